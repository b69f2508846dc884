//! Sharded gradient buckets of jobs that lose ranks and gain others: what each rank keeps for its
//! shards follows the elements, so that the training goes on as if nothing had happened.
//!
//! All ranks have the same gradients, so that weights and momenta are known for each element and
//! step, whoever takes part; each rank compares all that it has after each layout, and the weights
//! of all after some steps. What is lost is what one that died had, and nothing else.
//! `UNISUM_TEST_SHARDS=N` makes so many trials for each transport.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;
#[path = "elastic_shards/training.rs"]
mod training;

use std::time::{Duration, Instant};

use support::{Ended, Random, Running, World, tell};
use training::{VECTORS, parameters, reach, run};
use unisum::buckets::{Buckets, Parameter, ShardState};
use unisum::{Communicator, Dtype, Elastic, Error, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || run(false, VECTORS)),
        ("newcomer", || run(true, VECTORS)),
        ("other_vectors", || run(true, 3)),
        ("wrong", wrong),
        ("measure", measure),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn members(ranks: usize, transport: &str, copies: usize) -> World {
    World::new(ranks, "train")
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_REPRODUCIBLE", 1)
        .set("UNISUM_TLS", "off")
        .set("COPIES", copies)
        .set("SHAPES", "many")
}

fn newcomers(members: &World) -> World {
    members.clone().running("newcomer").set("UNISUM_RANK", "").set("UNISUM_WORLD", "")
}

fn finish(running: Running) -> Vec<Ended> {
    running.mark("end");
    running.wait(LIMIT)
}

/// All that live tell the same number of ranks and steps; how many elements were lost, by process.
fn alike(ended: &[Ended], dead: &[usize], world: usize) -> Vec<usize> {
    let living = ended.iter().enumerate().filter(|(it, _)| !dead.contains(it));
    let living: Vec<&Ended> = living.map(|(_, it)| it).collect();
    assert!(living.iter().all(|it| it.status == 0 && it.told.len() == 2), "{ended:#?}");
    assert!(living.iter().all(|it| it.told[0] == living[0].told[0]), "{ended:#?}");
    assert!(living[0].told[0].starts_with(&format!("{world} ranks, ")), "{ended:#?}");
    let lost = |it: &&Ended| it.told[1].strip_prefix("lost ").unwrap().parse().unwrap();
    living.iter().map(lost).collect()
}

/// They end together, before any other can do anything.
fn kill_at_once(running: &Running, victims: &[usize]) {
    victims.iter().for_each(|it| running.signal(*it, libc::SIGSTOP));
    victims.iter().for_each(|it| running.signal(*it, libc::SIGKILL));
}

/// The same while another one sleeps: it may have given all that it has for a call, which others
/// have ended then, and hears of the deaths as it wakes up.
fn kill_behind(running: &Running, victims: &[usize], sleeper: usize) {
    running.signal(sleeper, libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(15));
    kill_at_once(running, victims);
    std::thread::sleep(Duration::from_millis(10));
    running.signal(sleeper, libc::SIGCONT);
}

#[test]
fn newcomers_take_over_their_shards_between_two_steps() {
    for transport in support::transports() {
        let world = members(1, transport, 0);
        let mut running = world.start();
        running.wait_for("world-1", 1, LIMIT);
        for ranks in 1..4 {
            running.add(&newcomers(&world), ranks);
            running.wait_for(&format!("world-{}", ranks + 1), ranks + 1, LIMIT);
        }
        assert_eq!(alike(&finish(running), &[], 4), [0; 4]);
    }
}

#[test]
fn without_copies_the_shards_of_a_lost_rank_are_lost_and_no_others() {
    let running = members(4, "tcp", 0).start();
    running.wait_for("world-4", 4, LIMIT);
    running.signal(1, libc::SIGKILL);
    running.wait_for("world-3", 3, LIMIT);
    let lost = alike(&finish(running), &[1], 3);
    // A quarter of each bucket, of which some is padding.
    let elements: usize = 7000 + 3 + 1 + 1600 + 1 + 257;
    assert!(lost.iter().all(|it| *it == lost[0]), "{lost:?}");
    assert!(lost[0].abs_diff(elements / 4) < 500, "{lost:?}");
}

