//! The group action of direct steps: every member reads its operands directly from the senders'
//! memory.

use std::collections::HashMap;
use std::ops::Range;

use unisum_algorithms::{OnArrival, PairCounts, Pattern, PlanKind, Rank, Space, Step};

use super::first::FirstFold;
use super::folding::Extras;
use super::placement::{Located, Memory, Place, Placement};
use super::program::{Item, Source};

/// What a rank takes, and what it stages for others if its memory is private. In bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pull {
    /// Whether each member deposits a copy of its whole input, so that one arrival is enough.
    pub(crate) deposits: bool,
    /// Whether the group is entered first, where members publish their regions.
    pub(crate) enters: bool,
    /// Whether all members take everything from inputs.
    pub(crate) from_inputs: bool,
    pub(crate) takes: Vec<Take>,
    /// What others take from this rank, one for each lane.
    pub(crate) lanes: Vec<(Place, usize)>,
    /// The largest number of lanes of any member, and the bytes of the longest lane.
    pub(crate) lanes_max: usize,
    pub(crate) longest: usize,
    /// Divide what was folded by the number of ranks.
    pub(crate) divides: bool,
    /// Multiply the inputs by the factor as they are folded.
    pub(crate) scales: bool,
}

impl Pull {
    pub(super) const fn extras(&self) -> Extras {
        Extras { divides: self.divides, scales: self.scales, watches: true }
    }
}

/// One copy or one fold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Take {
    /// One for a copy, or all operands of a fold in rank order.
    pub(crate) sources: Vec<Origin>,
    pub(crate) writes: Place,
    pub(crate) bytes: usize,
    pub(crate) folds: bool,
    /// Whether it folds the whole input of every member.
    pub(crate) everything: bool,
}

/// Where a member has an operand: in which of its regions, and in which lane of its staging buffer
/// if the region is private.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) member: Rank,
    pub(crate) place: Place,
    pub(crate) lane: usize,
}

/// Builds the pulls of one program from the plans of all members.
pub(super) struct Puller<'a> {
    source: &'a Source<'a>,
    pub(super) first: FirstFold,
    plans: HashMap<Rank, Plan>,
}

/// What a member does.
struct Plan {
    items: Vec<Item>,
    placement: Placement,
}

impl Plan {
    /// The step that the group takes together in a round, and the index of its item.
    fn group_step(&self, round: usize) -> (usize, &Step) {
        let step = self.items.iter().enumerate().find_map(|(index, item)| match item {
            Item::Group(at, step) if *at == round => Some((index, step)),
            _ => None,
        });
        step.expect("members agree on what they do together")
    }
}

impl<'a> Puller<'a> {
    pub(super) fn new(source: &'a Source<'a>) -> Self {
        Self { source, first: FirstFold::of(source), plans: HashMap::new() }
    }

    /// Whether the group takes the step of a round together.
    pub(super) fn can_run(&self, step: &Step, round: usize) -> bool {
        // Inputs that are multiplied first lie in scratch memory, which only their own rank can
        // read.
        let is_moved = self.source.scales && !self.first.takes_all;
        let reads_inputs = step.pattern != Pattern::AllGather;
        is_possible(self.source, step, round) && !(is_moved && reads_inputs)
    }

    /// The pull for `step`, which this rank takes in a round, with its transfers at `located`.
    pub(super) fn pull(&mut self, round: usize, step: &Step, located: &[Located]) -> Pull {
        let own = self.source.rank;
        let size = self.source.element_bytes;
        let (outgoing, incoming) = located.split_at(step.outgoing.len());
        let deposits = self.is_only_round() && self.all_deposit();
        let mut pull = Pull { deposits, ..Pull::default() };
        for (arrival, located) in step.incoming.iter().zip(incoming) {
            let Some(writes) = located.writes else { continue };
            let folds = arrival.on_arrival == OnArrival::Reduce;
            let mut sources: Vec<Origin> = arrival
                .from
                .iter()
                .map(|&from| self.origin(round, from, &arrival.elements))
                .collect();
            if let (true, Some(reads)) = (folds, located.reads) {
                let place = reads.in_bytes(size);
                let at = sources.partition_point(|source| source.member < own);
                sources.insert(at, Origin { member: own, place, lane: usize::MAX });
            }
            let bytes = arrival.elements.len() * size;
            let everything = step.pattern == Pattern::OneShot && pull.deposits;
            let writes = writes.in_bytes(size);
            pull.takes.push(Take { sources, writes, bytes, folds, everything });
        }
        if !pull.deposits {
            let places = lanes(step).map(|(first, elements)| {
                let reads = outgoing[first].reads.expect("what is sent lies somewhere");
                (reads.in_bytes(size), elements.len() * size)
            });
            pull.lanes = places.collect();
            let members = self.source.group.map_or(&[][..], |group| group.members);
            // What a later step sends together may have been copied to the output by now.
            let moves_none = |member: &Rank| self.plan(*member).placement.first.is_empty();
            pull.from_inputs = round == 0 && members.iter().all(moves_none);
            for &member in members {
                let of_member: Vec<usize> =
                    lanes(self.step(round, member)).map(|(_, elements)| elements.len()).collect();
                pull.lanes_max = pull.lanes_max.max(of_member.len());
                pull.longest = pull.longest.max(of_member.into_iter().max().unwrap_or(0) * size);
            }
        }
        pull
    }

