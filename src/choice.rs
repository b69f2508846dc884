//! Which algorithm a call takes: by the measured links and the cost model, or as the user fixed.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use unisum_algorithms::{
    Algorithm, Collective, CostModel, PairCounts, Shape, Space, Topology, algorithms, cost,
};

use crate::programs::Key;
use crate::{Error, ErrorKind};

/// The choice of one communicator, the same on all its ranks: it follows from the topology and
/// from figures that rank 0 measured and told all others.
#[derive(Debug)]
pub(crate) struct Choice {
    topology: Topology,
    model: CostModel,
    /// The figures of the shared memory that spans the whole world, if one does.
    node: Option<NodeCost>,
    /// An index into the names of all algorithms, or [`AUTO`].
    fixed: AtomicUsize,
    /// By kind and size class; filled when first asked for.
    chosen: [[OnceLock<usize>; CLASSES]; KINDS],
}

/// What collectives of group steps cost in a node's shared memory, as measured there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NodeCost {
    pub(crate) one_shot: Line,
    pub(crate) two_shot: Line,
    /// Largest deposit.
    pub(crate) slot_bytes: usize,
}

/// A time that grows with the size in a straight line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) start_s: f64,
    pub(crate) s_per_byte: f64,
}

impl Line {
    /// The line through two measured points, (bytes, seconds), the smaller first.
    pub(crate) fn through((few, few_s): (usize, f64), (more, more_s): (usize, f64)) -> Self {
        let s_per_byte = ((more_s - few_s) / (more - few) as f64).max(1e-15);
        Self { start_s: (few_s - few as f64 * s_per_byte).max(1e-9), s_per_byte }
    }

    /// The same, but starting no earlier.
    pub(crate) fn starting_from(self, start_s: f64) -> Self {
        Self { start_s: self.start_s.max(start_s), ..self }
    }

    fn at(&self, bytes: usize) -> f64 {
        self.start_s + bytes as f64 * self.s_per_byte
    }
}

/// The number that stands for no fixed algorithm.
pub(crate) const AUTO: usize = usize::MAX;
/// Size classes are powers of two of bytes.
const CLASSES: usize = 48;
/// Kinds of collectives that have algorithms of their own.
const KINDS: usize = 8;

/// The number of the algorithm called `name` among all names.
pub(crate) fn index_of(name: &str) -> Result<usize, Error> {
    let names = crate::algorithms();
    names.iter().position(|known| *known == name).ok_or_else(|| {
        let text = format!("no algorithm is called {name:?}; there are {}", names.join(", "));
        Error::new(ErrorKind::Configuration, text)
    })
}

impl Choice {
    pub(crate) fn new(
        topology: Topology,
        model: CostModel,
        node: Option<NodeCost>,
        fixed: Option<usize>,
    ) -> Self {
        let fixed = AtomicUsize::new(fixed.unwrap_or(AUTO));
        let chosen = [const { [const { OnceLock::new() }; CLASSES] }; KINDS];
        Self { topology, model, node, fixed, chosen }
    }

    /// The choice of a group of these ranks: by the same figures, with `shares_memory` if all of
    /// the group's ranks share memory.
    pub(crate) fn for_group(&self, topology: Topology, shares_memory: bool) -> Self {
        let node = self.node.filter(|_| shares_memory);
        let fixed = Some(self.fixed()).filter(|&fixed| fixed != AUTO);
        Self::new(topology, self.model, node, fixed)
    }

    pub(crate) const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Fixes the algorithm, or leaves it to the model again. Collectives that have none of that
    /// name are left to the model.
    pub(crate) fn fix(&self, index: Option<usize>) {
        // Relaxed: the caller orders it with its own collectives; nothing else hangs on it.
        self.fixed.store(index.unwrap_or(AUTO), Ordering::Relaxed);
    }

    /// What is fixed, or [`AUTO`].
    pub(crate) fn fixed(&self) -> usize {
        // Relaxed: see `fix`.
        self.fixed.load(Ordering::Relaxed)
    }

    /// The number of the algorithm for a call, among those of its collective.
    pub(crate) fn algorithm(&self, shape: &Shape, key: &Key) -> usize {
        let list = algorithms(shape.collective);
        let fits = |index: &usize| {
            list[*index].supports(shape) && (!key.ordered || list[*index].in_rank_order())
        };
        let named = crate::algorithms().get(self.fixed()).copied();
        let fixed = list.iter().position(|algorithm| Some(algorithm.name()) == named);
        if let Some(fixed) = fixed.filter(fits) {
            return fixed;
        }
        let class = match shape.space {
            // Each rank knows lengths of its own: the choice must not hang on them.
            Space::Pairs(PairCounts::Own { .. }) => typical_class(shape.world()),
            _ => class(shape.elements().saturating_mul(key.element_bytes)),
        };
        let chosen = self.for_class(shape.collective, class);
        if fits(&chosen) {
            return chosen;
        }
        (0..list.len())
            .filter(fits)
            .min_by(|a, b| self.by_time(shape.collective, class, *a, *b))
            .expect("some algorithm folds any shape in rank order")
    }

    /// What the model says an all-reduce of so many bytes takes.
    pub(crate) fn all_reduce_seconds(&self, bytes: usize) -> f64 {
        let index = self.for_class(Collective::AllReduce, class(bytes));
        self.seconds(Collective::AllReduce, index, bytes)
    }

