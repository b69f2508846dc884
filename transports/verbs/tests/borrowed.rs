//! Memory that a program only lends for a collective: registered once in it or copied, and never
//! kept.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use std::ops::RangeInclusive;
use std::process::Command;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use unisum_kernels::Dtype;
use unisum_link::{Call, Landing, Link as _, Region, Regions, Ticket};
use unisum_verbs::VerbsLink;

const KIB: usize = 1 << 10;

fn region(memory: &mut [u8]) -> Region {
    // SAFETY: the tests leave the memory alone until all transfers of it are done.
    unsafe { Region::new(NonNull::from(&mut *memory).cast(), memory.len(), None) }
}

/// A collective in which each of two ranks sends its input, in pieces, into the other's output.
fn exchange(links: &mut [VerbsLink], number: u64, regions: [Regions; 2], pieces: usize) {
    let bytes = regions[0].input.bytes();
    let call = Call::all_reduce(number, Dtype::U8, bytes as u64);
    for (rank, (link, Regions { input, output })) in links.iter_mut().zip(regions).enumerate() {
        link.begin(&call, &Regions { input, output });
        for piece in 0..pieces {
            let range = piece * bytes / pieces..(piece + 1) * bytes / pieces;
            let ticket = 2 * piece as u64;
            let into = output.part(&range);
            link.receive(1 - rank, into, Landing::Place, Ticket(ticket)).unwrap();
            link.send(1 - rank, input.part(&range), Ticket(ticket + 1)).unwrap();
        }
    }
    let mut done = [Vec::new(), Vec::new()];
    let until = Instant::now() + Duration::from_secs(30);
    while done.iter().any(|done| done.len() < 2 * pieces) {
        for (link, done) in links.iter_mut().zip(&mut done) {
            link.progress(done).unwrap();
        }
        assert!(Instant::now() < until, "the transfers hang");
    }
}

/// The same with memory of its own for each rank.
fn exchange_borrowed(links: &mut [VerbsLink], number: u64, bytes: usize, pieces: usize) {
    let mut inputs = [1, 2].map(|value| vec![value + number as u8 % 100; bytes]);
    let mut outputs = [vec![0_u8; bytes], vec![0_u8; bytes]];
    let regions = |rank: usize, inputs: &mut [Vec<u8>; 2], outputs: &mut [Vec<u8>; 2]| Regions {
        input: region(&mut inputs[rank]),
        output: region(&mut outputs[rank]),
    };
    let both = [0, 1].map(|rank| regions(rank, &mut inputs, &mut outputs));
    exchange(links, number, both, pieces);
    assert!(outputs[0] == inputs[1] && outputs[1] == inputs[0], "call {number}");
}

fn registered_so_far(links: &[VerbsLink]) -> [u64; 2] {
    [0, 1].map(|rank: usize| links[rank].counts().registrations)
}

fn links_that_register_from(bytes: usize) -> Option<Vec<VerbsLink>> {
    let links = common::links(2, &common::config());
    links.iter().for_each(|link| link.registry().set_register_from(bytes));
    Some(links).filter(|links| !links.is_empty())
}

#[test]
fn the_way_depends_on_the_size_and_nothing_is_registered_twice() {
    let Some(mut links) = links_that_register_from(256 * KIB) else { return };
    exchange_borrowed(&mut links, 0, 256 * KIB - 1, 8);
    assert_eq!(registered_so_far(&links), [0, 0], "copied");
    exchange_borrowed(&mut links, 1, 256 * KIB, 8);
    assert_eq!(registered_so_far(&links), [2, 2], "input and output once, for 8 transfers each");
    exchange_borrowed(&mut links, 2, 256 * KIB, 64);
    assert_eq!(registered_so_far(&links), [2, 2], "small messages need none");
}

#[test]
fn what_was_measured_is_told() {
    let Some(links) = links_that_register_from(256 * KIB) else { return };
    let text = links[0].description();
    let words = ["borrowed memory is registered from ", " KiB on (registering ", " ns/B"];
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

/// Registrations on this machine, where nobody else has any. The kernel names the process only of
/// those that its first thread made.
fn registrations() -> usize {
    let output = Command::new("rdma").args(["resource", "show", "mr"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().count()
}

#[test]
fn a_thousand_collectives_leave_no_registrations_behind() {
    let Some(mut links) = links_that_register_from(128 * KIB) else { return };
    let calls = |links: &mut [VerbsLink], numbers: std::ops::Range<u64>| {
        for number in numbers {
            exchange_borrowed(links, number, 128 * KIB, 2);
        }
    };
    calls(&mut links, 0..2);
    let before = settled_registrations();
    assert!(before >= 4, "this shows what is registered: {before}");
    calls(&mut links, 2..1002);
    assert_eq!(registered_so_far(&links), [2 * 1002, 2 * 1002], "each call registered anew");
    await_registrations(before..=before);
    // They end with the next collective, which takes one slot or two on each side: what arrived
    // may have given its own back before the send is ready.
    exchange_borrowed(&mut links, 1002, 64 * KIB, 1);
    await_registrations(before - 4 + 2..=before - 4 + 4);
    drop(links);
    await_registrations(0..=0);
}

/// The system goes on with what it was asked to end, so what it counts is waited for.
const COUNTED_WITHIN: Duration = Duration::from_secs(10);

/// Registrations, once as many were counted for a while: those that are ending are gone by then.
fn settled_registrations() -> usize {
    let until = Instant::now() + COUNTED_WITHIN;
    let (mut last, mut since) = (registrations(), Instant::now());
    while since.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < until, "the number of registrations does not settle");
        std::thread::sleep(Duration::from_millis(20));
        let now = registrations();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}

fn await_registrations(expected: RangeInclusive<usize>) {
    let until = Instant::now() + COUNTED_WITHIN;
    loop {
        let found = registrations();
        if expected.contains(&found) {
            return;
        }
        assert!(Instant::now() < until, "{found} registrations, and not {expected:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Pages that can only be read.
struct ReadOnly {
    start: NonNull<u8>,
    bytes: usize,
}

impl ReadOnly {
    fn new(bytes: usize, value: u8) -> Self {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) }.unwrap();
        // SAFETY: mapped for writing.
        unsafe { start.cast::<u8>().write_bytes(value, bytes) };
        // SAFETY: nobody writes there any more.
        unsafe { mprotect(start, bytes, MprotectFlags::READ) }.unwrap();
        Self { start: NonNull::new(start.cast()).unwrap(), bytes }
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and not used any more.
        unsafe { munmap(self.start.as_ptr().cast(), self.bytes) }.unwrap();
    }
}

#[test]
fn memory_that_can_only_be_read_is_sent() {
    let Some(mut links) = links_that_register_from(64 * KIB) else { return };
    let inputs = [1, 2].map(|value| ReadOnly::new(128 * KIB, value));
    for number in 0..2 {
        let mut outputs = [vec![0_u8; 128 * KIB], vec![0_u8; 128 * KIB]];
        let [first, second] = &mut outputs;
        let regions = [(&inputs[0], first), (&inputs[1], second)].map(|(input, output)| Regions {
            // SAFETY: the pages outlive the transfers, which only read them.
            input: unsafe { Region::new(input.start, input.bytes, None) },
            output: region(output),
        });
        exchange(&mut links, number, regions, 4);
        assert!(outputs[0].iter().all(|&byte| byte == 2) && outputs[1].iter().all(|&b| b == 1));
    }
}
