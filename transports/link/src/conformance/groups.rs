//! Groups: ranks that share memory through one link. Nothing runs where a link has no group.

use std::time::{Duration, Instant};

use super::Mesh;
use super::memory::copy;
use super::parking::idle;
use super::port::{Kind, PATIENCE, Port, call, run_on};
use crate::{Call, LinkErrorKind, Part, Rank};
use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded};

const WORLDS: [usize; 3] = [2, 3, 5];
const FOLD: Fold = Fold::new(Dtype::U32, ReduceOp::Sum);

fn run_groups(mesh: &Mesh, bytes: usize, kind: Kind, rank: impl Fn(&mut Port<'_>, usize) + Sync) {
    for world in WORLDS {
        run_on(mesh, world, bytes, kind, &|port: &mut Port<'_>| {
            let Some(group) = port.link.group() else {
                return;
            };
            let members = group.members().to_vec();
            assert_eq!(members, (0..world).collect::<Vec<Rank>>());
            rank(port, world);
        });
    }
}

/// What rank `rank` puts in at `round`: one value, different for each.
fn input(rank: Rank, round: u64) -> u32 {
    (rank as u32 + 1).wrapping_mul(0x0101_0101).wrapping_mul(round as u32 + 1)
}

/// The reduced value.
fn reduced(world: usize, round: u64) -> u32 {
    (0..world).fold(0, |sum, rank| input(rank, round).wrapping_add(sum))
}

fn fill(port: &Port<'_>, round: u64, bytes: usize) {
    let value = input(port.rank, round).to_ne_bytes();
    port.memory.write(0, &value.repeat(bytes / 4));
}

/// Uneven ranks: now one, now another is late.
fn dawdle(rank: Rank, round: u64) {
    if (round + rank as u64).is_multiple_of(7) {
        for _ in 0..20 {
            std::thread::yield_now();
        }
    }
}

/// Hundreds of deposits with one arrival each: a fast member must not overwrite what a slow one
/// still reads, and its own region is its alone as soon as the arrival is complete.
pub fn deposits_survive_fast_and_slow_members(mesh: &Mesh) {
    run_groups(mesh, 4096, Kind::Private, |port, world| {
        let most = port.group().slot_bytes().min(4096);
        for round in 0..500 {
            let bytes = if round % 3 == 0 { most } else { 8 };
            port.begin(call(round, bytes));
            fill(port, round, bytes);
            let entered = port.group().enter(true);
            port.complete(entered).expect("all enter");
            dawdle(port.rank, round);
            assert!(!port.group().registered(Part::Input), "a deposit is not the region");
            let mut deposits = Vec::new();
            port.group().deposits(&(0..bytes), &mut deposits);
            let own = port.memory.region().base().cast_const();
            assert_eq!(deposits[port.rank], own, "nobody reads what it published itself");
            let expected = reduced(world, round).to_ne_bytes().repeat(bytes / 4);
            assert_eq!(fold(&deposits, bytes), expected, "{round}");
            let sum = fold_sources(port, world, 0, bytes);
            assert_eq!(sum, expected, "{round}, one by one");
            port.memory.write(0, &vec![0xee; bytes]);
        }
    });
}

/// Folds `bytes` bytes at `at` of all members' regions or staging buffers, in rank order.
fn fold_sources(port: &mut Port<'_>, world: usize, at: usize, bytes: usize) -> Vec<u8> {
    let group = port.group();
    let source = |member| {
        let mapped =
            group.source(member, Part::Input, at..at + bytes).expect("regions are where they say");
        mapped.unwrap_or_else(|| group.staging(member, at..at + bytes).cast_const())
    };
    fold(&(0..world).map(source).collect::<Vec<_>>(), bytes)
}

fn fold(sources: &[*const u8], bytes: usize) -> Vec<u8> {
    let mut sum = vec![0u32; bytes / 4];
    let into = sum.as_mut_ptr().cast::<u8>();
    // SAFETY: the group said that each source has `bytes` readable bytes; `sum` has as many.
    let outcome = unsafe { FOLD.run(into, sources, bytes / 4) };
    assert_eq!(outcome, Folded::Done);
    copy(into, bytes)
}

/// The slice of `bytes` that belongs to `rank`, in whole elements.
fn slice(rank: Rank, world: usize, bytes: usize) -> std::ops::Range<usize> {
    let at = |rank: Rank| bytes / 4 * rank / world * 4;
    at(rank)..at(rank + 1)
}

/// Registered regions: each member folds its slice of all regions and stores it in all of them.
pub fn groups_fold_registered_regions(mesh: &Mesh) {
    run_groups(mesh, 100_000, Kind::Registered, |port, world| {
        for round in 0..200 {
            let bytes = if round % 10 == 0 { 100_000 } else { 1000 };
            port.begin(call(round, bytes));
            fill(port, round, bytes);
            let entered = port.group().enter(false);
            port.complete(entered).expect("all enter");
            for part in [Part::Input, Part::Output] {
                assert!(port.group().registered(part), "all regions are");
            }
            dawdle(port.rank, round);
            let mine = slice(port.rank, world, bytes);
            let sum = fold_sources(port, world, mine.start, mine.len());
            for member in 0..world {
                let into =
                    port.group().target(member, mine.clone()).expect("its output is registered");
                // SAFETY: the group gave the address of that many writable bytes.
                unsafe { into.copy_from_nonoverlapping(sum.as_ptr(), sum.len()) };
            }
            let arrived = port.group().arrive();
            port.complete(arrived).expect("all arrive");
            let expected = reduced(world, round).to_ne_bytes().repeat(bytes / 4);
            assert!(port.memory.read(0, bytes) == expected, "round {round}");
        }
    });
}

