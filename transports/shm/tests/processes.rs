//! Real processes: what threads of one process can't show.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "common/processes.rs"]
mod processes;

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::{Arrival, Call, Landing, Link, Part, Region, Regions, Ticket};
use unisum_shm::ShmLink;

const WORLD: usize = 3;
const BYTES: usize = 300_000;

#[test]
fn processes_read_each_others_registered_and_private_memory() {
    let told = processes::run(WORLD, &["--exact", "rank_of_a_world", "--nocapture", "--ignored"]);
    assert_eq!(told, ["right"; WORLD]);
}

/// The child's side of the test above.
#[test]
#[ignore = "started by another test"]
fn rank_of_a_world() {
    let Some(rank) = processes::rank() else {
        return;
    };
    let mut link = processes::connect(rank);
    let block = link.heap().allocate(2 * BYTES).unwrap();
    let mut private = vec![0u8; 2 * BYTES];
    let private = NonNull::new(private.as_mut_ptr()).unwrap();
    let offset = link.heap().offset_of(block.address().as_ptr(), 2 * BYTES);
    assert_eq!(offset, Some(block.offset()));
    assert_eq!(link.heap().offset_of(private.as_ptr(), 1), None);
    for (number, (base, offset)) in [(block.address(), offset), (private, None)].iter().enumerate()
    {
        // SAFETY: both are that long, live until the end, and only the link uses them.
        let region = unsafe { Region::new(*base, 2 * BYTES, *offset) };
        rotate(&mut link, rank, number as u64, region);
        sources(&mut link, rank, region);
    }
    // Nobody leaves while others still read.
    let arrival = link.group().unwrap().arrive();
    complete(&mut link, arrival);
    processes::tell("right");
}

/// Each rank sends to the next and receives from the one before.
fn rotate(link: &mut ShmLink, rank: usize, number: u64, region: Region) {
    fill(region, 0, rank);
    let call = Call::all_reduce(number, Dtype::U8, BYTES as u64);
    link.begin(&call, &Regions::in_place(region));
    let before = (rank + WORLD - 1) % WORLD;
    link.receive(before, region.part(&(BYTES..2 * BYTES)), Landing::Place, Ticket(0)).unwrap();
    link.send((rank + 1) % WORLD, region.part(&(0..BYTES)), Ticket(1)).unwrap();
    let (deadline, mut done) = (deadline(), Vec::new());
    while done.len() < 2 {
        link.park(deadline, 2 - done.len()).unwrap();
        link.progress(&mut done).unwrap();
        assert!(Instant::now() < deadline);
    }
    check(region.pointer(&(BYTES..2 * BYTES)), before);
}

/// Each rank looks into all others' regions.
fn sources(link: &mut ShmLink, rank: usize, region: Region) {
    let arrival = link.group().unwrap().enter(false);
    complete(link, arrival);
    let staging = link.group().unwrap().staging(rank, 0..BYTES);
    // SAFETY: both are that long, and nobody reads the staging buffer before the next arrival.
    unsafe { staging.copy_from_nonoverlapping(region.base(), BYTES) };
    let arrival = link.group().unwrap().arrive();
    complete(link, arrival);
    for member in 0..WORLD {
        let group = link.group().unwrap();
        assert_eq!(group.registered(Part::Input), region.heap_offset().is_some());
        let mapped = group.source(member, Part::Input, 0..BYTES).unwrap();
        assert_eq!(mapped.is_some(), member == rank || group.registered(Part::Input));
        check(mapped.unwrap_or_else(|| group.staging(member, 0..BYTES).cast_const()), member);
    }
    if region.heap_offset().is_some() {
        let arrival = link.group().unwrap().arrive();
        complete(link, arrival);
        let next = (rank + 1) % WORLD;
        let into = link.group().unwrap().target(next, 0..BYTES).unwrap();
        // SAFETY: the group gave that much room, which is only ours to write.
        unsafe { into.write_bytes(rank as u8 + 101, BYTES) };
        let arrival = link.group().unwrap().arrive();
        complete(link, arrival);
        check(region.base(), (rank + WORLD - 1) % WORLD + 100);
    }
    let arrival = link.group().unwrap().arrive();
    complete(link, arrival);
}

fn complete(link: &mut ShmLink, arrival: Arrival) {
    let deadline = deadline();
    while !link.group().unwrap().complete(arrival).unwrap() {
        link.group().unwrap().park(arrival, deadline).unwrap();
        assert!(Instant::now() < deadline);
    }
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn fill(region: Region, at: usize, rank: usize) {
    let into = region.pointer(&(at..at + BYTES));
    // SAFETY: `pointer` checked the bounds.
    unsafe { into.write_bytes(rank as u8 + 1, BYTES) };
}

fn check(from: *const u8, rank: usize) {
    let mut bytes = vec![0; BYTES];
    // SAFETY: the caller got the address of `BYTES` readable bytes.
    unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), BYTES) };
    assert!(bytes.iter().all(|&byte| byte == rank as u8 + 1), "not all of rank {rank}");
}
