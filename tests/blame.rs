//! Who is to blame: whatever happens to a rank, in whatever it does, all others report the same
//! kind of error and the same ranks, and so does the rank itself where it lives to tell.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::{Ended, Random, World, reach, setting, tell, tell_error};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, CustomOp, Dtype, Error, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("suffer", suffer), ("slow", slow)]);
}

const LIMIT: Duration = Duration::from_secs(60);
const RANKS: usize = 4;
/// Longer than anything here takes that is not to wait for it.
const NEVER_S: u64 = 300;
/// Shorter than a rank is late.
const TIMEOUT_S: u64 = 4;

/// What happens to the victim.
const CAUSES: [&str; 5] = ["killed", "stopped", "late", "left", "other call"];
/// What all ranks do again and again. In a `remainder`, another rank has left before: rank 0 if
/// that is not the victim.
const PHASES: [&str; 5] = ["collective", "group", "messenger", "buckets", "remainder"];

#[derive(Clone, Debug)]
struct Case {
    transport: &'static str,
    cause: &'static str,
    phase: &'static str,
    victim: usize,
    algorithm: &'static str,
    count: usize,
    after_us: usize,
}

/// `UNISUM_TEST_DRAWS` cases for each transport, drawn anew in each run, or `all` of them; and
/// those in which the coordinator leaves a group and its process ends. Only those that
/// `UNISUM_TEST_CASE` fits, a part of what is printed of a case.
#[test]
fn every_rank_names_the_one_it_happened_to() {
    let draws = std::env::var("UNISUM_TEST_DRAWS").unwrap_or_else(|_| "8".into());
    let mut random = Random::new();
    let mut cases = Vec::new();
    for transport in support::transports() {
        let mut all = Vec::new();
        for (cause, phase) in CAUSES.iter().flat_map(|cause| PHASES.map(|phase| (*cause, phase))) {
            for victim in 0..RANKS {
                let (algorithm, count) = (random.of(&["ring", "tree"]), random.of(&[10, 100_000]));
                let after_us = random.below(20_000);
                all.push(Case { transport, cause, phase, victim, algorithm, count, after_us });
            }
        }
        all.retain(Case::makes_sense);
        let fits = std::env::var("UNISUM_TEST_CASE").unwrap_or_default();
        all.retain(|case| format!("{case:?}").contains(&fits));
        cases.extend(all.extract_if(.., |case| case.coordinator_leaves()));
        if draws == "all" {
            cases.append(&mut all);
        } else {
            let draws = draws.parse::<usize>().unwrap().min(all.len());
            cases.extend((0..draws).map(|_| all.swap_remove(random.below(all.len()))));
        }
    }
    for together in cases.chunks(16) {
        thread::scope(|scope| {
            for case in together {
                println!("{case:?}");
                scope.spawn(|| case.check());
            }
        });
    }
}

impl Case {
    /// Steps of buckets tell a wrong call in ways of their own.
    fn makes_sense(&self) -> bool {
        !(self.cause == "other call" && self.phase == "buckets")
    }

    /// Whether the coordinator changes while the victim is stopped: the next one never knows it,
    /// and has ended with all others when the victim goes on, so that nobody can tell it.
    fn victim_meets_nobody(&self) -> bool {
        let is_away = self.cause == "stopped" && self.phase == "remainder";
        is_away && self.leaver() == 0 && self.leaver_stays()
    }

    /// Whether the leaver's process lives on for a while.
    const fn leaver_stays(&self) -> bool {
        self.after_us % 2 == 1
    }

    /// What a rank did last in a group the next coordinator can't ask it any more.
    fn coordinator_leaves(&self) -> bool {
        let is_group = ["group", "remainder"].contains(&self.phase);
        self.victim == 0 && self.cause == "left" && is_group
    }

    /// Whether a rank ends while the victim is stopped. Who is in a group without rank 0 hears of a
    /// verdict only when that goes on.
    fn waits_for_victim(&self, rank: usize) -> bool {
        let is_elsewhere = self.phase == "group" && self.victim == 0 && rank % 2 == 1;
        rank != self.victim && !is_elsewhere
    }

