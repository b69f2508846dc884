//! What one rank does in one round.

use std::ops::Range;

use crate::{Rank, Topology};

/// What happens to bytes when they arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnArrival {
    /// They replace what was there.
    Store,
    /// They are reduced with what is there.
    Reduce,
}

/// Elements this rank sends; the receiver addresses them by the same indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The receiver.
    pub to: Rank,
    /// Which elements, as they were before the step.
    pub elements: Range<usize>,
}

/// Elements this rank receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The senders, ascending and without this rank.
    ///
    /// `Store`: exactly one. `Reduce`: this rank's own value and those of all senders are folded
    /// once, in rank order with the own value at its own place, and rounded once.
    pub from: Vec<Rank>,
    /// Which elements.
    pub elements: Range<usize>,
    /// Stored or reduced.
    pub on_arrival: OnArrival,
}

/// What a rank's step says about the steps of the other ranks in the same round.
///
/// All but `Pairs` and `Wall` name a group, see [`Step::members`]. All its members run the same
/// pattern in this round, so that an executor with shared memory can run it as one group step (a
/// barrier and a fold, or a copy and a barrier) instead of pairwise transfers. The transfers are
/// listed as well, so that any other executor may run them pairwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// Nothing: only the listed transfers.
    #[default]
    Pairs,
    /// Pairwise transfers that divide or join ranges: slices of earlier and later rounds do not
    /// mix with those of this round, see [`slice()`](crate::slice()). All ranks with work in the
    /// round carry the mark.
    Wall,
    /// Each member sends one range to all others and reduces it from all.
    OneShot,
    /// Each member reduces its own slice from all members; the slices are disjoint.
    ///
    /// Until the `AllGather` of the same group and slices the member touches only its own slice.
    ReduceScatter,
    /// Each member stores its own slice at all members; the slices are disjoint.
    AllGather,
    /// Any transfers among exactly the ranks of the scope, each of which carries the mark, with
    /// transfers or without.
    ///
    /// No member receives, stored or reduced, into what it sends in this step. With shared memory,
    /// the members therefore enter, each reads its operands directly from the senders' memory (a
    /// copy, or one fold of all sources in rank order), and they arrive.
    Direct(Scope),
}

/// The ranks of a [`Pattern::Direct`]; two or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All ranks.
    World,
    /// The ranks of the node of the rank whose step it is.
    Node,
}

/// One rank's part of one round.
///
/// Sends read the values from before the step. A `Reduce` into a range that is being sent is legal
/// (arrivals land in a slot first); a `Store` into one is a fault. Empty ranges are legal and never
/// sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// What this step says about other ranks.
    pub pattern: Pattern,
    /// What this rank sends.
    pub outgoing: Vec<Outgoing>,
    /// What this rank receives; the ranges are disjoint.
    pub incoming: Vec<Incoming>,
}

impl Step {
    /// Whether the step moves nothing.
    pub fn is_empty(&self) -> bool {
        self.outgoing.iter().all(|o| o.elements.is_empty())
            && self.incoming.iter().all(|i| i.elements.is_empty())
    }

    /// The group of a step of `rank` with a mark, `rank` included, ascending: the ranks of the
    /// scope of a `Direct`, else this rank and the receivers in `outgoing`.
    pub fn members(&self, rank: Rank, topology: &Topology) -> Vec<Rank> {
        let mut members: Vec<Rank> = match self.pattern {
            Pattern::Direct(Scope::World) => (0..topology.world()).collect(),
            Pattern::Direct(Scope::Node) => topology.members(topology.node_of(rank)),
            _ => self.outgoing.iter().map(|o| o.to).chain([rank]).collect(),
        };
        members.sort_unstable();
        members
    }

    /// Whether the step names a group.
    pub fn is_marked(&self) -> bool {
        !matches!(self.pattern, Pattern::Pairs | Pattern::Wall)
    }

    pub(crate) fn new(pattern: Pattern) -> Self {
        Self { pattern, ..Self::default() }
    }

    /// Adds the transfers of `other`, which belongs to the same round.
    pub(crate) fn absorb(&mut self, other: Self) {
        self.outgoing.extend(other.outgoing);
        self.incoming.extend(other.incoming);
    }

    pub(crate) fn send(mut self, to: Rank, elements: Range<usize>) -> Self {
        if !elements.is_empty() {
            self.outgoing.push(Outgoing { to, elements });
        }
        self
    }

    pub(crate) fn store(self, from: Rank, elements: Range<usize>) -> Self {
        self.receive(vec![from], elements, OnArrival::Store)
    }

    pub(crate) fn send_all(self, to: Rank, ranges: Vec<Range<usize>>) -> Self {
        ranges.into_iter().fold(self, |step, elements| step.send(to, elements))
    }

    pub(crate) fn store_all(self, from: Rank, ranges: Vec<Range<usize>>) -> Self {
        ranges.into_iter().fold(self, |step, elements| step.store(from, elements))
    }

    pub(crate) fn reduce(self, mut from: Vec<Rank>, elements: Range<usize>) -> Self {
        from.sort_unstable();
        self.receive(from, elements, OnArrival::Reduce)
    }

    fn receive(mut self, from: Vec<Rank>, elements: Range<usize>, on_arrival: OnArrival) -> Self {
        if !elements.is_empty() {
            self.incoming.push(Incoming { from, elements, on_arrival });
        }
        self
    }
}
