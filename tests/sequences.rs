//! Random sequences of collectives of all kinds, types and reductions against a sequential model.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "sequence/reuse.rs"]
mod reuse;
mod sequence;
mod support;

use support::World;

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("sequence", sequence::run_sequence),
        ("reuse", reuse::run_rounds),
        ("leave_at_once", reuse::leave_at_once),
    ]);
}

/// Ranks, bursts of calls, elements of a call.
const WORLDS: [(usize, usize, usize); 8] = [
    (1, 60, 5_000),
    (2, 60, 300_000),
    (3, 60, 100_000),
    (4, 60, 50_000),
    (5, 60, 20_000),
    (7, 40, 20_000),
    (8, 30, 10_000),
    (16, 12, 5_000),
];

fn world(ranks: usize, transport: &str) -> World {
    World::new(ranks, "sequence").set("UNISUM_TRANSPORT", transport)
}

#[test]
fn sequences_are_right_on_tcp() {
    let seed = sequence::seed();
    for (ranks, bursts, most) in WORLDS {
        sequence::check(&world(ranks, "tcp"), seed + ranks as u64, bursts, most);
    }
}

#[test]
fn sequences_are_right_on_shared_memory() {
    let seed = sequence::seed();
    for (ranks, bursts, most) in WORLDS {
        sequence::check(&world(ranks, "shm"), seed + ranks as u64, bursts, most);
    }
}

#[test]
fn sequences_are_right_on_rdma() {
    let seed = sequence::seed();
    for (ranks, bursts, most) in [(2, 20, 100_000), (4, 20, 20_000)] {
        if support::has_rdma() {
            sequence::check(&world(ranks, "verbs"), seed + ranks as u64, bursts, most);
        }
    }
}

/// Small slices make long pipelines of small messages.
#[test]
fn sequences_are_right_in_small_slices() {
    let seed = sequence::seed();
    for (ranks, transport) in [(3, "tcp"), (4, "shm"), (6, "tcp"), (6, "shm")] {
        let world = world(ranks, transport)
            .set("UNISUM_SLICE_BYTES", "4K")
            .set("UNISUM_WINDOW", 1 + seed % 5);
        sequence::check(&world, seed, 30, 50_000);
    }
}

/// Private memory then passes through the ranks' staging buffers.
#[test]
fn sequences_are_right_where_ranks_may_not_read_each_other() {
    let seed = sequence::seed();
    for ranks in [2, 5] {
        sequence::check(&world(ranks, "shm").set("UNISUM_CMA", 0), seed, 40, 200_000);
    }
}

/// Rounds of the test below for each transport; set it to run more.
const ROUNDS: &str = "UNISUM_TEST_ROUNDS";

/// A call that failed gives its memory back: whatever is written there is seen in no result of
/// another rank, and nothing is written there by others.
#[test]
fn memory_is_the_programs_again_when_a_call_has_failed() {
    let seed = sequence::seed();
    let rounds = std::env::var(ROUNDS).map_or(24, |rounds| rounds.parse().unwrap());
    for transport in support::transports() {
        reuse::check(transport, seed, rounds);
    }
}

#[test]
fn a_rank_may_leave_while_others_end_the_same_call() {
    for transport in support::transports() {
        let world = World::new(4, "leave_at_once").set("UNISUM_TRANSPORT", transport);
        world.set(reuse::ROUNDS, 30).succeed(std::time::Duration::from_secs(100));
    }
}
