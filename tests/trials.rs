//! The first call of a size tries algorithms: all ranks settle on the same, buffers are as if it
//! had not, and functions of the user are called no more often.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use support::{World, tell};
use unisum::{Buffers, Collective, Communicator, CustomOp, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("settle", settle),
        ("own_function", own_function),
        ("die_first", die_first),
        ("in_other_places", in_other_places),
        ("in_other_places_busy", in_other_places_busy),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);
const COUNTS: [usize; 3] = [300, 5000, 100_000];

fn worlds(scenario: &'static str) -> impl Iterator<Item = World> {
    [("tcp", 2), ("tcp", 5), ("shm", 2), ("shm", 4)].into_iter().map(move |(transport, ranks)| {
        World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport)
    })
}

#[test]
fn all_ranks_settle_on_the_same_and_buffers_are_as_ever() {
    for world in worlds("settle") {
        let told = world.succeed(LIMIT);
        assert!(told.iter().all(|told| told.len() == COUNTS.len()), "{told:?}");
        assert!(told.windows(2).all(|two| two[0] == two[1]), "{told:?}");
    }
}

/// Ranks know different calls of a size: some have had it in place, some apart, by a function of
/// the user, which is not tried, and then plain.
#[test]
fn ranks_that_know_other_calls_try_and_settle_alike() {
    for world in worlds("in_other_places") {
        world.succeed(LIMIT);
    }
}

/// The same on a host so busy that most trials take too long and are ended early.
#[test]
fn ranks_settle_alike_though_trials_take_too_long() {
    for world in worlds("in_other_places_busy") {
        world.succeed(LIMIT);
    }
}

fn in_other_places_busy() {
    let communicator = Communicator::from_environment().unwrap();
    for _ in 0..16 {
        // They end with the process.
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    call_in_other_places(&communicator);
}

fn in_other_places() {
    call_in_other_places(&Communicator::from_environment().unwrap());
}

fn call_in_other_places(communicator: &Communicator) {
    let (rank, world) = (communicator.rank(), communicator.world());
    let fold = |into: &mut [f32], from: &[f32]| {
        into.iter_mut().zip(from).for_each(|(into, from)| *into += from);
    };
    let own = CustomOp::commutative(fold);
    for count in COUNTS {
        let reduce = |collective: &Collective, apart: bool| {
            let (input, mut data) = (vec![1.0_f32; count], vec![1.0_f32; count]);
            let buffers = match apart {
                true => Buffers::OutOfPlace(&input, &mut data),
                false => Buffers::InPlace(&mut data),
            };
            communicator.run(collective, buffers).unwrap();
            assert!(data.iter().all(|&it| it == world as f32), "{count}");
        };
        let (custom, plain) = (Collective::all_reduce(own), Collective::all_reduce(ReduceOp::Sum));
        reduce(&custom, rank == 0);
        reduce(&plain, false);
        reduce(&custom, false);
        reduce(&plain, rank == 0);
    }
}

fn settle() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    for count in COUNTS {
        let own: Vec<f32> = (0..count).map(|at| ((at + rank) % 64) as f32).collect();
        let sum = |at: usize| (0..world).map(|rank| ((at + rank) % 64) as f32).sum::<f32>();
        let mut data = own.clone();
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!((0..count).all(|at| data[at] == sum(at)), "all-reduce of {count}");
        let mut data = own.clone();
        communicator.reduce(&mut data, ReduceOp::Sum, 1).unwrap();
        let expected = |at: usize| if rank == 1 { sum(at) } else { own[at] };
        assert!((0..count).all(|at| data[at] == expected(at)), "reduce of {count}");
        let (input, mut all) = (own.clone(), vec![-1.0; count * world]);
        communicator.run(&Collective::all_gather(), Buffers::OutOfPlace(&input, &mut all)).unwrap();
        let gathered = |at: usize| ((at % count + at / count) % 64) as f32;
        assert!((0..all.len()).all(|at| all[at] == gathered(at)), "all-gather of {count}");
        assert_eq!(input, own);
        tell(communicator.choice::<f32>(&Collective::all_reduce(ReduceOp::Sum), count));
    }
}

#[test]
fn functions_of_the_user_are_not_tried() {
    worlds("own_function").for_each(|world| drop(world.succeed(LIMIT)));
}

static CALLS: AtomicUsize = AtomicUsize::new(0);

fn own_function() {
    let communicator = Communicator::from_environment().unwrap();
    let fold = |into: &mut [f32], from: &[f32]| {
        // Relaxed: this thread alone calls it and reads it.
        CALLS.fetch_add(from.len(), Ordering::Relaxed);
        into.iter_mut().zip(from).for_each(|(into, from)| *into += from);
    };
    let calls = || {
        let mut data = vec![1.0_f32; 5000];
        communicator.all_reduce(&mut data, CustomOp::commutative(fold)).unwrap();
        CALLS.swap(0, Ordering::Relaxed)
    };
    assert_eq!(calls(), calls());
}

#[test]
fn a_rank_that_dies_before_the_first_call_is_named() {
    for world in worlds("die_first") {
        for (rank, ended) in world.run(LIMIT).iter().enumerate() {
            assert!(rank == 1 || ended.told.iter().any(|told| told == "[1]"), "{rank}: {ended:?}");
        }
    }
}

fn die_first() {
    let communicator = Communicator::from_environment().unwrap();
    if communicator.rank() == 1 {
        std::process::abort();
    }
    let error = communicator.all_reduce(&mut vec![1.0_f32; 5000], ReduceOp::Sum).unwrap_err();
    tell(format!("{:?}", error.failed_ranks()));
}
