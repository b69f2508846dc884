//! Reduce-scatter: the all-gather backwards.

use crate::algorithm::{Algorithm, Plan, Rounds};
use crate::mirror::mirror;
use crate::{OnArrival, Rank, Shape, all_gather};

/// Direct: everybody reduces its block from everybody at once, in rank order.
///
/// The choice in shared memory: one pass over the values of all ranks.
/// Cost: α + (n−1)/n·S·β + (n−1)/n·S·γ for S bytes on each rank, as n−1 messages per rank where run
/// pairwise.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Ring: the partial results of every block go once around.
///
/// The choice for large blocks: each rank speaks only to its neighbours.
/// Cost: (n−1)·α + (n−1)/n·S·β + (n−1)/n·S·γ.
///
/// Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
/// workstations", JPDC 69(2), 2009.
pub static RING: Plan = Plan::new("ring", ring, false);

/// Halving: in each round half of what is left goes to one rank.
///
/// The choice for small and medium blocks between nodes. For any number of ranks.
/// Cost: log₂(n)·α + (n−1)/n·S·β + (n−1)/n·S·γ.
///
/// Source: Träff, "(Poly)logarithmic time, optimal volume reduce-scatter on circulant graphs",
/// arXiv 2410.14234, 2024: Bruck's all-gather backwards.
pub static HALVING: Plan = Plan::new("halving", halving, false);

/// Hierarchical: within the nodes, across them by rings, within them again.
///
/// The choice for large blocks on several nodes.
/// Cost: as [`all_gather::HIERARCHICAL`], and (n−1)/n·S·γ.
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, false);

/// Hierarchical with halving across the nodes.
///
/// The choice for small blocks on many nodes.
/// Cost: as [`HIERARCHICAL`], with log₂(N)·α across.
pub static HIERARCHICAL_HALVING: Plan =
    Plan::new("hierarchical-halving", hierarchical_halving, false);

pub(crate) static ALL: [&dyn Algorithm; 5] =
    [&RING, &HALVING, &DIRECT, &HIERARCHICAL, &HIERARCHICAL_HALVING];

fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(all_gather::direct(shape, rank), OnArrival::Reduce)
}

fn ring(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(all_gather::ring(shape, rank), OnArrival::Reduce)
}

fn halving(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(all_gather::doubling(shape, rank), OnArrival::Reduce)
}

fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(all_gather::hierarchical(shape, rank), OnArrival::Reduce)
}

fn hierarchical_halving(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(all_gather::hierarchical_doubling(shape, rank), OnArrival::Reduce)
}
