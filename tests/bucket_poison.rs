//! Steps with infinities, NaNs and denormals next to every edge of a bucket, two in a row: all
//! ranks hear of what is not finite, and the steps after it are, to the bit, those of a layer that
//! never had it.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "sequence/random.rs"]
#[expect(dead_code, reason = "the sequences use more of it")]
mod random;
mod support;

use std::fmt::Debug;
use std::ops::Add;
use std::time::Duration;

use half::{bf16, f16};
use random::{Random, mix};
use support::{World, setting, tell};
use unisum::buckets::{Bucket, Buckets, Compressed, Encoding, Hook, LowRank, Parameter};
use unisum::{Collective, Communicator, Dtype, Element, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[("poison", poison)]);
}

const LIMIT: Duration = Duration::from_secs(300);

/// What buckets are reduced by, and how far an average of values up to 1 may be off where they are
/// `f32`. Others are not compressed.
const HOOKS: [(&str, f32); 9] = [
    ("plain", 1e-6),
    ("F16", 4e-3),
    ("Bf16", 4e-2),
    ("F8E4M3", 0.3),
    ("F8E5M2", 0.6),
    ("Int8", 4e-2),
    ("low rank", f32::MAX),
    ("sharded", 1e-6),
    ("leaves pads", 1e-6),
];

/// Around the borders of groups of 32 and 256 values, of lines of 16, and of slices of 100.
const LENGTHS: [usize; 18] =
    [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 101, 255, 256, 257, 300, 513];

/// Elements of gradients.
trait Real: Element + Add<Output = Self> + Debug {
    /// Those that are hard to reduce.
    const POISONS: [Self; 10];
    /// How far an average of values up to 1 may be off.
    const BOUND: f32;

    fn of(value: f32) -> Self;

    fn value(self) -> f32;
}

macro_rules! real {
    ($type:ident, $largest_denormal:expr, $negative:expr, $bound:expr, $of:expr, $value:expr) => {
        impl Real for $type {
            const POISONS: [Self; 10] = [
                Self::NAN,
                Self::INFINITY,
                Self::NEG_INFINITY,
                Self::MAX,
                Self::MIN,
                Self::MIN_POSITIVE,
                Self::from_bits(1),
                Self::from_bits($negative | 1),
                Self::from_bits($largest_denormal),
                Self::from_bits($negative),
            ];
            const BOUND: f32 = $bound;

            fn of(value: f32) -> Self {
                $of(value)
            }

            fn value(self) -> f32 {
                $value(self)
            }
        }
    };
}

real!(f32, 0x007f_ffff, 1 << 31, 1e-6, std::convert::identity, std::convert::identity);
// Sums of three are rounded once more on their way.
real!(bf16, 0x007f, 1 << 15, 1.2e-2, Self::from_f32, Self::to_f32);
real!(f16, 0x03ff, 1 << 15, 2e-3, Self::from_f32, Self::to_f32);

#[test]
fn a_step_after_one_with_poison_at_an_edge_is_as_if_that_had_not_been() {
    let mut cases = Vec::new();
    for transport in support::transports() {
        for (hook, _) in HOOKS {
            cases.extend([(transport, hook, 2, "f32"), (transport, hook, 3, "f32")]);
        }
        for hook in ["plain", "Int8", "sharded", "leaves pads"] {
            cases.extend([(transport, hook, 2, "bf16"), (transport, hook, 3, "f16")]);
            cases.extend([(transport, hook, 3, "bf16"), (transport, hook, 2, "f16")]);
        }
    }
    let (seed, is_whole) = (support::seed(), std::env::var_os("UNISUM_TEST_WHOLE").is_some());
    for (transport, hook, ranks, dtype) in support::sample(cases, 16) {
        // The layers are compared bit by bit, so they may not choose for themselves.
        let world = World::new(ranks, "poison").set("UNISUM_REPRODUCIBLE", 1);
        let world = world.set("UNISUM_TRANSPORT", transport).set("DTYPE", dtype);
        let cases = if is_whole { usize::MAX } else { 25 };
        let world = world.set("HOOK", hook).set("SEED", seed >> 16).set("CASES", cases);
        let told = world.succeed(LIMIT);
        assert!(told.iter().all(|it| *it == told[0]), "{transport}, {hook}, {dtype}: {told:#?}");
    }
}

/// A poison in a gradient of one rank.
#[derive(Clone, Copy, Debug)]
struct Case<T> {
    len: usize,
    parameter: usize,
    at: usize,
    poison: T,
    odd: usize,
}