/// Private regions pass through the staging buffers: each member stages its region, folds its slice
/// of all staging buffers, stages the result, and copies the others'.
pub fn groups_fold_private_regions_over_staging_buffers(mesh: &Mesh) {
    run_groups(mesh, 100_000, Kind::Private, |port, world| {
        for round in 0..200 {
            let bytes = if round % 10 == 0 { 100_000 } else { 1000 };
            port.begin(call(round, bytes));
            fill(port, round, bytes);
            let entered = port.group().enter(false);
            port.complete(entered).expect("all enter");
            assert!(!port.group().registered(Part::Output), "no region is");
            let own = port.rank;
            let other = (own + 1) % world;
            assert_eq!(port.group().source(other, Part::Input, 0..4), Ok(None), "nobody maps it");
            stage(port, 0..bytes);
            arrive(port);
            let mine = slice(own, world, bytes);
            let sum = fold_sources(port, world, mine.start, mine.len());
            port.memory.write(mine.start, &sum);
            arrive(port);
            dawdle(own, round);
            stage(port, mine);
            arrive(port);
            for member in (0..world).filter(|&member| member != own) {
                let theirs = slice(member, world, bytes);
                let from = port.group().staging(member, theirs.clone());
                port.memory.write(theirs.start, &copy(from, theirs.len()));
            }
            arrive(port);
            let expected = reduced(world, round).to_ne_bytes().repeat(bytes / 4);
            assert!(port.memory.read(0, bytes) == expected, "round {round}");
        }
    });
}

/// Copies `bytes` of the region to the same place of this rank's staging buffer.
fn stage(port: &mut Port<'_>, bytes: std::ops::Range<usize>) {
    let data = port.memory.read(bytes.start, bytes.len());
    let (own, len) = (port.rank, bytes.len());
    let staging = port.group().staging(own, bytes);
    // SAFETY: the staging buffer is that long, and nobody reads it before the next arrival.
    unsafe { staging.copy_from_nonoverlapping(data.as_ptr(), len) };
}

fn arrive(port: &mut Port<'_>) {
    let arrived = port.group().arrive();
    port.complete(arrived).expect("all arrive");
}

/// A member that calls something else is an error on every member, with both calls.
pub fn group_mismatch_reaches_every_member(mesh: &Mesh) {
    for deposit in [true, false] {
        run_groups(mesh, 64, Kind::Private, move |port, _| {
            let (usual, other) = (call(0, 64), Call { count: 63, ..call(0, 64) });
            let (ours, theirs) = if port.rank == 1 { (other, usual) } else { (usual, other) };
            port.begin(ours);
            let entered = port.group().enter(deposit);
            let error = port.complete(entered).expect_err("the calls differ");
            assert_eq!(error.peer, usize::from(port.rank != 1));
            assert_eq!(error.kind, LinkErrorKind::Mismatch { ours, theirs });
            port.meet();
        });
    }
}

/// While a member is late, the others can name it.
pub fn late_members_are_named(mesh: &Mesh) {
    run_groups(mesh, 64, Kind::Private, |port, _| {
        for round in 0..3 {
            port.begin(call(round, 64));
            if port.rank == 1 {
                port.meet();
                port.meet();
            }
            let entered = port.group().enter(false);
            if port.rank != 1 {
                port.meet();
                assert!(!port.group().complete(entered).expect("nobody differs"));
                assert_eq!(port.group().missing(entered), [1]);
                port.meet();
            }
            port.complete(entered).expect("all enter");
            assert_eq!(port.group().missing(entered), []);
            port.meet();
        }
    });
}

/// A group's park lasts until its deadline, uses no CPU, and ends by a wake.
pub fn group_parks_end_by_deadline_and_by_wake(mesh: &Mesh) {
    run_groups(mesh, 64, Kind::Private, |port, _| {
        port.begin(call(0, 64));
        if port.rank == 1 {
            port.meet();
            let entered = port.group().enter(false);
            return port.complete(entered).expect("all enter");
        }
        let entered = port.group().enter(false);
        idle(|until| port.group().park(entered, until).expect("parking works"));
        let (waker, start) = (port.link.waker(), Instant::now());
        waker.wake();
        port.group().park(entered, start + PATIENCE).expect("parking works");
        std::thread::scope(|scope| {
            let delay = Duration::from_millis(20);
            scope.spawn(move || {
                // Only makes it likely that the park has begun; right either way.
                std::thread::sleep(delay);
                waker.wake();
            });
            while start.elapsed() < delay {
                port.group().park(entered, start + PATIENCE).expect("parking works");
            }
        });
        assert!(start.elapsed() < PATIENCE / 2, "a wake was lost");
        port.meet();
        port.complete(entered).expect("all enter");
    });
}
