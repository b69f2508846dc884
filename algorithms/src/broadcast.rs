//! Broadcast.

use std::ops::Range;

use crate::algorithm::{Algorithm, Group, Plan, Rounds};
use crate::direct::{exchange, fan_out};
use crate::halves::{below, deal, spread};
use crate::lanes::Lanes;
use crate::tree::{Place, two_trees};
use crate::{Pattern, Rank, Scope, Shape, Step, chunk};

/// Direct: the root sends everything to everybody at once.
///
/// The choice in shared memory: everybody copies from the root.
/// Cost: α + (n−1)·S·β at the root, α + S·β in shared memory.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Binomial tree.
///
/// The choice for small messages.
/// Cost: log₂(n)·(α + S·β).
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005, section 4.2.
pub static TREE: Plan = Plan::new("tree", tree, true);

/// Chain: every rank hands on what it gets, slice after slice.
///
/// The choice for large messages on few ranks.
/// Cost with slices of s bytes: (n−2)·(α + s·β) + α + S·β.
///
/// Source: Chan et al., "Collective communication: theory, practice, and experience", Concurrency
/// and Computation 19(13), 2007, section 5 (pipelined algorithms).
pub static CHAIN: Plan = Plan::new("chain", chain, true);

/// Two binary trees below the root at once, half of the elements by each.
///
/// The choice for large messages on many ranks.
/// Cost with slices of s bytes: about 2·log₂(n)·(α + s·β) + S·β.
///
/// Source: Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction
/// and scan", Parallel Computing 35(12), 2009.
pub static DOUBLE_TREE: Plan = Plan::new("double-tree", double_tree, true);

/// Scatter by a binomial tree, then all-gather by a ring.
///
/// A choice for large messages where transfers can't be cut into many slices.
/// Cost: (log₂(n) + n−1)·α + less than 2(n−1)/n·S·β.
///
/// Source: van de Geijn's algorithm, Barnett et al., "Interprocessor collective communication
/// library (InterCom)", SHPCC 1994; Thakur et al. 2005, section 4.2.
pub static SCATTER_GATHER: Plan = Plan::new("scatter-gather", scatter_gather, true);

/// Hierarchical: by a binomial tree to one rank of each node, then directly to the others.
///
/// The choice for small and medium messages on several nodes.
/// Cost: across N nodes log₂(N)·(α + S·β), within them as [`DIRECT`].
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, true);

/// Hierarchical with chains across the nodes, a part of the elements in each.
///
/// The choice for large messages on several nodes. As many members as the smallest node has hand
/// on their part each.
/// Cost: across N nodes as [`CHAIN`]; within them one direct step, and another in the root's.
pub static HIERARCHICAL_CHAIN: Plan = Plan::new("hierarchical-chain", hierarchical_chain, true);

pub(crate) static ALL: [&dyn Algorithm; 7] =
    [&TREE, &CHAIN, &DOUBLE_TREE, &SCATTER_GATHER, &DIRECT, &HIERARCHICAL, &HIERARCHICAL_CHAIN];

pub(crate) fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    Box::new(std::iter::once_with(move || {
        fan_out(shape, Scope::World, root(shape), rank, |_| shape.all())
    }))
}

fn tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let root = group.position(root(shape));
    spread(group, root, shape.all())
}

pub(crate) fn chain(shape: &Shape, rank: Rank) -> Rounds<'_> {
    down_chain(from_root(shape, rank), shape.all())
}

pub(crate) fn double_tree(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = from_root(shape, rank);
    let height = (group.len() - 1).ilog2() as usize + 1;
    let [first, second] = two_trees(&group);
    let trees = [(first, chunk(&shape.all(), 2, 0)), (second, chunk(&shape.all(), 2, 1))];
    Box::new((height..2 * height).map(move |round| {
        let add =
            |step, (place, half): &(Place, Range<usize>)| place.step(step, round, height, half);
        trees.iter().fold(Step::default(), add)
    }))
}

