//! A world of devices on which programs are executed in any order, and which sees every race.
//!
//! Each element of each rank's memories has a symbolic value, and knows when it was written and by
//! whom it was read. Ranks carry vector clocks, and only flags pass them on: a read of something
//! whose write is not known to have ended is a race, and so is a write over something whose reads
//! are not known to have ended, whether or not it did harm in this order of execution.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use unisum_algorithms::{OnArrival, PlanKind, Rank, Shape, Step};

use super::{
    DeviceCopy, DeviceFold, DeviceProgram, DeviceSource, Flag, Memory, Note, Operand, Operation,
    Place,
};

pub(super) const ELEMENT_BYTES: usize = 4;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A rank read what another may not have written yet, or may be writing.
    ReadsTooEarly { rank: Rank, from: Rank, element: usize },
    /// A rank wrote what another may be reading.
    WritesTooEarly { rank: Rank, reader: Rank, element: usize },
    /// A rank read what has no value, or folded otherwise than it says.
    NoValue { rank: Rank, from: Rank, element: usize },
    /// A flag was set whose predecessor was not.
    SkipsFlag { rank: Rank, note: Note },
    /// A result is not what the plan makes of the inputs.
    Result { rank: Rank, element: usize },
    /// A result was not watched, or something else was.
    Watch { rank: Rank, element: usize },
    /// All ranks that have not ended wait.
    Deadlock,
}

type Value = usize;
const NOTHING: Value = usize::MAX;

/// How a value came about. A fold keeps its operands in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Expression {
    Input { call: usize, rank: Rank, element: usize },
    Scaled(Value),
    Folded(Vec<Value>),
    Divided(Value),
}

/// All values met so far; equal numbers are equal expressions.
#[derive(Default)]
struct Values {
    known: HashMap<Expression, Value>,
    all: Vec<Expression>,
}

impl Values {
    fn of(&mut self, expression: Expression) -> Value {
        let next = self.all.len();
        let value = *self.known.entry(expression.clone()).or_insert(next);
        if value == next {
            self.all.push(expression);
        }
        value
    }

    fn inputs(&self, value: Value) -> usize {
        match &self.all[value] {
            Expression::Input { .. } => 1,
            Expression::Scaled(of) | Expression::Divided(of) => self.inputs(*of),
            Expression::Folded(operands) => operands.iter().map(|it| self.inputs(*it)).sum(),
        }
    }
}

#[derive(Clone)]
struct Cell {
    value: Value,
    /// When its owner wrote it, and when each rank read it, by the clock of that rank.
    written: usize,
    read: Vec<usize>,
}

/// One rank.
struct Device {
    cells: Vec<Cell>,
    /// Where each memory begins in `cells`.
    starts: [usize; 3],
    /// How much each rank is known to have done.
    clock: Vec<usize>,
    call: usize,
    next: usize,
    /// For each peer and flag: how many came before this call.
    bases: Vec<[usize; 2]>,
}

/// The world.
pub(super) struct World<'a> {
    source: &'a DeviceSource<'a>,
    /// Those of all ranks, or of all ranks for one call after the other, in turns.
    programs: &'a [DeviceProgram],
    /// Whether nothing else uses scratch memory between calls.
    keeps_scratch: bool,
    calls: usize,
    devices: Vec<Device>,
    /// For each pair of ranks, from · world + to, and flag: the sender's clock at each setting.
    flags: Vec<[Vec<Vec<usize>>; 2]>,
    values: Values,
    /// For each call, what each rank has to end with.
    expected: Vec<Vec<Vec<Value>>>,
    watched: HashSet<(Rank, Value)>,
}

/// Which of the ranks that can go on does so next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Schedule {
    Random(u64),
    Lowest,
    Highest,
}

impl<'a> World<'a> {
    /// A world in which every rank calls the collective a number of times in a row.
    pub(super) fn new(
        source: &'a DeviceSource<'a>,
        programs: &'a [DeviceProgram],
        calls: usize,
    ) -> Self {
        let world = source.in_place.len();
        let mut it = Self {
            source,
            programs,
            keeps_scratch: false,
            calls,
            devices: (0..world).map(|rank| device(source, &programs[rank], rank)).collect(),
            flags: vec![Default::default(); world * world],
            values: Values::default(),
            expected: Vec::new(),
            watched: HashSet::new(),
        };
        for call in 0..calls {
            let expected = it.expect(call);
            it.expected.push(expected);
        }
        it
    }

