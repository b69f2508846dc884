//! A rank that has proven itself and then says what makes no sense: an error of a kind of its own,
//! on all ranks, that names it.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::collections::BTreeSet;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use socket2::SockRef;
use support::{World, tell_error};
use unisum::{Communicator, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("speak_nonsense", speak_nonsense)]);
}

const LIMIT: Duration = Duration::from_secs(60);

/// The connections of this process over TCP.
fn connections() -> BTreeSet<RawFd> {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = all.filter_map(|it| it.unwrap().file_name().to_str()?.parse().ok());
    numbers.filter(|&it| is_connection(it)).collect()
}

fn is_connection(descriptor: RawFd) -> bool {
    with(descriptor, |it| it.peer_addr().is_ok_and(|peer| peer.as_socket().is_some()))
}

fn with<T>(descriptor: RawFd, then: impl FnOnce(SockRef<'_>) -> T) -> T {
    // SAFETY: it is looked at, or written to, and one that is closed meanwhile is an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    then(SockRef::from(&borrowed))
}

/// In its second call, rank 1 writes to its data connections what unisum did not.
fn speak_nonsense() {
    let communicator = Communicator::from_environment().unwrap();
    let group = communicator.duplicate().unwrap();
    let before = connections();
    let mut data = [1.0_f32; 4];
    group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    if communicator.rank() == 1 {
        let opened: Vec<RawFd> = connections().difference(&before).copied().collect();
        assert!(!opened.is_empty(), "a group has connections of its own");
        for descriptor in opened {
            let nonsense = b"GET / HTTP/1.1\r\nHost: a rank of a job\r\nAccept: everything\r\n\r\n";
            assert_eq!(with(descriptor, |it| it.send(nonsense)).unwrap(), nonsense.len());
        }
    }
    // All ranks are connected with rank 1, by which algorithm ever.
    let error = (0..10).find_map(|_| group.all_reduce(&mut data, ReduceOp::Sum).err());
    tell_error(&error.expect("nonsense is noticed"));
}

#[test]
fn bytes_that_make_no_sense_are_a_protocol_error_that_names_their_rank() {
    for (level, said) in [("off", "a message began with 0x20544547"), ("token", "was altered")] {
        let world = World::new(3, "speak_nonsense").set("UNISUM_TRANSPORT", "tcp");
        for told in world.set("UNISUM_TLS", level).succeed(LIMIT) {
            let told = told.join("\n");
            assert!(told.starts_with("Protocol [1] ") && told.contains(said), "{level}: {told}");
        }
    }
}
