//! A program that ends its job while ranks wait, works that are waited for in other ways than
//! blocking, and callbacks.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use support::{World, await_others, reach, setting, tell_error};
use unisum::{Collective, Communicator, ErrorKind, InPlace, Messenger, ReduceOp};

const LIMIT: Duration = Duration::from_secs(60);
/// Half the deadline of calls: the machine may be busy.
const MOMENTS: Duration = Duration::from_secs(30);

#[test]
fn rank_process() {
    support::run_if_rank(&[("abort", abort), ("callbacks", callbacks)]);
}

/// What the ranks wait in when one of them aborts.
const PLACES: [&str; 5] = ["blocking", "work", "group", "message", "own"];

#[test]
fn a_program_that_aborts_ends_all_calls_under_way_on_all_ranks() {
    for transport in support::transports() {
        for place in PLACES {
            for aborting in [0, 1] {
                let world = World::new(3, "abort").set("UNISUM_TRANSPORT", transport);
                let told = world.set("PLACE", place).set("ABORTING", aborting).succeed(LIMIT);
                for (rank, told) in told.iter().enumerate() {
                    let context = format!("{transport}, {place}, rank {rank}: {told:?}");
                    let why = format!("rank {aborting} aborted the job: the loss is NaN");
                    assert!(told[0].contains(&why), "{context}");
                    assert!(told[0].starts_with(&format!("Aborted [{aborting}] ")), "{context}");
                }
            }
        }
    }
}

fn abort() {
    let communicator = Communicator::from_environment().unwrap();
    let group = communicator.duplicate().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    let (place, rank) = (setting("PLACE"), communicator.rank());
    let aborts = rank == setting("ABORTING").parse::<usize>().unwrap();
    let start = Instant::now();
    let error = thread::scope(|scope| {
        let aborter = scope.spawn(|| {
            await_others("waiting", if place == "own" { 3 } else { 2 }, LIMIT);
            aborts.then(|| communicator.abort("the loss is NaN"))
        });
        if aborts && place != "own" {
            return aborter.join().unwrap().unwrap();
        }
        reach("waiting");
        let data = &mut [1_f32; 100];
        // Nobody gets what it waits for: the rank that aborts calls nothing, or nobody sends.
        match &place[..] {
            "own" => messenger.receive(data, (rank + 1) % 3, 1).unwrap_err(),
            "blocking" => communicator.all_reduce(data, ReduceOp::Sum).unwrap_err(),
            "group" => group.all_reduce(data, ReduceOp::Sum).unwrap_err(),
            "message" => messenger.receive(data, (rank + 1) % 3, 1).unwrap_err(),
            _ => {
                let collective = Collective::all_reduce(ReduceOp::Sum);
                let work = communicator.start::<f32, _>(collective, InPlace(vec![1.0; 100]));
                work.wait().map(drop).unwrap_err()
            }
        }
    });
    assert!(start.elapsed() < MOMENTS, "{:?}", start.elapsed());
    tell_error(&error);
    // Whoever calls later is told the same.
    let later = communicator.barrier().unwrap_err();
    assert_eq!((later.kind(), later.failed_ranks()), (ErrorKind::Aborted, error.failed_ranks()));
    assert!(later.to_string().contains("the loss is NaN"), "{later}");
    // So is who sends what would not have to wait for anybody.
    let sent = messenger.send(&[1_f32; 4], (rank + 1) % 3, 2).unwrap_err();
    assert_eq!((sent.kind(), sent.failed_ranks()), (ErrorKind::Aborted, error.failed_ranks()));
    assert!(communicator.abort("again").to_string().contains("the loss is NaN"));
}

#[test]
fn a_world_of_one_that_aborts_calls_nothing_any_more() {
    let communicator = Communicator::builder().rank(0).world(1).connect().unwrap();
    communicator.all_reduce(&mut [1.0], ReduceOp::Sum).unwrap();
    let error = communicator.abort("enough");
    assert_eq!(error.to_string(), "rank 0 aborted the job: enough");
    let later = communicator.all_reduce(&mut [1.0], ReduceOp::Sum).unwrap_err();
    assert_eq!(later.kind(), ErrorKind::Aborted);
    assert!(later.to_string().contains("enough"), "{later}");
}

#[test]
fn works_are_waited_for_with_time_outs_and_callbacks() {
    for transport in support::transports() {
        World::new(2, "callbacks").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn callbacks() {
    let communicator = std::sync::Arc::new(Communicator::from_environment().unwrap());
    let (sender, receiver) = mpsc::channel();
    let collective = || Collective::all_reduce(ReduceOp::Sum);
    let start = || communicator.start::<f32, _>(collective(), InPlace(vec![1.0; 100]));
    if communicator.rank() == 1 {
        // The other rank's work waits for this one's: until then its waiting times out.
        await_others("timed_out", 1, LIMIT);
    }
    let mut work = start();
    let inside = communicator.clone();
    let main = thread::current().id();
    // A callback may call what others have to take part in.
    let callback = move || {
        assert_ne!(thread::current().id(), main);
        inside.barrier().unwrap();
        sender.send(thread::current().name().map(str::to_owned)).unwrap();
    };
    work.on_end(callback.clone()).unwrap();
    let ended = match communicator.rank() {
        0 => {
            let first = work.wait_timeout(Duration::from_millis(20));
            assert!(first.is_none(), "nobody else has started it");
            reach("timed_out");
            work.wait_timeout(LIMIT)
        }
        _ => work.wait_timeout(Duration::MAX),
    };
    assert_eq!(ended.unwrap().unwrap().0.0, [2.0; 100]);
    assert_eq!(receiver.recv_timeout(LIMIT).unwrap().as_deref(), Some("unisum-callback"));
    // The result is given once, and a callback of what has ended is called all the same.
    let again = work.wait_timeout(Duration::ZERO).unwrap().unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Configuration);
    work.on_end(callback).unwrap();
    receiver.recv_timeout(LIMIT).unwrap();
}
