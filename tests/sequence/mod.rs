//! Sequences of collectives that a seed makes, run by the ranks of a world and checked against a
//! sequential model.
//!
//! The seed decides what all ranks do alike: bursts of calls, each with an algorithm, some calls
//! several times in a row. The seed and the rank decide what each rank does its own way: in place
//! or apart, in private or in registered memory, at odd addresses, blocking or asynchronous, in
//! which order it waits. Some calls are batches of several tensors, and some bursts run in random
//! groups.

pub(crate) mod random;
pub(crate) mod step;
mod values;

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use half::{bf16, f16};
use unisum::{Bool, Buffer, Buffers, Communicator, Dtype, Outcome, Owned, Work, f8e4m3, f8e5m2};

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
        assert_eq!(*told_by_rank, told[0], "seed {seed}: ranks {rank} and 0 did other things");
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
        let context = format!("burst {burst}, {algorithm:?}");
        let group = common.one_in(4).then(|| random_group(&comm, &mut common));
        let used = group.as_ref().unwrap_or(&comm);
        used.set_algorithm(algorithm).unwrap();
        // Groups differ in size, and so in how much they draw.
        let mut drawn = Random(common.next() ^ (used.world() as u64) << 32);
        let most = number(MOST) as usize;
        let mut steps: Vec<Vec<Step>> = Vec::new();
        for _ in 0..1 + drawn.below(6) {
            let step = Step::random(&mut drawn, used.world(), most).maybe_batch(&mut drawn);
            // A call that comes again at once takes a shorter way, if its buffers are alike.
            let times = if drawn.one_in(3) { 2 + drawn.below(3) } else { 1 };
            steps.extend(std::iter::repeat_n(step, times));
        }
        let results = run_burst(used, &steps, &mut own, &context);
        if common.one_in(3) {
            let again = run_burst(used, &steps, &mut own, &context);
            assert!(results == again, "{context}: the same calls gave other bits: {steps:?}");
        }
        let shared = steps.iter().zip(&results).filter(|(step, _)| step[0].is_shared());
        let shared = shared.fold(0, |hash, (_, result)| mix(hash ^ result));
        let mut all = vec![0_u64; used.world()];
        used.all_gather(&[shared], &mut all).unwrap();
        assert!(all.iter().all(|&it| it == shared), "{context}: ranks have other bits: {steps:?}");
        tell(context);
    }
    comm.barrier().unwrap();
}

/// The group that this rank is in when the seed deals the ranks out, in an order of its own.
fn random_group(comm: &Communicator, common: &mut Random) -> Communicator {
    let groups = 1 + common.below(3);
    let dealt: Vec<(u32, i64)> = (0..comm.world())
        .map(|_| (common.below(groups) as u32, common.below(1000) as i64))
        .collect();
    let (color, key) = dealt[comm.rank()];
    comm.split(Some(color), key).unwrap().unwrap()
}

/// Waits for a call and gives a fingerprint of its result.
type Ending = Box<dyn FnOnce() -> u64>;

