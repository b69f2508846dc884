//! A training of 8 processes, of which some are killed from outside, at random moments, and replaced
//! by newcomers. After each change all that are left end the same step with the same weights, nobody
//! hangs, and nobody is left out that was not killed.
//!
//! `tests/elastic/run` makes more kills and prints figures: `UNISUM_TEST_KILLS` kills of each
//! transport.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "elastic/job.rs"]
mod job;
#[path = "elastic/member.rs"]
mod member;
mod support;
#[path = "elastic/watch.rs"]
mod watch;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use job::{Job, Kill, Shape, Through, draw_victims};
use support::Random;
use support::hosts::{Hosts, inside};
use watch::{Passage, Watch};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || member::train(false)),
        ("newcomer", || member::train(true)),
    ]);
}

const RANKS: usize = 8;
const HOSTS: usize = 4;

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |it| it.parse().unwrap())
}

fn shape(name: &str, transport: &str, through: Through) -> Shape {
    let computing = number("UNISUM_TEST_COMPUTING_US", 5000);
    let mut variables = vec![("COMPUTING_US", computing.to_string())];
    if name == "hosts" {
        variables.push(("UNISUM_INTERFACE", "eth0".into()));
    } else {
        variables.push(("UNISUM_TRANSPORT", transport.into()));
    }
    Shape { name: name.into(), ranks: number("UNISUM_TEST_RANKS", RANKS), through, variables }
}

/// Kills, at a random moment, and waits until all is well again, with a newcomer for each victim.
/// Sometimes another one dies meanwhile: a member, or a newcomer. Sometimes one is stopped for a
/// while and comes back, which nobody may take for a death: that change counts in no figure.
fn disturb(job: &mut Job, random: &mut Random) -> (Option<Kill>, usize) {
    job.look_for(Duration::from_micros(random.below(150_000) as u64));
    let members = job.members();
    let victims = draw_victims(random, &members);
    let drawn = [0, 0, random.below(30_000) as u64, random.below(300_000) as u64];
    let apart = Duration::from_micros(random.of(&drawn));
    let stopped = (random.below(8) == 0).then(|| random.of(&members));
    let stopped = stopped.filter(|it| !victims.contains(it));
    println!("{victims:?} of {members:?} die, {apart:?} apart, {stopped:?} is stopped");
    stopped.iter().for_each(|it| job.stop(*it, true));
    let mut kill = job.kill(&victims, apart);
    if let Some(stopped) = stopped {
        job.look_for(Duration::from_micros(random.below(800_000) as u64));
        job.stop(stopped, false);
    }
    // The newcomers may come while the others agree, or later.
    let is_early = random.below(2) == 0;
    if !is_early {
        job.await_survivors(&mut kill);
    }
    let newcomers: Vec<usize> = victims.iter().map(|_| job.add_newcomer()).collect();
    if is_early {
        job.await_survivors(&mut kill);
    }
    let mut more = 0;
    if random.below(6) == 0 {
        job.look_for(Duration::from_micros(random.below(300_000) as u64));
        let members = job.members();
        let victim = match random.below(3) {
            0 => newcomers[0],
            1 => members[0],
            _ => random.of(&members),
        };
        println!("{victim} dies while {newcomers:?} enter");
        job.kill(&[victim], Duration::ZERO);
        job.add_newcomer();
        more = 1;
    }
    job.await_all(member::now_ns());
    kill.settled = member::now_ns();
    if stopped.is_some() {
        more += victims.len();
        return (None, more);
    }
    (Some(kill), more)
}

fn percentile(sorted: &[u64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).map_or(0.0, |it| *it as f64 / 1e6)
}

/// How much longer the steps took that led from view to view than others: the mean over the ranks
/// that stayed, of all that a change took, from the kill until the newcomers were in.
fn lost_per_change(kills: &[Kill], watch: &Watch, usual: u64) -> u64 {
    let lost = kills.iter().filter_map(|kill| {
        let during = |it: &&Passage| kill.when < it.ended && it.ended <= kill.settled;
        let passages: Vec<&Passage> = watch.passages.iter().filter(during).collect();
        let ranks: BTreeSet<usize> = passages.iter().map(|it| it.process).collect();
        let lost = passages.iter().map(|it| (it.ended - it.before).saturating_sub(usual));
        lost.sum::<u64>().checked_div(ranks.len() as u64)
    });
    lost.sum::<u64>().checked_div(kills.len() as u64).unwrap_or(0)
}

fn tell_figures(name: &str, kills: &[Kill], more: usize, watch: &Watch) {
    let mut stalls: Vec<u64> = kills.iter().map(|it| it.stall_ns).collect();
    stalls.sort_unstable();
    let mut usual = watch.usual.clone();
    usual.sort_unstable();
    let victims: usize = kills.iter().map(|it| it.victims.len()).sum();
    let [p50, p90, p99, most] = [50, 90, 99, 100].map(|it| percentile(&stalls, it));
    let [step, slow] = [50, 99].map(|it| percentile(&usual, it));
    let lost = lost_per_change(kills, watch, usual[usual.len() / 2]) as f64 / 1e6;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!("{name}: {} kills, of which {victims} are measured:", victims + more);
    println!("  from the kill until the last survivor has ended a step without the victim:");
    println!("  p50 {p50:.0} ms, p90 {p90:.0} ms, p99 {p99:.0} ms, most {most:.0} ms");
    println!("  other steps: p50 {step:.1} ms, p99 {slow:.1} ms");
    println!("  a kill and the entrance of a newcomer cost each rank {lost:.0} ms");
    println!("  steps that ended in another view, by rank: {:?}", watch.ends);
    println!("  load {}", load.trim());
}

fn kills(name: &str, transport: &str, through: Through) {
    let often = number("UNISUM_TEST_KILLS", 6);
    let mut random = Random::new();
    let mut job = Job::start(shape(name, transport, through));
    let (mut all, mut more, mut count) = (Vec::new(), 0, 0);
    let start = Instant::now();
    while count < often {
        let (kill, and) = disturb(&mut job, &mut random);
        count += and + kill.as_ref().map_or(0, |it| it.victims.len());
        more += and;
        if let Some(kill) = kill {
            let stall = Duration::from_nanos(kill.stall_ns);
            println!("  {stall:.1?} without a step, after {:.1?}", start.elapsed());
            all.push(kill);
        }
    }
    let watch = job.finish();
    tell_figures(name, &all, more, &watch);
}

/// One at a time: two worlds slow each other.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_training_over_shared_memory_outlives_kills_of_any_rank() {
    let _one = alone();
    kills("shm", "shm", |_| Vec::new());
}

#[test]
fn a_training_over_tcp_outlives_kills_of_any_rank() {
    let _one = alone();
    kills("tcp", "tcp", |_| Vec::new());
}

#[test]
fn a_training_on_four_hosts_outlives_kills_of_any_rank() {
    let _one = alone();
    let Some(_hosts) = Hosts::new(HOSTS) else { return };
    kills("hosts", "", |number| inside(number % HOSTS));
}