    fn for_class(&self, collective: Collective, class: usize) -> usize {
        *self.chosen[kind(collective)][class].get_or_init(|| {
            let indices = 0..algorithms(collective).len();
            indices.min_by(|a, b| self.by_time(collective, class, *a, *b)).unwrap_or(0)
        })
    }

    fn by_time(
        &self,
        collective: Collective,
        class: usize,
        a: usize,
        b: usize,
    ) -> std::cmp::Ordering {
        let seconds = |index| self.seconds(collective, index, typical_bytes(class));
        seconds(a).total_cmp(&seconds(b))
    }

    /// The modelled time; infinite for a plan that can't be costed. Where all ranks share memory
    /// only group steps count: nothing else moves as few bytes and wakes as few ranks.
    fn seconds(&self, collective: Collective, index: usize, bytes: usize) -> f64 {
        let algorithm = algorithms(collective)[index];
        if let Some(node) = &self.node {
            return node.seconds(collective, algorithm, bytes).unwrap_or(f64::INFINITY);
        }
        let count = (bytes / self.model.bytes_per_element).max(1);
        let shape = typical_shape(self.topology.clone(), collective, count);
        match algorithm.supports(&shape) {
            true => cost(algorithm, &shape, &self.model).unwrap_or(f64::INFINITY),
            false => f64::INFINITY,
        }
    }
}

/// A shape of `count` elements in all.
fn typical_shape(topology: Topology, collective: Collective, count: usize) -> Shape {
    use Collective::{AllReduce, Broadcast, Reduce};
    match collective {
        AllReduce | Broadcast { .. } | Reduce { .. } => Shape::whole(topology, collective, count),
        _ => {
            let each = count.div_ceil(topology.world());
            Shape::even(topology, collective, each)
        }
    }
}

const fn kind(collective: Collective) -> usize {
    match collective {
        Collective::AllReduce => 0,
        Collective::Reduce { .. } => 1,
        Collective::Broadcast { .. } => 2,
        Collective::AllGather => 3,
        Collective::ReduceScatter => 4,
        Collective::AllToAll => 5,
        Collective::Gather { .. } => 6,
        Collective::Scatter { .. } => 7,
    }
}

impl NodeCost {
    /// The time of the algorithms that run as group steps when the node is the world.
    fn seconds(
        &self,
        collective: Collective,
        algorithm: &dyn Algorithm,
        bytes: usize,
    ) -> Option<f64> {
        match (collective, algorithm.name()) {
            (Collective::AllReduce, "one-shot") if bytes <= self.slot_bytes => {
                Some(self.one_shot.at(bytes))
            }
            (Collective::AllReduce, "two-shot") => Some(self.two_shot.at(bytes)),
            (Collective::AllReduce, _) => None,
            // Each byte is copied or folded once, by the rank that wants it.
            (_, "direct") => Some(self.two_shot.at(bytes)),
            _ => None,
        }
    }
}

/// The class of a size: sizes up to 2^class, above 2^(class-1).
const fn class(bytes: usize) -> usize {
    let class = usize::BITS - bytes.saturating_sub(1).leading_zeros();
    if class as usize >= CLASSES { CLASSES - 1 } else { class as usize }
}

/// The class of an all-to-all whose blocks may be of any length: as if they were of 4 KiB.
const fn typical_class(world: usize) -> usize {
    class(world.saturating_mul(4 << 10))
}

const fn typical_bytes(class: usize) -> usize {
    1 << class
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "algorithms of an all-reduce (chosen by modelled time, float32):")?;
        let collective = Collective::AllReduce;
        let mut from = 0;
        for class in 3..=30 {
            let index = self.for_class(collective, class);
            if class == 30 || self.for_class(collective, class + 1) != index {
                let name = algorithms(collective)[index].name();
                let to = typical_bytes(class);
                let micros = self.seconds(collective, index, to) * 1e6;
                writeln!(f, "  above {from:>10} up to {to:>10} B: {name} ({micros:.1} us there)")?;
                from = to;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_end_at_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 5, 8, 9, 1 << 20].map(class), [0, 0, 1, 2, 2, 3, 3, 4, 20]);
        assert_eq!(class(usize::MAX), CLASSES - 1);
    }

    #[test]
    fn unknown_algorithms_are_refused_with_the_known_ones() {
        let error = index_of("rign").unwrap_err();
        assert!(error.to_string().contains("\"rign\"") && error.to_string().contains("ring"));
    }

    #[test]
    fn shared_memory_takes_one_shot_for_small_and_two_shot_for_large_calls() {
        let one_shot = Line::through((8, 5e-6), (8 << 10, 8e-6));
        let two_shot = Line::through((4 << 10, 10e-6), (256 << 10, 30e-6));
        let node = NodeCost { one_shot, two_shot, slot_bytes: 16 << 10 };
        let choice = Choice::new(Topology::flat(8), CostModel::default(), Some(node), None);
        let name = |count| {
            let shape = Shape::flat(8, count);
            let key = Key::all_reduce(count, 4);
            algorithms(Collective::AllReduce)[choice.algorithm(&shape, &key)].name()
        };
        assert_eq!(name(2), "one-shot");
        assert_eq!(name(1 << 20), "two-shot");
        choice.fix(Some(index_of("ring").unwrap()));
        assert_eq!(name(2), "ring");
    }
}
