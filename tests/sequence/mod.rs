//! Sequences of collectives that a seed makes, run by the ranks of a world and checked against a
//! sequential model.
//!
//! The seed decides what all ranks do alike: bursts of calls, each with an algorithm. The seed and
//! the rank decide what each rank does its own way: in place or apart, in private or in registered
//! memory, at odd addresses, blocking or asynchronous, in which order it waits.

mod random;
mod step;
mod values;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use half::{bf16, f16};
use unisum::{
    Apart, Bool, Buffer, Buffers, Communicator, Dtype, InPlace, Outcome, Work, f8e4m3, f8e5m2,
};

use crate::support::{Ended, World, setting, tell};
use random::{Random, mix};
use step::{Kind, Step};
use values::Value;

const SEED: &str = "TEST_SEED";
const BURSTS: &str = "TEST_BURSTS";
const MOST: &str = "TEST_MOST";
/// Set it to the seed that a failed test printed.
const REPLAY: &str = "UNISUM_TEST_SEED";

/// The seed of this run, printed.
pub(crate) fn seed() -> u64 {
    let replayed = std::env::var(REPLAY).ok().map(|seed| seed.parse().unwrap());
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = replayed.unwrap_or_else(|| mix(clock()) >> 32);
    println!("{REPLAY}={seed} replays this");
    seed
}

/// Runs a sequence on a world of the scenario [`run_sequence`], whose calls have `most` elements
/// in all at most. Who gets the same elements gets the same bits.
pub(crate) fn check(world: &World, seed: u64, bursts: usize, most: usize) {
    let limit = Duration::from_secs(120);
    let world = world.clone().set(SEED, seed).set(BURSTS, bursts).set(MOST, most);
    let ended = world.set("RUST_BACKTRACE", 0).run(limit);
    let panic_of = |ended: &Ended| ended.log.split_once("panicked at").map(|(_, it)| it.to_owned());
    let panics: Vec<_> = ended.iter().map(panic_of).collect();
    assert!(ended.iter().all(|ended| ended.status == 0), "seed {seed}: {panics:#?}");
    let told: Vec<_> = ended.into_iter().map(|ended| ended.told).collect();
    assert_eq!(told[0].len(), bursts, "every burst is told of");
    for (rank, told_by_rank) in told.iter().enumerate() {
        assert_eq!(*told_by_rank, told[0], "seed {seed}: bits of rank {rank} and rank 0");
    }
}

/// The scenario of a rank.
pub(crate) fn run_sequence() {
    let number = |name| setting(name).parse::<u64>().unwrap();
    let comm = Communicator::from_environment().unwrap();
    let mut common = Random(number(SEED));
    let mut own = Random(mix(number(SEED) ^ (comm.rank() as u64 + 1) << 32));
    let algorithms = unisum::algorithms();
    for burst in 0..number(BURSTS) {
        let algorithm = (!common.one_in(3)).then(|| common.pick(&algorithms));
        comm.set_algorithm(algorithm).unwrap();
        let steps = 1 + common.below(6);
        let most = number(MOST) as usize;
        let steps: Vec<Step> =
            (0..steps).map(|_| Step::random(&mut common, comm.world(), most)).collect();
        let context = format!("burst {burst}, {algorithm:?}");
        let results = run_burst(&comm, &steps, &mut own, &context);
        if common.one_in(3) {
            let again = run_burst(&comm, &steps, &mut own, &context);
            assert!(results == again, "{context}: the same calls gave other bits: {steps:?}");
        }
        let shared = steps.iter().zip(&results).filter(|(step, _)| step.is_shared());
        let shared = shared.fold(0, |hash, (_, result)| mix(hash ^ result));
        tell(format!("{context}: {shared:016x}"));
    }
    comm.barrier().unwrap();
}

/// Waits for a call and gives a fingerprint of its result.
type Ending = Box<dyn FnOnce() -> u64>;

fn run_burst(comm: &Communicator, steps: &[Step], own: &mut Random, context: &str) -> Vec<u64> {
    let mut endings: Vec<(usize, Ending)> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let context = format!("{context}, rank {}, call {index}: {step:?}", comm.rank());
        endings.push((index, begin(comm, step, own, context)));
        if own.one_in(4) {
            let (index, ending) = endings.swap_remove(own.below(endings.len()));
            let result = ending();
            endings.push((index, Box::new(move || result)));
        }
    }
    own.shuffle(&mut endings);
    let mut results = vec![0; steps.len()];
    for (index, ending) in endings {
        results[index] = ending();
    }
    results
}

