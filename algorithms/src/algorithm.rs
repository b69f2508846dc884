//! What an algorithm is, and the lists of them.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

use crate::{
    DOUBLE_TREE, HALVING_DOUBLING, HIERARCHICAL, HIERARCHICAL_TREE, K_TREE, ONE_SHOT, PlanKind,
    RECURSIVE_DOUBLING, RING, Rank, Shape, Step, TREE, TWO_SHOT, all_gather, all_to_all, broadcast,
    gather, reduce, reduce_scatter, scatter,
};

/// The steps of one rank, generated lazily.
pub type Steps<'a> = Box<dyn Iterator<Item = Step> + Send + 'a>;

/// A plan for every rank, for shapes of one collective, that leaves each rank with what it wants.
/// Ranks that want the same elements get the same bits.
pub trait Algorithm: Send + Sync + Debug {
    /// The name that selects it among the algorithms of its collective.
    fn name(&self) -> &'static str;

    /// The steps of `rank`, one per round.
    ///
    /// Rounds are global: both ends of a transfer are in the same round, every rank yields the same
    /// number of rounds, and a rank without work in a round yields an empty step. A world of one
    /// yields none.
    ///
    /// # Panics
    /// If `rank` is not below the world, or the shape is of another collective or not supported.
    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a>;

    /// Whether there is a plan for this shape of the algorithm's collective.
    fn supports(&self, _shape: &Shape) -> bool {
        true
    }

    /// Whether every element is folded in rank order, so that the operation need not commute (it
    /// must still be associative). [`prove_rank_order`](crate::prove_rank_order) proves it. True
    /// for plans that reduce nothing.
    fn in_rank_order(&self) -> bool;
}

/// All algorithms of the all-reduce.
pub fn all() -> &'static [&'static dyn Algorithm] {
    algorithms(PlanKind::AllReduce)
}

/// The algorithms of a collective, whatever its root.
pub fn algorithms(collective: PlanKind) -> &'static [&'static dyn Algorithm] {
    match collective {
        PlanKind::AllReduce => &ALL_REDUCE,
        PlanKind::Reduce { .. } => &reduce::ALL,
        PlanKind::Broadcast { .. } => &broadcast::ALL,
        PlanKind::AllGather => &all_gather::ALL,
        PlanKind::ReduceScatter => &reduce_scatter::ALL,
        PlanKind::AllToAll => &all_to_all::ALL,
        PlanKind::Gather { .. } => &gather::ALL,
        PlanKind::Scatter { .. } => &scatter::ALL,
    }
}

/// The algorithm of a collective with this name.
pub fn by_name(collective: PlanKind, name: &str) -> Option<&'static dyn Algorithm> {
    algorithms(collective).iter().copied().find(|algorithm| algorithm.name() == name)
}

/// Steps that can be iterated from either end.
pub(crate) type Rounds<'a> = Box<dyn DoubleEndedIterator<Item = Step> + Send + 'a>;

/// An algorithm of a collective other than the all-reduce: a function of the shape and the rank.
#[derive(Debug)]
pub struct Plan {
    pub(crate) name: &'static str,
    /// Called for worlds of two ranks or more.
    pub(crate) rounds: for<'a> fn(&'a Shape, Rank) -> Rounds<'a>,
    pub(crate) in_rank_order: bool,
    pub(crate) supports: fn(&Shape) -> bool,
}

impl Plan {
    /// A plan for all shapes of its collective.
    pub(crate) const fn new(
        name: &'static str,
        rounds: for<'a> fn(&'a Shape, Rank) -> Rounds<'a>,
        in_rank_order: bool,
    ) -> Self {
        Self { name, rounds, in_rank_order, supports: |_| true }
    }
}

impl Algorithm for Plan {
    fn name(&self) -> &'static str {
        self.name
    }

    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a> {
        if shape.world() < 2 { Box::new(std::iter::empty()) } else { (self.rounds)(shape, rank) }
    }

    fn supports(&self, shape: &Shape) -> bool {
        (self.supports)(shape)
    }

    fn in_rank_order(&self) -> bool {
        self.in_rank_order
    }
}

/// An all-reduce of `range` over the members of a group; every member calls it.
pub(crate) type Phase = for<'a> fn(Group<'a>, Range<usize>) -> Steps<'a>;

/// An algorithm that treats all ranks alike, with an order of ranks in which neighbours share a
/// node where possible.
#[derive(Debug)]
pub struct Flat {
    pub(crate) name: &'static str,
    pub(crate) phase: Phase,
    pub(crate) in_rank_order: bool,
}

impl Algorithm for Flat {
    fn name(&self) -> &'static str {
        self.name
    }

    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a> {
        let group = Group::by_node(shape, rank);
        (self.phase)(group, shape.all())
    }

    fn in_rank_order(&self) -> bool {
        self.in_rank_order
    }
}

/// Ranks that run a phase together, in an order that is the same for all of them.
#[derive(Clone, Debug)]
pub(crate) struct Group<'a> {
    pub(crate) members: Cow<'a, [Rank]>,
    /// This rank's index in `members`.
    pub(crate) me: usize,
}

impl<'a> Group<'a> {
    pub(crate) fn new(members: Cow<'a, [Rank]>, rank: Rank) -> Self {
        let mut group = Self { members, me: 0 };
        group.me = group.position(rank);
        group
    }

    /// All ranks, node after node.
    pub(crate) fn by_node(shape: &'a Shape, rank: Rank) -> Self {
        Self::new(Cow::Borrowed(shape.topology.by_node()), rank)
    }

    /// All ranks, ascending.
    pub(crate) fn ascending(shape: &Shape, rank: Rank) -> Self {
        Self { members: (0..shape.world()).collect(), me: rank }
    }

    /// The index of another member.
    pub(crate) fn position(&self, rank: Rank) -> usize {
        let found = self.members.iter().position(|&member| member == rank);
        found.expect("the caller names a rank of the group")
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Member `i`, counted around the end.
    pub(crate) fn at(&self, i: usize) -> Rank {
        self.members[i % self.members.len()]
    }
}

static ALL_REDUCE: [&dyn Algorithm; 10] = [
    &RING,
    &TREE,
    &K_TREE,
    &DOUBLE_TREE,
    &RECURSIVE_DOUBLING,
    &HALVING_DOUBLING,
    &ONE_SHOT,
    &TWO_SHOT,
    &HIERARCHICAL,
    &HIERARCHICAL_TREE,
];
