//! Whether each wait of one rank's stream for another's is needed, and its absence noticed: the
//! emulated driver leaves out one of the waits of each call, and results are wrong.
//!
//! A wait that is left out makes a race, which a run may win: each mutation has several tries. The
//! rank that leaves it out is never late, and the others are at random. In three passes over all of
//! these 36 mutations, the first try noticed each. None is redundant:
//!
//! | all-reduce | ranks | waits of each rank in a call | noticed |
//! |---|---|---|---|
//! | one-shot | 2 | 2 | all of both ranks |
//! | ring | 3 | 5 | all of the three ranks |
//! | two-shot | 3 | 3 | all of the three ranks |
//! | doubling | 4 | 2 | all of the four ranks |
//!
//! The first wait of a call, for the inputs of the others, was only noticed where devices write
//! these: hosts meet in each call, and what a host has waited for before is there by then. That of
//! ring and two-shot also went unnoticed for inputs that were the results of the call before.
//!
//! Within the kernel of an all-reduce in one launch, a thread waits for each peer. The emulated
//! driver has one of them wait for nobody, in every call. Of 2 and 3 ranks, the first try noticed
//! each of these 8 mutations, too. Where the switch adds, there are two such waits, in threads of
//! their own: the first try noticed each of 16 mutations in one pass over all, the second one of
//! them in another run.

use unisum::ReduceOp;

use super::driver::{self, Pool};
use super::support::{Random, Scenario, World, setting, tell};
use super::{LIMIT, join, multimem, world};

pub const SCENARIOS: &[Scenario] =
    &[("without_a_wait", without_a_wait), ("without_a_wait_within", without_a_wait_within)];

/// What a single launch executes here.
const KERNEL: &str = "unisum_staged_sum_f32";
/// The same where the switch adds.
const SWITCHED: &str = "unisum_multimem_sum_f32";

/// Of each call.
const ELEMENTS: usize = 600;
const ROUNDS: u32 = 20;
/// Until a run has to have noticed.
const TRIES: usize = 12;

/// Calls of one algorithm, of a type for which there is no single launch, on new values each, which
/// the device puts in place: no host waits for that.
fn without_a_wait() {
    let (communicator, device) = join();
    device.set_algorithm(Some(&setting("ALGORITHM"))).unwrap();
    let stream = device.stream().unwrap();
    let (rank, world) = (communicator.rank() as u32, communicator.world() as u32);
    let pool = Pool::new(device.ordinal());
    let source = pool.allocate(4 * ELEMENTS);
    let mut buffer = device.allocate::<u32>(ELEMENTS).unwrap();
    for round in 0..ROUNDS {
        let value = |rank: u32, at: usize| (rank + 1) * 1000 * (round + 1) + at as u32;
        let values = (0..ELEMENTS).map(|at| value(rank, at));
        source.write(&values.flat_map(u32::to_ne_bytes).collect::<Vec<u8>>(), &stream);
        source.copy(0, buffer.address(), 4 * ELEMENTS, &stream);
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        let mut result = vec![0; ELEMENTS];
        buffer.read(0, &mut result, &stream).unwrap();
        let sum = |at| (0..world).map(|rank| value(rank, at)).sum::<u32>();
        assert_eq!(result, (0..ELEMENTS).map(sum).collect::<Vec<_>>(), "round {round}");
    }
    tell("right");
}

/// The same in a single launch each.
fn without_a_wait_within() {
    let (communicator, device) = join();
    let stream = device.stream().unwrap();
    let (rank, world) = (communicator.rank() as u32, communicator.world() as u32);
    let pool = Pool::new(device.ordinal());
    let source = pool.allocate(4 * ELEMENTS);
    let mut buffer = device.allocate::<f32>(ELEMENTS).unwrap();
    for round in 0..ROUNDS {
        let value = |rank: u32, at: usize| ((rank + 1) * 1000 * (round + 1) + at as u32) as f32;
        let values = (0..ELEMENTS).map(|at| value(rank, at));
        source.write(&values.flat_map(f32::to_ne_bytes).collect::<Vec<u8>>(), &stream);
        source.copy(0, buffer.address(), 4 * ELEMENTS, &stream);
        device.all_reduce(&mut buffer, ReduceOp::Sum, &stream).unwrap();
        let mut result = vec![0.0; ELEMENTS];
        buffer.read(0, &mut result, &stream).unwrap();
        let sum = |at| (0..world).map(|rank| value(rank, at)).sum::<f32>();
        assert_eq!(result, (0..ELEMENTS).map(sum).collect::<Vec<_>>(), "round {round}");
    }
    tell("right");
}

fn calls(ranks: usize, algorithm: &str) -> World {
    world(ranks, "without_a_wait", ranks).set("ALGORITHM", algorithm).set("CUDA_EMULATOR_COUNTS", 1)
}

/// How many waits rank `rank` has in each call.
fn waits(ranks: usize, algorithm: &str, rank: usize) -> usize {
    let ended = calls(ranks, algorithm).run(LIMIT);
    assert!(ended.iter().all(|ended| ended.status == 0), "{ended:#?}");
    let (_, counted) = ended[rank].log.split_once("unisum_wait=").unwrap();
    let digits = counted.split(|letter: char| !letter.is_ascii_digit()).next().unwrap();
    let all: usize = digits.parse().unwrap();
    assert!(all > 0 && all.is_multiple_of(ROUNDS as usize), "{all} in {ROUNDS} rounds");
    all / ROUNDS as usize
}