fn begin(comm: &Communicator, step: &Step, own: &mut Random, context: String) -> Ending {
    if step.kind == Kind::Barrier {
        comm.barrier().unwrap_or_else(|error| panic!("{context}: {error}"));
        return Box::new(|| 0);
    }
    match step.dtype {
        Dtype::F16 => begin_as::<f16>(comm, step, own, context),
        Dtype::Bf16 => begin_as::<bf16>(comm, step, own, context),
        Dtype::F32 => begin_as::<f32>(comm, step, own, context),
        Dtype::F64 => begin_as::<f64>(comm, step, own, context),
        Dtype::I8 => begin_as::<i8>(comm, step, own, context),
        Dtype::U8 => begin_as::<u8>(comm, step, own, context),
        Dtype::I16 => begin_as::<i16>(comm, step, own, context),
        Dtype::U16 => begin_as::<u16>(comm, step, own, context),
        Dtype::I32 => begin_as::<i32>(comm, step, own, context),
        Dtype::U32 => begin_as::<u32>(comm, step, own, context),
        Dtype::I64 => begin_as::<i64>(comm, step, own, context),
        Dtype::U64 => begin_as::<u64>(comm, step, own, context),
        Dtype::F8E4M3 => begin_as::<f8e4m3>(comm, step, own, context),
        Dtype::F8E5M2 => begin_as::<f8e5m2>(comm, step, own, context),
        Dtype::Bool => begin_as::<Bool>(comm, step, own, context),
        other => panic!("a type without a row: {other}"),
    }
}

fn begin_as<T: Value>(
    comm: &Communicator,
    step: &Step,
    own: &mut Random,
    context: String,
) -> Ending {
    let rank = comm.rank();
    let collective = step.collective::<T>(rank);
    let call = Call { step: step.clone(), rank, context };
    let is_async = own.one_in(2);
    let in_place = step.in_place(rank).filter(|_| own.one_in(2));
    if let Some((puts, gets, len)) = in_place {
        let mut buffer = InPlace(Memory::new(comm, len, own));
        let data = buffer.0.as_mut();
        data.iter_mut().enumerate().for_each(|(at, it)| *it = filler(at));
        puts.clone().for_each(|at| data[at] = step.input(rank, at - puts.start));
        let check = move |InPlace(memory): InPlace<Memory<T>>, outcome| {
            call.check_rest(memory.as_ref(), &puts, &gets);
            memory.check_margins(&call.context);
            call.check(&memory.as_ref()[gets], outcome)
        };
        if is_async {
            return wait(comm.start(collective, buffer), check);
        }
        let outcome = comm.run(&collective, Buffers::InPlace(buffer.0.as_mut()));
        let result = check(buffer, outcome.unwrap());
        return Box::new(move || result);
    }
    let (puts, gets) = step.extents(rank);
    let mut buffers = Apart(Memory::new(comm, puts, own), Memory::new(comm, gets, own));
    let data = buffers.0.as_mut().iter_mut().enumerate();
    data.for_each(|(at, it)| *it = step.input(rank, at));
    buffers.1.as_mut().iter_mut().for_each(|it| *it = filler(1));
    let check = move |Apart(input, output): Apart<Memory<T>, Memory<T>>, outcome| {
        input.check_margins(&call.context);
        output.check_margins(&call.context);
        let given = |at| call.step.input::<T>(rank, at).bits();
        let stays = |(at, it): (usize, &T)| it.bits() == given(at);
        let same = input.as_ref().iter().enumerate().all(stays);
        assert!(same, "the input changed: {}", call.context);
        call.check(output.as_ref(), outcome)
    };
    if is_async {
        return wait(comm.start(collective, buffers), check);
    }
    let (input, output) = (buffers.0.as_ref(), buffers.1.as_mut());
    let outcome = comm.run(&collective, Buffers::Apart(input, output));
    let result = check(buffers, outcome.unwrap());
    Box::new(move || result)
}

fn wait<B: 'static>(
    work: Work<(B, Outcome)>,
    check: impl FnOnce(B, Outcome) -> u64 + 'static,
) -> Ending {
    Box::new(move || {
        let (buffers, outcome) = work.wait().unwrap();
        check(buffers, outcome)
    })
}

