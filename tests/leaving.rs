//! A rank that leaves in order, while others still call collectives that it should take part in:
//! they are told in seconds, not at the deadline. One that leaves after its last call is no error.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::Duration;

use support::stopwatch::Stopwatch;
use support::{Random, World, setting, tell, tell_error};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Buffers, Collective, Communicator, Dtype, Error, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    let early = ("leave_early", leave_early as fn());
    support::run_if_rank(&[
        early,
        ("leave_after", leave_after),
        ("drop_messenger", drop_messenger),
    ]);
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
            let start = Stopwatch::start();
            for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
                let context = format!("{transport}, {leaver} leaves, rank {rank}: {}", told[0]);
                if rank == leaver {
                    assert_eq!(told[0], "left", "{context}");
                } else {
                    assert!(told[0].starts_with(&format!("RankLost [{leaver}]")), "{context}");
                    assert!(told[0].contains(" left the communicator"), "{context}");
                }
            }
            start.assert_within(
                Duration::from_secs(20),
                LIMIT / 2,
                &format!("{transport}, {leaver} leaves"),
            );
        }
    }
}

fn leave_early() {
    let communicator = Communicator::from_environment().unwrap();
    let group = communicator.duplicate().unwrap();
    let used = if setting("GROUP") == "1" { &group } else { &communicator };
    used.all_reduce(&mut [1_f32; 10], ReduceOp::Sum).unwrap();
    if communicator.rank() == setting("LEAVER").parse::<usize>().unwrap() {
        thread::sleep(Duration::from_secs(setting("AFTER").parse().unwrap()));
        return tell("left");
    }
    tell_error(&used.all_reduce(&mut [1_f32; 10], ReduceOp::Sum).unwrap_err());
}

/// The job goes on, so that no connection of it ends.
#[test]
fn who_drops_a_messenger_that_another_rank_waits_in_is_named() {
    let cases = support::transports().into_iter().flat_map(|it| [(it, 0), (it, 1)]);
    for (transport, sends, leaver) in cases.flat_map(|(it, sends)| [(it, sends, 0), (it, sends, 2)])
    {
        let world = World::new(3, "drop_messenger").set("UNISUM_TRANSPORT", transport);
        let world = world.set("SENDS", sends).set("LEAVER", leaver);
        let start = Stopwatch::start();
        for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
            let context = format!("{transport}, {sends}, rank {rank}: {}", told[0]);
            assert!(told[0].starts_with(&format!("RankLost [{leaver}]")), "{context}");
        }
        start.assert_within(Duration::from_secs(20), LIMIT / 2, &format!("{transport}, {sends}"));
    }
}

fn drop_messenger() {
    let communicator = Communicator::from_environment().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    let leaver: usize = setting("LEAVER").parse().unwrap();
    let (rank, mut data) = (communicator.rank(), vec![1_f32; 50_000]);
    if rank == leaver {
        drop(messenger);
    } else if rank == 1 {
        let error = match setting("SENDS").as_str() {
            "1" => messenger.send(&data, leaver, 7),
            _ => messenger.receive(&mut data, leaver, 7),
        };
        return tell_error(&error.unwrap_err());
    }
    tell_error(&communicator.barrier().unwrap_err());
}

/// Where ranks make their last call, before they leave.
const PLACES: [&str; 4] = ["job", "group", "messenger", "buckets"];

/// How ranks come to their last call, and leave: `DRAWS` ways a transport, drawn anew in each run.
/// Ranks come and go at once or more than 3 s apart, when those who wait begin to ask about each
/// other; with the process's end or before.
#[test]
fn ranks_that_leave_after_their_last_call_in_any_order_are_never_missed() {
    let draws = std::env::var("UNISUM_TEST_DRAWS").map_or(6, |text| text.parse().unwrap());
    let mut random = Random::new();
    thread::scope(|scope| {
        for transport in support::transports() {
            for draw in 0..draws {
                let (world, told) = draw_leaving(transport, PLACES[draw % 4], &mut random);
                println!("{told}");
                scope.spawn(move || world.succeed_as(&told, LIMIT));
            }
        }
    });
}

