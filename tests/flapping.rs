//! Data connections that break again and again between the ranks of a job: with
//! `UNISUM_RECONNECT_TIMEOUT`, no call fails and every result is right.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{World, setting};
use unisum::{Communicator, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("flap", flap)]);
}

const LIMIT: Duration = Duration::from_secs(100);

/// Calls whose results show in any part whether they are right, while this rank's data connections
/// break.
fn flap() {
    let communicator = Communicator::from_environment().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    let rounds: u64 = setting("ROUNDS").parse().unwrap();
    let is_over = AtomicBool::new(false);
    let cuts = std::thread::scope(|scope| {
        let cutter = scope.spawn(|| cut_until(&is_over, communicator.rank()));
        for round in 0..rounds {
            reduce(&communicator, [1, 700, 40_000, 500_000][round as usize % 4], round);
            send(&messenger, &communicator, [5, 9_000, 900_000][round as usize % 3], round);
        }
        // Relaxed: it is only to be seen some time.
        is_over.store(true, Ordering::Relaxed);
        cutter.join().unwrap()
    });
    support::tell(format!("{cuts}"));
}

fn reduce(communicator: &Communicator, count: u64, round: u64) {
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    let mut numbers: Vec<u64> = (0..count).map(|at| (at + round) * (rank + 1)).collect();
    communicator.all_reduce(&mut numbers, ReduceOp::Sum).unwrap();
    let expected = |at: u64| (at + round) * world * (world + 1) / 2;
    assert!((0..).zip(&numbers).all(|(at, &sum)| sum == expected(at)), "a wrong sum");
}

fn send(messenger: &Messenger, communicator: &Communicator, bytes: usize, round: u64) {
    let (rank, world) = (communicator.rank(), communicator.world());
    let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
    let text = |rank: usize| -> Vec<u8> {
        (0..bytes).map(|at| (at * 7 + rank * 13 + round as usize) as u8).collect()
    };
    let (sent, mut received) = (text(rank), vec![0; bytes]);
    let messages = &mut [
        Message::Send { data: &sent, to: next, tag: 7 },
        Message::Receive { data: &mut received, from: last, tag: 7 },
    ];
    messenger.exchange(messages).unwrap();
    assert!(received == text(last), "wrong bytes from rank {last}");
}

/// Cuts this process's TCP connections but the oldest, which is the one to rank 0's control thread;
/// rank 0, which has many of those, cuts none.
fn cut_until(is_over: &AtomicBool, rank: usize) -> usize {
    let (mut cuts, mut pause) = (0, Duration::from_millis(5));
    // Relaxed: see `flap`.
    while rank > 0 && !is_over.load(Ordering::Relaxed) {
        // The pace of what happens, not a wait for it; it gets slower, so that calls get done on
        // any machine.
        std::thread::sleep(pause);
        pause = pause * 6 / 5;
        for descriptor in connected().into_iter().skip(1) {
            // SAFETY: shutting a socket down is harmless to memory.
            cuts += usize::from(unsafe { libc::shutdown(descriptor, libc::SHUT_RDWR) } == 0);
        }
    }
    cuts
}

fn connected() -> Vec<i32> {
    let is_connected = |descriptor: &i32| {
        // SAFETY: an all-zero address is valid, and the call fills it.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: address and length are valid for writes; other descriptors give an error.
        let result =
            unsafe { libc::getpeername(*descriptor, (&raw mut address).cast(), &raw mut length) };
        result == 0 && i32::from(address.sin_family) == libc::AF_INET
    };
    (3..256).filter(is_connected).collect()
}

fn flaps(sockets: usize, tls: &str) {
    let world = World::new(3, "flap")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_TCP_SOCKETS", sockets)
        .set("UNISUM_TLS", tls)
        .set("UNISUM_RECONNECT_TIMEOUT", 30)
        .set("ROUNDS", 24);
    let told = world.succeed(LIMIT);
    let cuts: usize = told.iter().map(|told| told[0].parse::<usize>().unwrap()).sum();
    println!("{cuts} cuts");
    assert!(cuts > 5, "{cuts}");
}

#[test]
fn calls_go_on_over_connections_that_break() {
    flaps(1, "auto");
}

#[test]
fn calls_go_on_over_several_connections_that_break() {
    flaps(3, "off");
}
