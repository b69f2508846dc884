//! Ranks that have no file descriptors left, or no memory.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use support::{World, await_others, reach, setting, tell, tell_error};
use unisum::buckets::{Buckets, Compressed, Encoding, Parameter};
use unisum::{Buffers, Collective, Communicator, Dtype, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("few_from_the_start", few_from_the_start),
        ("none_at_the_door", none_at_the_door),
        ("none_later", none_later),
        ("none_for_a_group", none_for_a_group),
        ("no_memory", no_memory),
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

/// Only rank 0 lacks descriptors.
fn none_at_the_door() {
    if setting("UNISUM_RANK") == "0" {
        spare(setting("SPARE").parse().unwrap());
    }
    match Communicator::from_environment() {
        Ok(communicator) => reduce(&communicator),
        Err(error) => tell_error(&error),
    }
}

/// Those who come hear of what rank 0 lacks, and not only that it lets nobody in.
#[test]
fn a_rank_0_that_can_take_no_connection_says_so_to_those_who_come() {
    let mut told_why = 0;
    for spare in 3..12 {
        let world = World::new(3, "none_at_the_door")
            .set("UNISUM_TRANSPORT", "tcp")
            .set("UNISUM_CONNECT_TIMEOUT", 10)
            .set("SPARE", spare);
        let ended = world.run(Duration::from_secs(40));
        for ended in &ended {
            assert_eq!(ended.status, 0, "{spare} spare descriptors: {ended:#?}");
        }
        let is_told = |rank: usize| {
            let told = &ended[rank].told[0];
            told.starts_with("Rendezvous [0] ") && told.contains("no file descriptor left there")
        };
        told_why += usize::from(is_told(1) || is_told(2));
    }
    assert!(told_why > 0, "no limit showed at the door: the test tests nothing");
}

/// One rank runs out before anybody has a data connection to it.
fn none_later() {
    let communicator = Communicator::from_environment().unwrap();
    if communicator.rank() == setting("WITHOUT").parse::<usize>().unwrap() {
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
    // Of two ranks the higher one dials; the lower one, which accepts, hears that from rank 0.
    if setting("WITHOUT") == "3" && communicator.rank() == 3 {
        let is_lack = |code| code == Some(libc::EMFILE);
        assert!(codes(&error).into_iter().any(is_lack), "no errno: {error}");
    }
    tell_error(&error);
}

/// The codes of the operating system's errors that an error comes from.
fn codes(error: &unisum::Error) -> Vec<Option<i32>> {
    let error: &(dyn std::error::Error + 'static) = error;
    let chain = std::iter::successors(error.source(), |error| error.source());
    chain.filter_map(|it| it.downcast_ref()).map(std::io::Error::raw_os_error).collect()
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
            let named = format!("{:?} [{without}] ", ErrorKind::Resources);
            assert!(told.starts_with(&named), "rank {without} has none: {told}");
            assert!(told.contains("open files"), "{told}");
        }
    }
}

fn none_for_a_group() {
    let communicator = Communicator::from_environment().unwrap();
    // Connects all pairs, so that only the group needs descriptors.
    communicator.all_to_all(&[1_f32; 3], &mut [0_f32; 3]).unwrap();
    if communicator.rank() == setting("WITHOUT").parse::<usize>().unwrap() {
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
            assert!(told[0].starts_with(&format!("Resources [{without}] ")), "{context}");
            assert!(told[0].contains("open files"), "{context}");
        }
    }
}

/// More than what is left to the rank without.
const COUNT: usize = 32 << 20;
/// What is left to it, in MiB.
const LEFT_MIB: u64 = 32;

/// Leaves this process so much of addresses beside those that it has.
fn spare_memory(mib: u64) {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    let limit = pages * 4096 + (mib << 20);
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: `limit` is valid.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    assert_eq!(result, 0);
}

/// What takes memory in a call, by what the error says, and with which algorithm and slices. What
/// arrives over shared memory is read where it lies.
const TAKES: [(&str, &str, &str); 3] =
    [("a copy of", "auto", ""), ("of an arrival", "ring", "64M"), ("bucket 0", "auto", "")];

/// A call, or a step, for which one rank has no memory.
fn no_memory() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let takes = setting("TAKES");
    let mut data = vec![1_f32; COUNT / world * world];
    let mut buckets = (takes == "bucket 0").then(|| {
        let weight = Parameter::new("weight", &[COUNT], Dtype::F32);
        let builder = Buckets::builder(&communicator).bucket_bytes(4 * COUNT);
        builder.hook(Compressed::new(Encoding::Int8)).build(&[weight]).unwrap()
    });
    // The rank without may have reported before others have left this.
    let ready = communicator.barrier();
    if rank == setting("WITHOUT").parse::<usize>().unwrap() {
        spare_memory(LEFT_MIB);
    }
    let called = ready.and_then(|()| match &takes[..] {
        // What goes out may not be overwritten by what comes in.
        "a copy of" => {
            let buffers = Buffers::InPlace(&mut data[..]);
            communicator.run(&Collective::all_to_all(), buffers).map(drop)
        }
        "bucket 0" => {
            let step = buckets.as_mut().unwrap().begin()?;
            step.view::<f32>(0)?.ready();
            step.wait().map(drop)
        }
        _ => communicator.all_reduce(&mut data, ReduceOp::Sum),
    });
    tell_error(&called.and_then(|()| communicator.barrier()).unwrap_err());
}

#[test]
fn a_rank_that_has_no_memory_for_a_call_is_named_by_all_and_by_itself() {
    for (takes, algorithm, slices) in TAKES {
        let transports = support::transports().into_iter();
        let transports = transports.filter(|it| takes != "of an arrival" || *it == "tcp");
        let cases = transports.flat_map(|it| (0..3).map(move |without| (it, without))).collect();
        for (transport, without) in support::sample(cases, 3) {
            let world = World::new(3, "no_memory")
                .set("UNISUM_TRANSPORT", transport)
                .set("UNISUM_ALGORITHM", algorithm)
                .set("UNISUM_SLICE_BYTES", slices)
                .set("TAKES", takes)
                .set("WITHOUT", without);
            for (rank, told) in world.succeed(Duration::from_secs(60)).iter().enumerate() {
                let context = format!("{takes}, {transport}, rank {rank}: {told:?}");
                assert!(told[0].starts_with(&format!("Resources [{without}] ")), "{context}");
                assert!(told[0].contains(&format!("rank {without} has no memory")), "{context}");
                assert!(told[0].contains(takes), "{context}");
            }
        }
    }
}