    /// Where `member` has `elements`, which it sends in a round.
    fn origin(&mut self, round: usize, member: Rank, elements: &Range<usize>) -> Origin {
        let size = self.source.element_bytes;
        let plan = self.plan(member);
        let (index, step) = plan.group_step(round);
        let before: usize = plan.items[..index].iter().map(Item::transfers).sum();
        let (lane, (first, _)) = lanes(step)
            .enumerate()
            .find(|(_, (_, sent))| *sent == elements)
            .expect("both ends of a transfer name the same elements");
        let place = plan.placement.located[before + first].reads;
        let place = place.expect("what is sent lies somewhere").in_bytes(size);
        debug_assert_ne!(place.memory, Memory::Scratch, "checked by `can_run`");
        Origin { member, place, lane }
    }

    fn step(&mut self, round: usize, member: Rank) -> &Step {
        self.plan(member).group_step(round).1
    }

    fn plan(&mut self, member: Rank) -> &Plan {
        if !self.plans.contains_key(&member) {
            let items = self.source.items(member, self);
            let steps = items.iter().flat_map(Item::steps);
            let renames_all = self.source.scales && !self.first.takes_all;
            let placement = Placement::new(self.source.shape, member, steps, renames_all);
            self.plans.insert(member, Plan { items, placement });
        }
        &self.plans[&member]
    }

    fn is_only_round(&self) -> bool {
        self.source.algorithm.steps(self.source.shape, self.source.rank).nth(1).is_none()
    }

    /// Whether every rank's input fits a deposit.
    fn all_deposit(&self) -> bool {
        let Source { shape, group, element_bytes, .. } = self.source;
        let fits = |rank| {
            let elements: usize = shape.contributes(rank).iter().map(Range::len).sum();
            group.is_some_and(|group| elements * element_bytes <= group.slot_bytes)
        };
        self.source.group_is_world() && (0..shape.world()).all(fits)
    }
}

/// Whether a group could take the step of a round together: whether all members can tell where the
/// others have what they send.
pub(super) fn is_possible(source: &Source<'_>, step: &Step, round: usize) -> bool {
    let Source { shape, group, .. } = source;
    let is_first = round == 0;
    let all_want_all = matches!(
        shape.collective,
        PlanKind::AllReduce | PlanKind::Broadcast { .. } | PlanKind::AllGather
    );
    match step.pattern {
        Pattern::Pairs | Pattern::Wall => false,
        Pattern::OneShot => {
            let bytes = shape.elements() * source.element_bytes;
            is_first && group.is_some_and(|group| bytes <= group.slot_bytes)
        }
        Pattern::ReduceScatter => is_first,
        Pattern::AllGather => true,
        Pattern::Direct(_) => {
            let known = !matches!(shape.space, Space::Pairs(PairCounts::Own { .. }));
            known && (is_first || all_want_all)
        }
    }
}

/// The different ranges that a step sends, each with the first transfer that sends it.
fn lanes(step: &Step) -> impl Iterator<Item = (usize, &Range<usize>)> {
    let sent = step.outgoing.iter().map(|out| &out.elements).enumerate();
    let is_new = |at: usize, elements: &Range<usize>| {
        !elements.is_empty() && step.outgoing[..at].iter().all(|out| out.elements != *elements)
    };
    sent.filter(move |(at, elements)| is_new(*at, elements))
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::{Shape, Topology, algorithms};

    use super::*;
    use crate::program::{Action, GroupShape, Program, Tuning};

    /// Members decide alike how they take, based on where all of them have what is taken.
    #[test]
    fn who_takes_from_inputs_only_finds_everything_there() {
        let lengths = [[801; 6], [3, 0, 40, 1, 7, 0]];
        for (algorithm, lengths) in algorithms(PlanKind::AllGather)
            .iter()
            .flat_map(|algorithm| lengths.iter().map(move |lengths| (algorithm, lengths)))
        {
            let topology = Topology::nodes(&[2, 3, 1]);
            let shape = Shape::blocks(topology, PlanKind::AllGather, lengths);
            let pulls = [2, 3, 4].map(|rank| {
                pulls(&Source {
                    algorithm: *algorithm,
                    shape: &shape,
                    rank,
                    element_bytes: 4,
                    average: false,
                    scales: false,
                    in_place: false,
                    tuning: Tuning { slice_bytes: 256 << 10, window: 4 },
                    group: Some(GroupShape { members: &[2, 3, 4], slot_bytes: 0 }),
                })
            });
            for pull in pulls.iter().flatten().filter(|pull| pull.from_inputs) {
                let sources = pull.takes.iter().flat_map(|take| &take.sources);
                let name = algorithm.name();
                assert!(sources.clone().all(|it| it.place.memory == Memory::Input), "{name}");
            }
            let alike = |pull: &Pull| (pull.from_inputs, pull.longest, pull.lanes_max);
            let [first, others @ ..] =
                pulls.map(|pulls| pulls.iter().map(alike).collect::<Vec<_>>());
            assert!(others.iter().all(|other| *other == first), "{}", algorithm.name());
        }
    }

    fn pulls(source: &Source<'_>) -> Vec<Pull> {
        let actions = Program::build(source).actions.into_iter();
        let pull = |action| if let Action::Pull(pull) = action { Some(pull) } else { None };
        actions.filter_map(pull).collect()
    }
}
