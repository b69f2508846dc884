//! Sharded buckets: training with shards gives the weights of training with whole gradients.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::Duration;

use support::{World, tell};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[("train", train)]);
}

#[test]
fn shards_train_as_whole_gradients_do() {
    for (ranks, transport) in [(1, "shm"), (2, "tcp"), (3, "shm"), (4, "tcp"), (7, "shm")] {
        let world = World::new(ranks, "train").set("UNISUM_TRANSPORT", transport);
        let told = world.succeed(Duration::from_secs(60));
        assert!(told.iter().all(|it| *it == told[0]), "{ranks} ranks: {told:#?}");
    }
}

fn parameters() -> Vec<Parameter> {
    let shapes: [&[usize]; 6] = [&[1000, 7], &[3], &[], &[40, 40], &[1], &[257]];
    let new = |(at, shape): (usize, &&[usize])| Parameter::new(at.to_string(), shape, Dtype::F32);
    shapes.iter().enumerate().map(new).collect()
}

/// Small integers, whose sums are exact.
fn gradient(rank: usize, number: usize, parameter: usize, at: usize) -> f32 {
    ((rank + 3 * number + 5 * parameter + 7 * at) % 11) as f32 - 5.0
}

fn put_all(buckets: &mut Buckets, rank: usize, number: usize) -> Result<(), Error> {
    let step = buckets.begin()?;
    for (parameter, known) in parameters().iter().enumerate().rev() {
        let values = (0..known.count()).map(|at| gradient(rank, number, parameter, at));
        step.put(parameter, &values.collect::<Vec<f32>>())?;
    }
    step.wait().map(drop)
}

/// The optimiser: momentum, so that each rank keeps something for its shards.
fn update(weight: &mut f32, velocity: &mut f32, gradient: f32) {
    *velocity = 0.5 * *velocity - gradient;
    *weight += *velocity;
}

fn train() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let small = || Buckets::builder(&communicator).bucket_bytes(4000).end_bucket_bytes(900);
    let mut whole = small().build(&parameters()).unwrap();
    let mut sharded = small().sharded().build(&parameters()).unwrap();
    let mut weights = sharded.weights().unwrap();
    let counts: Vec<usize> = parameters().iter().map(Parameter::count).collect();
    let mut expected: Vec<Vec<(f32, f32)>> =
        counts.iter().map(|&count| (0..count).map(|at| (at as f32, 0.0)).collect()).collect();
    for (parameter, expected) in expected.iter().enumerate() {
        let weight = weights.get_mut::<f32>(parameter);
        weight.iter_mut().zip(expected).for_each(|(weight, (first, _))| *weight = *first);
    }
    let buckets = sharded.layout().buckets().len();
    let mut velocities: Vec<Vec<f32>> =
        (0..buckets).map(|bucket| vec![0.0; sharded.shard(bucket).len()]).collect();
    for number in 0..5 {
        put_all(&mut whole, rank, number).unwrap();
        for (parameter, expected) in expected.iter_mut().enumerate() {
            let averages = whole.gradient::<f32>(parameter).iter();
            expected.iter_mut().zip(averages).for_each(|((weight, velocity), &average)| {
                update(weight, velocity, average);
            });
        }
        put_all(&mut sharded, rank, number).unwrap();
        for (bucket, velocity) in velocities.iter_mut().enumerate() {
            let weights = weights.shard_mut::<f32>(bucket);
            let averages = sharded.shard_gradient::<f32>(bucket);
            for ((weight, velocity), &average) in weights.iter_mut().zip(velocity).zip(averages) {
                update(weight, velocity, average);
            }
        }
        let gathering = sharded.gather(&mut weights).unwrap();
        for (parameter, expected) in expected.iter().enumerate() {
            let weight = gathering.get::<f32>(parameter).unwrap();
            assert!(weight.iter().eq(expected.iter().map(|(weight, _)| weight)), "{parameter}");
        }
        if number % 2 == 0 {
            gathering.wait().unwrap();
        }
    }
    let sum: f64 = (0..counts.len())
        .flat_map(|parameter| weights.get::<f32>(parameter))
        .map(|&weight| f64::from(weight))
        .sum();
    tell(sum);
}
