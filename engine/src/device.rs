//! Collectives on device memory: one rank's steps of a plan as a queue of device operations.
//!
//! A collective on host memory is executed step by step by a thread that waits for messages. On
//! device memory, it is *enqueued*: a stream executes copies, folds, signals and waits in order,
//! and no thread takes part. Data is *pulled*: a rank reads its operands directly from its peers'
//! memories, at the places that the peers' own placement gives, and writes only its own memory.
//! Ranks are ordered by flags: a peer may read what is [`Flag::Ready`], and a rank may overwrite
//! what its peers have [`Flag::Taken`].
//!
//! Nothing here knows of CUDA. [`DeviceProgram::build`] is a pure function, like the plans: each
//! rank lays out the operations of *all* ranks (`layout`), finds which reads and writes of
//! different ranks have to be ordered, and keeps the fewest flags that order them all (`ordering`).
//! Both ends of a flag therefore agree on its number without a message.

mod cost;
mod layout;
mod one_launch;
mod ordering;
mod results;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use unisum_algorithms::{Algorithm, Rank, Shape};

pub use super::placement::{Memory, Place};
pub use cost::{Candidate, DeviceFigures, candidates, seconds};
use layout::{Kind, Layout, Work};
pub use one_launch::{STAGING_MEMORIES, multimem_seconds, one_launch, one_launch_seconds};
use ordering::Ordering;

/// What a device program is compiled from. All but `rank` has to be the same on all ranks.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSource<'a> {
    /// The algorithm.
    pub algorithm: &'a dyn Algorithm,
    /// World, counts and root: one shape for all ranks, or one for each rank, which an all-to-all
    /// of any lengths needs.
    pub shapes: &'a [Shape],
    /// The rank that executes the program.
    pub rank: Rank,
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Whether the sum is divided by the number of ranks.
    pub average: bool,
    /// Whether inputs are multiplied by a factor first.
    pub scales: bool,
    /// For each rank, whether its input and output are one memory. Not in an all-to-all.
    pub in_place: &'a [bool],
    /// The largest transfer between two ranks; [`usize::MAX`] leaves all of them whole. Steps that
    /// ranks take as a group are never cut.
    pub slice_bytes: usize,
}

impl DeviceSource<'_> {
    fn world(&self) -> usize {
        self.shapes[0].world()
    }

    fn shape(&self, rank: Rank) -> &Shape {
        if self.shapes.len() == 1 { &self.shapes[0] } else { &self.shapes[rank] }
    }
}

/// What a flag says to the rank whose memory it lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    /// What you read from me is there.
    Ready,
    /// I have read what I needed from you.
    Taken,
}

/// One flag from or to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The rank that is told by a signal, or that a wait waits for.
    pub peer: Rank,
    /// What it says.
    pub flag: Flag,
    /// It is the `count`-th such flag between the two ranks in this direction and collective,
    /// from 1.
    pub count: u32,
}

/// Bytes in the memory of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Whose memory it is; may be the own rank.
    pub rank: Rank,
    /// Which memory, and the byte where the operand begins.
    pub place: Place,
}

/// One copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCopy {
    /// Where the bytes are.
    pub from: Operand,
    /// Where they go in the own memory.
    pub to: Place,
    /// How many.
    pub bytes: usize,
}

/// One reduction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFold {
    /// The operands in the order in which they are folded: rank order. With one, the fold only
    /// scales.
    pub sources: Vec<Operand>,
    /// Where the result goes in the own memory; may be one of the sources.
    pub to: Place,
    /// Bytes of each operand.
    pub bytes: usize,
    /// The result is the full sum of an average and is divided by the number of ranks.
    pub divides: bool,
    /// The operands are inputs of a pre-multiplied sum and are multiplied by the factor.
    pub scales: bool,
    /// The result is final: an infinite or NaN element is one of the collective's result.
    pub watches: bool,
}

/// An entry of the queue. It begins when all earlier ones have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Sets flags of peers; at most one for each peer.
    Signal(Vec<Note>),
    /// Waits for flags from peers; at most one from each peer.
    Wait(Vec<Note>),
    /// Copies that neither overlap nor read what another one writes: they may run at once. They
    /// come in the order in which a rank that copies one after the other should take them, so that
    /// not all ranks read from the same one.
    Copy(Vec<DeviceCopy>),
    /// A reduction.
    Fold(DeviceFold),
}

/// How many flags of each kind a collective sends over one pair of ranks, in one direction. An
/// executor whose flags count on from call to call advances by this much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Of [`Flag::Ready`].
    pub ready: u32,
    /// Of [`Flag::Taken`].
    pub taken: u32,
}

impl Totals {
    /// The total of one kind.
    pub const fn of(&self, flag: Flag) -> u32 {
        match flag {
            Flag::Ready => self.ready,
            Flag::Taken => self.taken,
        }
    }

    const fn of_mut(&mut self, flag: Flag) -> &mut u32 {
        match flag {
            Flag::Ready => &mut self.ready,
            Flag::Taken => &mut self.taken,
        }
    }
}

/// One rank's part of a collective on device memory.
///
/// When the queue has ended, the rank has its result, and no peer will read any of its memories for
/// this collective any more: input, output and scratch memory may be reused at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProgram {
    /// The queue.
    pub operations: Vec<Operation>,
    /// The scratch memory of each rank in bytes, from rank 0. Peers read it, too.
    pub scratch: Vec<usize>,
    /// How many flags this rank sends to each rank, from rank 0.
    pub sent: Vec<Totals>,
    /// How many flags come to it from each rank, from rank 0.
    pub received: Vec<Totals>,
    /// The ranks whose folds with `watches` produced the result of this rank, ascending. Those
    /// folds have ended when the queue has.
    pub watched_by: Vec<Rank>,
    /// The ranks whose result this rank's folds with `watches` produced, ascending: those that have
    /// it among their `watched_by`.
    pub watches_for: Vec<Rank>,
}