fn cases<T: Real>(ranks: usize) -> Vec<Case<T>> {
    let mut cases = Vec::new();
    for len in LENGTHS {
        let edges = [0, 1, 15, 16, 31, 32, 99, 100, 255, 256, len.saturating_sub(2), len - 1];
        let mut edges: Vec<usize> = edges.into_iter().filter(|&at| at < len).collect();
        edges.sort_unstable();
        edges.dedup();
        for parameter in [0, 2] {
            for &at in &edges {
                for (number, poison) in T::POISONS.into_iter().enumerate() {
                    cases.push(Case { len, parameter, at, poison, odd: (at + number) % ranks });
                }
            }
        }
    }
    cases
}

fn poison() {
    match &setting("DTYPE")[..] {
        "bf16" => poison_of::<bf16>(),
        "f16" => poison_of::<f16>(),
        _ => poison_of::<f32>(),
    }
}

fn poison_of<T: Real>() {
    let communicator = Communicator::from_environment().unwrap();
    let mut random = Random(setting("SEED").parse().unwrap());
    let mut all = cases::<T>(communicator.world());
    random.shuffle(&mut all);
    all.truncate(setting("CASES").parse().unwrap());
    let mut results = 0;
    for case in all {
        results = mix(results ^ run(&communicator, case, random.next()));
    }
    tell(format!("{results:x}"));
}

/// Averages, and leaves what it likes between the gradients.
#[derive(Debug)]
struct LeavesPads;

impl Hook for LeavesPads {
    fn name(&self) -> String {
        "leaves pads".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        let ranges: Vec<_> = bucket.parameters().map(|(_, elements)| elements).collect();
        let is_pad = |at: usize| !ranges.iter().any(|range| range.contains(&at));
        match bucket.dtype() {
            Dtype::F16 => Self::average::<f16>(bucket, is_pad),
            Dtype::Bf16 => Self::average::<bf16>(bucket, is_pad),
            _ => Self::average::<f32>(bucket, is_pad),
        }
    }
}

impl LeavesPads {
    fn average<T: Real>(
        bucket: &mut Bucket<'_>,
        is_pad: impl Fn(usize) -> bool,
    ) -> Result<(), Error> {
        let elements = bucket.elements::<T>().iter().enumerate();
        let mut pads = elements.filter(|(at, _)| is_pad(*at)).map(|(_, it)| it.value());
        assert!(pads.all(|it| it.to_bits() == 0), "pads");
        bucket.run(&Collective::all_reduce(bucket.average()))?;
        let elements = bucket.elements::<T>().iter_mut().enumerate();
        elements.filter(|(at, _)| is_pad(*at)).for_each(|(_, it)| *it = T::of(f32::NAN));
        Ok(())
    }
}

fn layer<T: Real>(communicator: &Communicator, len: usize) -> Buckets {
    let parameters = [
        Parameter::new("first", &[len], T::DTYPE),
        Parameter::new("matrix", &[9, 7], T::DTYPE),
        Parameter::new("last", &[len], T::DTYPE),
    ];
    let builder = Buckets::builder(communicator).relayout(false);
    // Some slices of which the last is shorter, and some ranks without a share of it.
    let encoding = |encoding| Compressed::new(encoding).in_slices_of(400);
    let builder = match &setting("HOOK")[..] {
        "F16" => builder.hook(encoding(Encoding::F16)),
        "Bf16" => builder.hook(encoding(Encoding::Bf16)),
        "F8E4M3" => builder.hook(encoding(Encoding::F8E4M3)),
        "F8E5M2" => builder.hook(Compressed::new(Encoding::F8E5M2)),
        "Int8" => builder.hook(Compressed::new(Encoding::Int8)),
        "low rank" => builder.hook(LowRank::new(1).starting_at(0)),
        "sharded" => builder.sharded(),
        "leaves pads" => builder.hook(LeavesPads),
        _ => builder,
    };
    builder.build(&parameters).unwrap()
}

/// What a rank puts in: values from -1 to 1.
fn gradients<T: Real>(seed: u64, rank: usize, len: usize) -> [Vec<T>; 3] {
    let mut random = Random(mix(seed ^ (rank as u64) << 40));
    [len, 63, len]
        .map(|count| (0..count).map(|_| T::of(random.below(2001) as f32 / 1000.0 - 1.0)).collect())
}

