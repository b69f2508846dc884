//! In which memory of a rank each virtual element of a plan lies.
//!
//! Plans name elements of the collective's space. A rank's input and output hold the elements that
//! it contributes and wants; everything else that passes through it lies in scratch memory. The
//! input is never written. The first write of an element *renames* it, as a processor renames
//! registers, and later steps read it where it was written. An out-of-place collective therefore
//! needs no copy before it starts; in place (one memory for input and output), only the addresses
//! change.

use std::ops::Range;

use unisum_algorithms::{Rank, Shape, Step};

/// One of a rank's memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Memory {
    /// What the caller contributes; never written.
    Input,
    /// Where the caller wants the result.
    Output,
    /// What passes through the rank.
    Scratch,
}

/// A place in one of the memories: of an element here, of a byte in compiled programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which memory.
    pub memory: Memory,
    /// The first element, or byte.
    pub start: usize,
}

impl Place {
    pub(crate) const fn new(memory: Memory, start: usize) -> Self {
        Self { memory, start }
    }

    pub(crate) const fn plus(self, offset: usize) -> Self {
        Self { start: self.start + offset, ..self }
    }

    pub(crate) const fn in_bytes(self, element_bytes: usize) -> Self {
        Self { start: self.start * element_bytes, ..self }
    }
}

/// Whether input and output are one memory, and how they overlap: the byte of the output at which
/// the input begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Overlay(Option<isize>);

impl Overlay {
    /// Two memories that do not overlap.
    pub(crate) const APART: Self = Self(None);

    /// The input lies in the output, or the other way round, as `shape` defines it for a rank.
    pub(crate) fn in_place(shape: &Shape, rank: Rank, element_bytes: usize) -> Self {
        let start = |ranges: Vec<Range<usize>>| ranges.first().map_or(0, |range| range.start);
        let [input, output] = [shape.contributes(rank), shape.wants(rank)].map(start);
        Self(Some((input as isize - output as isize) * element_bytes as isize))
    }

    /// A position by which two places in one memory can be compared.
    pub(crate) const fn of(self, place: Place) -> (Memory, isize) {
        match (self.0, place.memory) {
            (Some(offset), Memory::Input) => (Memory::Output, place.start as isize + offset),
            _ => (place.memory, place.start as isize),
        }
    }
}

/// Elements to be copied from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: Place,
    pub(crate) to: Place,
    pub(crate) count: usize,
}

/// Where a transfer reads (a send, or this rank's operand of a reduction) and where it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) reads: Option<Place>,
    pub(crate) writes: Option<Place>,
}

/// The places of one rank's plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placement {
    /// For each step: its outgoing, then its incoming transfers.
    pub(crate) located: Vec<Located>,
    /// Elements of scratch memory.
    pub(crate) scratch: usize,
    /// What must be copied before the first step.
    pub(crate) first: Vec<Move>,
    /// What must be copied after the last step.
    pub(crate) last: Vec<Move>,
}

/// One use of a range by a transfer.
struct Access {
    range: Range<usize>,
    reads: bool,
    writes: bool,
}

impl Placement {
    /// Places the transfers of `steps`, which `rank` executes in this order. With `renames_all`,
    /// every input element is written (scaled, for example) to where it is processed before the
    /// first step.
    pub(crate) fn new<'a>(
        shape: &Shape,
        rank: Rank,
        steps: impl Iterator<Item = &'a Step>,
        renames_all: bool,
    ) -> Self {
        let accesses: Vec<Access> = steps.flat_map(accesses).collect();
        let mut map = Map::new(shape, rank, &accesses);
        map.join(&accesses);
        if renames_all {
            map.rename_all();
        }
        loop {
            match map.locate(&accesses) {
                Ok(located) => return map.finish(located),
                // Elements that are sent in one message but lie apart are brought together first.
                Err(apart) => apart.for_each(|piece| map.is_first[piece] |= map.is_input(piece)),
            }
        }
    }
}

