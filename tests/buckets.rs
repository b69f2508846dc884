//! Random training steps through gradient buckets against a single process's sums, bit by bit.
//!
//! The seed decides what all ranks do alike: parameters, settings, which steps accumulate. The seed
//! and the rank decide what each does its own way: the order in which gradients become ready, on
//! how many threads, what is not used, and when a rank runs out of data.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "sequence/random.rs"]
#[expect(dead_code, reason = "the sequences use more of it")]
mod random;
mod support;

use std::time::Duration;

use half::{bf16, f16};
use random::{Random, mix};
use support::{World, setting, tell};
use unisum::buckets::{Buckets, Layout, Parameter, Place, Step};
use unisum::{Communicator, Dtype, Element};

#[test]
fn rank_process() {
    support::run_if_rank(&[("random_steps", random_steps)]);
}

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn random_steps_give_the_sums_of_a_single_process() {
    let seed = std::env::var("UNISUM_TEST_SEED").map_or_else(|_| clock(), |it| it.parse().unwrap());
    println!("UNISUM_TEST_SEED={seed} replays this");
    for (ranks, transport) in
        [(1, "shm"), (2, "shm"), (3, "tcp"), (4, "shm"), (5, "tcp"), (8, "shm")]
    {
        for variant in 0..3 {
            let seed = mix(seed ^ (16 * ranks as u64 + variant)) >> 16;
            let world = World::new(ranks, "random_steps").set("UNISUM_TRANSPORT", transport);
            let told = world.set("SEED", seed).succeed(LIMIT);
            assert!(told.iter().all(|it| *it == told[0]), "ranks differ, seed {seed}: {told:#?}");
        }
    }
}

fn clock() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    since.as_nanos() as u64 >> 10
}

/// A gradient's type with the values the test puts in: small integers, whose sums are exact.
trait Value: Element + PartialEq + std::ops::Add<Output = Self> + std::fmt::Debug {
    fn of(value: f32) -> Self;
}

impl Value for f32 {
    fn of(value: f32) -> Self {
        value
    }
}

impl Value for f64 {
    fn of(value: f32) -> Self {
        value.into()
    }
}

impl Value for f16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Value for bf16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// What all ranks know of a run.
struct Run {
    seed: u64,
    world: usize,
    parameters: Vec<Parameter>,
    may_skip: bool,
    /// How many steps each rank has data for.
    steps: Vec<u64>,
}

const STEPS: u64 = 6;

impl Run {
    fn new(seed: u64, world: usize, common: &mut Random) -> Self {
        let dtypes = [Dtype::F32, Dtype::F32, Dtype::F64, Dtype::Bf16, Dtype::F16];
        let count = 1 + common.below(30);
        let parameters = (0..count).map(|index| {
            let elements = common.size(20_000);
            let parameter = Parameter::new(
                format!("p{index}"),
                &[elements],
                dtypes[common.below(dtypes.len())],
            );
            parameter.used(if common.one_in(8) { 2 } else { 1 })
        });
        let parameters = parameters.collect();
        let may_skip = common.one_in(2);
        let is_uneven = common.one_in(2);
        let steps =
            (0..world).map(|_| if is_uneven { 1 + common.next() % STEPS } else { STEPS }).collect();
        Self { seed, world, parameters, may_skip, steps }
    }

    fn is_uneven(&self) -> bool {
        self.steps.iter().any(|&steps| steps != STEPS)
    }

    /// Whether a rank puts a gradient in, in a part of a step.
    fn uses(&self, rank: usize, step: u64, part: u64, parameter: usize) -> bool {
        let draw = self.draw(rank, step, part, parameter, 1);
        !self.may_skip || !draw.is_multiple_of(3)
    }

    /// What it puts in, of every element the same with its place's low bits.
    fn value(&self, rank: usize, step: u64, part: u64, parameter: usize, at: usize) -> f32 {
        (self.draw(rank, step, part, parameter, 2) % 5) as f32 - 2.0 + (at % 3) as f32
    }

    fn draw(&self, rank: usize, step: u64, part: u64, parameter: usize, what: u64) -> u64 {
        let place = [rank as u64, step, part, parameter as u64, what];
        place.into_iter().fold(self.seed, |hash, each| mix(hash ^ each)) >> 8
    }

    /// Steps before the reducing one that accumulate.
    fn parts(&self, step: u64) -> u64 {
        self.draw(self.world, step, 0, 0, 3) % 3
    }