/// A step; whether all was finite.
fn step<T: Real>(buckets: &mut Buckets, gradients: &[Vec<T>; 3]) -> bool {
    let step = buckets.begin().unwrap();
    (0..3).rev().for_each(|at| step.put(at, &gradients[at]).unwrap());
    !step.wait().unwrap().nonfinite
}

/// What this rank has of the averages: all, or of sharded buckets its shard.
fn averages<T: Real>(buckets: &Buckets) -> Vec<(usize, usize, f32)> {
    if setting("HOOK") != "sharded" {
        let of_all = |at| buckets.gradient::<T>(at).iter().enumerate();
        return (0..3).flat_map(|at| of_all(at).map(move |(i, it)| (at, i, it.value()))).collect();
    }
    let shard = buckets.shard_gradient::<T>(0);
    let pieces = buckets.shard_pieces(0).into_iter();
    let values = pieces.flat_map(|piece| {
        let (parameter, at) = (piece.parameter, piece.at);
        piece.elements.enumerate().map(move |(n, i)| (parameter, i, shard[at + n].value()))
    });
    values.collect()
}

/// A step without the poison, two with it, and two without, beside a layer that has only those that
/// count. The first one since low rank draws its beginning anew in each step until one counts.
fn run<T: Real>(communicator: &Communicator, case: Case<T>, seed: u64) -> u64 {
    let (rank, world) = (communicator.rank(), communicator.world());
    let Case { len, parameter, at, poison, odd } = case;
    let [mut buckets, mut twin] = [0, 1].map(|_| layer::<T>(communicator, len));
    let mut results = 0;
    for number in 0..5 {
        let has_poison = number == 1 || number == 2;
        let seed = mix(seed ^ number);
        let mut own = gradients::<T>(seed, rank, len);
        if has_poison && rank == odd {
            own[parameter][at] = poison;
        }
        let is_finite = step(&mut buckets, &own);
        let context = format!("{case:?}, step {number}, rank {rank}");
        // Encodings of 16 bits have no such values; elsewhere they may overflow.
        let is_largest = poison.value().abs() == T::POISONS[3].value();
        let may_overflow = has_poison && is_largest;
        if has_poison && !poison.value().is_finite() {
            assert!(!is_finite, "{context}: not told");
        } else if !may_overflow {
            assert!(is_finite, "{context}: told of what was not there");
        }
        results = mix(results ^ u64::from(is_finite));
        if !is_finite {
            continue;
        }
        assert!(step(&mut twin, &own), "{context}: the twin");
        let (ours, theirs) = (averages::<T>(&buckets), averages::<T>(&twin));
        assert!(same_bits(&ours, &theirs), "{context}: {ours:?} where {theirs:?} are right");
        if !is_largest {
            check::<T>(&ours, (seed, world, len), &context, |all| {
                if has_poison {
                    all[odd][parameter][at] = poison;
                }
            });
        }
        // Shards differ between ranks.
        if setting("HOOK") != "sharded" {
            results = ours.iter().fold(results, |sum, it| mix(sum ^ u64::from(it.2.to_bits())));
        }
    }
    results
}

fn same_bits(ours: &[(usize, usize, f32)], theirs: &[(usize, usize, f32)]) -> bool {
    let bits = |all: &[(usize, usize, f32)]| -> Vec<u32> {
        all.iter().map(|(_, _, value)| value.to_bits()).collect()
    };
    bits(ours) == bits(theirs)
}

/// Whether the averages are those of what all ranks put in, as nearly as the hook has them.
fn check<T: Real>(
    ours: &[(usize, usize, f32)],
    (seed, world, len): (u64, usize, usize),
    context: &str,
    change: impl Fn(&mut [[Vec<T>; 3]]),
) {
    let (_, bound) = HOOKS.into_iter().find(|(name, _)| *name == setting("HOOK")).unwrap();
    let bound = if T::DTYPE == Dtype::F32 { bound } else { T::BOUND };
    let mut all: Vec<_> = (0..world).map(|rank| gradients::<T>(seed, rank, len)).collect();
    change(&mut all);
    for &(parameter, at, value) in ours {
        let sum: f64 = all.iter().map(|of_rank| f64::from(of_rank[parameter][at].value())).sum();
        let off = f64::from(value) - sum / world as f64;
        assert!(value.is_finite(), "{context}: {value} at {at} of {parameter}");
        assert!(off.abs() <= f64::from(bound), "{context}: off by {off} at {at} of {parameter}");
    }
}