/// Whether all results are right where this rank leaves out such launches, in one run.
fn is_right(ranks: usize, algorithm: &str, rank: usize, skip: &str) -> bool {
    is_right_without(&calls(ranks, algorithm), (ranks, rank), ("CUDA_EMULATOR_SKIP", skip))
}

fn is_right_without(
    calls: &World,
    (ranks, rank): (usize, usize),
    (name, left_out): (&str, &str),
) -> bool {
    let all = calls
        .clone()
        .set("CUDA_EMULATOR_DELAY_US", 3000)
        .set("CUDA_EMULATOR_LEAKS", "")
        .set("UNISUM_TIMEOUT", 20);
    // Whoever does not wait is never late.
    let hasty = all.clone().set(name, left_out).set("CUDA_EMULATOR_DELAY_US", 0);
    let mut running = hasty.start_ranks(&[rank]);
    for other in (0..ranks).filter(|&other| other != rank) {
        running.add(&all, other);
    }
    running.wait(LIMIT).iter().all(|ended| ended.told == ["right"])
}

#[test]
fn no_wait_can_be_left_out() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver leaves out launches");
        return;
    }
    let mut draws = Random::new();
    let mut missed = Vec::new();
    for (ranks, algorithm) in [(2, "one-shot"), (3, "ring"), (3, "two-shot"), (4, "doubling")] {
        let drawn = draws.below(ranks);
        for rank in (0..ranks).filter(|&rank| driver::is_whole() || rank == drawn) {
            let of = waits(ranks, algorithm, rank);
            assert!(is_right(ranks, algorithm, rank, "none:1:1"), "nothing was left out");
            let drawn = draws.below(of);
            for wait in (1..=of).filter(|&wait| driver::is_whole() || wait == drawn + 1) {
                let skip = format!("unisum_wait:{wait}:{of}");
                let tries = (1..=TRIES).find(|_| !is_right(ranks, algorithm, rank, &skip));
                println!("{algorithm}, rank {rank} of {ranks}, wait {wait} of {of}: {tries:?}");
                if tries.is_none() {
                    missed.push((algorithm, ranks, rank, wait));
                }
            }
        }
    }
    assert!(missed.is_empty(), "nobody noticed that these were left out: {missed:?}");
}

#[test]
fn no_wait_within_a_launch_can_be_left_out() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver leaves out waits of a kernel");
        return;
    }
    let missed = [2, 3].map(|ranks| {
        let calls = world(ranks, "without_a_wait_within", ranks);
        missed_within(&calls, ranks, KERNEL, &[|peer| peer])
    });
    let missed = missed.concat();
    assert!(missed.is_empty(), "nobody noticed that these were left out: {missed:?}");
}

#[test]
fn no_wait_for_the_switch_can_be_left_out() {
    if driver::is_installed() {
        println!("skipped: only the emulated driver leaves out waits of a kernel");
        return;
    }
    let missed = [2, 3].map(|ranks| {
        let calls = multimem::always(&world(ranks, "without_a_wait_within", ranks));
        // Before sums are loaded, and before results are copied out.
        missed_within(&calls, ranks, SWITCHED, &[|peer| peer, |peer| 256 - 32 + peer])
    });
    let missed = missed.concat();
    assert!(missed.is_empty(), "nobody noticed that these were left out: {missed:?}");
}

/// The waits within a kernel that no run noticed to be left out: the number of ranks, who waits and
/// for whom, and in which meeting. `threads` says which thread waits for a peer in each.
fn missed_within(
    calls: &World,
    ranks: usize,
    kernel: &str,
    threads: &[fn(usize) -> usize],
) -> Vec<[usize; 4]> {
    let mut draws = Random::new();
    let mut missed = Vec::new();
    let calls = calls.clone().set("CUDA_EMULATOR_COUNTS", 1);
    let right = |rank: usize, hasty: &str| {
        is_right_without(&calls, (ranks, rank), ("CUDA_EMULATOR_HASTY", hasty))
    };
    let drawn = draws.below(ranks);
    for rank in (0..ranks).filter(|&rank| driver::is_whole() || rank == drawn) {
        for ended in calls.run(LIMIT) {
            let mut words = ended.log.split_whitespace();
            let all_in_one = words.any(|word| word == format!("{kernel}={ROUNDS}"));
            assert!(ended.status == 0 && all_in_one, "{ended:#?}");
        }
        for (meeting, thread) in threads.iter().enumerate() {
            // Its own thread waits for nobody anyway.
            let own = format!("{kernel}:{}:1:1", thread(rank));
            assert!(right(rank, &own), "nothing was left out");
            for peer in (0..ranks).filter(|&peer| peer != rank) {
                let hasty = format!("{kernel}:{}:1:1", thread(peer));
                let tries = (1..=TRIES).find(|_| !right(rank, &hasty));
                println!("{kernel}, {meeting}: rank {rank} of {ranks} for {peer}: {tries:?}");
                if tries.is_none() {
                    missed.push([ranks, rank, peer, meeting]);
                }
            }
        }
    }
    missed
}
