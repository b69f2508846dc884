//! All-to-all.

use std::ops::Range;

use crate::algorithm::{Algorithm, Group, Plan, Rounds};
use crate::{PairCounts, Pattern, Rank, Scope, Shape, Space, Step};

/// Direct: everybody sends every rank its block at once.
///
/// The choice in shared memory: everybody copies from everybody.
/// Cost: α + (n−1)/n·S·β for S bytes of one rank, as n−1 messages per rank where run pairwise.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Pairwise: in round t to the rank at distance t, from the one at that distance the other way.
///
/// The choice between nodes: nobody gets from several at once.
/// Cost: (n−1)·α + (n−1)/n·S·β.
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005, section 4.3.
pub static PAIRWISE: Plan = Plan::new("pairwise", pairwise, true);

/// Bruck: in round t each block whose way has a 2^t in it goes that far; the ranks it passes keep
/// it meanwhile. Blocks of one length only.
///
/// Worth its log₂(n) rounds, each of up to n/2 blocks for one rank, only where an executor puts the
/// blocks of a round into one message; one message for each block makes n/2·log₂(n) of them, and
/// the model of [`cost`](crate::cost) prices them so.
/// Cost: log₂(n)·(α + S/2·β) with joint messages.
///
/// Source: Bruck et al., "Efficient algorithms for all-to-all communications in multiport
/// message-passing systems", IEEE TPDS 8(11), 1997, section 3.
pub static BRUCK: Plan = Plan { name: "bruck", rounds: bruck, in_rank_order: true, supports: even };

pub(crate) static ALL: [&dyn Algorithm; 3] = [&PAIRWISE, &DIRECT, &BRUCK];

fn even(shape: &Shape) -> bool {
    matches!(shape.space, Space::Pairs(PairCounts::Uniform(_)))
}

fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let others = (0..shape.world()).filter(move |&other| other != rank);
    Box::new(std::iter::once_with(move || {
        others.fold(Step::new(Pattern::Direct(Scope::World)), |step, other| {
            step.send(other, shape.pair(rank, other)).store(other, shape.pair(other, rank))
        })
    }))
}

fn pairwise(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let (n, me) = (group.len(), group.me);
    let (topology, nodes) = (&shape.topology, shape.topology.node_count());
    let m = n / nodes;
    let is_even = (0..nodes).all(|node| topology.members_of(node).len() == m);
    // Where the nodes are alike, all members of one send to the members of one other.
    let at = move |node: usize, member: usize| node % nodes * m + member % m;
    Box::new((1..n).map(move |t| {
        let (to, from) = match is_even {
            true => {
                let (node, member) = (me / m, me % m);
                (at(node + t / m, member + t % m), at(node + nodes - t / m, member + m - t % m))
            }
            false => (me + t, me + n - t),
        };
        let (to, from) = (group.at(to), group.at(from));
        Step::default().send(to, shape.pair(rank, to)).store(from, shape.pair(from, rank))
    }))
}

fn bruck(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let group = Group::by_node(shape, rank);
    let (n, me) = (group.len(), group.me);
    let rounds = 0..n.next_power_of_two().trailing_zeros();
    Box::new(rounds.map(move |t| {
        let distance = 1 << t;
        // What the rank at `holder` sends: blocks that have gone the lower bits of their way.
        let leaving = |holder: usize| -> Vec<Range<usize>> {
            let ways = (1..n).filter(|way| way & distance != 0);
            let pair = |source: usize, way| shape.pair(group.at(source), group.at(source + way));
            ways.map(|way| pair(holder + n - way % distance, way)).collect()
        };
        let (to, from) = (group.at(me + distance), group.at(me + n - distance));
        Step::default().send_all(to, leaving(me)).store_all(from, leaving(me + n - distance))
    }))
}
