//! From a rank's plan to what the engine executes.

use std::ops::Range;

use unisum_algorithms::{Algorithm, Pattern, Rank, Shape, Step, slice};

use super::segment::Segment;

/// One action. Each ends before the next begins; the work inside a segment is pipelined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Pairwise transfers through the scoreboard.
    Transfers(Segment),
    /// Leave a copy of `bytes`, the whole region, for the group, and fold all members' copies.
    OneShot { bytes: Range<usize>, divides: bool },
    /// Fold slices of the group's regions, or hand them on.
    Exchange(Exchange),
    /// Divide by the number of ranks (the end of an average).
    Divide { bytes: Range<usize> },
}

/// What the members of a group do with the slices of their regions, each with its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Exchange {
    /// By place in the group.
    pub(crate) slices: Vec<Range<usize>>,
    /// Whether the group is entered first: the members tell where their regions are.
    pub(crate) enters: bool,
    /// Fold the slice of all members' regions, in rank order.
    pub(crate) folds: bool,
    /// Give the slice to all members.
    pub(crate) gathers: bool,
    /// Divide what was folded by the number of ranks.
    pub(crate) divides: bool,
}

impl Exchange {
    /// Bytes of the longest slice.
    pub(crate) fn longest(&self) -> usize {
        self.slices.iter().map(Range::len).max().unwrap_or(0)
    }
}

/// What a rank executes for one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) actions: Vec<Action>,
}

/// How plans are turned into programs: the same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tuning {
    /// Largest message.
    pub(crate) slice_bytes: usize,
    /// Steps open at once.
    pub(crate) window: usize,
}

/// The ranks this one shares memory with, and how much a deposit may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupShape<'a> {
    pub(crate) members: &'a [Rank],
    pub(crate) slot_bytes: usize,
}

/// What a program is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) algorithm: &'a dyn Algorithm,
    pub(crate) shape: &'a Shape,
    pub(crate) rank: Rank,
    pub(crate) element_bytes: usize,
    pub(crate) average: bool,
    pub(crate) tuning: Tuning,
    pub(crate) group: Option<GroupShape<'a>>,
}

impl Program {
    /// Builds the program: steps that the whole group takes together become group actions, runs
    /// of pairwise steps become segments. Without a group everything is pairwise.
    pub(crate) fn build(source: &Source<'_>) -> Self {
        let mut builder = Builder { source, actions: Vec::new(), pairs: Vec::new() };
        for step in source.algorithm.steps(source.shape, source.rank) {
            builder.add(step);
        }
        builder.finish()
    }
}

struct Builder<'a> {
    source: &'a Source<'a>,
    actions: Vec<Action>,
    pairs: Vec<Step>,
}

impl Builder<'_> {
    fn add(&mut self, step: Step) {
        if !self.is_group_step(&step) {
            self.pairs.push(step);
            return;
        }
        self.close_pairs();
        match step.pattern {
            Pattern::Pairs => {}
            Pattern::OneShot => {
                let bytes = self.bytes(&step.incoming[0].elements);
                self.actions.push(Action::OneShot { bytes, divides: self.is_final() });
            }
            Pattern::ReduceScatter => self.add_exchange(&step),
            Pattern::AllGather => {
                let (alone, divides) = (self.group_is_world(), self.source.average);
                match self.actions.last_mut() {
                    // The slices that were just folded are handed on while they are in cache. All
                    // members have to see this alike: where there are other nodes, a member may
                    // have nothing to do with them, but others have.
                    Some(Action::Exchange(exchange)) if alone && !exchange.gathers => {
                        (exchange.gathers, exchange.divides) = (true, divides);
                    }
                    _ => self.add_exchange(&step),
                }
            }
        }
    }

    fn add_exchange(&mut self, step: &Step) {
        let folds = step.pattern == Pattern::ReduceScatter;
        let enters = !self.actions.iter().any(|action| matches!(action, Action::Exchange(_)));
        self.actions.push(Action::Exchange(Exchange {
            slices: self.slices(step, folds),
            enters,
            folds,
            gathers: !folds,
            divides: false,
        }));
    }

    /// Whether the step is one that exactly the members of the group take together, in a form
    /// that the group can execute.
    fn is_group_step(&self, step: &Step) -> bool {
        let Some(group) = self.source.group else { return false };
        let fits = match step.pattern {
            Pattern::Pairs => false,
            Pattern::OneShot => {
                self.source.shape.count * self.source.element_bytes <= group.slot_bytes
            }
            Pattern::ReduceScatter | Pattern::AllGather => true,
        };
        fits && step.members(self.source.rank) == group.members
    }

    /// A fold over the group completes an average where the group is the world; elsewhere the
    /// division follows at the end, alike on all ranks.
    fn is_final(&self) -> bool {
        self.source.average && self.group_is_world()
    }

    fn group_is_world(&self) -> bool {
        let members = self.source.group.map_or(0, |group| group.members.len());
        members == self.source.shape.world()
    }

    /// Each member's slice: what it folds is sent to it, what it gathers comes from it.
    fn slices(&self, step: &Step, folds: bool) -> Vec<Range<usize>> {
        let group = self.source.group.map_or(&[][..], |group| group.members);
        let outgoing = |to| step.outgoing.iter().find(|out| out.to == to).map(|out| &out.elements);
        let incoming = |from| {
            let arrival = step.incoming.iter().find(|incoming| incoming.from.contains(&from));
            arrival.map(|incoming| &incoming.elements)
        };
        let own = match folds {
            true => step.incoming.first().map(|incoming| &incoming.elements),
            false => step.outgoing.first().map(|out| &out.elements),
        };
        let slice_of = |&member: &Rank| match member == self.source.rank {
            true => own,
            false if folds => outgoing(member),
            false => incoming(member),
        };
        group.iter().map(|member| slice_of(member).map_or(0..0, |it| self.bytes(it))).collect()
    }

    fn bytes(&self, elements: &Range<usize>) -> Range<usize> {
        let size = self.source.element_bytes;
        elements.start * size..elements.end * size
    }

    fn close_pairs(&mut self) {
        let tuning = self.source.tuning;
        let size = self.source.element_bytes;
        let steps = slice(std::mem::take(&mut self.pairs).into_iter(), tuning.slice_bytes / size);
        if !steps.is_empty() {
            self.actions.push(Action::Transfers(Segment::compile(&steps, size, tuning.window)));
        }
    }

    fn finish(mut self) -> Program {
        self.close_pairs();
        let divided = self.actions.iter().any(|action| {
            matches!(
                action,
                Action::OneShot { divides: true, .. }
                    | Action::Exchange(Exchange { divides: true, .. })
            )
        });
        if self.source.average && !divided {
            let bytes = 0..self.source.shape.count * self.source.element_bytes;
            self.actions.push(Action::Divide { bytes });
        }
        Program { actions: self.actions }
    }
}
