//! A rank that leaves in order, while others still call collectives that it should take part in:
//! they are told in seconds, not at the deadline. One that leaves after its last call is no error.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::{World, setting, tell, tell_error};
use unisum::{Communicator, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("leave_early", leave_early), ("leave_after", leave_after)]);
}

const LIMIT: Duration = Duration::from_secs(60);

/// In the job's own communicator or in a group, at once or once the others have waited for long.
#[test]
fn who_leaves_too_early_is_named_long_before_the_deadline() {
    for transport in support::transports() {
        for (leaver, group, after) in
            [(1, 0, 0), (0, 0, 0), (2, 0, 5), (0, 0, 5), (1, 1, 0), (2, 1, 5)]
        {
            let world = World::new(4, "leave_early").set("UNISUM_TRANSPORT", transport);
            let world = world.set("LEAVER", leaver).set("GROUP", group).set("AFTER", after);
            let start = Instant::now();
            for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
                let context = format!("{transport}, {leaver} leaves, rank {rank}: {}", told[0]);
                if rank == leaver {
                    assert_eq!(told[0], "left", "{context}");
                } else {
                    assert!(told[0].starts_with(&format!("RankLost [{leaver}]")), "{context}");
                    assert!(told[0].contains(" left the communicator"), "{context}");
                }
            }
            let took = start.elapsed();
            assert!(took < Duration::from_secs(20), "{transport}, {leaver} leaves: {took:?}");
        }
    }
}

fn leave_early() {
    let communicator = Communicator::from_environment().unwrap();
    let group = communicator.duplicate().unwrap();
    let used = if setting("GROUP") == "1" { &group } else { &communicator };
    used.all_reduce(&mut [1_f32; 10], ReduceOp::Sum).unwrap();
    if communicator.rank() == setting("LEAVER").parse().unwrap() {
        std::thread::sleep(Duration::from_secs(setting("AFTER").parse().unwrap()));
        return tell("left");
    }
    tell_error(&used.all_reduce(&mut [1_f32; 10], ReduceOp::Sum).unwrap_err());
}

/// The root of a broadcast has nothing to wait for. The others may be late, and the slowest has
/// waited for long before the others left.
#[test]
fn who_leaves_after_its_last_call_is_not_missed() {
    for transport in support::transports() {
        World::new(3, "leave_after").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn leave_after() {
    let communicator = Communicator::from_environment().unwrap();
    let group = communicator.duplicate().unwrap();
    for used in [&communicator, &group] {
        let mut data = vec![communicator.rank() as f32; 10];
        if communicator.rank() == 2 {
            std::thread::sleep(Duration::from_millis(3500));
        }
        used.broadcast(&mut data, 0).unwrap();
        assert_eq!(data, [0.0; 10]);
    }
}