/// Whenever it dies, those that are left have made the same steps, and lose nothing of their own.
#[test]
fn steps_end_in_the_same_way_on_all_that_are_left() {
    let trials = std::env::var("UNISUM_TEST_SHARDS").map_or(3, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for _ in 0..trials {
            let running = members(3, transport, 0).set("SHAPES", "few").start();
            running.wait_for("world-3", 3, LIMIT);
            let victim = random.below(3);
            let sleeper = (victim + 1 + random.below(2)) % 3;
            let moment = Duration::from_micros(random.below(50_000) as u64);
            println!("{transport}: {victim} dies after {moment:?}, while {sleeper} sleeps");
            std::thread::sleep(moment);
            kill_behind(&running, &[victim], sleeper);
            running.wait_for("world-2", 2, LIMIT);
            let lost = alike(&finish(running), &[victim], 2);
            // Gradients lie 64 bytes apart, and so do these shards.
            assert_eq!(lost, [[1, 3, 0][victim]; 2]);
        }
    }
}

/// Some may have got a layout that others did not get: between them, they have all.
#[test]
fn deaths_while_shards_move_lose_what_the_dead_had_and_nothing_else() {
    let trials = std::env::var("UNISUM_TEST_SHARDS").map_or(3, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for trial in 0..trials {
            let running = members(5, transport, 0).set("SHAPES", "large").set("MOVING", 1).start();
            running.wait_for("moving", 5, LIMIT);
            let first = random.below(5);
            let mut victims = vec![first];
            if trial % 2 == 1 {
                victims.push((first + 1 + random.below(4)) % 5);
            }
            let moment = Duration::from_micros(random.below(60_000) as u64);
            let sleeper = (0..5).filter(|it| !victims.contains(it)).nth(random.below(3)).unwrap();
            println!("{transport}: {victims:?} die after {moment:?}, while {sleeper} sleeps");
            std::thread::sleep(moment);
            kill_behind(&running, &victims, sleeper);
            let world = 5 - victims.len();
            running.wait_for(&format!("world-{world}"), world, LIMIT);
            let lost = alike(&finish(running), &victims, world);
            assert!(lost.iter().all(|it| *it > 0), "{lost:?}");
        }
    }
}

#[test]
fn with_copies_nothing_is_lost_down_to_one_rank() {
    for (transport, copies) in [("shm", 1), ("tcp", 3)] {
        let running = members(4, transport, copies).start();
        running.wait_for("copied-4", 4, LIMIT);
        running.signal(0, libc::SIGKILL);
        running.wait_for("copied-3", 3, LIMIT);
        running.signal(3, libc::SIGKILL);
        running.wait_for("copied-2", 2, LIMIT);
        // The first of two goes on without the second.
        running.signal(2, libc::SIGKILL);
        running.wait_for("copied-1", 1, LIMIT);
        assert_eq!(alike(&finish(running), &[0, 2, 3], 1), [0]);
    }
}

#[test]
fn of_two_that_die_at_once_only_neighbours_take_something_with_them() {
    for (victims, loses) in [([1, 3], false), ([2, 3], true), ([0, 4], true)] {
        let running = members(5, "tcp", 2).start();
        running.wait_for("copied-5", 5, LIMIT);
        kill_at_once(&running, &victims);
        running.wait_for("world-3", 3, LIMIT);
        let lost = alike(&finish(running), &victims, 3);
        assert!(lost.iter().all(|it| (*it > 0) == loses), "{victims:?}: {lost:?}");
    }
}

#[test]
fn more_ranks_than_elements() {
    let world = members(3, "tcp", 1).set("SHAPES", "few");
    let mut running = world.start();
    running.wait_for("copied-3", 3, LIMIT);
    running.add(&newcomers(&world), 3);
    running.wait_for("copied-4", 4, LIMIT);
    running.signal(0, libc::SIGKILL);
    running.wait_for("world-3", 4, LIMIT);
    assert_eq!(alike(&finish(running), &[0], 3), [0; 3]);
}

#[test]
fn deaths_while_newcomers_enter_lose_nothing_that_was_copied() {
    let trials = std::env::var("UNISUM_TEST_SHARDS").map_or(4, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for trial in 0..trials {
            let copies = random.below(3);
            let world = members(4, transport, copies);
            let mut running = world.start();
            running.wait_for(if copies > 0 { "copied-4" } else { "world-4" }, 4, LIMIT);
            running.add(&newcomers(&world), 4);
            running.wait_for("started", 5, LIMIT);
            let victim = [0, random.below(4), 4][trial % 3];
            let moment = Duration::from_micros(random.below(80_000) as u64);
            println!("{transport}, copies {copies}: {victim} dies after {moment:?}");
            std::thread::sleep(moment);
            running.signal(victim, libc::SIGKILL);
            running.mark("killed");
            if victim < 4 {
                running.wait_for("joined", 1, LIMIT);
            }
            // The victim may have taken part in that step, and in none after it.
            running.wait_for("step-after-kill", 4, LIMIT);
            let ended = finish(running);
            let lost = alike(&ended, &[victim], 4);
            assert!(copies == 0 || lost == [0; 4], "{ended:#?}");
        }
    }
}

