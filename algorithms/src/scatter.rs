//! Scatter.

use crate::algorithm::{Algorithm, Group, Plan, Rounds};
use crate::broadcast::{heads, root};
use crate::direct::fan_out;
use crate::halves::deal;
use crate::{Rank, Scope, Shape, Step};

/// Direct: the root sends every rank its block at once.
///
/// The choice in shared memory and for large blocks.
/// Cost: α + (n−1)/n·S·β for S bytes in all, as n−1 messages of the root where run pairwise.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Binomial tree: half of the blocks go to one rank, which deals them out, and so on.
///
/// The choice for small blocks on many ranks.
/// Cost: log₂(n)·α + (n−1)/n·S·β; a message joins the blocks that lie side by side.
///
/// Source: Chan et al., "Collective communication: theory, practice, and experience", Concurrency
/// and Computation 19(13), 2007, section 4.
pub static TREE: Plan = Plan::new("tree", tree, true);

/// Hierarchical: by a binomial tree to one rank of each node, then directly to the others.
///
/// The choice for small blocks on several nodes.
/// Cost: across N nodes log₂(N)·α + (N−1)/N·S·β; within them one direct step.
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, true);

pub(crate) static ALL: [&dyn Algorithm; 3] = [&TREE, &DIRECT, &HIERARCHICAL];

pub(crate) fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let block_of = |rank| shape.block(rank);
    let step = move || fan_out(shape, Scope::World, root(shape), rank, block_of);
    Box::new(std::iter::once_with(step))
}

pub(crate) fn tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let root = group.position(root(shape));
    let order = shape.topology.by_node();
    deal(group, root, |i| vec![shape.block(order[i])])
}

pub(crate) fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let topology = &shape.topology;
    let (heads, from) = heads(shape, rank);
    let head = heads.at(heads.me);
    let of_node = |node| topology.members_of(node).iter().map(|&member| shape.block(member));
    let across = deal(heads, from, move |node| of_node(node).collect())
        .map(move |step| if rank == head { step } else { Step::default() });
    let within = move || fan_out(shape, Scope::Node, head, rank, |member| shape.block(member));
    Box::new(across.chain(std::iter::once_with(within)))
}