    /// Who has left before, in a remainder.
    const fn leaver(&self) -> usize {
        if self.victim == 0 { RANKS - 1 } else { 0 }
    }

    fn check(&self) {
        let is_timed = ["stopped", "late"].contains(&self.cause);
        let world = World::new(RANKS, "suffer")
            .set("UNISUM_TRANSPORT", self.transport)
            .set("UNISUM_ALGORITHM", self.algorithm)
            .set("UNISUM_TIMEOUT", if is_timed { TIMEOUT_S } else { NEVER_S })
            .set("CAUSE", self.cause)
            .set("PHASE", self.phase)
            .set("VICTIM", self.victim)
            .set("LEAVER", self.leaver())
            .set("COUNT", self.count)
            .set("AFTER_US", self.after_us)
            .set("LEAVER_STAYS_MS", u64::from(self.leaver_stays()) * 2000);
        let running = world.start();
        if self.cause == "stopped" {
            let deadline = Instant::now() + LIMIT;
            while (0..RANKS).any(|rank| self.waits_for_victim(rank) && running.lives(rank)) {
                assert!(Instant::now() < deadline, "{self:?}: ranks hang");
                thread::sleep(Duration::from_millis(20));
            }
            running.signal(self.victim, libc::SIGCONT);
        }
        let ended = running.wait(LIMIT);
        for (rank, ended) in ended.iter().enumerate() {
            self.check_rank(rank, ended);
        }
    }

    fn check_rank(&self, rank: usize, ended: &Ended) {
        let context = format!("{self:?}, rank {rank}: {ended:#?}");
        let is_victim = rank == self.victim;
        if is_victim && self.cause == "killed" {
            return assert_eq!(ended.status, 128 + libc::SIGKILL, "{context}");
        }
        assert_eq!(ended.status, 0, "{context}");
        let told = ended.told.last().map_or("", String::as_str);
        if (is_victim && self.cause == "left") || told == "left before" {
            return;
        }
        let v = self.victim;
        let expected = match self.cause {
            "killed" | "left" => format!("RankLost [{v}] "),
            "stopped" | "late" => format!("Timeout [{v}] "),
            _ => {
                let (kind, rest) = told.split_once(" [").unwrap_or_default();
                let (failed, _) = rest.split_once(']').unwrap_or_default();
                let names = failed.split(", ").any(|name| name == v.to_string());
                return assert!(kind == "Mismatch" && names, "{context}");
            }
        };
        let is_alone = is_victim && self.victim_meets_nobody() && told.starts_with("RankLost [");
        assert!(is_alone || told.starts_with(&expected), "{context}");
    }
}

/// All are in the call and alive: nobody is lost.
#[test]
fn a_rank_that_is_slow_in_a_call_is_late_and_not_lost() {
    let transports = support::transports().into_iter();
    let cases: Vec<_> = transports.flat_map(|it| [(it, 0), (it, 2)]).collect();
    thread::scope(|scope| {
        for (transport, victim) in cases {
            let world = World::new(3, "slow")
                .set("UNISUM_TRANSPORT", transport)
                .set("UNISUM_TIMEOUT", 2)
                // Each rank folds there what the others wait for.
                .set("UNISUM_ALGORITHM", "ring")
                .set("VICTIM", victim);
            scope.spawn(move || {
                let told = world.succeed(LIMIT);
                let context = format!("{transport}, rank {victim} is slow: {told:?}");
                let failed = |told: &[String]| told[0].split(']').next().map(str::to_owned);
                let first = failed(&told[0]);
                for (rank, told) in told.iter().enumerate() {
                    assert!(told[0].starts_with("Timeout ["), "{context}");
                    assert_eq!(failed(told), first, "{context}");
                    // The slow rank may have all it needs for that call.
                    let is_told = told[0].contains(": all_reduce #1 (f32 x 1000, ");
                    assert!(is_told || rank == victim, "{context}");
                }
            });
        }
    });
}

