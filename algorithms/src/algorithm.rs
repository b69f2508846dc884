//! What an algorithm is, and the list of them.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

use crate::{
    DOUBLE_TREE, HALVING_DOUBLING, HIERARCHICAL, HIERARCHICAL_TREE, K_TREE, ONE_SHOT,
    RECURSIVE_DOUBLING, RING, Rank, Shape, Step, TREE, TWO_SHOT,
};

/// The steps of one rank, made as they are asked for.
pub type Steps<'a> = Box<dyn Iterator<Item = Step> + Send + 'a>;

/// A plan for every rank of every shape that leaves the reduced elements on all ranks, bitwise
/// equal.
pub trait Algorithm: Send + Sync + Debug {
    /// The name to choose it by.
    fn name(&self) -> &'static str;

    /// The steps of `rank`, one per round.
    ///
    /// Rounds are global: both ends of a transfer are in the same round, every rank yields the same
    /// number of rounds, and a rank without work in a round yields an empty step. A world of one
    /// yields none.
    ///
    /// # Panics
    /// If `rank` is not below the world.
    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a>;
}

/// All algorithms.
pub fn all() -> &'static [&'static dyn Algorithm] {
    &ALL
}

/// The algorithm with this name.
pub fn by_name(name: &str) -> Option<&'static dyn Algorithm> {
    all().iter().copied().find(|algorithm| algorithm.name() == name)
}

/// An all-reduce of `range` over the members of a group; every member calls it.
pub(crate) type Phase = for<'a> fn(Group<'a>, Range<usize>) -> Steps<'a>;

/// An algorithm that treats all ranks alike, placed so that its neighbours share a node where
/// possible.
#[derive(Debug)]
pub struct Flat {
    pub(crate) name: &'static str,
    pub(crate) phase: Phase,
}

impl Algorithm for Flat {
    fn name(&self) -> &'static str {
        self.name
    }

    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a> {
        let group = Group::new(Cow::Borrowed(shape.topology.by_node()), rank);
        (self.phase)(group, 0..shape.count)
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
        let me = members.iter().position(|&member| member == rank);
        Self { me: me.expect("the caller names a rank of the group"), members }
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Member `i`, counted around the end.
    pub(crate) fn at(&self, i: usize) -> Rank {
        self.members[i % self.members.len()]
    }
}

static ALL: [&dyn Algorithm; 10] = [
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
