//! Who is to blame: whatever happens to a rank, in whatever it does, all others report the same
//! kind of error and the same ranks, and so does the rank itself where it lives to tell.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::hosts::{Hosts, inside, sh};
use support::{Ended, Random, World, await_others, reach, setting, tell, tell_error};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, CustomOp, Dtype, Error, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    suffer_while_joining();
    support::run_if_rank(&[("suffer", suffer), ("slow", slow)]);
}

const LIMIT: Duration = Duration::from_secs(150);
const RANKS: usize = 4;
/// Longer than anything here takes that is not to wait for it.
const NEVER_S: u64 = 300;
/// Shorter than a rank is late; many ranks start at once, and all have to be there by then.
const TIMEOUT_S: u64 = 12;

const LATE: Duration = Duration::from_secs(TIMEOUT_S + 10);

/// What happens to the victim.
const CAUSES: [&str; 5] = ["killed", "stopped", "late", "left", "other call"];
/// What all ranks do again and again. In a `remainder`, another rank has left before: rank 0 if
/// that is not the victim. In a `trial`, each call is the first of its size. At the `start`
/// and when ranks begin `measuring`, the victim suffers before it has joined.
const PHASES: [&str; 8] =
    ["start", "measuring", "collective", "trial", "group", "messenger", "buckets", "remainder"];

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

/// Rank 0 measures a link with one of the others, which wait for it meanwhile, all equally long at
/// first sight: whoever of them ended first must not blame rank 0.
#[test]
fn who_waits_for_a_late_rank_while_measuring_is_not_blamed() {
    thread::scope(|scope| {
        for transport in support::transports() {
            for (victim, cause) in (1..RANKS).flat_map(|it| [(it, "late"), (it, "stopped")]) {
                let (phase, algorithm) = ("measuring", "ring");
                let case =
                    Case { transport, cause, phase, victim, algorithm, count: 10, after_us: 0 };
                scope.spawn(move || case.check());
            }
        }
    });
}

impl Case {
    /// Steps of buckets tell a wrong call in ways of their own.
    fn makes_sense(&self) -> bool {
        !(self.cause == "other call" && (self.phase == "buckets" || self.is_joining()))
    }

    /// Whether the victim suffers before it has joined, or in that moment.
    fn is_joining(&self) -> bool {
        ["start", "measuring"].contains(&self.phase)
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
            .set("UNISUM_ALGORITHM", if self.phase == "trial" { "auto" } else { self.algorithm })
            .set("UNISUM_TIMEOUT", if is_timed { TIMEOUT_S } else { NEVER_S })
            // Who dies before it has come is missed for so long.
            .set("UNISUM_CONNECT_TIMEOUT", if self.is_joining() { TIMEOUT_S } else { 60 })
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
        if self.is_joining() {
            return self.check_joining(rank, told, &context);
        }
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

    /// Joining fails, or, where it was faster, the first call. Who was away meanwhile meets nobody.
    fn check_joining(&self, rank: usize, told: &str, context: &str) {
        let (kind, rest) = told.split_once(" [").unwrap_or_default();
        let (failed, _) = rest.split_once(']').unwrap_or_default();
        assert!(["Rendezvous", "RankLost", "Timeout"].contains(&kind), "{context}");
        let names_it = failed == self.victim.to_string();
        assert!(names_it || rank == self.victim, "{context}");
    }
}

/// What is cut: the network between two hosts that both reach all others, or between one and all
/// others.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Pair(usize, usize),
    Host(usize),
}

impl Cut {
    /// What ranks do, so that the cut is in the way of some.
    const fn phases(self) -> &'static [&'static str] {
        match self {
            // Of the groups, one has only these two.
            Self::Pair(1, 3) => &["group"],
            Self::Pair(..) => &["measuring", "collective", "messenger", "buckets", "remainder"],
            Self::Host(0) => &["measuring", "collective", "trial", "group", "messenger", "buckets"],
            Self::Host(_) => {
                &["measuring", "collective", "trial", "group", "messenger", "buckets", "remainder"]
            }
        }
    }

    /// Makes the cut, or mends it.
    fn make(self, hosts: &Hosts, is_cut: bool) {
        let set = |host: usize, how: &str| {
            sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
        };
        match self {
            Self::Pair(one, other) => [one, other].into_iter().for_each(|host| {
                let isolated = if is_cut { "on" } else { "off" };
                set(host, &format!("type bridge_slave isolated {isolated}"));
            }),
            Self::Host(host) => set(host, if is_cut { "nomaster" } else { "master br0" }),
        }
    }

    /// Whom a rank names.
    fn failed_ranks(self, phase: &str, rank: usize) -> Vec<usize> {
        // In a remainder, rank 0 has left.
        let coordinator = usize::from(phase == "remainder");
        let lost = match self {
            Self::Pair(one, other) if one != coordinator => return vec![one, other],
            Self::Pair(_, host) | Self::Host(host) => host,
        };
        match lost {
            _ if rank != lost => vec![lost],
            // It is cut off from the others as they are from it.
            0 => (1..RANKS).collect(),
            _ => vec![coordinator],
        }
    }

    fn check(self, phase: &str, all: &[Ended]) {
        for (rank, ended) in all.iter().enumerate() {
            let context = format!("{self:?}, {phase}, rank {rank}: {ended:#?}");
            assert_eq!(ended.status, 0, "{context}");
            let told = ended.told.last().map_or("", String::as_str);
            if told == "left before" {
                continue;
            }
            let kind = if phase == "measuring" { "Rendezvous" } else { "RankLost" };
            let failed_ranks = self.failed_ranks(phase, rank);
            assert!(told.starts_with(&format!("{kind} {failed_ranks:?} ")), "{context}");
        }
    }
}