fn run_burst(
    comm: &Communicator,
    steps: &[Vec<Step>],
    own: &mut Random,
    context: &str,
) -> Vec<u64> {
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

fn begin(comm: &Communicator, steps: &[Step], own: &mut Random, context: String) -> Ending {
    if steps[0].kind == Kind::Barrier {
        comm.barrier().unwrap_or_else(|error| panic!("{context}: {error}"));
        return Box::new(|| 0);
    }
    match steps[0].dtype {
        Dtype::F16 => begin_as::<f16>(comm, steps, own, context),
        Dtype::Bf16 => begin_as::<bf16>(comm, steps, own, context),
        Dtype::F32 => begin_as::<f32>(comm, steps, own, context),
        Dtype::F64 => begin_as::<f64>(comm, steps, own, context),
        Dtype::I8 => begin_as::<i8>(comm, steps, own, context),
        Dtype::U8 => begin_as::<u8>(comm, steps, own, context),
        Dtype::I16 => begin_as::<i16>(comm, steps, own, context),
        Dtype::U16 => begin_as::<u16>(comm, steps, own, context),
        Dtype::I32 => begin_as::<i32>(comm, steps, own, context),
        Dtype::U32 => begin_as::<u32>(comm, steps, own, context),
        Dtype::I64 => begin_as::<i64>(comm, steps, own, context),
        Dtype::U64 => begin_as::<u64>(comm, steps, own, context),
        Dtype::F8E4M3 => begin_as::<f8e4m3>(comm, steps, own, context),
        Dtype::F8E5M2 => begin_as::<f8e5m2>(comm, steps, own, context),
        Dtype::Bool => begin_as::<Bool>(comm, steps, own, context),
        other => panic!("a type without a row: {other}"),
    }
}

/// Several steps are a batch.
fn begin_as<T: Value>(
    comm: &Communicator,
    steps: &[Step],
    own: &mut Random,
    context: String,
) -> Ending {
    let rank = comm.rank();
    let collective = steps[0].collective::<T>(rank);
    let calls: Vec<Call> = steps
        .iter()
        .map(|step| Call { step: step.clone(), rank, context: context.clone() })
        .collect();
    let mut tensors: Vec<Tensor<T>> =
        calls.iter().map(|call| Tensor::new(comm, call, own)).collect();
    let check = move |tensors: Vec<Tensor<T>>, outcome: Outcome| {
        let expected = calls.iter().any(Call::expects_nonfinite::<T>);
        assert_eq!(outcome.nonfinite, expected, "nonfinite: {context}");
        let hashes = tensors.iter().zip(&calls).map(|(tensor, call)| tensor.check(call));
        hashes.fold(0, |hash, each| mix(hash ^ each))
    };
    match (own.one_in(2), tensors.len()) {
        (true, 1) => wait(comm.start(collective, tensors.remove(0)), move |tensor, outcome| {
            check(vec![tensor], outcome)
        }),
        (true, _) => wait(comm.start_batch(collective, tensors), check),
        (false, count) => {
            let mut lent: Vec<Buffers<'_, T>> = tensors.iter_mut().map(Owned::lend).collect();
            let outcome = match count {
                1 => comm.run(&collective, lent.remove(0)),
                _ => comm.run_batch(&collective, &mut lent),
            };
            drop(lent);
            let result = check(tensors, outcome.unwrap());
            Box::new(move || result)
        }
    }
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

/// A call's buffers.
pub(crate) enum Tensor<T> {
    InPlace { data: Memory<T>, puts: Range<usize>, gets: Range<usize> },
    OutOfPlace { input: Memory<T>, output: Memory<T> },
}

impl<T: Value> Tensor<T> {
    /// In place or apart, filled for the call.
    pub(crate) fn new(comm: &Communicator, call: &Call, own: &mut Random) -> Self {
        let Call { step, rank, .. } = call;
        let in_place = step.in_place(*rank).filter(|_| own.one_in(2));
        if let Some((puts, gets, len)) = in_place {
            let mut data = Memory::new(comm, len, own);
            let elements = data.as_mut();
            elements.iter_mut().enumerate().for_each(|(at, it)| *it = filler(at));
            puts.clone().for_each(|at| elements[at] = step.input(*rank, at - puts.start));
            return Self::InPlace { data, puts, gets };
        }
        let (puts, gets) = step.extents(*rank);
        let (mut input, mut output) = (Memory::new(comm, puts, own), Memory::new(comm, gets, own));
        let elements = input.as_mut().iter_mut().enumerate();
        elements.for_each(|(at, it)| *it = step.input(*rank, at));
        output.as_mut().iter_mut().for_each(|it| *it = filler(1));
        Self::OutOfPlace { input, output }
    }

    /// Checks what the call left; a fingerprint of its result.
    pub(crate) fn check(&self, call: &Call) -> u64 {
        match self {
            Self::InPlace { data, puts, gets } => {
                call.check_rest(data.as_ref(), puts, gets);
                data.check_margins(&call.context);
                call.check(&data.as_ref()[gets.clone()])
            }
            Self::OutOfPlace { input, output } => {
                input.check_margins(&call.context);
                output.check_margins(&call.context);
                let given = |at| call.step.input::<T>(call.rank, at).bits();
                let stays = |(at, it): (usize, &T)| it.bits() == given(at);
                let same = input.as_ref().iter().enumerate().all(stays);
                assert!(same, "the input changed: {}", call.context);
                call.check(output.as_ref())
            }
        }
    }
}

impl<T: Value> Owned<T> for Tensor<T> {
    fn lend(&mut self) -> Buffers<'_, T> {
        match self {
            Self::InPlace { data, .. } => Buffers::InPlace(data.as_mut()),
            Self::OutOfPlace { input, output } => {
                Buffers::OutOfPlace(Memory::as_ref(input), output.as_mut())
            }
        }
    }
}

/// What memory holds that nobody put anything into.
fn filler<T: Value>(at: usize) -> T {
    T::from_bits(0x55 + (at % 3) as u64)
}

/// A call as one rank made it.
pub(crate) struct Call {
    pub(crate) step: Step,
    pub(crate) rank: usize,
    pub(crate) context: String,
}

impl Call {
    /// Checks the result; its fingerprint.
    fn check<T: Value>(&self, result: &[T]) -> u64 {
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
        hash
    }

    /// Told where it was asked for: of what all ranks get, or of this rank's block.
    fn expects_nonfinite<T: Value>(&self) -> bool {
        let Self { step, rank, .. } = self;
        let is_told_of = matches!(step.kind, Kind::AllReduce | Kind::ReduceScatter);
        let is_told = step.is_watched && is_told_of && step.how.is_watchable();
        let (_, gets) = step.extents(*rank);
        is_told && (0..gets).any(|at| !step.expected::<T>(*rank, at).is_finite())
    }

    /// What is neither put in nor got in place stays as it is.
    fn check_rest<T: Value>(&self, data: &[T], puts: &Range<usize>, gets: &Range<usize>) {
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
pub(crate) struct Memory<T> {
    pub(crate) store: Store<T>,
    skip: usize,
    len: usize,
}

pub(crate) enum Store<T> {
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

    pub(crate) fn all(&self) -> &[T] {
        match &self.store {
            Store::Private(elements) => elements,
            Store::Registered(elements) => elements,
        }
    }

    pub(crate) fn all_mut(&mut self) -> &mut [T] {
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
