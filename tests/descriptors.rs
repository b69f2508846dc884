//! Ranks that have no file descriptors left.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use support::{World, await_others, reach, setting, tell, tell_error};
use unisum::{Communicator, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("few_from_the_start", few_from_the_start),
        ("none_later", none_later),
        ("none_for_a_group", none_for_a_group),
    ]);
}

/// Leaves this process so many descriptors beside those that are open.
fn spare(descriptors: usize) {
    let free: Vec<File> = (0..=descriptors).map(|_| File::open("/dev/null").unwrap()).collect();
    let limit = free[descriptors].as_raw_fd() as u64;
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: `limit` is valid.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    assert_eq!(result, 0);
}

fn reduce(communicator: &Communicator) {
    match communicator.all_reduce(&mut [1_f32; 100], ReduceOp::Sum) {
        Ok(()) => tell("fine"),
        Err(error) => tell_error(&error),
    }
}

fn few_from_the_start() {
    spare(setting("SPARE").parse().unwrap());
    match Communicator::from_environment() {
        Ok(communicator) => reduce(&communicator),
        Err(error) => tell_error(&error),
    }
}

#[test]
fn a_job_without_enough_descriptors_ends_in_errors_and_not_in_a_hang() {
    let mut failures = 0;
    for spare in 0..14 {
        let world = World::new(4, "few_from_the_start")
            .set("UNISUM_TRANSPORT", "tcp")
            .set("UNISUM_ALGORITHM", "one-shot")
            .set("UNISUM_CONNECT_TIMEOUT", 3)
            .set("UNISUM_TIMEOUT", 3)
            .set("SPARE", spare);
        let ended = world.run(Duration::from_secs(30));
        for ended in &ended {
            assert_eq!(ended.status, 0, "{spare} spare descriptors: {ended:#?}");
            assert_eq!(ended.told.len(), 1, "{ended:#?}");
        }
        failures += usize::from(ended.iter().any(|ended| ended.told[0] != "fine"));
    }
    assert!(failures > 0, "the limit never showed: the test tests nothing");
}

/// One rank runs out before anybody has a data connection to it.
fn none_later() {
    let communicator = Communicator::from_environment().unwrap();
    if communicator.rank() == setting("WITHOUT").parse().unwrap() {
        spare(0);
        reach("without");
    } else {
        await_others("without", 1, Duration::from_secs(20));
    }
    // A rank that has what it needs hears of the others' trouble in a later call.
    let error = loop {
        if let Err(error) = communicator.all_reduce(&mut [1_f32; 100], ReduceOp::Sum) {
            break error;
        }
    };
    tell_error(&error);
}

/// Long before the deadlines, which are 60 s.
#[test]
fn a_rank_that_runs_out_later_is_named_with_the_reason() {
    for without in 0..4 {
        let world = World::new(4, "none_later")
            .set("UNISUM_TRANSPORT", "tcp")
            .set("UNISUM_ALGORITHM", "one-shot")
            .set("WITHOUT", without);
        for ended in world.run(Duration::from_secs(30)) {
            assert_eq!(ended.status, 0, "{ended:#?}");
            let told = &ended.told[0];
            let named = format!("{:?} [{without}] ", ErrorKind::RankLost);
            assert!(told.starts_with(&named), "rank {without} has none: {told}");
            assert!(told.contains("open files"), "{told}");
        }
    }
}

fn none_for_a_group() {
    let communicator = Communicator::from_environment().unwrap();
    // Connects all pairs, so that only the group needs descriptors.
    communicator.all_to_all(&[1_f32; 3], &mut [0_f32; 3]).unwrap();
    if communicator.rank() == setting("WITHOUT").parse().unwrap() {
        spare(0);
    }
    tell_error(&communicator.duplicate().unwrap_err());
}

#[test]
fn a_rank_that_has_none_for_a_group_is_named_by_all_and_by_itself() {
    for without in 0..3 {
        let world = World::new(3, "none_for_a_group").set("UNISUM_TRANSPORT", "tcp");
        let told = world.set("WITHOUT", without).succeed(Duration::from_secs(30));
        for (rank, told) in told.iter().enumerate() {
            let context = format!("rank {without} has none, rank {rank}: {told:?}");
            assert!(told[0].starts_with(&format!("Rendezvous [{without}] ")), "{context}");
            assert!(told[0].contains("open files"), "{context}");
        }
    }
}
