//! Compressed gradient buckets against the true averages: how far off, the same bits on all ranks,
//! what is lost comes back, infinities are told, and a saved state goes on as if nothing had been.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "sequence/random.rs"]
#[expect(dead_code, reason = "the sequences use more of it")]
mod random;
mod support;

use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use random::mix;
use support::{World, setting, tell};
use unisum::buckets::{
    AllReduce, Bucket, Buckets, Compressed, Encoding, Hook, LowRank, Parameter, StepReport,
};
use unisum::{Communicator, Dtype, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[("hooked", hooked), ("look", look)]);
}

const LIMIT: Duration = Duration::from_secs(60);

/// A hook, the largest error of an average relative to the largest gradient (four roundings: this
/// step's and the last's, of the gradient and of the average), and of the mean of many steps.
const HOOKS: [(&str, f32, f32); 9] = [
    ("bf16", 8e-3, 1e-3),
    ("f16", 1e-3, 1.3e-4),
    ("f8e4m3", 0.25, 0.03),
    ("f8e5m2", 0.5, 0.06),
    ("int8", 0.016, 2e-3),
    ("int8 in slices", 0.016, 2e-3),
    ("bf16 in slices", 8e-3, 1e-3),
    ("int8 without feedback", 8e-3, 8e-3),
    // Random matrices are as far from rank 2 as can be: much is due at any time.
    ("rank 2", 40.0, 1.0),
];

fn hook(name: &str) -> Box<dyn Hook> {
    let encoding = |name: &str| match name {
        "bf16" => Encoding::Bf16,
        "f16" => Encoding::F16,
        "f8e4m3" => Encoding::F8E4M3,
        "f8e5m2" => Encoding::F8E5M2,
        _ => Encoding::Int8,
    };
    if let Some(name) = name.strip_suffix(" in slices") {
        return Box::new(Compressed::new(encoding(name)).in_slices_of(3000));
    }
    match name.strip_suffix(" without feedback") {
        Some(name) => Box::new(Compressed::new(encoding(name)).without_feedback()),
        None if name == "rank 2" => Box::new(LowRank::new(2).starting_at(2).at_least(1.5)),
        None => Box::new(Compressed::new(encoding(name))),
    }
}

#[test]
fn averages_are_near_and_the_same_on_all_ranks() {
    for (index, (name, ..)) in HOOKS.iter().enumerate() {
        for (ranks, transport) in [(1, "shm"), (2, "tcp"), (3, "shm"), (5, "tcp"), (8, "shm")] {
            let world = World::new(ranks, "hooked").set("UNISUM_TRANSPORT", transport);
            // The order of sums is to be the same in all runs.
            let world = world.set("UNISUM_ALGORITHM", "ring").set("HOOK", index);
            let told = world.succeed(LIMIT);
            assert!(told.iter().all(|it| *it == told[0]), "{name}, {ranks} ranks: {told:#?}");
        }
    }
}

/// Where the hook found each parameter's gradient.
static SEEN: Mutex<Vec<(String, usize)>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Look;

impl Hook for Look {
    fn name(&self) -> String {
        "look".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        let parameters: Vec<_> = bucket.parameters().collect();
        if bucket.dtype() == Dtype::F32 {
            let base = &*bucket.elements::<f32>();
            let place = |(parameter, elements): (&Parameter, Range<usize>)| {
                (parameter.name().to_owned(), base[elements].as_ptr().addr())
            };
            SEEN.lock().unwrap().extend(parameters.into_iter().map(place));
        }
        AllReduce.reduce(bucket)
    }
}

/// No copies: what the program writes, what the collective reduces and what the optimiser reads
/// is the same memory.
#[test]
fn gradients_stay_where_they_are() {
    World::new(2, "look").succeed(LIMIT);
}

fn look() {
    let communicator = Communicator::from_environment().unwrap();
    let builder = Buckets::builder(&communicator).hook(Look).bucket_bytes(5000);
    let mut buckets = builder.build(&parameters()).unwrap();
    for _ in 0..3 {
        SEEN.lock().unwrap().clear();
        let step = buckets.begin().unwrap();
        let mut viewed = Vec::new();
        for (parameter, known) in parameters().iter().enumerate().take(4) {
            let view = step.view::<f32>(parameter).unwrap();
            viewed.push((known.name().to_owned(), view.as_ptr().addr()));
            view.ready();
        }
        step.put(4, &[1_f64; 50]).unwrap();
        step.wait().unwrap();
        for (parameter, (_, place)) in viewed.iter().enumerate() {
            assert_eq!(buckets.gradient::<f32>(parameter).as_ptr().addr(), *place);
        }
        let mut seen = SEEN.lock().unwrap();
        seen.sort();
        viewed.sort();
        assert_eq!(*seen, viewed);
    }
}

fn parameters() -> Vec<Parameter> {
    let new = |name: &str, shape: &[usize]| Parameter::new(name, shape, Dtype::F32);
    vec![
        new("embedding", &[100, 30]),
        new("bias", &[77]),
        new("scalar", &[]),
        new("weight", &[64, 3, 9]),
        Parameter::new("double", &[50], Dtype::F64),
    ]
}

