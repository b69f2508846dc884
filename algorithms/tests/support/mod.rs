//! Shapes of all collectives, and their modelled times.

#![allow(dead_code, reason = "not every test uses all of it")]

use unisum_algorithms::PlanKind::{
    self, AllGather, AllReduce, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
};
use unisum_algorithms::{CostModel, Shape, Topology, by_name, cost};

/// Every collective, with this root where it has one.
pub(crate) fn collectives(root: usize) -> [PlanKind; 8] {
    [
        AllReduce,
        Reduce { root },
        Broadcast { root },
        AllGather,
        ReduceScatter,
        AllToAll,
        Gather { root },
        Scatter { root },
    ]
}

/// Every collective of a world, with every root.
pub(crate) fn with_every_root(world: usize) -> impl Iterator<Item = PlanKind> {
    let first = move |root| root == 0;
    (0..world).flat_map(move |root| {
        collectives(root).into_iter().filter(move |kind| first(root) || kind.root().is_some())
    })
}

/// A shape with `count` elements in all, or in each block.
pub(crate) fn even(topology: &Topology, collective: PlanKind, count: usize) -> Shape {
    match collective {
        AllReduce | Reduce { .. } | Broadcast { .. } => {
            Shape::whole(topology.clone(), collective, count)
        }
        _ => Shape::even(topology.clone(), collective, count),
    }
}

/// The modelled time of the algorithm with this name, in seconds.
pub(crate) fn seconds(name: &str, shape: &Shape, model: &CostModel) -> f64 {
    let algorithm = by_name(shape.collective, name).expect("a known name");
    cost(algorithm, shape, model).expect("a right plan")
}
