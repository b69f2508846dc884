//! Which links are measured, and what follows from the measurements.
//!
//! One pair within a node, that of rank 0, and one of each two neighbouring nodes: as many pairs as
//! a ring over the nodes crosses, in two rounds regardless of their number. The pairs of a round
//! measure concurrently and have no rank in common.

use unisum_algorithms::{LinkCost, Topology};
use unisum_link::Rank;

/// What a rank measured with a later one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    pub(super) pair: [Rank; 2],
    pub(super) cost: LinkCost,
}

/// The links between nodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Across {
    /// The median, or the faster of the two in the middle.
    pub(super) median: Measured,
    /// The link at the fastest third: a slow host among four has two slow links of three.
    pub(super) fast: Measured,
    pub(super) slowest: Measured,
    pub(super) links: usize,
}

/// The size by which links are compared: as much as a training's buckets are cut into.
const TYPICAL_BYTES: f64 = (1 << 20) as f64;
/// A link that is this many times slower than the fast ones is reported.
const SLOW: f64 = 2.0;

/// The pairs of each round, the lower rank first; the same on all ranks. `core` is the core that a
/// rank told.
pub(super) fn rounds<C: PartialEq>(
    topology: &Topology,
    core: impl Fn(Rank) -> C,
) -> [Vec<[Rank; 2]>; 3] {
    // What two ranks of a core take is mostly the switches between them.
    let others = &topology.members(0)[1..];
    let elsewhere = others.iter().find(|&&peer| core(peer) != core(0));
    let inside = elsewhere.or_else(|| others.first()).map(|&peer| [0, peer]);
    let leaders: Vec<Rank> =
        (0..topology.node_count()).map(|node| topology.members(node as u32)[0]).collect();
    // Nodes are numbered by their first ranks, so leaders ascend.
    let from = |first: usize| {
        let leaders = leaders.get(first..).unwrap_or_default();
        leaders.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect()
    };
    [inside.into_iter().collect(), from(0), from(1)]
}

/// The rank's partner in a round.
pub(super) fn partner(round: &[[Rank; 2]], rank: Rank) -> Option<Rank> {
    round.iter().find_map(|&[first, second]| match rank {
        _ if rank == first => Some(second),
        _ if rank == second => Some(first),
        _ => None,
    })
}

impl Measured {
    pub(super) fn is_inside(&self, topology: &Topology) -> bool {
        let [first, second] = self.pair;
        topology.node_of(first) == topology.node_of(second)
    }

    fn typical_s(&self) -> f64 {
        self.cost.alpha_s + TYPICAL_BYTES * self.cost.beta_s_per_byte
    }
}

impl Across {
    /// Summarizes all measured links between nodes, if there are any.
    pub(super) fn of(mut links: Vec<Measured>) -> Option<Self> {
        links.sort_by(|a, b| a.typical_s().total_cmp(&b.typical_s()));
        let slowest = *links.last()?;
        let last = links.len() - 1;
        Some(Self { median: links[last / 2], fast: links[last / 3], slowest, links: last + 1 })
    }

    /// How many times slower the slowest link is than the fast ones, if that must be reported.
    pub(super) fn outlier(&self) -> Option<f64> {
        Some(self.slowest.typical_s() / self.fast.typical_s()).filter(|&times| times > SLOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_inside_and_each_two_nodes_that_follow_each_other_are_measured() {
        let on_cores = |nodes: &[usize], cores: &'static [u32]| {
            rounds(&Topology::nodes(nodes), |rank| cores[rank])
        };
        let none: Vec<[Rank; 2]> = Vec::new();
        assert_eq!(on_cores(&[3], &[5, 5, 6]), [vec![[0, 2]], none.clone(), none.clone()]);
        assert_eq!(on_cores(&[3], &[5, 5, 5])[0], [[0, 1]], "all on one core");
        let uneven = on_cores(&[1, 2, 1, 1], &[5; 5]);
        assert_eq!(uneven, [none.clone(), vec![[0, 1], [3, 4]], vec![[1, 3]]]);
        assert_eq!(on_cores(&[1], &[5]), [none.clone(), none.clone(), none]);
        // Ranks placed in turn.
        let in_turn = rounds(&Topology::from_node_of(vec![0, 1, 2, 0, 1, 2]), |rank| rank);
        assert_eq!(in_turn, [vec![[0, 3]], vec![[0, 1]], vec![[1, 2]]]);
        assert_eq!([0, 1, 3].map(|rank| partner(&in_turn[1], rank)), [Some(1), Some(0), None]);
    }

    #[test]
    fn the_median_link_stands_for_all_and_a_slow_one_is_found() {
        let link =
            |pair: [Rank; 2], rate: f64| Measured { pair, cost: LinkCost::new(1e-5, 1.0 / rate) };
        let even = vec![link([0, 8], 9e9), link([8, 16], 11e9), link([16, 24], 10e9)];
        let across = Across::of(even.clone()).unwrap();
        assert_eq!((across.median.pair, across.outlier(), across.links), ([16, 24], None, 3));
        let across = Across::of([even, vec![link([24, 32], 1e9)]].concat()).unwrap();
        assert_eq!((across.median.pair, across.slowest.pair), ([16, 24], [24, 32]));
        assert!(across.outlier().is_some_and(|times| (9.0..10.0).contains(&times)));
        let slow_host = vec![link([0, 8], 1e10), link([8, 16], 1e9), link([16, 24], 1e9)];
        assert!(Across::of(slow_host).unwrap().outlier().is_some());
        assert_eq!(Across::of(Vec::new()), None);
    }
}
