//! Compiles a rank's plan into the program that the engine executes.

use std::ops::Range;

use unisum_algorithms::{Algorithm, Pattern, PlanKind, Rank, Shape, Step, slice};

use super::folding::Extras;
use super::fused_hierarchical::FusedHierarchical;
use super::placement::{Move, Overlay, Placement};
use super::pull::{Pull, Puller};
use super::segment::Segment;
use super::token::{self, Pair};

/// One action. Each ends before the next begins; the work inside a segment is pipelined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Pairwise transfers through the scoreboard.
    Transfers(Segment),
    /// Read what this rank receives directly from the memory of the group's members.
    Pull(Pull),
    /// Fold slices of the group's regions, or distribute them.
    Exchange(Exchange),
    /// Copies within this rank, in bytes; `scales` marks copies of a pre-multiplied sum's inputs.
    Copy { moves: Vec<Move>, scales: bool },
    /// Divide the output by the number of ranks (the end of an average).
    Divide { bytes: Range<usize> },
    /// Wait until all members of the group are done.
    Arrive,
}

/// What the members of a group do with the slices of their regions, one slice each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Exchange {
    /// Indexed by the member's place in the group.
    pub(crate) slices: Vec<Range<usize>>,
    /// Whether the group is entered first, where members publish their regions.
    pub(crate) enters: bool,
    /// Fold the slice of all members' inputs, in rank order.
    pub(crate) folds: bool,
    /// Store the slice at all members.
    pub(crate) gathers: bool,
    /// Divide what was folded by the number of ranks.
    pub(crate) divides: bool,
    /// Multiply the inputs by the factor as they are folded.
    pub(crate) scales: bool,
}

impl Exchange {
    pub(super) const fn extras(&self) -> Extras {
        Extras { divides: self.divides, scales: self.scales, watches: true }
    }

    /// Bytes of the longest slice.
    pub(crate) fn longest(&self) -> usize {
        self.slices.iter().map(Range::len).max().unwrap_or(0)
    }
}

/// The compiled plan of a rank for one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    pub(crate) actions: Vec<Action>,
    /// What is executed instead, after the enter, if all members' regions turn out to be
    /// registered.
    pub(crate) mapped: Option<Vec<Action>>,
    /// The scratch memory it needs, in bytes.
    pub(crate) scratch: usize,
    /// What each pair of ranks compares, where it differs by pair.
    pub(crate) pairs: Vec<Pair>,
}

/// How plans are compiled: the same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuning {
    /// Largest message.
    pub slice_bytes: usize,
    /// Steps open at once.
    pub window: usize,
}

/// The ranks that share memory with this one, and the size of a deposit.
#[derive(Clone, Copy, Debug)]
pub struct GroupShape<'a> {
    /// The ranks, this one included, ascending.
    pub members: &'a [Rank],
    /// Bytes of a deposit.
    pub slot_bytes: usize,
}

/// What a program is compiled from.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The algorithm.
    pub algorithm: &'a dyn Algorithm,
    /// World, counts and root.
    pub shape: &'a Shape,
    /// The rank that executes it.
    pub rank: Rank,
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Whether the sum is divided by the number of ranks.
    pub average: bool,
    /// Whether inputs are multiplied by a factor first.
    pub scales: bool,
    /// Whether input and output are one memory.
    pub in_place: bool,
    /// Slices and window.
    pub tuning: Tuning,
    /// The ranks it shares memory with, if there are any.
    pub group: Option<GroupShape<'a>>,
}

