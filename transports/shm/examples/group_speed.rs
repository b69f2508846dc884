//! How fast the shared-memory group is: `group_speed RANKS` runs that many processes.
//!
//! 8 bytes are reduced by deposits (one arrival), 1 MiB in one pass over mapped buffers: each rank
//! folds its slice of all buffers block by block and stores the result into all of them.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "../tests/common/processes.rs"]
mod processes;

use std::time::{Duration, Instant};

use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded};
use unisum_link::{Arrival, Backoff, Call, Group, Link, Part, Patience, Pause, Region, Regions};
use unisum_shm::ShmLink;

const FOLD: Fold = Fold::new(Dtype::F32, ReduceOp::Sum);
const BLOCK: usize = 8 << 10;
const LARGE: usize = 1 << 20;

fn main() {
    let Some(rank) = processes::rank() else {
        let ranks = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
        for line in processes::run(ranks, &[]).iter().filter(|line| *line != "done") {
            println!("{ranks} ranks: {line}");
        }
        return;
    };
    let mut link = processes::connect(rank);
    let block = link.heap().allocate(LARGE).unwrap();
    let mut figures = Vec::new();
    for (bytes, rounds) in [(8, 20_000), (LARGE, 400)] {
        // SAFETY: the block is that long and only this thread uses it.
        let region = unsafe { Region::new(block.address(), bytes, Some(block.offset())) };
        let mut times: Vec<Duration> =
            (0..rounds).map(|number| time(&mut link, number, region)).collect();
        times.sort_unstable();
        let (median, p99) = (times[rounds as usize / 2], times[rounds as usize * 99 / 100]);
        figures.push(format!("{bytes} B median {median:.2?} p99 {p99:.2?}"));
    }
    processes::tell(&if rank == 0 { figures.join(", ") } else { "done".to_string() });
}

fn time(link: &mut ShmLink, number: u64, region: Region) -> Duration {
    let count = region.bytes() / 4;
    // SAFETY: the region holds that many floats.
    unsafe { std::slice::from_raw_parts_mut(region.base().cast::<f32>(), count) }.fill(1.0);
    // All start together: filling the buffer is not what is measured.
    let group = link.group().unwrap();
    let ready = group.arrive();
    complete(group, ready);
    let start = Instant::now();
    let call = Call::all_reduce(number, Dtype::F32, count as u64);
    link.begin(&call, &Regions::in_place(region));
    let group = link.group().unwrap();
    if region.bytes() <= group.slot_bytes() {
        let entered = group.enter(true);
        complete(group, entered);
        let mut deposits = Vec::new();
        group.deposits(&(0..region.bytes()), &mut deposits);
        // SAFETY: the group gave that many bytes; the region is as long.
        let folded = unsafe { FOLD.run(region.base(), &deposits, region.bytes() / 4) };
        assert_eq!(folded, Folded::Done);
    } else {
        one_pass(group, region.bytes());
    }
    let elapsed = start.elapsed();
    let world = link.group().unwrap().members().len() as f32;
    // SAFETY: the region holds floats.
    assert_eq!(unsafe { region.base().cast::<f32>().read() }, world);
    elapsed
}

/// Folds all members' bytes at `at` into `into`.
fn fold(group: &mut dyn Group, at: usize, bytes: usize, into: *mut u8) {
    let members = group.members().to_vec();
    let source = |member| group.source(member, Part::Input, at..at + bytes).unwrap().unwrap();
    let sources: Vec<*const u8> = members.into_iter().map(source).collect();
    // SAFETY: the group and the caller gave that many bytes.
    let outcome = unsafe { FOLD.run(into, &sources, bytes / 4) };
    assert_eq!(outcome, Folded::Done);
}

fn one_pass(group: &mut dyn Group, bytes: usize) {
    let entered = group.enter(false);
    complete(group, entered);
    let members = group.members().to_vec();
    let (own, world) = (processes::rank().unwrap(), members.len());
    let edge = |rank: usize| bytes / 64 * rank / world * 64;
    let mut scratch = vec![0f32; BLOCK / 4];
    let mut at = edge(own);
    while at < edge(own + 1) {
        let len = BLOCK.min(edge(own + 1) - at);
        fold(group, at, len, scratch.as_mut_ptr().cast());
        for &member in &members {
            let into = group.target(member, at..at + len).expect("outputs are registered");
            // SAFETY: the group gave that much room, and the slice is ours to write.
            unsafe { into.copy_from_nonoverlapping(scratch.as_ptr().cast(), len) };
        }
        at += len;
    }
    let arrived = group.arrive();
    complete(group, arrived);
}

fn complete(group: &mut dyn Group, arrival: Arrival) {
    let (deadline, mut backoff) = (Instant::now() + Duration::from_secs(20), Backoff::new());
    while !group.complete(arrival).unwrap() {
        if backoff.pause(Patience::MEMORY) == Pause::Park {
            group.park(arrival, deadline).unwrap();
        }
    }
}