impl DeviceProgram {
    /// Compiles the program of one rank.
    ///
    /// Cost: lays out the plans of all ranks, about a microsecond for each transfer of each rank:
    /// keep what is built.
    ///
    /// # Panics
    /// If there is not one shape or one for each rank, if `in_place` does not have an entry for
    /// each rank, or if the lengths of an all-to-all are those of one rank only.
    pub fn build(source: &DeviceSource<'_>) -> Self {
        Schedule::new(source).program(source.rank)
    }

    /// The largest number of operands of a fold.
    pub fn most_sources(&self) -> usize {
        let sources = |operation: &Operation| match operation {
            Operation::Fold(fold) => fold.sources.len(),
            _ => 0,
        };
        self.operations.iter().map(sources).max().unwrap_or(0)
    }
}

/// What all ranks do.
struct Schedule {
    layout: Layout,
    ordering: Ordering,
    average: bool,
    scales: bool,
    watched_by: Vec<Vec<Rank>>,
}

impl Schedule {
    fn new(source: &DeviceSource<'_>) -> Self {
        let world = source.world();
        assert!([1, world].contains(&source.shapes.len()), "one shape, or one for each rank");
        assert_eq!(source.in_place.len(), world, "an entry for each rank");
        let mut layout = Layout::new(source, false);
        if source.scales && !(world > 1 && layout.folds_inputs_only()) {
            layout = Layout::new(source, true);
        }
        let ordering = Ordering::new(&layout);
        let watched_by = results::find(source, &mut layout, &ordering.order);
        let (average, scales) = (source.average, source.scales);
        Self { layout, ordering, average, scales, watched_by }
    }

    fn most_sources(&self) -> usize {
        let nodes = self.layout.members.iter().flat_map(|member| &member.nodes);
        nodes.flat_map(|node| &node.work).map(|work| work.sources.len()).max().unwrap_or(0)
    }

    fn program(&self, rank: Rank) -> DeviceProgram {
        let mut operations = Vec::new();
        let member = &self.layout.members[rank];
        let notes = &self.ordering.notes[rank];
        for (index, notes) in notes.iter().enumerate() {
            if !notes.waits.is_empty() {
                operations.push(Operation::Wait(notes.waits.clone()));
            }
            if let Some(node) = member.nodes.get(index) {
                self.work(rank, &node.work, &mut operations);
            }
            if !notes.signals.is_empty() {
                operations.push(Operation::Signal(notes.signals.clone()));
            }
        }
        let world = self.layout.members.len();
        let (mut sent, mut received) =
            (vec![Totals::default(); world], vec![Totals::default(); world]);
        for operation in &operations {
            let (notes, totals) = match operation {
                Operation::Signal(notes) => (notes, &mut sent),
                Operation::Wait(notes) => (notes, &mut received),
                _ => continue,
            };
            notes.iter().for_each(|note| *totals[note.peer].of_mut(note.flag) = note.count);
        }
        let scratch = self.layout.members.iter().map(|member| member.scratch).collect();
        let watched_by = self.watched_by[rank].clone();
        let watches = |reader: &Rank| self.watched_by[*reader].contains(&rank);
        let watches_for = (0..self.watched_by.len()).filter(watches).collect();
        DeviceProgram { operations, scratch, sent, received, watched_by, watches_for }
    }

    fn work(&self, rank: Rank, work: &[Work], operations: &mut Vec<Operation>) {
        let mut copies = Vec::new();
        for it in work {
            match it.kind {
                Kind::Fold => operations.extend(self.folds(it)),
                Kind::Scale => operations.push(Operation::Fold(DeviceFold {
                    sources: it.sources.clone(),
                    to: it.to,
                    bytes: it.bytes,
                    divides: false,
                    scales: true,
                    watches: self.layout.members.len() == 1,
                })),
                Kind::Copy | Kind::Land => {
                    copies.push(DeviceCopy { from: it.sources[0], to: it.to, bytes: it.bytes });
                }
            }
        }
        if !copies.is_empty() {
            operations.push(Operation::Copy(joined(copies, rank, self.layout.members.len())));
        }
    }

    /// The folds of one arrival: one, unless only a part of it is final.
    fn folds<'a>(&'a self, work: &'a Work) -> impl Iterator<Item = Operation> + 'a {
        let scales = self.scales && work.reads_inputs();
        work.parts.iter().map(move |part| {
            let at = |place: Place| place.plus(part.bytes.start);
            let sources = work.sources.iter();
            Operation::Fold(DeviceFold {
                sources: sources.map(|it| Operand { place: at(it.place), ..*it }).collect(),
                to: at(work.to),
                bytes: part.bytes.len(),
                divides: self.average && part.is_final,
                scales,
                watches: part.is_final,
            })
        })
    }
}

/// Copies that lie side by side at both ends made one, those from the next higher ranks first.
fn joined(mut copies: Vec<DeviceCopy>, rank: Rank, world: usize) -> Vec<DeviceCopy> {
    copies.sort_by_key(|it| ((it.from.rank + world - rank) % world, it.from.place.start));
    let mut joined: Vec<DeviceCopy> = Vec::new();
    for copy in copies {
        match joined.last_mut() {
            Some(last)
                if last.from.rank == copy.from.rank
                    && last.from.place.plus(last.bytes) == copy.from.place
                    && last.to.plus(last.bytes) == copy.to =>
            {
                last.bytes += copy.bytes;
            }
            _ => joined.push(copy),
        }
    }
    joined
}