fn slow() {
    fn fold(into: &mut [f32], from: &[f32]) {
        if setting("VICTIM") == setting("UNISUM_RANK") {
            thread::sleep(Duration::from_secs(4));
        }
        into.iter_mut().zip(from).for_each(|(into, from)| *into += from);
    }
    let communicator = Communicator::from_environment().unwrap();
    let mut data = [1_f32; 1000];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    let error = loop {
        if let Err(error) = communicator.all_reduce(&mut data, CustomOp::commutative(fold)) {
            break error;
        }
    };
    tell_error(&error);
}

/// What a rank does again and again.
enum Work {
    Collective(Communicator, Vec<f32>),
    Messages(Box<Messenger>, Vec<f32>, Vec<f32>),
    Steps(Box<Buckets>),
}

impl Work {
    fn once(&mut self, is_other: bool) -> Result<(), Error> {
        match self {
            Self::Collective(communicator, data) => {
                let end = data.len() - usize::from(is_other);
                communicator.all_reduce(&mut data[..end], ReduceOp::Max)
            }
            Self::Messages(messenger, data, received) => {
                let (rank, world) = (messenger.rank(), messenger.world());
                let end = data.len() - usize::from(is_other);
                messenger.exchange(&mut [
                    Message::Send { data: &data[..end], to: (rank + 1) % world, tag: 1 },
                    Message::Receive { data: received, from: (rank + world - 1) % world, tag: 1 },
                ])
            }
            Self::Steps(buckets) => {
                let step = buckets.begin()?;
                step.view::<f32>(0)?.ready();
                step.wait().map(drop)
            }
        }
    }
}

/// Works until that fails; the victim suffers what it has to.
fn suffer() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let number = |name: &str| setting(name).parse::<usize>().unwrap();
    let (victim, count) = (rank == number("VICTIM"), number("COUNT"));
    let phase = setting("PHASE");
    let is_leaver = phase == "remainder" && rank == number("LEAVER");
    let mut work = match phase.as_str() {
        "collective" => Work::Collective(communicator, vec![1.0; count]),
        "group" => {
            let group = communicator.split(Some((rank % 2) as u32), 0).unwrap().unwrap();
            Work::Collective(group, vec![1.0; count])
        }
        "messenger" => {
            let messenger = Messenger::new(&communicator).unwrap();
            Work::Messages(Box::new(messenger), vec![1.0; count], vec![0.0; count])
        }
        "buckets" => {
            let parameters = [Parameter::new("weight", &[count], Dtype::F32)];
            Work::Steps(Box::new(Buckets::builder(&communicator).build(&parameters).unwrap()))
        }
        _ => {
            let group = communicator.split((!is_leaver).then_some(0), 0).unwrap();
            communicator.barrier().unwrap();
            drop(communicator);
            // The leaver's process ends, or lives on for a while.
            let Some(group) = group else {
                thread::sleep(Duration::from_millis(number("LEAVER_STAYS_MS") as u64));
                return tell("left before");
            };
            thread::sleep(Duration::from_millis(500));
            Work::Collective(group, vec![1.0; count])
        }
    };
    work.once(false).unwrap();
    reach("working");
    if victim {
        thread::sleep(Duration::from_millis(50));
    }
    let cause = setting("CAUSE");
    let after = Duration::from_micros(number("AFTER_US") as u64);
    match cause.as_str() {
        "killed" | "stopped" if victim => {
            let signal = if cause == "killed" { libc::SIGKILL } else { libc::SIGSTOP };
            let own = std::process::id() as i32;
            thread::spawn(move || {
                thread::sleep(after);
                // SAFETY: plain system call: a signal to this process itself.
                unsafe { libc::kill(own, signal) };
            });
        }
        "late" if victim => thread::sleep(Duration::from_secs(TIMEOUT_S + 6)),
        "left" if victim => return,
        _ => {}
    }
    let is_other = victim && cause == "other call";
    loop {
        if let Err(error) = work.once(is_other) {
            return tell_error(&error);
        }
        thread::sleep(Duration::from_millis(1));
    }
}