    /// The same with scratch memory that nothing else uses between calls.
    pub(super) const fn keeping_scratch(mut self) -> Self {
        self.keeps_scratch = true;
        self
    }

    /// What a rank does in the call that it is in.
    fn program(&self, rank: Rank) -> &'a DeviceProgram {
        let world = self.devices.len();
        &self.programs[(self.devices[rank].call * world + rank) % self.programs.len()]
    }

    /// Executes all programs.
    pub(super) fn run(&mut self, mut schedule: Schedule) -> Result<(), Fault> {
        let world = self.devices.len();
        (0..world).try_for_each(|rank| self.begin(rank))?;
        loop {
            let running = |rank: &Rank| self.devices[*rank].call < self.calls;
            let able: Vec<Rank> =
                (0..world).filter(running).filter(|&rank| self.is_able(rank)).collect();
            let Some(&rank) = schedule.choose(&able) else {
                let is_over = !(0..world).any(|rank| running(&rank));
                return if is_over { Ok(()) } else { Err(Fault::Deadlock) };
            };
            self.step(rank)?;
        }
    }

    fn is_able(&self, rank: Rank) -> bool {
        match self.program(rank).operations.get(self.devices[rank].next) {
            Some(Operation::Wait(notes)) => {
                notes.iter().all(|note| self.clock_at(rank, note).is_some())
            }
            _ => true,
        }
    }

    /// The clock of the peer when it set the flag that `rank` waits for, if it has.
    fn clock_at(&self, rank: Rank, note: &Note) -> Option<&Vec<usize>> {
        let base = self.devices[rank].bases[note.peer][note.flag as usize];
        let index = base + note.count as usize - 1;
        self.flags[note.peer * self.devices.len() + rank][note.flag as usize].get(index)
    }

    fn step(&mut self, rank: Rank) -> Result<(), Fault> {
        self.devices[rank].clock[rank] += 1;
        match self.program(rank).operations.get(self.devices[rank].next) {
            None => return self.end(rank),
            Some(Operation::Signal(notes)) => {
                notes.iter().try_for_each(|note| self.signal(rank, note))?;
            }
            Some(Operation::Wait(notes)) => {
                for note in notes {
                    let known = self.clock_at(rank, note).expect("it is able to").clone();
                    let clock = &mut self.devices[rank].clock;
                    clock.iter_mut().zip(known).for_each(|(mine, known)| *mine = known.max(*mine));
                }
            }
            Some(Operation::Copy(copies)) => self.copy(rank, copies)?,
            Some(Operation::Fold(fold)) => self.fold(rank, fold)?,
        }
        self.devices[rank].next += 1;
        Ok(())
    }

    fn signal(&mut self, rank: Rank, note: &Note) -> Result<(), Fault> {
        let world = self.devices.len();
        let before: u32 = self.program(rank).sent[note.peer].of(note.flag);
        let before = before as usize * self.devices[rank].call;
        let clock = self.devices[rank].clock.clone();
        let set = &mut self.flags[rank * world + note.peer][note.flag as usize];
        set.push(clock);
        match set.len() == before + note.count as usize {
            true => Ok(()),
            false => Err(Fault::SkipsFlag { rank, note: *note }),
        }
    }

    /// All copies read before any of them writes, so that one that reads what another writes is
    /// seen: by the wrong result.
    fn copy(&mut self, rank: Rank, copies: &[DeviceCopy]) -> Result<(), Fault> {
        let mut read = Vec::new();
        for copy in copies {
            for at in elements(copy.bytes) {
                read.push(self.read(rank, copy.from, at)?);
            }
        }
        let mut read = read.into_iter();
        for copy in copies {
            for (at, value) in elements(copy.bytes).zip(&mut read) {
                self.write(rank, copy.to, at, value)?;
            }
        }
        Ok(())
    }

    fn fold(&mut self, rank: Rank, fold: &DeviceFold) -> Result<(), Fault> {
        assert!(fold.sources.is_sorted_by_key(|source| source.rank), "in rank order");
        for at in elements(fold.bytes) {
            let mut operands = Vec::new();
            for source in &fold.sources {
                let value = self.read(rank, *source, at)?;
                let is_input = matches!(self.values.all[value], Expression::Input { .. });
                if fold.scales && !is_input {
                    return Err(Fault::NoValue { rank, from: source.rank, element: at });
                }
                let scaled = Expression::Scaled(value);
                operands.push(if fold.scales { self.values.of(scaled) } else { value });
            }
            let mut value = match operands[..] {
                [only] => only,
                _ => self.values.of(Expression::Folded(operands)),
            };
            if fold.divides {
                value = self.values.of(Expression::Divided(value));
            }
            if fold.watches {
                self.watched.insert((rank, value));
                if self.values.inputs(value) != self.devices.len() {
                    return Err(Fault::Watch { rank, element: at });
                }
            }
            self.write(rank, fold.to, at, value)?;
        }
        Ok(())
    }

    fn read(&mut self, rank: Rank, operand: Operand, at: usize) -> Result<Value, Fault> {
        let from = operand.rank;
        let [known, now] = [from, rank].map(|it| self.devices[rank].clock[it]);
        let element = self.devices[from].index(operand.place) + at;
        let cell = &mut self.devices[from].cells[element];
        cell.read[rank] = now;
        match cell.value {
            _ if from != rank && cell.written > known => {
                Err(Fault::ReadsTooEarly { rank, from, element })
            }
            NOTHING => Err(Fault::NoValue { rank, from, element }),
            value => Ok(value),
        }
    }

    fn write(&mut self, rank: Rank, place: Place, at: usize, value: Value) -> Result<(), Fault> {
        let element = self.devices[rank].index(place) + at;
        self.write_cell(rank, element, value)
    }

    fn write_cell(&mut self, rank: Rank, element: usize, value: Value) -> Result<(), Fault> {
        let device = &mut self.devices[rank];
        let cell = &mut device.cells[element];
        let known = device.clock.iter().zip(&cell.read);
        let too_early = |(reader, (known, read)): (Rank, (&usize, &usize))| {
            (reader != rank && read > known).then_some(reader)
        };
        if let Some(reader) = known.enumerate().find_map(too_early) {
            return Err(Fault::WritesTooEarly { rank, reader, element });
        }
        (cell.value, cell.written) = (value, device.clock[rank]);
        Ok(())
    }

    /// What the caller does between two calls: new inputs, and other use of all other memory.
    fn begin(&mut self, rank: Rank) -> Result<(), Fault> {
        let device = &mut self.devices[rank];
        device.clock[rank] += 1;
        let (call, cells) = (device.call, device.cells.len());
        let mut fresh = vec![NOTHING; cells];
        let inputs = device.index(Place::new(Memory::Input, 0))..;
        let contributed = self.source.shape(rank).contributes(rank).into_iter().flatten();
        for (cell, element) in inputs.zip(contributed) {
            fresh[cell] = self.values.of(Expression::Input { call, rank, element });
        }
        let kept = if self.keeps_scratch { device.starts[2]..cells } else { cells..cells };
        let mut fresh = (0..cells).zip(fresh).filter(|(cell, _)| !kept.contains(cell));
        fresh.try_for_each(|(cell, value)| self.write_cell(rank, cell, value))
    }

    fn end(&mut self, rank: Rank) -> Result<(), Fault> {
        let call = self.devices[rank].call;
        for at in 0..self.expected[call][rank].len() {
            let expected = self.expected[call][rank][at];
            let from = Operand { rank, place: Place::new(Memory::Output, 0) };
            let value = self.read(rank, from, at)?;
            if value != expected {
                return Err(Fault::Result { rank, element: at });
            }
            let folds =
                matches!(self.values.all[value], Expression::Folded(_) | Expression::Divided(_));
            let watchers = &self.program(rank).watched_by;
            if folds && !watchers.iter().any(|&it| self.watched.contains(&(it, value))) {
                return Err(Fault::Watch { rank, element: at });
            }
        }
        let received = &self.program(rank).received;
        let device = &mut self.devices[rank];
        (device.call, device.next) = (call + 1, 0);
        for (bases, totals) in device.bases.iter_mut().zip(received) {
            bases[Flag::Ready as usize] += totals.ready as usize;
            bases[Flag::Taken as usize] += totals.taken as usize;
        }
        self.begin(rank)
    }

    /// What the plans make of the inputs, step by step, on all ranks at once.
    fn expect(&mut self, call: usize) -> Vec<Vec<Value>> {
        let (source, world) = (self.source, self.devices.len());
        let mut held: Vec<HashMap<usize, Value>> = vec![HashMap::new(); world];
        for (rank, held) in held.iter_mut().enumerate() {
            for element in source.shape(rank).contributes(rank).into_iter().flatten() {
                let input = self.values.of(Expression::Input { call, rank, element });
                let scaled = Expression::Scaled(input);
                let value = if source.scales { self.values.of(scaled) } else { input };
                held.insert(element, value);
            }
        }
        let mut plans: Vec<_> =
            (0..world).map(|rank| source.algorithm.steps(source.shape(rank), rank)).collect();
        loop {
            let steps: Vec<Step> = plans.iter_mut().filter_map(Iterator::next).collect();
            if steps.is_empty() {
                break;
            }
            let before = held.clone();
            for (rank, step) in steps.iter().enumerate() {
                for arrival in &step.incoming {
                    for element in arrival.elements.clone() {
                        let of = |peer: &Rank| before[*peer][&element];
                        let value = match arrival.on_arrival {
                            OnArrival::Store => of(&arrival.from[0]),
                            OnArrival::Reduce => {
                                let mut holders = arrival.from.clone();
                                holders.push(rank);
                                holders.sort_unstable();
                                let operands = holders.iter().map(of).collect();
                                self.values.of(Expression::Folded(operands))
                            }
                        };
                        held[rank].insert(element, value);
                    }
                }
            }
        }
        let divides = source.average && world > 1;
        let mut result = |rank: Rank, element: usize| {
            let value = held[rank][&element];
            if divides { self.values.of(Expression::Divided(value)) } else { value }
        };
        let wants = |rank| source.shape(rank).wants(rank).into_iter().flatten();
        (0..world).map(|rank| wants(rank).map(|it| result(rank, it)).collect()).collect()
    }
}