fn scatter_gather(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let (n, me, root) = (group.len(), group.me, group.position(root(shape)));
    let part = move |i: usize| chunk(&shape.all(), n, i);
    let (next, previous) = (group.at(me + 1), group.at(me + n - 1));
    // What the scatter has left there on its way need not come again.
    let [held, held_by_next] = [me, (me + 1) % n].map(|member| below(n, root, member));
    let gather = (0..n - 1).map(move |t| {
        let (sent, stored) = ((me + n - t) % n, (me + n - 1 - t) % n);
        let step = Step::default();
        let step = if held_by_next.contains(&sent) { step } else { step.send(next, part(sent)) };
        if held.contains(&stored) { step } else { step.store(previous, part(stored)) }
    });
    Box::new(deal(group, root, move |i| vec![part(i)]).chain(gather))
}

pub(crate) fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let (heads, from) = heads(shape, rank);
    let head = heads.at(heads.me);
    let across = spread(heads, from, shape.all())
        .map(move |step| if rank == head { step } else { Step::default() });
    let within = move || fan_out(shape, Scope::Node, head, rank, |_| shape.all());
    Box::new(across.chain(std::iter::once_with(within)))
}

/// One rank of each node, the root among them, seen by the one of the node of `rank`; and the
/// root's position.
pub(crate) fn heads(shape: &Shape, rank: Rank) -> (Group<'_>, usize) {
    let (topology, root) = (&shape.topology, root(shape));
    let [from, me] = [root, rank].map(|rank| topology.node_of(rank) as usize);
    let first = |node| if node == from { root } else { topology.members_of(node)[0] };
    (Group { members: (0..topology.node_count()).map(first).collect(), me }, from)
}

pub(crate) fn hierarchical_chain(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let (topology, root) = (&shape.topology, root(shape));
    let nodes = topology.node_count();
    let [from, node] = [root, rank].map(|rank| topology.node_of(rank) as usize);
    let lanes = Lanes::new(topology, Some(root));
    let mine = lanes.lane_of(rank);
    let part = move |lane| chunk(&shape.all(), lanes.count, lane);
    let deal = move || {
        let step = Step::new(Pattern::Direct(Scope::Node));
        match mine {
            _ if rank == root => (1..lanes.count)
                .fold(step, |step, lane| step.send(lanes.carrier(from, lane), part(lane))),
            Some(lane) if node == from => step.store(root, part(lane)),
            _ => step,
        }
    };
    let lane = mine.unwrap_or(0);
    let carriers = (0..nodes).map(|i| lanes.carrier((from + i) % nodes, lane)).collect();
    let chain = Group { members: carriers, me: (node + nodes - from) % nodes };
    let across = down_chain(chain, part(lane))
        .map(move |step| if mine.is_some() { step } else { Step::default() });
    let carried = move |member| lanes.lane_of(member).map(part).into_iter().collect();
    let within = move || {
        let mut step = exchange(shape, Scope::Node, rank, carried);
        // Nothing need come to the root.
        step.outgoing.retain(|out| out.to != root);
        step.incoming.retain(|_| rank != root);
        step
    };
    let deal = (lanes.count > 1).then(deal).into_iter();
    Box::new(deal.chain(across).chain(std::iter::once_with(within)))
}

/// From the first member to the second, from the second to the third, and so on.
fn down_chain(group: Group<'_>, range: Range<usize>) -> Rounds<'_> {
    let (n, me) = (group.len(), group.me);
    Box::new((1..n).map(move |position| match position {
        _ if position == me => Step::default().store(group.at(me - 1), range.clone()),
        _ if position == me + 1 => Step::default().send(group.at(position), range.clone()),
        _ => Step::default(),
    }))
}

/// All ranks, the root first, then those of its node, then node after node.
fn from_root(shape: &Shape, rank: Rank) -> Group<'_> {
    let (topology, root) = (&shape.topology, root(shape));
    let node = topology.node_of(root) as usize;
    let nodes = (0..topology.node_count()).map(|i| (node + i) % topology.node_count());
    let others = nodes.flat_map(|node| topology.members_of(node)).filter(|&&other| other != root);
    Group::new(std::iter::once(&root).chain(others).copied().collect(), rank)
}

/// The root of a shape that has one.
pub(crate) fn root(shape: &Shape) -> Rank {
    shape.collective.root().unwrap_or_else(|| panic!("{:?} has no root", shape.collective))
}
