//! Jobs that outlive their ranks: real processes, killed at random moments, and what the others
//! make of it.
//!
//! `UNISUM_TEST_KILLS=N` makes so many trials for each transport, by hand.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::{Random, Running, World, reach, setting, tell, tell_error};
use unisum::{Buffers, Collective, Communicator, Elastic, Error, ErrorKind, Rank, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", train),
        ("one_call", one_call),
        ("leave_behind", leave_behind),
        ("change_for_its_own_sake", change_for_its_own_sake),
        ("hold", hold),
        ("meet_late", meet_late),
        ("disagree", disagree),
        ("not_elastic", not_elastic),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// Elements of the weights by which it can be seen who took part in which steps.
const PROCESSES: usize = 64;

fn connect() -> Communicator {
    let minimum = std::env::var("MINIMUM").map_or(1, |it| it.parse().unwrap());
    Communicator::builder().elastic(Elastic { minimum }).connect().unwrap()
}

/// A training as small as can be. Element p of a step's gradient is the step's number, from 1, on
/// process p, 0 elsewhere; the elements behind tell the processes apart in another way.
struct Training {
    communicator: Communicator,
    /// How many steps are done.
    step: i64,
    weights: Vec<i64>,
    sum: Vec<i64>,
    /// When the last step ended, and the longest time between two.
    last: Option<Instant>,
    stall: Duration,
}

impl Training {
    fn new(communicator: Communicator, count: usize) -> Self {
        let zeros = vec![0; PROCESSES + count];
        let (weights, sum) = (zeros.clone(), zeros);
        Self { communicator, step: 0, weights, sum, last: None, stall: Duration::ZERO }
    }

    fn process(&self) -> usize {
        self.communicator.view().unwrap().processes[self.communicator.rank()] as usize
    }

    fn take_step(&mut self) -> Result<(), Error> {
        let (process, number) = (self.process(), self.step + 1);
        let mut gradient = vec![number * (process as i64 + 1); self.weights.len()];
        gradient[..PROCESSES].fill(0);
        gradient[process] = number;
        let kept = gradient.clone();
        let is_in_place = number % 2 == 0;
        let buffers = match is_in_place {
            true => Buffers::InPlace(&mut gradient),
            false => Buffers::OutOfPlace(&gradient, &mut self.sum),
        };
        let result = self.communicator.run(&Collective::all_reduce(ReduceOp::Sum), buffers);
        if result.is_err() || !is_in_place {
            assert!(gradient == kept, "the input is intact, in place: {is_in_place}");
        }
        result?;
        if is_in_place {
            self.sum = gradient;
        }
        self.weights.iter_mut().zip(&self.sum).for_each(|(weight, sum)| *weight += sum);
        self.step = number;
        let now = Instant::now();
        self.stall = self.stall.max(self.last.map_or(Duration::ZERO, |last| now - last));
        self.last = Some(now);
        Ok(())
    }

    /// The communicator of those that are left, all of them after the same step: whoever has done
    /// the last one tells the others what came of it.
    fn go_on(&mut self) -> Result<(), Error> {
        loop {
            self.communicator = self.communicator.rebuild()?;
            match self.align() {
                Err(error) if error.kind() == ErrorKind::ViewChanged => {}
                result => return result,
            }
        }
    }

    fn align(&mut self) -> Result<(), Error> {
        let mut steps = vec![0; self.communicator.world()];
        self.communicator.all_gather(&[self.step], &mut steps)?;
        let (ahead, last) = (0..).zip(&steps).max_by_key(|(rank, step)| (**step, -rank)).unwrap();
        let mut weights = self.weights.clone();
        self.communicator.broadcast(&mut weights, ahead as Rank)?;
        (self.weights, self.step) = (weights, *last);
        Ok(())
    }

    /// What is the same on all ranks in the end. Whoever is left took part in all steps, whoever is
    /// not in the first so many, and nobody in any of them twice.
    fn check(&self) -> String {
        let done = |steps: i64| steps * (steps + 1) / 2;
        let Self { step, weights, .. } = self;
        let (counted, rest) = weights.split_at(PROCESSES);
        for process in self.communicator.view().unwrap().processes {
            assert_eq!(counted[process as usize], done(*step), "process {process}");
        }
        let took_part: Vec<i64> = counted
            .iter()
            .map(|&sum| (0..=*step).find(|&steps| done(steps) == sum).expect("whole steps"))
            .collect();
        let expected: i64 = (1..).zip(counted).map(|(factor, sum)| factor * sum).sum();
        assert!(rest.iter().all(|&it| it == expected), "{expected}: {rest:?}");
        let view = self.communicator.view().unwrap();
        let world = self.communicator.world();
        format!("epoch {} of {world} after {step} steps: {:?}", view.epoch, &took_part[..12])
    }
}

/// Trains until the world has its last size, and 5 steps more.
fn train() {
    let count = setting("COUNT").parse().unwrap();
    let last: usize = setting("LAST").parse().unwrap();
    let mut training = Training::new(connect(), count);
    let mut until = i64::MAX;
    while training.step < until {
        match training.take_step() {
            Ok(()) if training.step == 3 => reach("training"),
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::ViewChanged => {
                if let Err(error) = training.go_on() {
                    return tell_error(&error);
                }
            }
            Err(error) => return tell_error(&error),
        }
        if training.communicator.world() == last && until == i64::MAX {
            until = training.step + 5;
        }
    }
    tell(training.check());
    tell(training.stall.as_millis());
}

/// Kills some ranks at a moment, the second a moment after the first; what each survivor told.
fn kill(world: &World, ranks: usize, victims: &[usize], (after, between): (u64, u64)) -> Vec<Told> {
    let running = world.start();
    running.wait_for("training", ranks, LIMIT);
    std::thread::sleep(Duration::from_micros(after));
    for (index, &victim) in victims.iter().enumerate() {
        if index > 0 {
            std::thread::sleep(Duration::from_micros(between));
        }
        running.signal(victim, libc::SIGKILL);
    }
    survivors(running, victims)
}

/// What a survivor told: its last words, and its longest stall in milliseconds.
type Told = (String, u64);

fn survivors(running: Running, victims: &[usize]) -> Vec<Told> {
    let ended = running.wait(LIMIT);
    let survivors = ended.iter().enumerate().filter(|(rank, _)| !victims.contains(rank));
    survivors
        .map(|(rank, it)| {
            assert_eq!((it.status, it.told.len()), (0, 2), "rank {rank}: {ended:#?}");
            (it.told[0].clone(), it.told[1].parse().unwrap())
        })
        .collect()
}

fn trials() -> usize {
    std::env::var("UNISUM_TEST_KILLS").map_or(6, |it| it.parse().unwrap())
}

fn kill_at_random_moments(transport: &str) {
    // One at a time: two worlds slow each other.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut random = Random::new();
    let mut stalls = Vec::new();
    for trial in 0..trials() {
        let ranks = 4 + random.below(5);
        let mut victims = vec![if trial % 2 == 0 { 0 } else { random.below(ranks) }];
        // Of four ranks that lose two, those with rank 0 go on: here it may be lost.
        if ranks > 4 && trial % 3 == 0 {
            victims.push((victims[0] + 1 + random.below(ranks - 1)) % ranks);
        }
        let count = random.of(&[0, 1000, 300_000]);
        let moment = (random.below(30_000) as u64, random.of(&[0, 300, 20_000]));
        println!("{transport}, trial {trial}: of {ranks}, {victims:?} die, {count}, {moment:?}");
        let world = World::new(ranks, "train")
            .set("UNISUM_TRANSPORT", transport)
            // Or algorithms are tried in each epoch, which is a part of the stall.
            .set("UNISUM_REPRODUCIBLE", u8::from(trial % 4 > 0))
            .set("LAST", ranks - victims.len())
            .set("COUNT", count);
        let told = kill(&world, ranks, &victims, moment);
        println!("  {told:?}");
        // Two epochs if one was lost after the other.
        assert!(told.iter().all(|(words, _)| *words == told[0].0), "{told:#?}");
        stalls.extend(told.iter().map(|(_, stall)| *stall).max());
    }
    stalls.sort_unstable();
    let (p50, p99) = (stalls[stalls.len() / 2], stalls[(stalls.len() * 99 / 100).max(1) - 1]);
    println!("{transport}: stalls of {} changes: p50 {p50} ms, p99 {p99} ms", stalls.len());
}

#[test]
fn survivors_of_kills_end_the_same_steps_on_tcp() {
    kill_at_random_moments("tcp");
}

#[test]
fn survivors_of_kills_end_the_same_steps_on_shared_memory() {
    kill_at_random_moments("shm");
}

fn one_call() {
    let communicator = connect();
    reach("training");
    let error = loop {
        if let Err(error) = communicator.barrier() {
            break error;
        }
    };
    tell_error(&error);
    assert_eq!(communicator.barrier().unwrap_err().failed_ranks(), error.failed_ranks());
}

#[test]
fn too_few_survivors_all_end_with_an_error_that_says_so() {
    let world = World::new(4, "one_call").set("MINIMUM", 4);
    let running = world.start();
    running.wait_for("training", 4, LIMIT);
    running.signal(2, libc::SIGKILL);
    let ended = running.wait(LIMIT);
    for (rank, it) in ended.iter().enumerate().filter(|(rank, _)| *rank != 2) {
        let told = it.told.first().unwrap_or_else(|| panic!("rank {rank}: {ended:#?}"));
        assert!(told.starts_with("RankLost [2] "), "rank {rank}: {told}");
        assert!(told.contains("3 ranks are left, and the job needs 4"), "rank {rank}: {told}");
    }
}

#[test]
fn of_two_ranks_the_first_goes_on_and_the_other_is_told_why_not() {
    for (victim, other, expected) in [(1, 0, "ViewChanged [1] "), (0, 1, "RankLost [0] ")] {
        let running = World::new(2, "one_call").start();
        running.wait_for("training", 2, LIMIT);
        running.signal(victim, libc::SIGKILL);
        let ended = running.wait(LIMIT);
        let told = &ended[other].told[0];
        assert!(told.starts_with(expected), "{ended:#?}");
        assert!(victim == 1 || told.contains("of two halves the one with rank 0"), "{told}");
    }
}

#[test]
fn a_rank_that_is_left_alone_goes_on_alone() {
    let world = World::new(2, "train").set("LAST", 1).set("COUNT", 1);
    let told = kill(&world, 2, &[1], (0, 0));
    assert!(told[0].0.starts_with("epoch 2 of 1 after "), "{told:?}");
}

/// Rank 2 takes part in nothing any more: the others leave it behind.
fn leave_behind() {
    let communicator = connect();
    communicator.barrier().unwrap();
    if communicator.rank() == 2 {
        reach("stuck");
        support::await_others("gone", 3, LIMIT);
        return tell_error(&communicator.barrier().unwrap_err());
    }
    support::await_others("stuck", 1, LIMIT);
    let refused = communicator.shrink(&[communicator.rank()]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    let smaller = communicator.shrink(&[2]).unwrap();
    let mut ranks = vec![0; 3];
    smaller.all_gather(&[communicator.rank() as u64], &mut ranks).unwrap();
    tell(format!("{} {ranks:?} {:?}", smaller.rank(), smaller.view().unwrap()));
    reach("gone");
    assert_eq!(communicator.barrier().unwrap_err().kind(), ErrorKind::ViewChanged);
}

#[test]
fn a_rank_that_is_stuck_is_left_behind_and_hears_of_it() {
    for transport in support::transports() {
        let world = World::new(4, "leave_behind").set("UNISUM_TRANSPORT", transport);
        let told = world.succeed(LIMIT);
        for (rank, was) in [0, 1, 3].into_iter().enumerate() {
            let expected = format!("{rank} [0, 1, 3] View {{ epoch: 2, processes: [0, 1, 3] }}");
            assert_eq!(told[was], [expected]);
        }
        let why = "the other ranks went on without this one";
        assert!(told[2][0].starts_with("RankLost ") && told[2][0].contains(why), "{told:?}");
    }
}

/// Rank 1 revokes; the others are in calls, or begin one later.
fn change_for_its_own_sake() {
    let communicator = connect();
    if communicator.rank() == 1 {
        std::thread::sleep(Duration::from_millis(20));
        communicator.revoke().unwrap();
        communicator.revoke().unwrap();
    }
    let error = loop {
        if let Err(error) = communicator.barrier() {
            break error;
        }
    };
    let what = (error.kind(), error.epoch(), error.lost(), error.joined());
    assert_eq!(what, (ErrorKind::ViewChanged, Some(2), &[][..], &[][..]), "{error}");
    let again = communicator.rebuild().unwrap();
    drop(communicator);
    let mut sum = [1_i32; 3];
    again.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    let halves = again.split(Some(again.rank() as u32 % 2), 0).unwrap().unwrap();
    halves.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert_eq!(halves.rebuild().unwrap_err().kind(), ErrorKind::Configuration);
    // Without a cause, when nobody is in a call any more.
    reach("summed");
    support::await_others("summed", 4, LIMIT);
    let third = again.rebuild().unwrap();
    third.barrier().unwrap();
    tell(format!("{sum:?} {}", third.view().unwrap().epoch));
}

#[test]
fn a_revoked_communicator_is_rebuilt_with_the_same_ranks() {
    for transport in support::transports() {
        let world = World::new(4, "change_for_its_own_sake").set("UNISUM_TRANSPORT", transport);
        for told in world.succeed(LIMIT) {
            assert_eq!(told, ["[8, 8, 8] 3"]);
        }
    }
}

fn disagree() {
    let minimum = 1 + setting("UNISUM_RANK").parse::<usize>().unwrap();
    tell_error(&Communicator::builder().elastic(Elastic { minimum }).connect().unwrap_err());
}

#[test]
fn ranks_that_give_different_minimums_are_refused() {
    for told in World::new(2, "disagree").succeed(LIMIT) {
        let what = "rank 0 has UNISUM_ELASTIC=1, rank 1 has UNISUM_ELASTIC=2";
        assert!(told[0].starts_with("Configuration [1] ") && told[0].contains(what), "{told:?}");
    }
}

fn not_elastic() {
    let communicator = Communicator::from_environment().unwrap();
    assert!(communicator.view().is_none());
    let refused = communicator.rebuild().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert_eq!(communicator.revoke().unwrap_err(), refused);
    reach("training");
    let error = loop {
        if let Err(error) = communicator.barrier() {
            break error;
        }
    };
    tell_error(&error);
    assert_eq!(communicator.barrier().unwrap_err().kind(), ErrorKind::Aborted);
}

#[test]
fn a_job_that_is_not_elastic_ends_with_the_first_rank_that_is_lost() {
    let running = World::new(3, "not_elastic").start();
    running.wait_for("training", 3, LIMIT);
    running.signal(1, libc::SIGKILL);
    let ended = running.wait(LIMIT);
    for rank in [0, 2] {
        assert!(ended[rank].told[0].starts_with("RankLost [1] "), "{ended:#?}");
    }
}

/// Trains; rank 2 is stopped, which no connection tells.
fn hold() {
    train();
}

#[test]
fn a_stopped_rank_is_left_behind_when_a_call_is_overdue() {
    let world = World::new(4, "hold")
        .set("LAST", 3)
        .set("COUNT", 10)
        .set("UNISUM_TIMEOUT", 5)
        .set("UNISUM_HEARTBEAT_TIMEOUT", 5);
    let running = world.start();
    running.wait_for("training", 4, LIMIT);
    running.signal(2, libc::SIGSTOP);
    let deadline = Instant::now() + LIMIT;
    while [0, 1, 3].iter().any(|&rank| running.lives(rank)) {
        assert!(Instant::now() < deadline, "the others hang");
        std::thread::sleep(Duration::from_millis(10));
    }
    running.signal(2, libc::SIGCONT);
    let ended = running.wait(LIMIT);
    let told: Vec<_> = ended.iter().map(|it| it.told[0].clone()).collect();
    assert!(told[0].starts_with("epoch 2 of 3 after"), "{ended:#?}");
    assert!(told[1] == told[0] && told[3] == told[0], "{ended:#?}");
    assert!(told[2].starts_with("RankLost "), "{ended:#?}");
}

/// Trains; the ranks that the test names do not come to rebuild before it says so.
fn meet_late() {
    let mut training = Training::new(connect(), 10);
    reach("training");
    let late = setting("LATE");
    let error = loop {
        if let Err(error) = training.take_step() {
            break error;
        }
    };
    assert_eq!(error.lost(), [3], "{error}");
    reach("decided");
    if late.contains(&setting("UNISUM_RANK")) {
        reach("late");
        support::await_others("go", 1, LIMIT);
    }
    while let Err(error) = training.go_on() {
        if error.kind() != ErrorKind::Rendezvous {
            return tell_error(&error);
        }
        reach("in-vain");
    }
    training.take_step().unwrap();
    tell(training.check());
}

/// Those that are late are stopped after the view was decided that they are to enter.
#[test]
fn a_rank_that_is_stopped_before_it_rebuilds_is_left_behind() {
    for late in [2, 0] {
        let world = World::new(4, "meet_late").set("LATE", late).set("UNISUM_CONNECT_TIMEOUT", 3);
        let running = world.start();
        running.wait_for("training", 4, LIMIT);
        running.signal(3, libc::SIGKILL);
        // Whoever has not heard of it may have to ask the one that is stopped.
        running.wait_for("decided", 3, LIMIT);
        running.wait_for("late", 1, LIMIT);
        running.signal(late, libc::SIGSTOP);
        let others = [1, 2 - late];
        support::wait_until("the others go on", LIMIT, || {
            others.iter().all(|it| !running.lives(*it))
        });
        running.mark("go");
        running.signal(late, libc::SIGCONT);
        let ended = running.wait(LIMIT);
        for rank in others {
            let told = ended[rank].told.first().unwrap_or_else(|| panic!("{ended:#?}"));
            assert!(told.starts_with("epoch 3 of 2 after "), "{ended:#?}");
        }
        assert!(ended[late].told[0].starts_with("RankLost "), "{ended:#?}");
    }
}

/// One rank of three can't leave two behind, and they live: it may try again.
#[test]
fn ranks_that_are_late_are_met_by_those_that_rebuild_again() {
    let world = World::new(4, "meet_late").set("LATE", "1 2").set("UNISUM_CONNECT_TIMEOUT", 3);
    let running = world.start();
    running.wait_for("training", 4, LIMIT);
    running.signal(3, libc::SIGKILL);
    running.wait_for("late", 2, LIMIT);
    running.wait_for("in-vain", 1, LIMIT);
    running.mark("go");
    let ended = running.wait(LIMIT);
    assert!(ended[0].told[0].contains(" of 3 after "), "{ended:#?}");
    assert!(ended[..3].iter().all(|it| it.told == ended[0].told), "{ended:#?}");
}
