//! Several members of each node that speak for it.

use crate::{Rank, Topology};

/// As many lanes between the nodes as the smallest node has members: each node has a carrier for
/// each lane, so that a lane visits every node.
#[derive(Clone, Copy)]
pub(crate) struct Lanes<'a> {
    topology: &'a Topology,
    /// Its node's carriers begin with it.
    root: Option<Rank>,
    pub(crate) count: usize,
}

impl<'a> Lanes<'a> {
    pub(crate) fn new(topology: &'a Topology, root: Option<Rank>) -> Self {
        let sizes = (0..topology.node_count()).map(|node| topology.members_of(node).len());
        Self { topology, root, count: sizes.min().unwrap_or(0) }
    }

    pub(crate) fn carrier(&self, node: usize, lane: usize) -> Rank {
        let members = self.topology.members_of(node);
        members[(self.first(members) + lane) % members.len()]
    }

    /// The lane that `rank` carries, if it is a carrier.
    pub(crate) fn lane_of(&self, rank: Rank) -> Option<usize> {
        let members = self.topology.members_of(self.topology.node_of(rank) as usize);
        let place = members.binary_search(&rank).ok()?;
        let lane = (place + members.len() - self.first(members)) % members.len();
        Some(lane).filter(|&lane| lane < self.count)
    }

    /// The index of the carrier of lane 0.
    fn first(&self, members: &[Rank]) -> usize {
        self.root.and_then(|root| members.binary_search(&root).ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_has_a_carrier_for_each_lane_and_the_root_carries_the_first() {
        let topology = Topology::from_node_of(vec![0, 1, 0, 1, 1, 0, 0]);
        let lanes = Lanes::new(&topology, Some(5));
        assert_eq!(lanes.count, 3);
        assert_eq!([0, 1, 2].map(|lane| lanes.carrier(0, lane)), [5, 6, 0]);
        assert_eq!([0, 1, 2].map(|lane| lanes.carrier(1, lane)), [1, 3, 4]);
        let carried: Vec<_> = (0..7).map(|rank| lanes.lane_of(rank)).collect();
        assert_eq!(carried, [Some(2), Some(0), None, Some(1), Some(2), Some(0), Some(1)]);
    }
}
