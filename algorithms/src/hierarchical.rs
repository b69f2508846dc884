//! Hierarchical: within the nodes, across them, within them again.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

use crate::algorithm::{Algorithm, Group, Phase, Steps};
use crate::direct::{all_gather, reduce_scatter};
use crate::ring::ring;
use crate::tree::tree;
use crate::{Rank, Shape, Step, Topology, chunk};

/// Hierarchical with rings across the nodes: all members of a node share its link.
///
/// The choice for large messages on several nodes. Within a node of m ranks member i reduces slice
/// i of m, across N nodes the owners of the same elements run a ring, and the node gathers the
/// slices again.
/// Cost: within the node 2·α + 2(m−1)/m·S·β + (m−1)/m·S·γ; across 2(N−1)·α + 2(N−1)/N·S/m·β per
/// rank.
///
/// Nodes may have different numbers of ranks: every node divides the elements evenly among its own
/// members, and the rings run over the pieces that the cuts of all nodes make together, so that no
/// rank idles and every node sends the same bytes. A rank then has a few smaller messages per
/// round.
///
/// Source: Jia et al., "Highly scalable deep learning training system with mixed-precision", 2018,
/// section 4.2; Cho et al., "BlueConnect", MLSys 2019.
pub static HIERARCHICAL: Hierarchical = Hierarchical { name: "hierarchical", across: ring };

/// Hierarchical with binary trees across the nodes.
///
/// The choice for small and medium messages on many nodes.
/// Cost: as [`HIERARCHICAL`] within the node; across about 2·log₂(N)·α + 3·S/m·β per rank with
/// slices.
pub static HIERARCHICAL_TREE: Hierarchical =
    Hierarchical { name: "hierarchical-tree", across: tree };

/// Reduce-scatter in the node, an all-reduce across the nodes per piece, all-gather in the node.
#[derive(Debug)]
pub struct Hierarchical {
    name: &'static str,
    across: Phase,
}

impl Algorithm for Hierarchical {
    fn name(&self) -> &'static str {
        self.name
    }

    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a> {
        if shape.world() < 2 {
            return Box::new(std::iter::empty());
        }
        let node = shape.topology.node_of(rank) as usize;
        let members = shape.topology.members_of(node);
        let me = Group::new(Cow::Borrowed(members), rank).me;
        let slice_of = |i: usize| chunk(&shape.all(), members.len(), i);
        let count = shape.all().end;
        let across = pieces(&shape.topology, count, slice_of(me)).into_iter().map(|piece| {
            let owners = (0..shape.topology.node_count()).map(|other| match other == node {
                true => rank,
                false => owner(shape.topology.members_of(other), count, piece.start),
            });
            (self.across)(Group { members: owners.collect(), me: node }, piece)
        });
        let scatter = std::iter::once_with(move || reduce_scatter(members, me, slice_of));
        let gather = std::iter::once_with(move || all_gather(members, me, slice_of));
        Box::new(scatter.chain(side_by_side(across.collect())).chain(gather))
    }

    fn in_rank_order(&self) -> bool {
        false
    }
}

/// `slice` cut wherever some node begins a new slice; at least one piece, which may be empty.
fn pieces(topology: &Topology, count: usize, slice: Range<usize>) -> Vec<Range<usize>> {
    let sizes: BTreeSet<usize> =
        (0..topology.node_count()).map(|node| topology.members_of(node).len()).collect();
    let cuts = sizes
        .into_iter()
        .flat_map(|parts| (0..parts).map(move |i| chunk(&(0..count), parts, i).start));
    let inside = cuts.filter(|cut| slice.start < *cut && *cut < slice.end);
    let mut bounds: Vec<usize> = inside.chain([slice.start, slice.end]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    if bounds.len() < 2 {
        return Vec::from([slice]);
    }
    bounds.windows(2).map(|cuts| cuts[0]..cuts[1]).collect()
}

/// Which of a node's members owns `element`; any of them for the end of the range.
fn owner(members: &[Rank], count: usize, element: usize) -> Rank {
    let owns = |i: &usize| chunk(&(0..count), members.len(), *i).end > element;
    members[(0..members.len()).find(owns).unwrap_or(0)]
}

/// Runs phases with the same number of rounds in the same rounds.
fn side_by_side<'a>(mut phases: Vec<Steps<'a>>) -> impl Iterator<Item = Step> + Send + 'a {
    std::iter::from_fn(move || {
        let (first, rest) = phases.split_first_mut()?;
        let mut step = first.next()?;
        rest.iter_mut().filter_map(Iterator::next).for_each(|other| step.absorb(other));
        Some(step)
    })
}