/// What memory holds that nobody put anything into.
fn filler<T: Value>(at: usize) -> T {
    T::from_bits(0x55 + (at % 3) as u64)
}

/// A call as one rank made it.
struct Call {
    step: Step,
    rank: usize,
    context: String,
}

impl Call {
    /// Checks the result; its fingerprint.
    fn check<T: Value>(&self, result: &[T], outcome: Outcome) -> u64 {
        let Self { step, rank, context, .. } = self;
        let mut hash = 0;
        for (at, element) in result.iter().enumerate() {
            let expected = step.expected::<T>(*rank, at);
            let same = match step.reduces() {
                true => element.is_same(expected),
                false => element.bits() == expected.bits(),
            };
            assert!(same, "element {at} is {element:?}, not {expected:?}: {context}");
            hash = mix(hash ^ element.bits());
        }
        self.check_outcome::<T>(outcome);
        hash
    }

    /// Told where it was asked for: of what all ranks get, or of this rank's block.
    fn check_outcome<T: Value>(&self, outcome: Outcome) {
        let Self { step, rank, context, .. } = self;
        let is_told_of = matches!(step.kind, Kind::AllReduce | Kind::ReduceScatter);
        let is_told = step.is_watched && is_told_of && step.how.is_watchable();
        let (_, gets) = step.extents(*rank);
        let expected = is_told && (0..gets).any(|at| !step.expected::<T>(*rank, at).is_finite());
        assert_eq!(outcome.nonfinite, expected, "nonfinite: {context}");
    }

    /// What is neither put in nor got in place stays as it is.
    fn check_rest<T: Value>(
        &self,
        data: &[T],
        puts: &std::ops::Range<usize>,
        gets: &std::ops::Range<usize>,
    ) {
        let Self { step, rank, context, .. } = self;
        for (at, element) in data.iter().enumerate() {
            let expected = match (puts.contains(&at), gets.contains(&at)) {
                (_, true) => continue,
                // In place a reduce-scatter works on all blocks.
                (true, false) if step.kind == Kind::ReduceScatter => continue,
                (true, false) => step.input::<T>(*rank, at - puts.start),
                (false, false) => filler(at),
            };
            assert!(element.bits() == expected.bits(), "element {at} changed: {context}");
        }
    }
}

/// Private or registered memory for some elements, at an odd address, with margins that must stay
/// as they are.
struct Memory<T> {
    store: Store<T>,
    skip: usize,
    len: usize,
}

enum Store<T> {
    Private(Vec<T>),
    Registered(Buffer<T>),
}

const MARGIN: usize = 3;

impl<T: Value> Memory<T> {
    fn new(comm: &Communicator, len: usize, own: &mut Random) -> Self {
        let skip = own.pick(&[0, 0, 1, MARGIN]);
        let size = len + 2 * MARGIN;
        let store = match own.one_in(2) {
            true => Store::Registered(comm.allocate(size).unwrap()),
            false => Store::Private(vec![T::from_bits(0); size]),
        };
        let mut memory = Self { store, skip, len };
        memory.all_mut().fill(T::from_bits(0x5a));
        memory
    }

    fn all(&self) -> &[T] {
        match &self.store {
            Store::Private(elements) => elements,
            Store::Registered(elements) => elements,
        }
    }

    fn all_mut(&mut self) -> &mut [T] {
        match &mut self.store {
            Store::Private(elements) => elements,
            Store::Registered(elements) => elements,
        }
    }

    fn check_margins(&self, context: &str) {
        let all = self.all();
        let margins = all[..self.skip].iter().chain(&all[self.skip + self.len..]);
        let stays = margins.clone().all(|it| it.bits() == T::from_bits(0x5a).bits());
        assert!(stays, "written outside the buffer: {context}");
    }
}

impl<T: Value> AsRef<[T]> for Memory<T> {
    fn as_ref(&self) -> &[T] {
        &self.all()[self.skip..self.skip + self.len]
    }
}

impl<T: Value> AsMut<[T]> for Memory<T> {
    fn as_mut(&mut self) -> &mut [T] {
        let elements = self.skip..self.skip + self.len;
        &mut self.all_mut()[elements]
    }
}