impl Device {
    fn index(&self, place: Place) -> usize {
        assert_eq!(place.start % ELEMENT_BYTES, 0, "whole elements");
        self.starts[place.memory as usize] + place.start / ELEMENT_BYTES
    }
}

impl Schedule {
    fn choose<'r>(&mut self, able: &'r [Rank]) -> Option<&'r Rank> {
        match self {
            Self::Lowest => able.first(),
            Self::Highest => able.last(),
            Self::Random(state) => {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                able.get((*state >> 33) as usize % able.len().max(1))
            }
        }
    }
}

fn elements(bytes: usize) -> Range<usize> {
    assert_eq!(bytes % ELEMENT_BYTES, 0, "whole elements");
    assert_ne!(bytes, 0, "nothing is launched for no bytes");
    0..bytes / ELEMENT_BYTES
}

fn device(source: &DeviceSource<'_>, program: &DeviceProgram, rank: Rank) -> Device {
    let (world, shape) = (source.world(), source.shape(rank));
    let count = |ranges: Vec<Range<usize>>| ranges.iter().map(Range::len).sum::<usize>();
    let (puts, gets) = (shape.contributes(rank), shape.wants(rank));
    let firsts = [&puts, &gets].map(|ranges| ranges.first().map_or(0, |range| range.start));
    let [input, output] = [count(puts), count(gets)];
    let (starts, end) = match source.in_place[rank] {
        true => {
            let start = firsts[0].min(firsts[1]);
            let [input_at, output_at] = firsts.map(|first| first - start);
            ([input_at, output_at], (input_at + input).max(output_at + output))
        }
        false => ([0, input], input + output),
    };
    let cell = Cell { value: NOTHING, written: 0, read: vec![0; world] };
    Device {
        cells: vec![cell; end + program.scratch[rank].div_ceil(ELEMENT_BYTES)],
        starts: [starts[0], starts[1], end],
        clock: vec![0; world],
        call: 0,
        next: 0,
        bases: vec![[0; 2]; world],
    }
}

/// Whether a collective folds.
pub(super) const fn folds(shape: &Shape) -> bool {
    matches!(
        shape.collective,
        PlanKind::AllReduce | PlanKind::Reduce { .. } | PlanKind::ReduceScatter
    )
}