/// How long a host may give no sign of life.
const HEARTBEAT_S: u64 = 2;

/// Each rank on a host of its own. All that is done at a time suffers the same cut.
#[test]
fn every_rank_names_those_whose_network_is_cut() {
    let Some(hosts) = Hosts::new(RANKS) else { return };
    let cuts = [Cut::Pair(1, 2), Cut::Pair(1, 3), Cut::Pair(2, 3), Cut::Host(0), Cut::Host(2)];
    let fits = std::env::var("UNISUM_TEST_CASE").unwrap_or_default();
    for cut in cuts.into_iter().filter(|cut| format!("{cut:?}").contains(&fits)) {
        println!("{cut:?}");
        let start = |(at, phase): (usize, &&'static str)| {
            let world = World::new(RANKS, "suffer")
                .through(inside)
                .set("UNISUM_RENDEZVOUS", format!("tcp://10.77.0.1:{}", 7001 + at))
                .set("UNISUM_INTERFACE", "")
                .set("UNISUM_ALGORITHM", if *phase == "trial" { "auto" } else { "ring" })
                .set("UNISUM_HEARTBEAT_TIMEOUT", HEARTBEAT_S)
                // Half of it is for connections that are not answered.
                .set("UNISUM_CONNECT_TIMEOUT", 40)
                .set("UNISUM_TIMEOUT", NEVER_S)
                .set("CAUSE", "cut")
                .set("PHASE", phase)
                .set("VICTIM", RANKS)
                .set("LEAVER", 0)
                .set("LEAVER_STAYS_MS", 0)
                .set("COUNT", 100_000)
                .set("AFTER_US", 0);
            (*phase, world.start())
        };
        let running: Vec<_> = cut.phases().iter().enumerate().map(start).collect();
        for (phase, running) in &running {
            let ranks = RANKS - usize::from(*phase == "remainder");
            running.wait_for("working", ranks, LIMIT);
        }
        cut.make(&hosts, true);
        let cut_at = Instant::now();
        for (phase, running) in running {
            running.mark("cut");
            cut.check(phase, &running.wait(LIMIT));
        }
        println!("all ended {:?} after the cut", cut_at.elapsed());
        cut.make(&hosts, false);
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
                .set("UNISUM_TIMEOUT", 5)
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
            thread::sleep(Duration::from_secs(8));
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

/// In a victim that suffers before it has joined: has it do so, now or when it begins to measure.
/// Where the network is to be cut then, no rank measures before that.
fn suffer_while_joining() {
    if !support::is_rank() {
        return;
    }
    let Ok(phase) = std::env::var("PHASE") else { return };
    let is_victim = setting("VICTIM") == setting("UNISUM_RANK");
    let is_cut = setting("CAUSE") == "cut";
    match phase.as_str() {
        "start" if is_victim => suffer_soon(),
        "measuring" if is_victim || is_cut => {
            let at_measuring = if is_cut { await_cut } else { suffer_soon };
            tracing::subscriber::set_global_default(AtMeasuring(at_measuring)).unwrap();
        }
        _ => {}
    }
}

fn await_cut() {
    reach("working");
    await_others("cut", 1, LIMIT);
}

fn suffer_soon() {
    let after = Duration::from_micros(setting("AFTER_US").parse().unwrap());
    let own = std::process::id() as i32;
    let signal = match &setting("CAUSE")[..] {
        "killed" => libc::SIGKILL,
        "stopped" => libc::SIGSTOP,
        "late" => return thread::sleep(LATE),
        _ => {
            thread::spawn(move || {
                thread::sleep(after);
                tell("left before");
                std::process::exit(0);
            });
            return;
        }
    };
    thread::spawn(move || {
        thread::sleep(after);
        // SAFETY: plain system call: a signal to this process itself.
        unsafe { libc::kill(own, signal) };
    });
}

/// Calls its function when this rank begins to measure.
struct AtMeasuring(fn());

impl tracing::Subscriber for AtMeasuring {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("unisum")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut says = Says(String::new());
        event.record(&mut says);
        if says.0 == "measuring the links" {
            (self.0)();
        }
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// The message of an event.
struct Says(String);

impl tracing::field::Visit for Says {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

/// What a rank does again and again.
enum Work {
    Collective(Communicator, Vec<f32>),
    /// With the elements of the next call, which are ever more.
    Trials(Communicator, Vec<f32>, usize),
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
            Self::Trials(communicator, data, count) => {
                let end = *count - usize::from(is_other);
                *count = (*count * 2).min(data.len());
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
    let phase = setting("PHASE");
    let is_joining = ["start", "measuring"].contains(&&phase[..]);
    let communicator = match Communicator::from_environment() {
        Err(error) if is_joining => return tell_error(&error),
        joined => joined.unwrap(),
    };
    let rank = communicator.rank();
    let number = |name: &str| setting(name).parse::<usize>().unwrap();
    let (victim, count) = (rank == number("VICTIM") && !is_joining, number("COUNT"));
    let is_leaver = phase == "remainder" && rank == number("LEAVER");
    let mut work = match phase.as_str() {
        "start" | "measuring" | "collective" => Work::Collective(communicator, vec![1.0; count]),
        "trial" => Work::Trials(communicator, vec![1.0; 1 << 20], 3),
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
    if !is_joining {
        work.once(false).unwrap();
        reach("working");
    }
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
        "late" if victim => thread::sleep(LATE),
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
