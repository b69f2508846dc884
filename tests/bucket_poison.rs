//! Steps with infinities, NaNs and denormals next to every edge of a bucket, two in a row: all
//! ranks hear of what is not finite, and the steps after it are, to the bit, those of a layer that
//! never had it.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "sequence/random.rs"]
#[expect(dead_code, reason = "the sequences use more of it")]
mod random;
mod support;

use std::time::Duration;

use random::{Random, mix};
use support::{World, setting, tell};
use unisum::buckets::{Bucket, Buckets, Compressed, Encoding, Hook, LowRank, Parameter};
use unisum::{Collective, Communicator, Dtype, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[("poison", poison)]);
}

const LIMIT: Duration = Duration::from_secs(300);

/// What buckets are reduced by, and how far an average of values up to 1 may be off.
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

const POISONS: [f32; 10] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    f32::from_bits(1),
    f32::from_bits(0x8000_0001),
    f32::from_bits(0x007f_ffff),
    -0.0,
];

#[test]
fn a_step_after_one_with_poison_at_an_edge_is_as_if_that_had_not_been() {
    let mut cases = Vec::new();
    for transport in support::transports() {
        for (hook, _) in HOOKS {
            cases.extend([(transport, hook, 2), (transport, hook, 3)]);
        }
    }
    let (seed, is_whole) = (support::seed(), std::env::var_os("UNISUM_TEST_WHOLE").is_some());
    for (transport, hook, ranks) in support::sample(cases, 12) {
        // The layers are compared bit by bit, so they may not choose for themselves.
        let world = World::new(ranks, "poison").set("UNISUM_REPRODUCIBLE", 1);
        let world = world.set("UNISUM_TRANSPORT", transport);
        let cases = if is_whole { usize::MAX } else { 25 };
        let world = world.set("HOOK", hook).set("SEED", seed >> 16).set("CASES", cases);
        let told = world.succeed(LIMIT);
        assert!(told.iter().all(|it| *it == told[0]), "{transport}, {hook}: {told:#?}");
    }
}

/// A poison in a gradient of one rank.
#[derive(Clone, Copy, Debug)]
struct Case {
    len: usize,
    parameter: usize,
    at: usize,
    poison: f32,
    odd: usize,
}

fn cases(ranks: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for len in LENGTHS {
        let edges = [0, 1, 15, 16, 31, 32, 99, 100, 255, 256, len.saturating_sub(2), len - 1];
        let mut edges: Vec<usize> = edges.into_iter().filter(|&at| at < len).collect();
        edges.sort_unstable();
        edges.dedup();
        for parameter in [0, 2] {
            for &at in &edges {
                for (number, poison) in POISONS.into_iter().enumerate() {
                    cases.push(Case { len, parameter, at, poison, odd: (at + number) % ranks });
                }
            }
        }
    }
    cases
}

fn poison() {
    let communicator = Communicator::from_environment().unwrap();
    let mut random = Random(setting("SEED").parse().unwrap());
    let mut all = cases(communicator.world());
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
        let elements = bucket.elements::<f32>().iter().enumerate();
        assert!(elements.filter(|(at, _)| is_pad(*at)).all(|(_, it)| it.to_bits() == 0), "pads");
        bucket.run(&Collective::all_reduce(bucket.average()))?;
        let elements = bucket.elements::<f32>().iter_mut().enumerate();
        elements.filter(|(at, _)| is_pad(*at)).for_each(|(_, it)| *it = f32::NAN);
        Ok(())
    }
}

fn layer(communicator: &Communicator, len: usize) -> Buckets {
    let parameters = [
        Parameter::new("first", &[len], Dtype::F32),
        Parameter::new("matrix", &[9, 7], Dtype::F32),
        Parameter::new("last", &[len], Dtype::F32),
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
fn gradients(seed: u64, rank: usize, len: usize) -> [Vec<f32>; 3] {
    let mut random = Random(mix(seed ^ (rank as u64) << 40));
    [len, 63, len].map(|count| {
        (0..count).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect::<Vec<_>>()
    })
}

/// A step; whether all was finite.
fn step(buckets: &mut Buckets, gradients: &[Vec<f32>; 3]) -> bool {
    let step = buckets.begin().unwrap();
    (0..3).rev().for_each(|at| step.put(at, &gradients[at]).unwrap());
    !step.wait().unwrap().nonfinite
}

/// What this rank has of the averages: all, or of sharded buckets its shard.
fn averages(buckets: &Buckets) -> Vec<(usize, usize, f32)> {
    if setting("HOOK") != "sharded" {
        let of_all = |at| buckets.gradient::<f32>(at).iter().enumerate();
        return (0..3).flat_map(|at| of_all(at).map(move |(i, &it)| (at, i, it))).collect();
    }
    let shard = buckets.shard_gradient::<f32>(0);
    let pieces = buckets.shard_pieces(0).into_iter();
    let values = pieces.flat_map(|piece| {
        let (parameter, at) = (piece.parameter, piece.at);
        piece.elements.enumerate().map(move |(n, i)| (parameter, i, shard[at + n]))
    });
    values.collect()
}

/// A step without the poison, two with it, and two without, beside a layer that has only those that
/// count. The first one since low rank draws its beginning anew in each step until one counts.
fn run(communicator: &Communicator, case: Case, seed: u64) -> u64 {
    let (rank, world) = (communicator.rank(), communicator.world());
    let Case { len, parameter, at, poison, odd } = case;
    let [mut buckets, mut twin] = [0, 1].map(|_| layer(communicator, len));
    let mut results = 0;
    for number in 0..5 {
        let has_poison = number == 1 || number == 2;
        let seed = mix(seed ^ number);
        let mut own = gradients(seed, rank, len);
        if has_poison && rank == odd {
            own[parameter][at] = poison;
        }
        let is_finite = step(&mut buckets, &own);
        let context = format!("{case:?}, step {number}, rank {rank}");
        // Encodings of 16 bits have no such values; elsewhere they may overflow.
        let may_overflow = has_poison && poison.abs() == f32::MAX;
        if has_poison && !poison.is_finite() {
            assert!(!is_finite, "{context}: not told");
        } else if !may_overflow {
            assert!(is_finite, "{context}: told of what was not there");
        }
        results = mix(results ^ u64::from(is_finite));
        if !is_finite {
            continue;
        }
        assert!(step(&mut twin, &own), "{context}: the twin");
        let (ours, theirs) = (averages(&buckets), averages(&twin));
        assert!(same_bits(&ours, &theirs), "{context}: {ours:?} where {theirs:?} are right");
        if poison.abs() != f32::MAX {
            check(&ours, (seed, world, len), &context, |all| {
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
fn check(
    ours: &[(usize, usize, f32)],
    (seed, world, len): (u64, usize, usize),
    context: &str,
    change: impl Fn(&mut [[Vec<f32>; 3]]),
) {
    let (_, bound) = HOOKS.into_iter().find(|(name, _)| *name == setting("HOOK")).unwrap();
    let mut all: Vec<_> = (0..world).map(|rank| gradients(seed, rank, len)).collect();
    change(&mut all);
    for &(parameter, at, value) in ours {
        let sum: f64 = all.iter().map(|of_rank| f64::from(of_rank[parameter][at])).sum();
        let off = f64::from(value) - sum / world as f64;
        assert!(value.is_finite(), "{context}: {value} at {at} of {parameter}");
        assert!(off.abs() <= f64::from(bound), "{context}: off by {off} at {at} of {parameter}");
    }
}
