//! An elastic training on four hosts whose connections are reset, all those of a host at once: with
//! `UNISUM_RECONNECT_TIMEOUT` they go on at the byte, and the view stays as it is. A process that
//! dies meanwhile is lost at once all the same.
//!
//! `UNISUM_TEST_RESETS` rounds, by hand; each has resets, a kill among resets, and a newcomer.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "elastic/job.rs"]
#[allow(dead_code, reason = "kills need more of it")]
mod job;
#[path = "elastic/member.rs"]
mod member;
mod support;
#[path = "elastic/watch.rs"]
#[allow(dead_code, reason = "kills need more of it")]
mod watch;

use std::time::Duration;

use job::{Job, Shape, draw_victims};
use support::Random;
use support::hosts::{Hosts, inside, sh};
use support::stopwatch::Stopwatch;

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || member::train(false)),
        ("newcomer", || member::train(true)),
    ]);
}

const HOSTS: usize = 4;
const RANKS: usize = 6;
/// Half of the time that connections have to go on: nothing that is known at once takes so long.
const SOON: Duration = Duration::from_secs(15);

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |it| it.parse().unwrap())
}

/// One at a time: two worlds slow each other.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn start(name: &str, variables: &[(&'static str, String)]) -> Job {
    let mut all = vec![
        ("COMPUTING_US", "5000".to_owned()),
        ("UNISUM_INTERFACE", "eth0".to_owned()),
        ("UNISUM_RECONNECT_TIMEOUT", (2 * SOON.as_secs()).to_string()),
    ];
    all.extend_from_slice(variables);
    let through = |number: usize| inside(number % HOSTS);
    Job::start(Shape { name: name.into(), ranks: RANKS, through, variables: all })
}

/// Resets all connections between a host and the others: those of data, of control and of views.
fn reset(hosts: &Hosts, host: usize) {
    hosts.on(host, "ss -H -K -t dst 10.77.0.0/24 > /dev/null");
}

fn percentile(times: &mut [u64], percent: usize) -> f64 {
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(at).map_or(0.0, |it| *it as f64 / 1e6)
}

/// Resets connections, of which none may change the view; how long each stopped the steps.
fn reset_only(job: &mut Job, hosts: &Hosts, random: &mut Random, stalls: &mut Vec<u64>) {
    for _ in 0..2 {
        job.look_for(Duration::from_micros(random.below(100_000) as u64));
        let before = job.watch.view().0;
        let when = member::now_ns();
        let host = random.below(HOSTS);
        reset(hosts, host);
        if random.below(3) == 0 {
            // While they go on after the first one.
            job.look_for(Duration::from_micros(random.below(60_000) as u64));
            reset(hosts, random.below(HOSTS));
        }
        let late = job.await_steps(when);
        assert_eq!(job.watch.view().0, before, "a reset of host {host} changed the view");
        stalls.push(late);
    }
}

/// Kills one or two ranks while connections are reset, before it or just after, so that the resets
/// fall into the agreement on the next view or the making of its communicator.
fn kill_among_resets(job: &mut Job, hosts: &Hosts, random: &mut Random) -> u64 {
    job.look_for(Duration::from_micros(random.below(100_000) as u64));
    let members = job.members();
    let victims = draw_victims(random, &members, 10);
    let spread = [0, 5_000, 30_000, 150_000];
    let first = random.below(2) == 0;
    if first {
        reset(hosts, random.below(HOSTS));
        job.look_for(Duration::from_micros(random.below(20_000) as u64));
    }
    let mut kill = job.kill(&victims, Duration::ZERO);
    for _ in 0..1 + random.below(3) {
        let most = random.of(&spread);
        job.look_for(Duration::from_micros(random.below(most + 1) as u64));
        reset(hosts, random.below(HOSTS));
    }
    job.await_survivors(&mut kill);
    println!("{victims:?} of {members:?}: {:.0?}", Duration::from_nanos(kill.stall_ns));
    assert!(Duration::from_nanos(kill.stall_ns) < SOON, "{victims:?} died: {kill:?}");
    victims.iter().for_each(|_| _ = job.add_newcomer());
    job.await_all(member::now_ns());
    kill.stall_ns
}

#[test]
fn resets_change_no_view_and_hide_no_death() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    let mut random = Random::new();
    let mut job = start("resets", &[]);
    let (mut stalls, mut kills) = (Vec::new(), Vec::new());
    for _ in 0..number("UNISUM_TEST_RESETS", 3) {
        reset_only(&mut job, &hosts, &mut random, &mut stalls);
        kills.push(kill_among_resets(&mut job, &hosts, &mut random));
    }
    reset_only(&mut job, &hosts, &mut random, &mut stalls);
    let watch = job.finish();
    let mut usual = watch.usual;
    println!("steps: p50 {:.1} ms", percentile(&mut usual, 50));
    for (what, times) in [("resets", &mut stalls), ("kills among resets", &mut kills)] {
        let [p50, p99, most] = [50, 99, 100].map(|it| percentile(times, it));
        println!("{what}: {} times, p50 {p50:.0}, p99 {p99:.0}, most {most:.0} ms", times.len());
    }
}

/// Seconds without a sign of life from another host, and until connections have gone on.
const SILENCE: u64 = 2;
const RECONNECT: u64 = 4;

fn plug(hosts: &Hosts, host: usize, is_in: bool) {
    let how = if is_in { "master br0" } else { "nomaster" };
    sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
}

fn start_briefly(name: &str) -> Job {
    start(
        name,
        &[
            ("UNISUM_HEARTBEAT_TIMEOUT", SILENCE.to_string()),
            ("UNISUM_RECONNECT_TIMEOUT", RECONNECT.to_string()),
        ],
    )
}

/// A host that is away for longer than the heartbeat time-out, and comes back in time, is not lost.
/// Each in a job of its own: the steps go on before all connections do, so that one between two
/// hosts that are away in turn may be gone for longer than either of them.
#[test]
fn hosts_that_are_back_in_time_are_not_lost() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    for host in [0, 3] {
        let mut job = start_briefly(&format!("away-{host}"));
        let before = job.watch.view().0;
        plug(&hosts, host, false);
        job.look_for(Duration::from_secs(SILENCE + RECONNECT / 2));
        plug(&hosts, host, true);
        let late = job.await_steps(member::now_ns());
        println!("host {host} is back: {:.1?} later", Duration::from_nanos(late));
        assert_eq!(job.watch.view().0, before, "host {host} was away, and came back in time");
        job.finish();
    }
}

/// One that stays away is, after both times. All its connections were there before: one that was
/// still to go on would be late sooner.
#[test]
fn a_host_that_vanishes_is_lost_after_both_times() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    let mut job = start_briefly("vanished");
    // The last one, where rank 3 is.
    let mut kill = job.give_up(&[3]);
    let vanished = Stopwatch::start();
    plug(&hosts, 3, false);
    job.await_survivors(&mut kill);
    let took = Duration::from_nanos(kill.stall_ns);
    println!("host 3 vanished: {took:.1?}");
    let both = Duration::from_secs(SILENCE + RECONNECT);
    assert!(took >= both, "{took:?}");
    // The kernel asks once a second, and nobody waits for the dead when dropping the communicator.
    vanished.assert_took(took, (both + Duration::from_secs(2), SOON), "until all went on");
    job.bury(&[3], true);
    plug(&hosts, 3, true);
    job.finish();
}