impl Program {
    /// Compiles the program: steps that the whole group takes together become group actions, runs
    /// of pairwise steps become segments. Without a group, everything is pairwise.
    pub fn build(source: &Source<'_>) -> Self {
        let mut puller = Puller::new(source);
        let items = source.items(source.rank, &puller);
        let scales_folds = source.scales && puller.first.takes_all;
        let renames_all = source.scales && !scales_folds;
        let steps = items.iter().flat_map(Item::steps);
        let placement = Placement::new(source.shape, source.rank, steps, renames_all);
        let divides = source.average && puller.first.is_only;
        let mut builder = Builder { source, actions: Vec::new(), scales: scales_folds, divides };
        builder.copy(&placement.first, renames_all);
        let pairs = token::pairs(source.shape);
        let mut segment = Segment::new(source.tuning.window);
        let size = source.element_bytes;
        let tokens = token::add(&mut segment, &pairs, placement.scratch, size);
        let mut located = &placement.located[..];
        for item in &items {
            let (of_item, rest) = located.split_at(item.transfers());
            located = rest;
            match item {
                Item::Pairs(steps) => {
                    let mut segment =
                        std::mem::replace(&mut segment, Segment::new(source.tuning.window));
                    segment.compile(steps, of_item, size, source.overlay());
                    builder.actions.push(Action::Transfers(segment));
                }
                Item::Group(_, step) if is_exchange(step) => builder.exchange(step),
                Item::Group(round, step) => builder.pull(puller.pull(*round, step, of_item)),
            }
        }
        if segment.steps() > 0 {
            // There are only tokens.
            builder.actions.push(Action::Transfers(segment));
        }
        let mapped = builder.fuse(placement.last.is_empty());
        builder.copy(&placement.last, false);
        builder.divide();
        let scratch = (placement.scratch + tokens) * size;
        Self { actions: builder.actions, mapped, scratch, pairs }
    }

    /// The actions to execute: before the group is entered, or afterwards, when it is known whether
    /// all regions are registered.
    pub(crate) fn actions(&self, is_mapped: bool) -> &[Action] {
        match &self.mapped {
            Some(mapped) if is_mapped => mapped,
            _ => &self.actions,
        }
    }
}

/// A part of a plan.
#[derive(Debug)]
pub(super) enum Item {
    /// The step of a round that the group takes together.
    Group(usize, Step),
    /// Sliced pairwise steps.
    Pairs(Vec<Step>),
}

impl Item {
    pub(super) fn steps(&self) -> &[Step] {
        match self {
            Self::Group(_, step) => std::slice::from_ref(step),
            Self::Pairs(steps) => steps,
        }
    }

    /// How many transfers its steps have.
    pub(super) fn transfers(&self) -> usize {
        self.steps().iter().map(|step| step.outgoing.len() + step.incoming.len()).sum()
    }
}

const fn is_exchange(step: &Step) -> bool {
    matches!(step.pattern, Pattern::ReduceScatter | Pattern::AllGather)
}

impl Source<'_> {
    /// The parts of a member's plan, divided in the same way on all members of a group.
    pub(super) fn items(&self, rank: Rank, puller: &Puller<'_>) -> Vec<Item> {
        let mut items = Vec::new();
        let mut pairs = Vec::new();
        for (round, step) in self.algorithm.steps(self.shape, rank).enumerate() {
            if self.is_group_step(&step, rank) && puller.can_run(&step, round) {
                self.close_pairs(&mut pairs, &mut items);
                items.push(Item::Group(round, step));
            } else {
                pairs.push(step);
            }
        }
        self.close_pairs(&mut pairs, &mut items);
        items
    }

    fn close_pairs(&self, pairs: &mut Vec<Step>, items: &mut Vec<Item>) {
        let max = (self.tuning.slice_bytes / self.element_bytes).max(1);
        let steps = slice(std::mem::take(pairs).into_iter(), max);
        if !steps.is_empty() {
            items.push(Item::Pairs(steps));
        }
    }
}

impl Source<'_> {
    /// Whether exactly the members of the group take the step together.
    pub(super) fn is_group_step(&self, step: &Step, rank: Rank) -> bool {
        let Some(group) = self.group else { return false };
        step.is_marked() && step.members(rank, &self.shape.topology) == group.members
    }

    pub(super) fn group_is_world(&self) -> bool {
        let members = self.group.map_or(0, |group| group.members.len());
        members == self.shape.world()
    }

    fn overlay(&self) -> Overlay {
        match self.in_place {
            true => Overlay::in_place(self.shape, self.rank, self.element_bytes),
            false => Overlay::APART,
        }
    }

    fn bytes(&self, elements: &Range<usize>) -> Range<usize> {
        elements.start * self.element_bytes..elements.end * self.element_bytes
    }
}