/// What can't be done is an error, and the next call works.
fn wrong() {
    let communicator = Communicator::builder().elastic(Elastic::default()).connect().unwrap();
    let builder = || Buckets::builder(&communicator);
    let mut buckets = builder().sharded().build(&parameters()).unwrap();
    let mut state = ShardState::<f32>::new(VECTORS);
    let kind = |error: Result<(), Error>| error.unwrap_err().kind();
    assert_eq!(kind(buckets.copy_shards(&mut state)), ErrorKind::Configuration, "not laid out");
    let mut other = ShardState::<f32>::new(1 + communicator.rank());
    let error = buckets.reshard(&mut other).unwrap_err();
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Mismatch, &[0, 1][..]));
    let error = match communicator.rank() {
        0 => buckets.reshard(&mut ShardState::<f32>::new(VECTORS)),
        _ => buckets.reshard(&mut ShardState::<f64>::new(VECTORS)),
    };
    let text = error.unwrap_err().to_string();
    assert!(text.contains("2 vectors of f32, and rank 1 2 vectors of f64"), "{text}");
    let resharded = buckets.reshard(&mut state).unwrap();
    assert_eq!(resharded.version, 0);
    assert!(resharded.moves.iter().all(|it| it.from.is_none()));
    if resharded.lost().any(|it| it.to == 0) {
        let copied = kind(buckets.copy_shards(&mut state));
        assert_eq!(copied, ErrorKind::Configuration, "not initialized");
    }
    state.set_version(communicator.rank() as u64);
    assert_eq!(kind(buckets.copy_shards(&mut state)), ErrorKind::Mismatch);
    state.set_version(9);
    buckets.copy_shards(&mut state).unwrap();
    let again = buckets.reshard(&mut state).unwrap();
    assert!(again.version == 9 && again.moves.iter().all(|it| it.from == Some(it.to)));
    assert_eq!(buckets.admit().unwrap_err().kind(), ErrorKind::Configuration);
    let others = [Parameter::new("others", &[9000], Dtype::F32)];
    let mut others = builder().sharded().build(&others).unwrap();
    let mut fresh = ShardState::new(VECTORS);
    let given = if communicator.rank() == 1 { &mut state } else { &mut fresh };
    let error = others.reshard(given).unwrap_err();
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Mismatch, &[1][..]));
    tell("fine");
}

#[test]
fn what_cannot_be_laid_out_or_copied_is_an_error() {
    let world = World::new(2, "wrong").set("SHAPES", "many").set("UNISUM_TLS", "off");
    for told in world.succeed(LIMIT) {
        assert_eq!(told, ["fine"]);
    }
}

#[test]
fn a_newcomer_with_other_vectors_is_found_out() {
    let world = members(2, "tcp", 0);
    let mut running = world.start();
    running.wait_for("world-2", 2, LIMIT);
    running.add(&newcomers(&world).running("other_vectors"), 2);
    for ended in running.wait(LIMIT) {
        assert!(ended.told[0].starts_with("Mismatch [0, 2] "), "{ended:#?}");
    }
}

/// How long copies take, and the layout after a loss.
fn measure() {
    let communicator = Communicator::builder().elastic(Elastic::default()).connect().unwrap();
    let parameters = [Parameter::new("all", &[8_000_000], Dtype::F32)];
    let build = |communicator: &Communicator| {
        Buckets::builder(communicator).sharded().build(&parameters).unwrap()
    };
    let mut buckets = build(&communicator);
    let mut state = ShardState::<f32>::new(3);
    buckets.reshard(&mut state).unwrap();
    for version in 1..7 {
        state.set_version(version);
        communicator.barrier().unwrap();
        let started = Instant::now();
        buckets.copy_shards(&mut state).unwrap();
        tell(format!("copied in {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
    }
    reach("copied");
    let lost = loop {
        match communicator.barrier() {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(lost.kind(), ErrorKind::ViewChanged);
    let communicator = communicator.rebuild().unwrap();
    let mut buckets = build(&communicator);
    communicator.barrier().unwrap();
    let started = Instant::now();
    let resharded = buckets.reshard(&mut state).unwrap();
    tell(format!("laid out in {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
    assert_eq!(resharded.lost().count(), 0);
}

#[test]
#[ignore = "prints figures"]
fn what_copies_cost() {
    for transport in support::transports() {
        let running = World::new(4, "measure").set("UNISUM_TRANSPORT", transport).start();
        running.wait_for("copied", 4, LIMIT);
        running.signal(3, libc::SIGKILL);
        let ended = running.wait(LIMIT);
        println!("{transport}: {:#?}", ended[0].told);
    }
}