    /// What rank `rank` has accumulated of an element.
    fn sum(&self, rank: usize, step: u64, parameter: usize, at: usize) -> f32 {
        let parts = (0..=self.parts(step)).filter(|&part| self.uses(rank, step, part, parameter));
        parts.map(|part| self.value(rank, step, part, parameter, at)).sum()
    }

    fn average(&self, step: u64, parameter: usize, at: usize) -> f64 {
        let takes_part = (0..self.world).filter(|&rank| step < self.steps[rank]);
        let participants = takes_part.clone().count() as f64;
        let sum: f64 = takes_part.map(|rank| f64::from(self.sum(rank, step, parameter, at))).sum();
        match participants as usize == self.world {
            true => sum / participants,
            // The layer scales the inputs then.
            false => sum * (1.0 / participants),
        }
    }
}

fn random_steps() {
    let communicator = Communicator::from_environment().unwrap();
    let seed = setting("SEED").parse().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let (mut common, mut own) = (Random(seed), Random(mix(seed ^ (rank as u64 + 1) << 40)));
    let run = Run::new(seed, world, &mut common);
    let mut builder = Buckets::builder(&communicator)
        .bucket_bytes(1 << (10 + common.below(8)))
        .end_bucket_bytes(1 << (8 + common.below(8)))
        .unused_parameters(run.may_skip)
        .uneven_inputs(run.is_uneven());
    if common.one_in(3) {
        builder = builder.relayout(false);
    }
    let mut buckets = builder.build(&run.parameters).unwrap();
    let mut reports = Vec::new();
    for step in 0..run.steps[rank] {
        for part in 0..run.parts(step) {
            let micro = buckets.begin_accumulating().unwrap();
            put_all(&run, &micro, (rank, step, part), &mut own);
            micro.wait().unwrap();
        }
        let last = buckets.begin().unwrap();
        put_all(&run, &last, (rank, step, run.parts(step)), &mut own);
        let report = last.wait().unwrap();
        check_step(&run, &buckets, step);
        reports.push(report.clone());
        let participants = run.steps.iter().filter(|&&steps| step < steps).count();
        assert_eq!(report.participants, participants);
        let is_unused = |parameter: &usize| {
            let uses =
                |rank| (0..=run.parts(step)).any(|part| run.uses(rank, step, part, *parameter));
            !(0..world).any(|rank| step < run.steps[rank] && uses(rank))
        };
        let unused: Vec<usize> = (0..run.parameters.len()).filter(is_unused).collect();
        assert_eq!(report.unused, unused);
    }
    if run.is_uneven() {
        let mut step = run.steps[rank];
        buckets
            .join(|buckets, _| {
                check_step(&run, buckets, step);
                step += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(step, *run.steps.iter().max().unwrap());
    }
    let layout: &Layout = buckets.layout();
    tell(format!("{} {:?}", layout.version(), layout.buckets().collect::<Vec<_>>()));
    resume(&communicator, &run, &layout.to_bytes());
    tell(format!("{:?}", buckets.advise(&reports).unwrap()));
}

/// Who resumes with the saved layout has the same buckets.
fn resume(communicator: &Communicator, run: &Run, saved: &[u8]) {
    let builder = Buckets::builder(communicator).layout(saved);
    let buckets = builder.build(&run.parameters).unwrap();
    assert_eq!(buckets.layout().to_bytes(), saved);
}

/// Puts all gradients of a rank in, in an order of its own, on two threads.
fn put_all(run: &Run, step: &Step<'_>, place: (usize, u64, u64), own: &mut Random) {
    let (rank, number, part) = place;
    let used = |parameter: &usize| run.uses(rank, number, part, *parameter);
    let mut order: Vec<usize> = (0..run.parameters.len()).filter(used).collect();
    own.shuffle(&mut order);
    let (here, there) = order.split_at(own.below(order.len() + 1));
    let (mut first, mut second) = (Random(own.next()), Random(own.next()));
    std::thread::scope(|scope| {
        scope.spawn(|| there.iter().for_each(|&it| put(run, step, place, it, &mut first)));
        here.iter().for_each(|&it| put(run, step, place, it, &mut second));
    });
}

fn put(run: &Run, step: &Step<'_>, place: (usize, u64, u64), parameter: usize, own: &mut Random) {
    match run.parameters[parameter].dtype() {
        Dtype::F64 => put_as::<f64>(run, step, place, parameter, own),
        Dtype::F16 => put_as::<f16>(run, step, place, parameter, own),
        Dtype::Bf16 => put_as::<bf16>(run, step, place, parameter, own),
        _ => put_as::<f32>(run, step, place, parameter, own),
    }
}

/// A tied parameter gets all in its first use and nothing in the second, or the other way round.
fn put_as<T: Value>(
    run: &Run,
    step: &Step<'_>,
    (rank, number, part): (usize, u64, u64),
    parameter: usize,
    own: &mut Random,
) {
    let value = |at| T::of(run.value(rank, number, part, parameter, at));
    let is_tied = run.parameters[parameter].to_string().contains("used 2");
    let ready = || step.ready(parameter).unwrap();
    let comes_first = is_tied && own.one_in(2);
    if comes_first {
        ready();
    }
    let count = run.parameters[parameter].count();
    if own.one_in(4) {
        // Each row is an element; some are split into two terms.
        let rows: Vec<usize> = (0..count).chain(0..count.min(10)).collect();
        let term = |at: usize| if at < 10 { value(at) + T::of(1.0) } else { value(at) };
        let terms = (0..count).map(term).chain((0..count.min(10)).map(|_| T::of(-1.0)));
        step.put_rows(parameter, &rows, &terms.collect::<Vec<T>>()).unwrap();
    } else if own.one_in(3) {
        let gradient: Vec<T> = (0..count).map(value).collect();
        step.put(parameter, &gradient).unwrap();
    } else {
        let mut view = step.view::<T>(parameter).unwrap();
        view.iter_mut().enumerate().for_each(|(at, it)| *it = *it + value(at));
        if own.one_in(3) {
            drop(view);
            ready();
        } else {
            view.ready();
        }
    }
    if is_tied && !comes_first {
        ready();
    }
}

fn check_step(run: &Run, buckets: &Buckets, step: u64) {
    for (parameter, known) in run.parameters.iter().enumerate() {
        match known.dtype() {
            Dtype::F64 => check_as::<f64>(run, buckets, step, parameter),
            Dtype::F16 => check_as::<f16>(run, buckets, step, parameter),
            Dtype::Bf16 => check_as::<bf16>(run, buckets, step, parameter),
            _ => check_as::<f32>(run, buckets, step, parameter),
        }
    }
}

fn check_as<T: Value + Into<f64>>(run: &Run, buckets: &Buckets, step: u64, parameter: usize) {
    let gradient = buckets.gradient::<T>(parameter);
    assert_eq!(gradient.len(), run.parameters[parameter].count());
    let is_complete = run.steps.iter().all(|&steps| step < steps);
    for (at, &element) in gradient.iter().enumerate() {
        let expected = run.average(step, parameter, at);
        let (element, context) = (element.into(), format!("step {step}, p{parameter}[{at}]"));
        if is_complete {
            let rounded: f64 = T::of(expected as f32).into();
            let rounded = if T::DTYPE == Dtype::F64 { expected } else { rounded };
            assert_eq!(element, rounded, "{context}");
        } else {
            // Each input is scaled and the sum rounded: within a few units in the last place.
            let unit = match T::DTYPE {
                Dtype::Bf16 => 1e-2,
                Dtype::F16 => 2e-3,
                _ => 1e-5,
            };
            assert!((element - expected).abs() <= unit * 8.0, "{context}: {element}, {expected}");
        }
    }
}

#[test]
fn the_memory_of_a_place_outlives_its_layout_and_its_buckets() {
    let communicator = Communicator::builder().rank(0).world(1).connect().unwrap();
    let parameters = ["a", "b"].map(|name| Parameter::new(name, &[3], Dtype::F32));
    let mut buckets = Buckets::builder(&communicator).build(&parameters).unwrap();
    let early = buckets.place(1);
    let step = buckets.begin().unwrap();
    // Not the order that the first layout expects.
    step.put(0, &[1_f32; 3]).unwrap();
    step.put(1, &[2_f32; 3]).unwrap();
    step.wait().unwrap();
    let read = |place: &Place| {
        assert_eq!((place.count(), place.dtype()), (3, Dtype::F32));
        // SAFETY: no step is under way, and the place has so many.
        unsafe { *place.start().cast::<[f32; 3]>().as_ptr() }
    };
    assert_eq!(read(&early), [2.0; 3]);
    let step = buckets.begin().unwrap();
    let place = step.place(1);
    assert_eq!(step.layout().version(), 1);
    assert_ne!(place.start(), early.start());
    step.put(0, &[3_f32; 3]).unwrap();
    step.put(1, &[4_f32; 3]).unwrap();
    step.wait().unwrap();
    assert_eq!(buckets.place(1).start(), place.start());
    drop(buckets);
    assert_eq!((read(&early), read(&place)), ([2.0; 3], [4.0; 3]));
}
