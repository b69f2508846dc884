//! Gather: the scatter backwards.

use crate::algorithm::{Algorithm, Plan, Rounds};
use crate::mirror::mirror;
use crate::{OnArrival, Rank, Shape, scatter};

/// Direct: everybody sends its block to the root at once.
///
/// The choice in shared memory and for large blocks.
/// Cost: α + (n−1)/n·S·β for S bytes in all, as n−1 messages of the root where run pairwise.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Binomial tree: each rank collects the blocks of those below it and hands them on.
///
/// The choice for small blocks on many ranks.
/// Cost: log₂(n)·α + (n−1)/n·S·β; a message joins the blocks that lie side by side.
///
/// Source: as [`scatter::TREE`].
pub static TREE: Plan = Plan::new("tree", tree, true);

/// Hierarchical: directly to one rank of each node, then by a binomial tree to the root.
///
/// The choice for small blocks on several nodes.
/// Cost: within the nodes one direct step; across N of them log₂(N)·α + (N−1)/N·S·β.
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, true);

pub(crate) static ALL: [&dyn Algorithm; 3] = [&TREE, &DIRECT, &HIERARCHICAL];

fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(scatter::direct(shape, rank), OnArrival::Store)
}

fn tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(scatter::tree(shape, rank), OnArrival::Store)
}

fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(scatter::hierarchical(shape, rank), OnArrival::Store)
}
