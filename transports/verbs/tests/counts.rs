//! What transfers cost: work requests, reports and announcements, counted; and that nothing is
//! left behind.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use std::process::Command;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::{Call, Landing, Link as _, Rank, Region, Regions, Ticket};
use unisum_verbs::{Counts, VerbsConfig, VerbsLink};

const LARGE: usize = 1 << 20;

fn call(number: u64, count: u64) -> Call {
    Call::all_reduce(number, Dtype::U8, count)
}

/// Each rank sends `bytes` to the other, in place or to be reduced: what that cost rank 0, once it
/// is `expected`, or no more comes.
fn exchange(
    links: &mut [VerbsLink],
    bytes: usize,
    landing: Landing,
    number: u64,
    expected: Option<Counts>,
) -> Counts {
    let call = call(number, bytes as u64);
    let mut memory = [vec![1_u8; 2 * LARGE], vec![2_u8; 2 * LARGE]];
    let before = links[0].counts();
    for (rank, (link, memory)) in links.iter_mut().zip(&mut memory).enumerate() {
        let base = NonNull::from(&mut memory[..]).cast();
        // SAFETY: the memory outlives the transfers, and nothing else touches it meanwhile.
        let region = unsafe { Region::new(base, 2 * LARGE, None) };
        link.begin(&call, &Regions::in_place(region));
        let into = region.part(&(LARGE..LARGE + bytes));
        link.receive(1 - rank, into, landing, Ticket(0)).unwrap();
        link.send(1 - rank, region.part(&(0..bytes)), Ticket(1)).unwrap();
    }
    let mut done = [Vec::new(), Vec::new()];
    let until = Instant::now() + Duration::from_secs(30);
    while done.iter().any(|done| done.len() < 2) {
        for (link, done) in links.iter_mut().zip(&mut done) {
            link.progress(done).unwrap();
        }
        assert!(Instant::now() < until, "the transfers hang");
    }
    for (rank, link) in links.iter_mut().enumerate() {
        check(link, rank, &memory[rank][LARGE..LARGE + bytes], landing);
    }
    if let Some(expected) = expected {
        let until = Instant::now() + Duration::from_secs(10);
        while since(before, links[0].counts()) != expected && Instant::now() < until {
            settle(links);
        }
    }
    settle(links);
    since(before, links[0].counts())
}

fn check(link: &mut VerbsLink, rank: Rank, place: &[u8], landing: Landing) {
    let expected = 2 - rank as u8;
    match landing {
        Landing::Place => assert!(place.iter().all(|&byte| byte == expected)),
        Landing::Slot => {
            // SAFETY: a done receive is readable until it is released.
            assert_eq!(unsafe { link.arrived(Ticket(0)).read() }, expected);
            link.release(Ticket(0)).unwrap();
        }
    }
}

/// Lets reports come in that nobody waits for.
fn settle(links: &mut [VerbsLink]) {
    let until = Instant::now() + Duration::from_millis(100);
    while Instant::now() < until {
        for link in links.iter_mut() {
            link.progress(&mut Vec::new()).unwrap();
        }
    }
}

fn since(before: Counts, now: Counts) -> Counts {
    Counts {
        writes: now.writes - before.writes,
        reports: now.reports - before.reports,
        announcements: now.announcements - before.announcements,
        sleeps: now.sleeps - before.sleeps,
        registrations: now.registrations - before.registrations,
    }
}

#[test]
fn transfers_cost_no_more_requests_than_they_need() {
    for pairs in [1, 2, 4] {
        let config = VerbsConfig { pairs_per_peer: pairs, ..common::config() };
        let mut links = common::links(2, &config);
        if links.is_empty() {
            return;
        }
        links.iter().for_each(|link| link.registry().set_register_from(LARGE));
        for (number, landing) in [Landing::Place, Landing::Slot].into_iter().enumerate() {
            let number = 2 * number as u64;
            // One write, one report, one announcement.
            let one = Counts { writes: 1, reports: 1, announcements: 1, ..Counts::default() };
            let small = exchange(&mut links, 8, landing, number, Some(one));
            assert_eq!(small, one, "{pairs} pairs, {landing:?}");
            // One announcement of the place, and a write for each connection.
            let each = 1 + pairs as u64;
            let (writes, reports, announcements) = (each, each, each);
            let expected = Counts { writes, reports, announcements, sleeps: 0, registrations: 1 };
            let large = exchange(&mut links, LARGE, landing, number + 1, Some(expected));
            assert_eq!(large, expected, "{pairs} pairs, {landing:?}");
        }
    }
}

#[test]
fn dropped_links_leave_nothing_behind() {
    if !common::has_device() {
        return;
    }
    let resources = || {
        let output = Command::new("rdma").args(["resource", "show"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let before = resources();
    for round in 0..5 {
        let mut links = common::links(3, &common::config());
        assert_ne!(resources(), before, "this shows what links have");
        exchange(&mut links[..2], LARGE, Landing::Slot, round, None);
        // One is aborted in the middle of a transfer.
        let mut memory = vec![0_u8; LARGE];
        let base = NonNull::from(&mut memory[..]).cast();
        let call = call(round, 1);
        // SAFETY: the memory outlives the link's use of it, which its abort ends.
        let region = unsafe { Region::new(base, LARGE, None) };
        links[2].begin(&call, &Regions::in_place(region));
        links[2].receive(0, region, Landing::Place, Ticket(0)).unwrap();
        links[2].progress(&mut Vec::new()).unwrap();
        links[2].abort();
        drop(links);
        // The system goes on with what it was asked to end.
        let until = Instant::now() + Duration::from_secs(10);
        while resources() != before && Instant::now() < until {}
        assert_eq!(resources(), before, "round {round}");
    }
}