fn draw_leaving(transport: &str, place: &str, random: &mut Random) -> (World, String) {
    let ranks = 2 + random.below(3);
    let mut moments = |shares: [usize; 2]| {
        let moment = |_| match random.below(4) {
            share if share < shares[0] => 3_500,
            share if share < shares[1] => random.below(300),
            _ => 0,
        };
        (0..ranks).map(moment).map(|ms| ms.to_string()).collect::<Vec<_>>().join(",")
    };
    let (before, after, stay) = (moments([1, 2]), moments([1, 3]), moments([1, 2]));
    let call = random.below(CALLS);
    // Trying algorithms out is a call of its own: one in four ends with it.
    let algorithm = ["ring", "tree", "direct", "auto"][random.below(4)];
    let told = format!(
        "{transport}, {place}, {ranks} ranks, call {call} by {algorithm}, before {before}, \
         after {after}, stay {stay}"
    );
    let world = World::new(ranks, "leave_after").set("UNISUM_TRANSPORT", transport);
    let world = if algorithm == "auto" { world } else { world.set("UNISUM_ALGORITHM", algorithm) };
    let world = world.set("PLACE", place).set("CALL", call);
    (world.set("BEFORE", before).set("AFTER", after).set("STAY", stay), told)
}

fn leave_after() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let pause = |name: &str| {
        let moments = setting(name);
        let ms = moments.split(',').nth(rank).unwrap().parse().unwrap();
        thread::sleep(Duration::from_millis(ms));
    };
    let call = setting("CALL").parse().unwrap();
    match setting("PLACE").as_str() {
        "job" => {
            pause("BEFORE");
            last_call(&communicator, call).unwrap();
            pause("AFTER");
            drop(communicator);
        }
        "group" => {
            let group = communicator.duplicate().unwrap();
            pause("BEFORE");
            last_call(&group, call).unwrap();
            drop(communicator);
            pause("AFTER");
        }
        "messenger" => {
            let messenger = Messenger::new(&communicator).unwrap();
            pause("BEFORE");
            last_messages(&messenger).unwrap();
            drop(communicator);
            pause("AFTER");
        }
        _ => {
            let parameters = [Parameter::new("weight", &[100_000], Dtype::F32)];
            let mut buckets = Buckets::builder(&communicator).build(&parameters).unwrap();
            pause("BEFORE");
            let step = buckets.begin().unwrap();
            step.view::<f32>(0).unwrap().ready();
            step.wait().unwrap();
            drop(communicator);
            pause("AFTER");
        }
    }
    // Whether the process goes on or ends makes a difference to the others' connections.
    pause("STAY");
}

const CALLS: usize = 7;

/// One of the calls after which some ranks have had all they need before others have come.
fn last_call(communicator: &Communicator, call: usize) -> Result<(), Error> {
    let (rank, world) = (communicator.rank(), communicator.world());
    let (root, each) = (world - 1, 1000);
    let (mut one, mut all) = (vec![rank as f32; each], vec![0_f32; each * world]);
    match call {
        0 => communicator.broadcast(&mut one, 0),
        1 => communicator.broadcast(&mut one, root),
        2 => communicator.reduce(&mut one, ReduceOp::Sum, root),
        3 => communicator.gather(&one, &mut all, root),
        4 => communicator.scatter(&all, &mut one, 0),
        5 => communicator.all_reduce(&mut one, ReduceOp::Sum),
        _ => {
            // Only the neighbours have something for each other.
            let (mut sends, mut receives) = (vec![0; world], vec![0; world]);
            sends[(rank + 1) % world] = each;
            receives[(rank + world - 1) % world] = each;
            let collective = Collective::all_to_all_v(&sends, &receives);
            let (input, output) = (vec![1_f32; each], &mut all[..each]);
            communicator.run(&collective, Buffers::OutOfPlace(&input, output)).map(drop)
        }
    }
}

/// A ring of messages, short and long.
fn last_messages(messenger: &Messenger) -> Result<(), Error> {
    let (rank, world) = (messenger.rank(), messenger.world());
    for count in [10, 100_000] {
        let (data, mut received) = (vec![rank as f32; count], vec![0_f32; count]);
        messenger.exchange(&mut [
            Message::Send { data: &data, to: (rank + 1) % world, tag: 1 },
            Message::Receive { data: &mut received, from: (rank + world - 1) % world, tag: 1 },
        ])?;
    }
    Ok(())
}
