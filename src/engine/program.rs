//! From a rank's plan to what the engine executes.

use std::ops::Range;
use std::sync::Arc;

use unisum_algorithms::{Algorithm, Pattern, Rank, Shape, Step, slice};

use super::segment::Segment;

/// One action. Each ends before the next begins; the work inside a segment is pipelined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Pairwise transfers through the scoreboard.
    Transfers(Segment),
    /// Arrive at the group; with `deposit`, leave a copy of the whole region for the others.
    Enter { deposit: bool },
    /// Fold `bytes` of all members into this rank's region, in rank order. With `push`, store
    /// each block at all members while it is hot, where their memory allows it.
    Fold { bytes: Range<usize>, divide: bool, push: bool },
    /// Every member's slice goes to all members. `slices` is by place in the group. With
    /// `pushed`, the fold before it did that already where the members' memory allows it.
    Gather { slices: Vec<Range<usize>>, pushed: bool },
    /// Divide by the number of ranks (the end of an average).
    Divide { bytes: Range<usize> },
}

/// What a rank executes for one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) actions: Vec<Action>,
    /// The same without group actions, for a group whose members can't read each other's private
    /// memory: whether a call's memory is private is known only when all have entered.
    pub(crate) pairwise: Option<Arc<Self>>,
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
    pub(crate) reads_private: bool,
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
    /// Builds the program, and the pairwise one beside it if the group may need that.
    pub(crate) fn build(source: &Source<'_>) -> Self {
        let alone = || Arc::new(Self::plain(&Source { group: None, ..*source }));
        let blind = source.group.is_some_and(|group| !group.reads_private);
        Self { pairwise: blind.then(alone), ..Self::plain(source) }
    }

    /// Steps that the whole group takes together become group actions, runs
    /// of pairwise steps become segments. Without a group everything is pairwise.
    fn plain(source: &Source<'_>) -> Self {
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
                self.actions.push(Action::Enter { deposit: true });
                self.actions.push(Action::Fold { bytes, divide: self.is_final(), push: false });
            }
            Pattern::ReduceScatter => {
                let elements = step.incoming.first().map_or(0..0, |own| own.elements.clone());
                let bytes = self.bytes(&elements);
                self.actions.push(Action::Enter { deposit: false });
                self.actions.push(Action::Fold { bytes, divide: false, push: false });
            }
            Pattern::AllGather => self.add_gather(&step),
        }
    }

    fn add_gather(&mut self, step: &Step) {
        let slices = self.gather_slices(step);
        let is_final = self.is_final();
        let pushed = match self.actions.last_mut() {
            Some(Action::Fold { divide, push, .. }) => {
                (*divide, *push) = (is_final, true);
                true
            }
            _ => false,
        };
        self.actions.push(Action::Gather { slices, pushed });
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
        let members = self.source.group.map_or(0, |group| group.members.len());
        self.source.average && members == self.source.shape.world()
    }

    fn gather_slices(&self, step: &Step) -> Vec<Range<usize>> {
        let group = self.source.group.map_or(&[][..], |group| group.members);
        let own = step.outgoing.first().map_or(0..0, |out| out.elements.clone());
        let slice_of = |member: &Rank| {
            let arrival = step.incoming.iter().find(|incoming| incoming.from == [*member]);
            arrival.map_or_else(|| own.clone(), |incoming| incoming.elements.clone())
        };
        group.iter().map(|member| self.bytes(&slice_of(member))).collect()
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
            matches!(action, Action::Divide { .. } | Action::Fold { divide: true, .. })
        });
        if self.source.average && !divided {
            let bytes = 0..self.source.shape.count * self.source.element_bytes;
            self.actions.push(Action::Divide { bytes });
        }
        Program { actions: self.actions, pairwise: None }
    }
}