fn accesses(step: &Step) -> impl Iterator<Item = Access> {
    let sends = step.outgoing.iter().map(|out| Access {
        range: out.elements.clone(),
        reads: true,
        writes: false,
    });
    let arrivals = step.incoming.iter().map(|incoming| Access {
        range: incoming.elements.clone(),
        reads: incoming.on_arrival == unisum_algorithms::OnArrival::Reduce,
        writes: true,
    });
    sends.chain(arrivals)
}

/// The space of one rank, cut wherever a range begins or ends.
struct Map {
    /// Piece i is `cuts[i]..cuts[i + 1]`.
    cuts: Vec<usize>,
    /// Where each piece lies in the input and the output.
    input: Vec<Option<usize>>,
    output: Vec<Option<usize>>,
    /// The first piece of the run that each piece belongs to: pieces that transfers touch together.
    run: Vec<usize>,
    /// Where a piece is processed, if it is ever written.
    work: Vec<Option<Place>>,
    /// Pieces that are copied to where they are processed before the first step.
    is_first: Vec<bool>,
    /// Pieces that have been written at the current point of the walk through the steps.
    is_written: Vec<bool>,
    scratch: usize,
}

impl Map {
    fn new(shape: &Shape, rank: Rank, accesses: &[Access]) -> Self {
        let (inputs, outputs) = (shape.contributes(rank), shape.wants(rank));
        let ranges = accesses.iter().map(|access| &access.range).chain(&inputs).chain(&outputs);
        let mut cuts: Vec<usize> = ranges.flat_map(|range| [range.start, range.end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let pieces = cuts.len().saturating_sub(1);
        Self {
            input: places(&cuts, &inputs),
            output: places(&cuts, &outputs),
            run: (0..pieces).collect(),
            work: vec![None; pieces],
            is_first: vec![false; pieces],
            is_written: vec![false; pieces],
            cuts,
            scratch: 0,
        }
    }

    fn pieces(&self, range: &Range<usize>) -> Range<usize> {
        let at = |element: usize| self.cuts.partition_point(|&cut| cut < element);
        at(range.start)..at(range.end)
    }

    fn len(&self, piece: usize) -> usize {
        self.cuts[piece + 1] - self.cuts[piece]
    }

    fn is_input(&self, piece: usize) -> bool {
        self.input[piece].is_some()
    }

    /// Decides where each piece is processed. What one transfer touches must be contiguous: in the
    /// output if all of it is wanted, in scratch memory otherwise.
    fn join(&mut self, accesses: &[Access]) {
        // Transfers that overlap make one run of pieces: `reach` is the last piece of a transfer
        // that begins with a piece.
        let pieces = self.run.len();
        let mut reach: Vec<usize> = (0..pieces).collect();
        let mut is_written = vec![false; pieces];
        for access in accesses {
            let touched = self.pieces(&access.range);
            if let Some(last) = touched.clone().next_back() {
                reach[touched.start] = reach[touched.start].max(last);
            }
            if access.writes {
                is_written[touched].fill(true);
            }
        }
        let mut at = 0;
        while at < pieces {
            let (start, mut end) = (at, reach[at]);
            while at <= end {
                end = end.max(reach[at]);
                self.run[at] = start;
                at += 1;
            }
            self.place_run(start..at, is_written[start..at].contains(&true));
        }
    }

    fn place_run(&mut self, run: Range<usize>, is_written: bool) {
        let is_wanted = run.clone().all(|piece| self.output[piece].is_some());
        for piece in run {
            self.work[piece] = match self.output[piece] {
                Some(start) if is_wanted => Some(Place::new(Memory::Output, start)),
                // Never written and never moved: no place is needed.
                _ if !is_written => None,
                _ => {
                    self.scratch += self.len(piece);
                    Some(Place::new(Memory::Scratch, self.scratch - self.len(piece)))
                }
            };
        }
    }

    fn rename_all(&mut self) {
        for piece in 0..self.run.len() {
            if self.is_input(piece) {
                self.is_first[piece] = true;
                self.scratch_for(piece);
            }
        }
    }

    /// Gives a run that is only read a place where it is brought together.
    fn scratch_for(&mut self, piece: usize) {
        if self.work[piece].is_none() {
            let start = self.run[piece];
            let end = (start..self.run.len()).find(|&other| self.run[other] != start);
            self.place_run(start..end.unwrap_or(self.run.len()), true);
        }
    }

    /// The places of all transfers, or the first pieces that turn out not to be contiguous.
    fn locate(&mut self, accesses: &[Access]) -> Result<Vec<Located>, Range<usize>> {
        self.is_written.clone_from(&self.is_first);
        let mut located = Vec::with_capacity(accesses.len());
        for access in accesses {
            let pieces = self.pieces(&access.range);
            let reads = match access.reads && !pieces.is_empty() {
                true => Some(self.together(pieces.clone())?),
                false => None,
            };
            let mut writes = None;
            if access.writes && !pieces.is_empty() {
                writes = self.work[pieces.start];
                self.is_written[pieces].fill(true);
            }
            located.push(Located { reads, writes });
        }
        Ok(located)
    }

    /// Where pieces lie, if they are contiguous.
    fn together(&mut self, pieces: Range<usize>) -> Result<Place, Range<usize>> {
        let first = self.now(pieces.start);
        let mut next = first;
        for piece in pieces.clone() {
            if self.now(piece) != next {
                pieces.clone().for_each(|piece| self.scratch_for(piece));
                return Err(pieces);
            }
            next.start += self.len(piece);
        }
        Ok(first)
    }

    /// Where a piece's value is now.
    fn now(&self, piece: usize) -> Place {
        match (self.is_written[piece], self.work[piece], self.input[piece]) {
            (true, Some(place), _) => place,
            (_, _, Some(start)) => Place::new(Memory::Input, start),
            _ => panic!("a proven plan reads no element that has no value"),
        }
    }

    fn finish(self, located: Vec<Located>) -> Placement {
        let mut placement =
            Placement { located, scratch: self.scratch, first: Vec::new(), last: Vec::new() };
        for piece in 0..self.run.len() {
            let count = self.len(piece);
            let input = self.input[piece].map(|start| Place::new(Memory::Input, start));
            if let (true, Some(from), Some(to)) = (self.is_first[piece], input, self.work[piece]) {
                append(&mut placement.first, Move { from, to, count });
            }
            let Some(start) = self.output[piece] else { continue };
            let to = Place::new(Memory::Output, start);
            let from = self.now(piece);
            if from != to {
                append(&mut placement.last, Move { from, to, count });
            }
        }
        placement
    }
}

/// Where each piece lies in a memory that holds `ranges` one after the other.
fn places(cuts: &[usize], ranges: &[Range<usize>]) -> Vec<Option<usize>> {
    let mut before = 0;
    let mut ranges = ranges.iter().peekable();
    let place = |piece: &[usize]| {
        while let Some(range) = ranges.next_if(|range| range.end <= piece[0]) {
            before += range.len();
        }
        let range = ranges.peek().filter(|range| range.start <= piece[0])?;
        Some(before + piece[0] - range.start)
    };
    cuts.windows(2).map(place).collect()
}

/// Appends a move, merging it with the previous one if it continues it.
fn append(moves: &mut Vec<Move>, next: Move) {
    if let Some(last) = moves.last_mut() {
        let goes_on = |a: Place, b: Place| a.memory == b.memory && a.start + last.count == b.start;
        if goes_on(last.from, next.from) && goes_on(last.to, next.to) {
            last.count += next.count;
            return;
        }
    }
    moves.push(next);
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::{
        Incoming, OnArrival, Outgoing, Pattern, PlanKind, Topology, algorithms,
    };

    use super::*;

    const COUNT: usize = 12;

    fn place(shape: &Shape, rank: Rank, steps: &[Step]) -> Placement {
        Placement::new(shape, rank, steps.iter(), false)
    }

    fn exchange(send: Range<usize>, receive: Range<usize>) -> Step {
        let (from, on_arrival) = (vec![1], OnArrival::Reduce);
        Step {
            pattern: Pattern::Pairs,
            outgoing: vec![Outgoing { to: 1, elements: send }],
            incoming: vec![Incoming { from, elements: receive, on_arrival }],
        }
    }

    #[test]
    fn reads_come_from_the_input_until_the_output_has_been_written() {
        let shape = Shape::flat(2, COUNT);
        let steps = [exchange(0..6, 6..12), exchange(6..12, 0..6)];
        let placement = place(&shape, 0, &steps);
        let input = |start| Some(Place::new(Memory::Input, start));
        let output = |start| Some(Place::new(Memory::Output, start));
        let expected = [
            Located { reads: input(0), writes: None },
            Located { reads: input(6), writes: output(6) },
            Located { reads: output(6), writes: None },
            Located { reads: input(0), writes: output(0) },
        ];
        assert_eq!(placement.located, expected);
        assert_eq!((placement.scratch, placement.first, placement.last), (0, vec![], vec![]));
    }

    #[test]
    fn what_is_sent_in_one_message_is_brought_together_first() {
        let shape = Shape::flat(2, COUNT);
        let steps = [exchange(0..1, 0..4), exchange(0..12, 0..12)];
        let placement = place(&shape, 0, &steps);
        let [from, to] = [Memory::Input, Memory::Output].map(|memory| Place::new(memory, 0));
        assert_eq!(placement.first, [Move { from, to, count: COUNT }]);
        assert!(placement.located.iter().all(|it| it.reads == Some(to) || it.reads.is_none()));
    }

    #[test]
    fn what_nobody_wants_here_passes_through_scratch_memory() {
        let shape = Shape::whole(Topology::flat(2), PlanKind::Reduce { root: 1 }, COUNT);
        let placement = place(&shape, 0, &[exchange(0..2, 4..8), exchange(4..8, 4..4)]);
        let scratch = Some(Place::new(Memory::Scratch, 0));
        let reads: Vec<_> = placement.located.iter().map(|it| it.reads).collect();
        let input = |start| Some(Place::new(Memory::Input, start));
        assert_eq!(reads, [input(0), input(4), scratch, None]);
        assert_eq!((placement.scratch, placement.first, placement.last), (4, vec![], vec![]));
    }

    /// For every plan: no transfer writes the input, what a rank wants ends in its output, and
    /// nothing leaves the bounds of the memories.
    #[test]
    fn no_plan_writes_its_input_or_leaves_its_memories() {
        let topology = Topology::nodes(&[2, 3, 1]);
        let roots = [0, 4].into_iter().flat_map(|root| {
            [PlanKind::Reduce { root }, PlanKind::Broadcast { root }]
                .map(|collective| Shape::whole(topology.clone(), collective, COUNT))
        });
        let blocks = [PlanKind::AllGather, PlanKind::ReduceScatter]
            .map(|collective| Shape::blocks(topology.clone(), collective, &[5, 0, 3, 1, 2, 1]));
        let all = [Shape::all_reduce(topology.clone(), COUNT)];
        for shape in roots.chain(blocks).chain(all) {
            for algorithm in algorithms(shape.collective) {
                for rank in 0..shape.world() {
                    check(&shape, rank, *algorithm);
                }
            }
        }
    }

    fn check(shape: &Shape, rank: Rank, algorithm: &dyn unisum_algorithms::Algorithm) {
        let steps: Vec<Step> = algorithm.steps(shape, rank).collect();
        let placement = place(shape, rank, &steps);
        let total = |ranges: Vec<Range<usize>>| ranges.iter().map(Range::len).sum::<usize>();
        let (input, output) = (total(shape.contributes(rank)), total(shape.wants(rank)));
        let fits = |place: Place, count: usize| {
            let len = match place.memory {
                Memory::Input => input,
                Memory::Output => output,
                Memory::Scratch => placement.scratch,
            };
            assert!(place.start + count <= len, "{} of rank {rank}: {place:?}", algorithm.name());
        };
        let counts = steps.iter().flat_map(accesses).map(|access| access.range.len());
        for (located, count) in placement.located.iter().zip(counts) {
            located.reads.into_iter().chain(located.writes).for_each(|place| fits(place, count));
            assert!(located.writes.is_none_or(|place| place.memory != Memory::Input));
        }
        for step in placement.first.iter().chain(&placement.last) {
            fits(step.from, step.count);
            fits(step.to, step.count);
            assert!(step.to.memory != Memory::Input);
        }
        assert!(placement.last.iter().all(|step| step.to.memory == Memory::Output));
    }
}
