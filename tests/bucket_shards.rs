//! Sharded buckets: training with shards gives the weights of training with whole gradients.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::Duration;

use support::{World, tell};
use unisum::buckets::{Buckets, Parameter, ShardState};
use unisum::{Communicator, Dtype, Error, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", train),
        ("keep", keep),
        ("renumber", renumber),
        ("fork", fork),
    ]);
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

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn state_is_copied_and_laid_out_while_weights_come() {
    World::new(2, "keep").succeed(LIMIT);
}

fn keep() {
    let communicator = Communicator::from_environment().unwrap();
    let new = |number: usize| Parameter::new(number.to_string(), &[50_000], Dtype::F32);
    let list: Vec<_> = (0..20).map(new).collect();
    let builder = Buckets::builder(&communicator).bucket_bytes(200_000).end_bucket_bytes(200_000);
    let mut buckets = builder.sharded().build(&list).unwrap();
    let (mut state, mut weights) = (ShardState::<f32>::new(3), buckets.weights().unwrap());
    buckets.reshard(&mut state).unwrap();
    for number in 1..=10 {
        state.set_version(number);
        let coming = buckets.gather(&mut weights).unwrap();
        // The last bucket is here, and the others may not be.
        coming.get::<f32>(0).unwrap();
        buckets.copy_shards(&mut state).unwrap();
        coming.wait().unwrap();
        drop(buckets.gather(&mut weights).unwrap());
        assert_eq!(buckets.reshard(&mut state).unwrap().version, number);
        drop(buckets.gather(&mut weights).unwrap());
        buckets.advise(&[]).unwrap();
    }
}

#[test]
fn weights_of_another_rank_are_refused() {
    World::new(3, "renumber").succeed(LIMIT);
}

/// After a change of the view a rank may have another number in the same layout.
fn renumber() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let build = |of: &Communicator| Buckets::builder(of).sharded().build(&parameters()).unwrap();
    let mut weights = build(&communicator).weights().unwrap();
    weights.shard_mut::<f32>(0).fill(7.0);
    let key = [2, 0, 1][rank];
    let other = communicator.split(Some(0), key).unwrap().unwrap();
    assert_ne!(other.rank(), rank);
    let mut buckets = build(&other);
    let error = buckets.gather(&mut weights).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    let text = error.to_string();
    assert!(text.contains(&format!("these weights are of rank {rank} of 3 ranks")), "{text}");
    let mut weights = buckets.weights().unwrap();
    weights.shard_mut::<f32>(0).fill(7.0);
    buckets.gather(&mut weights).unwrap().wait().unwrap();
    assert!(weights.get::<f32>(0).iter().all(|&it| it == 7.0));
}

#[test]
fn a_forked_child_can_gather_nothing_and_the_parent_goes_on() {
    World::new(2, "fork").succeed(LIMIT);
}

fn fork() {
    let communicator = Communicator::from_environment().unwrap();
    let mut buckets = Buckets::builder(&communicator).sharded().build(&parameters()).unwrap();
    let (mut weights, mut others) = (buckets.weights().unwrap(), buckets.weights().unwrap());
    let coming = buckets.gather(&mut weights).unwrap();
    // SAFETY: the child calls only what the library promises to refuse, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let is_forked = |error: Error| error.kind() == ErrorKind::Forked;
        let mut is_refused = coming.wait().is_err_and(is_forked);
        is_refused &= buckets.gather(&mut others).is_err_and(is_forked);
        is_refused &= buckets.reshard(&mut ShardState::<f32>::new(1)).is_err_and(is_forked);
        drop((buckets, others, communicator));
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!is_refused)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made; `status` is valid.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child was refused and left quietly");
    coming.wait().unwrap();
    buckets.gather(&mut others).unwrap().wait().unwrap();
}
