//! Reduce: the broadcast backwards.

use std::ops::Range;

use crate::algorithm::{Algorithm, Group, Plan, Rounds};
use crate::broadcast::root;
use crate::direct::{exchange, fan_out};
use crate::halves::spread;
use crate::mirror::mirror;
use crate::{OnArrival, Rank, Scope, Shape, all_gather, broadcast, chunk};

/// Direct: the root reduces from everybody at once, in rank order.
///
/// The choice for small messages in shared memory.
/// Cost: α + (n−1)·S·β + (n−1)·S·γ at the root.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Binomial tree in rank order.
///
/// The choice for small messages.
/// Cost: log₂(n)·(α + S·β + S·γ).
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005, section 4.4.
pub static TREE: Plan = Plan::new("tree", tree, true);

/// Chain: every rank folds its own into what it gets and hands it on, slice after slice.
///
/// The choice for large messages on few ranks.
/// Cost with slices of s bytes: (n−2)·(α + s·(β+γ)) + α + S·max(β, γ).
pub static CHAIN: Plan = Plan::new("chain", chain, false);

/// Two binary trees below the root at once, half of the elements by each.
///
/// The choice for large messages on many ranks.
/// Cost with slices of s bytes: about 2·log₂(n)·(α + s·β) + S·β + S·γ.
///
/// Source: as [`broadcast::DOUBLE_TREE`].
pub static DOUBLE_TREE: Plan = Plan::new("double-tree", double_tree, false);

/// Direct reduce-scatter in rank order, then the root gathers.
///
/// The choice for large messages in shared memory: all ranks fold at once.
/// Cost: 2·α + 2(n−1)/n·S·β + (n−1)/n·S·γ.
pub static SCATTER_GATHER: Plan = Plan::new("scatter-gather", scatter_gather, true);

/// Reduce-scatter by a ring, then the root gathers.
///
/// A choice for large messages where transfers can't be cut into many slices.
/// Cost: n·α + 2(n−1)/n·S·β + (n−1)/n·S·γ.
///
/// Source: Rabenseifner's algorithm, Thakur et al. 2005, section 4.4, with a ring.
pub static RING: Plan = Plan::new("ring", ring, false);

/// Hierarchical: directly within the nodes, then by a binomial tree across them.
///
/// The choice for small and medium messages on several nodes.
/// Cost: within the nodes as [`DIRECT`], across N of them log₂(N)·(α + S·β + S·γ).
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, false);

/// Hierarchical with chains across the nodes.
///
/// The choice for large messages on several nodes: all members of a node fold a part of the
/// elements and hand it on.
/// Cost: within the nodes as [`SCATTER_GATHER`], across them as [`CHAIN`].
pub static HIERARCHICAL_CHAIN: Plan = Plan::new("hierarchical-chain", hierarchical_chain, false);

pub(crate) static ALL: [&dyn Algorithm; 8] = [
    &TREE,
    &CHAIN,
    &DOUBLE_TREE,
    &RING,
    &DIRECT,
    &SCATTER_GATHER,
    &HIERARCHICAL,
    &HIERARCHICAL_CHAIN,
];

fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(broadcast::direct(shape, rank), OnArrival::Reduce)
}

fn tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let down = spread(Group::ascending(shape, rank), root(shape), shape.all());
    mirror(down, OnArrival::Reduce)
}

fn chain(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(broadcast::chain(shape, rank), OnArrival::Reduce)
}

fn double_tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(broadcast::double_tree(shape, rank), OnArrival::Reduce)
}

fn scatter_gather(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let part = |rank| chunk(&shape.all(), shape.world(), rank);
    let gather = move || exchange(shape, Scope::World, rank, |rank| vec![part(rank)]);
    let reduce_scatter = mirror(Box::new(std::iter::once_with(gather)), OnArrival::Reduce);
    Box::new(reduce_scatter.chain(to_root(shape, rank, part)))
}

fn ring(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let n = group.len();
    let part = move |i| chunk(&shape.all(), n, i);
    let places = group.clone();
    let around = all_gather::around(group, Box::new(move |i| vec![part(i)]));
    let reduce_scatter = mirror(around, OnArrival::Reduce);
    Box::new(reduce_scatter.chain(to_root(shape, rank, move |rank| part(places.position(rank)))))
}

fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(broadcast::hierarchical(shape, rank), OnArrival::Reduce)
}

fn hierarchical_chain(shape: &Shape, rank: Rank) -> Rounds<'_> {
    mirror(broadcast::hierarchical_chain(shape, rank), OnArrival::Reduce)
}

/// The root gets every rank's part directly.
fn to_root<'a>(
    shape: &'a Shape,
    rank: Rank,
    part_of: impl Fn(Rank) -> Range<usize> + Send + 'a,
) -> Rounds<'a> {
    let down = move || fan_out(shape, Scope::World, root(shape), rank, &part_of);
    mirror(Box::new(std::iter::once_with(down)), OnArrival::Store)
}
