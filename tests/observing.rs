//! What a rank tells of itself: statistics, also while a call is stuck, and the event stream.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::{World, await_others, reach};
use unisum::events::{Event, Observer};
use unisum::{Communicator, ErrorKind, ReduceOp, RunningCall};

#[test]
fn rank_process() {
    support::run_if_rank(&[("observe", observe), ("lose", lose)]);
}

const LIMIT: Duration = Duration::from_secs(60);
const COUNT: usize = 20_000;

fn on_each_transport(body: &'static str) {
    for transport in support::transports() {
        let world = World::new(3, body).set("UNISUM_TRANSPORT", transport);
        world.set("UNISUM_TIMEOUT", "20").succeed(LIMIT);
    }
}

#[test]
fn calls_bytes_and_waits_are_told() {
    on_each_transport("observe");
}

#[test]
fn a_call_that_fails_ends_in_the_stream_too() {
    on_each_transport("lose");
}

/// Rank 2 is late, until the others have seen what they do meanwhile, which they ask from another
/// thread.
fn observe() {
    let communicator = Communicator::from_environment().unwrap();
    let (world, rank) = (communicator.world(), communicator.rank());
    communicator.set_algorithm(Some("ring")).unwrap();
    let mut data = vec![rank as f32; COUNT];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    let before = communicator.stats();
    assert_eq!(before.running, None);
    let mut observer = Observer::new();
    if rank == 2 {
        await_others("stuck", 2, LIMIT);
        communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
    } else {
        std::thread::scope(|scope| {
            let mut watching = Observer::new();
            let call = scope.spawn(|| communicator.all_reduce(&mut data, ReduceOp::Max));
            check_stuck(&communicator, &mut watching);
            reach("stuck");
            call.join().unwrap().unwrap();
        });
    }
    let after = communicator.stats();
    assert_eq!((after.calls, after.running), (before.calls + 1, None));
    if rank != 2 {
        assert!(after.sleeps > before.sleeps && after.slept > before.slept);
    }
    let batch = observer.read();
    assert_eq!(batch.lost, 0);
    let events: Vec<Event> = batch.events.iter().map(|recorded| recorded.event).collect();
    let [Event::CallEntered { communicator: 0, number, collective: 1, count, .. }] =
        events_of(&events, |event| matches!(event, Event::CallEntered { .. }))[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(count, COUNT as u64);
    assert_eq!(events.last(), Some(&Event::CallCompleted { communicator: 0, number }));
    // A ring of three over pairs: each rank passes two thirds on to the next, twice.
    let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
    let sent = after.peers[next].sent - before.peers[next].sent;
    let received = after.peers[last].received - before.peers[last].received;
    let bytes = |pick: fn(&Event, usize) -> Option<u64>, peer| -> u64 {
        events.iter().filter_map(|event| pick(event, peer)).sum()
    };
    assert_eq!(bytes(sent_to, next), sent);
    assert_eq!(bytes(received_from, last), received);
    let moved = (COUNT * 4 * 4 / 3) as u64;
    assert!(sent.abs_diff(moved) <= 256 && received.abs_diff(moved) <= 256, "{sent} {received}");
    assert_eq!(after.peers[last].sent, before.peers[last].sent);
    let waits = events.iter().filter(|event| matches!(event, Event::Blocked { .. })).count();
    let wakes = events.iter().filter(|event| matches!(event, Event::Woken)).count();
    assert_eq!(waits, wakes);
    if rank == 0 {
        // What it gets comes from the late rank.
        assert!(events.contains(&Event::Blocked { on: Some(2) }), "{events:?}");
    }
    check_description(&communicator);
    communicator.barrier().unwrap();
}

/// What it consists of is data, and its text has all of it.
fn check_description(communicator: &Communicator) {
    let described = communicator.describe();
    let text = described.to_string();
    let world = communicator.world();
    assert_eq!(
        (described.ranks.len(), &described.transport[..]),
        (world, communicator.transport())
    );
    assert_eq!(described.ranks[communicator.rank()].pid, std::process::id());
    assert!(described.ranks.iter().all(|rank| text.contains(&format!("pid {}", rank.pid))));
    assert!(described.joined_in.is_some_and(|time| time < LIMIT));
    assert!(text.starts_with(&described.summary()), "{text}");
    let [cost, ..] = &described.costs[..] else { panic!("{text}") };
    assert!(cost.rates.latency_s > 0.0 && text.contains(&cost.what), "{text}");
    let sizes: Vec<_> = described.algorithms.iter().map(|it| (it.above, it.up_to)).collect();
    assert!(sizes[0].0 == 0 && sizes.windows(2).all(|pair| pair[0].1 == pair[1].0), "{sizes:?}");
    // Fixed by `observe`.
    assert!(described.algorithms.iter().all(|it| it.algorithm == "ring"), "{text}");
    let group = communicator.split(Some(0), 0).unwrap().unwrap();
    let described = group.describe();
    assert!(described.ranks.is_empty() && described.summary().contains("over"), "{described}");
}

fn events_of(events: &[Event], is: fn(&Event) -> bool) -> Vec<Event> {
    events.iter().copied().filter(is).collect()
}

fn sent_to(event: &Event, to: usize) -> Option<u64> {
    match *event {
        Event::Sent { peer, bytes } if peer as usize == to => Some(bytes),
        _ => None,
    }
}

fn received_from(event: &Event, from: usize) -> Option<u64> {
    match *event {
        Event::Received { peer, bytes } if peer as usize == from => Some(bytes),
        _ => None,
    }
}

/// Waits until the call is seen to be under way and to sleep.
fn check_stuck(communicator: &Communicator, observer: &mut Observer) {
    let start = Instant::now();
    let mut sleeps = false;
    loop {
        let events = observer.read().events;
        sleeps |= events.iter().any(|it| match it.event {
            // What rank 0 gets comes from the late rank.
            Event::Blocked { on } => communicator.rank() != 0 || on == Some(2),
            _ => false,
        });
        let running = communicator.stats().running;
        if let Some(RunningCall { call, steps, .. }) = &running
            && *steps > 0
            && sleeps
        {
            assert!(call.contains("all_reduce") && call.contains("20000"), "{call}");
            return;
        }
        assert!(start.elapsed() < LIMIT, "{running:?}");
        std::thread::yield_now();
    }
}

/// Rank 2 calls something else: the stream says that the call was aborted.
fn lose() {
    let communicator = Communicator::from_environment().unwrap();
    let mut observer = Observer::new();
    let op = if communicator.rank() == 2 { ReduceOp::Max } else { ReduceOp::Sum };
    let error = communicator.all_reduce(&mut [1_f32; 10][..], op).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch);
    let events: Vec<Event> = observer.read().events.iter().map(|it| it.event).collect();
    let is_end =
        |event: &&Event| matches!(event, Event::CallAborted { .. } | Event::CallCompleted { .. });
    let ends: Vec<&Event> = events.iter().filter(is_end).collect();
    assert!(matches!(ends[..], [.., Event::CallAborted { communicator: 0, .. }]), "{events:?}");
    assert_eq!(communicator.stats().running, None);
}