/// Assembles actions.
struct Builder<'a> {
    source: &'a Source<'a>,
    actions: Vec<Action>,
    /// Whether the first fold multiplies its operands by the factor.
    scales: bool,
    /// Whether the first fold is the only one and divides its results.
    divides: bool,
}

impl Builder<'_> {
    /// Whether this is the first action that the group takes together.
    fn enters(&self) -> bool {
        !self.actions.iter().any(|it| matches!(it, Action::Exchange(_) | Action::Pull(_)))
    }

    fn pull(&mut self, pull: Pull) {
        let divides = std::mem::take(&mut self.divides);
        let (enters, scales) = (self.enters(), std::mem::take(&mut self.scales));
        self.actions.push(Action::Pull(Pull { enters, divides, scales, ..pull }));
    }

    fn exchange(&mut self, step: &Step) {
        let folds = step.pattern == Pattern::ReduceScatter;
        if let Some(Action::Exchange(exchange)) = self.actions.last_mut()
            && self.source.group_is_world()
            && !folds
            && !exchange.gathers
        {
            // The slices that were just folded are distributed while they are in cache. All members
            // must decide this alike: where there are other nodes, a member may have nothing to
            // exchange with them although others do.
            exchange.gathers = true;
            return;
        }
        let (enters, scales) = (self.enters(), folds && std::mem::take(&mut self.scales));
        let (slices, gathers) = (self.slices(step, folds), !folds);
        let divides = folds && std::mem::take(&mut self.divides);
        self.actions.push(Action::Exchange(Exchange {
            slices,
            enters,
            folds,
            gathers,
            divides,
            scales,
        }));
    }

    /// Each member's slice: what it folds is sent to it, and what it gathers comes from it.
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
        let bytes = |member| slice_of(member).map_or(0..0, |it| self.source.bytes(it));
        group.iter().map(bytes).collect()
    }

    /// Adds copies within the rank; in place, most of them are empty.
    fn copy(&mut self, moves: &[Move], scales: bool) {
        let (size, overlay) = (self.source.element_bytes, self.source.overlay());
        let in_bytes = |it: &Move| Move {
            from: it.from.in_bytes(size),
            to: it.to.in_bytes(size),
            count: it.count * size,
        };
        let is_needed = |it: &Move| scales || overlay.of(it.from) != overlay.of(it.to);
        let moves: Vec<Move> = moves.iter().map(in_bytes).filter(is_needed).collect();
        if !moves.is_empty() {
            self.actions.push(Action::Copy { moves, scales });
        }
    }

    /// Fuses the last three parts of a hierarchical all-reduce. With `is_end`, nothing is copied
    /// after them.
    fn fuse(&self, is_end: bool) -> Option<Vec<Action>> {
        let place = self.source.group?.members.binary_search(&self.source.rank).ok()?;
        let begin = self.actions.iter().position(|it| matches!(it, Action::Exchange(_)))?;
        let fusion = FusedHierarchical::of(&self.actions[begin..], place)?;
        let is_whole = self.source.shape.collective == PlanKind::AllReduce;
        let fuses = is_end && is_whole;
        fuses.then(|| fusion.actions(self.source.average, self.source.overlay()))
    }

    /// Divides an average that no fold has divided.
    fn divide(&mut self) {
        let is_divided = |action: &Action| match action {
            Action::Pull(pull) => pull.divides,
            Action::Exchange(exchange) => exchange.divides,
            _ => false,
        };
        let wants = self.source.shape.wants(self.source.rank);
        let wanted: usize = wants.iter().map(Range::len).sum();
        if self.source.average && wanted > 0 && !self.actions.iter().any(is_divided) {
            self.actions.push(Action::Divide { bytes: 0..wanted * self.source.element_bytes });
        }
    }
}