const STEPS: u64 = 40;

/// What rank `rank` puts in: the same in all steps.
fn gradient(rank: usize, parameter: usize, at: usize) -> f32 {
    let random = mix(mix(rank as u64 ^ (parameter as u64) << 20) ^ (at as u64) << 40);
    (random >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn hooked() {
    let communicator = Communicator::from_environment().unwrap();
    let (name, once, in_the_mean) = HOOKS[setting("HOOK").parse::<usize>().unwrap()];
    let build = |layout: Option<Vec<u8>>| {
        let builder = Buckets::builder(&communicator).hook(hook(name)).bucket_bytes(5000);
        let builder = builder.end_bucket_bytes(1000);
        let builder = layout.iter().fold(builder, |builder, layout| builder.layout(layout));
        builder.build(&parameters()).unwrap()
    };
    let mut buckets = build(None);
    let mut means: Vec<Vec<f64>> =
        parameters().iter().map(|parameter| vec![0.0; parameter.count()]).collect();
    for number in 0..STEPS {
        assert!(!step(&mut buckets, None).nonfinite);
        check(&communicator, &buckets, once);
        let is_counted = number >= STEPS / 2;
        for (parameter, mean) in means.iter_mut().enumerate().take(4).filter(|_| is_counted) {
            let average = buckets.gradient::<f32>(parameter).iter();
            mean.iter_mut().zip(average).for_each(|(mean, &it)| *mean += f64::from(it));
        }
    }
    for (parameter, mean) in means.iter().enumerate().take(4) {
        for (at, sum) in mean.iter().enumerate() {
            let error = sum / (STEPS / 2) as f64 - expected(communicator.world(), parameter, at);
            let context = format!("{name}, parameter {parameter}, element {at}");
            assert!(error.abs() <= f64::from(in_the_mean), "{context}: {error} in the mean");
        }
    }
    // One rank's infinity is told to all, and leaves no trace.
    let last = communicator.world() - 1;
    let poisoner = communicator.rank() == last;
    let saved = (buckets.save_hook(), buckets.layout().to_bytes());
    assert!(step(&mut buckets, poisoner.then_some(f32::INFINITY)).nonfinite);
    assert!(step(&mut buckets, poisoner.then_some(f32::NAN)).nonfinite);
    let mut resumed = build(Some(saved.1));
    resumed.restore_hook(&saved.0).unwrap();
    // What was restored is rescaled as what is in use is.
    buckets.rescale_hook(4.0);
    resumed.rescale_hook(4.0);
    for _ in 0..3 {
        assert!(!step(&mut buckets, None).nonfinite);
        if name != "rank 2" {
            // PowerSGD counts its steps, those that did not count as well.
            assert!(!step(&mut resumed, None).nonfinite);
            assert!(bits(&buckets) == bits(&resumed), "{name}: resumed otherwise");
        }
    }
    tell(format!("{:016x}", bits(&buckets).into_iter().fold(0, |hash, bits| mix(hash ^ bits))));
    assert!(resumed.restore_hook(&[1, 2, 3]).is_err());
}

/// A step of the usual gradients, one of which may be another.
fn step(buckets: &mut Buckets, poison: Option<f32>) -> StepReport {
    let rank = setting("UNISUM_RANK").parse().unwrap();
    let step = buckets.begin().unwrap();
    for (parameter, known) in parameters().iter().enumerate().rev() {
        if known.dtype() == Dtype::F64 {
            step.put(parameter, &vec![f64::from(rank as u32); known.count()]).unwrap();
            continue;
        }
        let mut view = step.view_to_overwrite::<f32>(parameter).unwrap();
        view.iter_mut().enumerate().for_each(|(at, it)| *it = gradient(rank, parameter, at));
        if let (Some(poison), 3) = (poison, parameter) {
            view[1000] = poison;
        }
        view.ready();
    }
    step.wait().unwrap()
}

fn expected(world: usize, parameter: usize, at: usize) -> f64 {
    let sum: f64 = (0..world).map(|rank| f64::from(gradient(rank, parameter, at))).sum();
    sum / world as f64
}

fn check(communicator: &Communicator, buckets: &Buckets, once: f32) {
    let world = communicator.world();
    for parameter in 0..4 {
        for (at, &average) in buckets.gradient::<f32>(parameter).iter().enumerate() {
            let error = f64::from(average) - expected(world, parameter, at);
            assert!(error.abs() <= f64::from(once), "parameter {parameter}[{at}]: {error}");
        }
    }
    let ranks = (world - 1) as f64 / 2.0;
    assert!(buckets.gradient::<f64>(4).iter().all(|&average| average == ranks));
}

fn bits(buckets: &Buckets) -> Vec<u64> {
    let floats = (0..4).flat_map(|parameter| buckets.gradient::<f32>(parameter));
    floats.map(|value| u64::from(value.to_bits())).collect()
}
