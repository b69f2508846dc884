//! Where the ranks live.

use std::collections::HashMap;
use std::sync::Arc;

use crate::Rank;

/// Which node each rank lives on. Any placement: block, round robin, uneven. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    node_of: Arc<[u32]>,
    /// All ranks, those of node 0 first, ascending within a node; follows from `node_of`.
    by_node: Arc<[Rank]>,
    /// Where each node's ranks begin in `by_node`, and `world` at the end.
    starts: Arc<[usize]>,
}

impl Topology {
    /// All of `world` ranks on one node.
    pub fn flat(world: usize) -> Self {
        Self::from_node_of(vec![0; world])
    }

    /// Block placement: the first `sizes[0]` ranks on node 0, the next `sizes[1]` on node 1, and so
    /// on.
    pub fn nodes(sizes: &[usize]) -> Self {
        let blocks = sizes.iter().zip(0u32..);
        Self::from_node_of(
            blocks.flat_map(|(&size, node)| std::iter::repeat_n(node, size)).collect::<Vec<_>>(),
        )
    }

    /// One node identifier per rank; they are renumbered from 0 in order of first appearance.
    pub fn from_node_of(node_of: impl Into<Arc<[u32]>>) -> Self {
        let given: Arc<[u32]> = node_of.into();
        let mut numbers = HashMap::new();
        let node_of: Arc<[u32]> = given
            .iter()
            .map(|id| {
                let next = numbers.len() as u32; // below the world, which is one u32 per rank
                *numbers.entry(*id).or_insert(next)
            })
            .collect();
        let mut by_node: Vec<Rank> = (0..node_of.len()).collect();
        by_node.sort_by_key(|&rank| node_of[rank]); // stable: ascending within a node
        let starts = (0..=numbers.len() as u32)
            .map(|node| by_node.partition_point(|&rank| node_of[rank] < node))
            .collect();
        Self { node_of, by_node: by_node.into(), starts }
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.node_of.len()
    }

    /// The node of `rank`, in `0..node_count()`.
    ///
    /// # Panics
    /// If `rank` is not below the world.
    pub fn node_of(&self, rank: Rank) -> u32 {
        self.node_of[rank]
    }

    /// The number of nodes that have a rank.
    pub fn node_count(&self) -> usize {
        self.starts.len() - 1
    }

    /// The ranks of `node`, ascending.
    ///
    /// # Panics
    /// If `node` is not below `node_count()`.
    pub fn members(&self, node: u32) -> Vec<Rank> {
        self.members_of(node as usize).to_vec()
    }

    /// All ranks, node after node, ascending within a node: neighbours here are near each other.
    pub fn by_node(&self) -> &[Rank] {
        &self.by_node
    }

    pub(crate) fn members_of(&self, node: usize) -> &[Rank] {
        &self.by_node[self.starts[node]..self.starts[node + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_node_ids_are_numbered_by_first_appearance() {
        let topology = Topology::from_node_of(vec![9, 4, 9, 4, 7]);
        assert_eq!((0..5).map(|r| topology.node_of(r)).collect::<Vec<_>>(), [0, 1, 0, 1, 2]);
        assert_eq!(topology.node_count(), 3);
        assert_eq!(topology.members(1), [1, 3]);
        assert_eq!(topology.by_node(), [0, 2, 1, 3, 4]);
    }

    #[test]
    fn a_node_without_ranks_is_not_a_node() {
        assert_eq!(Topology::nodes(&[2, 0, 1]), Topology::nodes(&[2, 1]));
        assert_eq!(Topology::flat(0).node_count(), 0);
    }
}
