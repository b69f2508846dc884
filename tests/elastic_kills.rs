//! A training of 8 processes, of which some are killed from outside, at random moments, and
//! replaced by newcomers. After each change all that are left end the same step with the same
//! weights, nobody hangs, and nobody is left out that was not killed.
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
use support::hosts::{Hosts, inside, sh};
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
    let victims = draw_victims(random, &members, number("UNISUM_TEST_TWO_IN", 10));
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

/// Seconds without a sign of life from another host.
const SILENCE: u64 = 2;

/// Cuts one of the hosts off, without a word to anybody, or ends that.
fn plug(hosts: &Hosts, host: usize, is_in: bool) {
    let how = if is_in { "master br0" } else { "nomaster" };
    sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
}

/// Hosts vanish with all their processes. Some come back, when the others have gone on long ago:
/// their processes end by themselves, and disturb nobody.
#[test]
fn a_training_outlives_hosts_that_vanish_without_a_word() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    let mut random = Random::new();
    let mut shape = shape("hosts", "", |number| inside(number % HOSTS));
    shape.name = "vanished".into();
    shape.variables.push(("UNISUM_HEARTBEAT_TIMEOUT", SILENCE.to_string()));
    let mut job = Job::start(shape);
    let mut late = Vec::new();
    for round in 0..number("UNISUM_TEST_VANISHED", 2) {
        job.look_for(Duration::from_micros(random.below(150_000) as u64));
        let members = job.members();
        let on = |host: usize| members.iter().copied().filter(move |it| it % HOSTS == host);
        // The others have to be more than half.
        let few: Vec<usize> = (0..HOSTS).filter(|it| (1..=3).contains(&on(*it).count())).collect();
        if few.is_empty() {
            // Of 4 and 4, those with rank 0 would go on; a newcomer comes to another host.
            let mut kill = job.kill(&[members[0]], Duration::ZERO);
            job.await_survivors(&mut kill);
            job.add_newcomer();
            job.await_all(member::now_ns());
            continue;
        }
        let first = members[0] % HOSTS;
        let host = if round % 2 == 0 && few.contains(&first) { first } else { random.of(&few) };
        let victims: Vec<usize> = on(host).collect();
        let mut kill = job.give_up(&victims);
        plug(&hosts, host, false);
        job.await_survivors(&mut kill);
        let come_back = random.below(2) == 0;
        println!(
            "{victims:?} vanish; {:.2?} without a step; do they come back? {come_back}",
            Duration::from_nanos(kill.stall_ns)
        );
        late.push(kill.stall_ns.saturating_sub(SILENCE * 1_000_000_000));
        if come_back {
            plug(&hosts, host, true);
            job.bury(&victims, false);
        } else {
            job.bury(&victims, true);
            plug(&hosts, host, true);
        }
        victims.iter().for_each(|_| _ = job.add_newcomer());
        job.await_all(member::now_ns());
    }
    job.finish();
    late.sort_unstable();
    let [p50, most] = [50, 100].map(|it| percentile(&late, it));
    println!("vanished: {SILENCE} s, and {p50:.0} ms later (p50), {most:.0} ms (most)");
}

/// How a host is cut off.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// Its port of the switch leads nowhere, which no host sees.
    Switch,
    /// Its cable is out, which it sees.
    Cable,
    /// Nothing that it sends to this other host arrives.
    OneWay(usize),
    /// It and this other host do not reach each other.
    Pair(usize),
}

impl Cut {
    fn draw(random: &mut Random, host: usize) -> Self {
        let other = (host + 1 + random.below(HOSTS - 1)) % HOSTS;
        match number("UNISUM_TEST_CUT_KIND", random.below(4)) {
            0 => Self::Switch,
            1 => Self::Cable,
            2 => Self::OneWay(other),
            _ => Self::Pair(other),
        }
    }

    fn set(self, hosts: &Hosts, host: usize, is_cut: bool) {
        let port = |host: usize, how: &str| {
            sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
        };
        match self {
            Self::Switch => plug(hosts, host, !is_cut),
            Self::Cable => port(host, if is_cut { "down" } else { "up" }),
            Self::Pair(other) => [host, other].into_iter().for_each(|host| {
                let how = if is_cut { "on" } else { "off" };
                port(host, &format!("type bridge_slave isolated {how}"));
            }),
            Self::OneWay(other) => {
                // It takes the other's card for one that is not there.
                let number = other + 1;
                for address in [format!("10.77.0.{number}"), format!("fd77::{number}")] {
                    let how = match is_cut {
                        true => format!("replace {address} lladdr 02:00:00:00:00:01 nud permanent"),
                        false => format!("del {address}"),
                    };
                    hosts.on(host, &format!("ip neigh {how} dev eth0"));
                }
            }
        }
    }
}

/// Has hosts ask for each other's cards every 50 ms instead of every second: where it sees that its
/// cable is out, a host forgets all cards, and asks in vain until the cable is back.
fn ask_often(hosts: &Hosts) {
    for (host, family) in (0..HOSTS).flat_map(|host| [(host, "ipv4"), (host, "ipv6")]) {
        let path = format!("/proc/sys/net/{family}/neigh/eth0/retrans_time_ms");
        hosts.on(host, &format!("sh -c 'echo 50 > {path}'"));
    }
}

/// TCP alone sends again after pauses that double: of an outage of 2 s it would miss the end by
/// 0.6 s at the least, and by seconds if it is longer.
#[test]
fn a_training_goes_on_as_soon_as_its_hosts_are_back() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    ask_often(&hosts);
    let mut job = Job::start(reconnecting("back"));
    for how in [Cut::Switch, Cut::Cable, Cut::Pair(0), Cut::OneWay(0), Cut::OneWay(2)] {
        // What only noise delays is measured until it is good once.
        let is_soon = (0..10).any(|_| {
            let before = job.watch.processes[1].step;
            how.set(&hosts, 1, true);
            job.look_for(Duration::from_secs(2));
            how.set(&hosts, 1, false);
            let during = job.watch.processes[1].step - before;
            let late = Duration::from_nanos(job.await_steps(member::now_ns()));
            println!("{how:?}: {during} steps meanwhile, {late:.2?} later");
            late < Duration::from_millis(200)
        });
        assert!(is_soon, "{how:?}");
    }
    job.finish();
}

/// A job that is not elastic, on hosts, whose connections may break and go on.
fn reconnecting(name: &str) -> Shape {
    let mut shape = shape("hosts", "", |number| inside(number % HOSTS));
    shape.name = name.into();
    shape.variables.push(("ELASTIC", "no".into()));
    shape.variables.push(("UNISUM_RECONNECT_TIMEOUT", "30".into()));
    shape
}

/// Where connections may break and go on, a network that is away for a moment costs that moment.
/// The job is not elastic: `elastic_resets` does that. `UNISUM_TEST_CUTS` and `UNISUM_TEST_RESETS`
/// say how many, by hand, and `UNISUM_TEST_CUT_KIND` (0 to 3) of which kind.
#[test]
fn a_training_goes_on_when_its_hosts_are_back_and_when_connections_are_reset() {
    let _one = alone();
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    ask_often(&hosts);
    let mut random = Random::new();
    let mut job = Job::start(reconnecting("cut"));
    let (mut back, mut resumed) = (Vec::new(), Vec::new());
    for _ in 0..number("UNISUM_TEST_CUTS", 2) {
        job.look_for(Duration::from_micros(random.below(150_000) as u64));
        // As many of 0.1 to 1 s as of 1 to 10.
        let cut = Duration::from_secs_f64(10_f64.powf(random.below(2000) as f64 / 1000.0 - 1.0));
        let host = random.below(HOSTS);
        let how = Cut::draw(&mut random, host);
        how.set(&hosts, host, true);
        job.look_for(cut);
        how.set(&hosts, host, false);
        let late = job.await_steps(member::now_ns());
        let later = Duration::from_nanos(late);
        println!("host {host} cut off for {cut:.2?} ({how:?}): {later:.2?} later");
        back.push(late);
    }
    for _ in 0..number("UNISUM_TEST_RESETS", 4) {
        job.look_for(Duration::from_micros(random.below(150_000) as u64));
        let host = random.below(HOSTS);
        let when = member::now_ns();
        hosts.on(host, "ss -H -K -t dst 10.77.0.0/24 > /dev/null");
        let late = job.await_steps(when);
        println!("connections of host {host} reset: {:.2?}", Duration::from_nanos(late));
        resumed.push(late);
    }
    let watch = job.finish();
    let mut usual = watch.usual;
    usual.sort_unstable();
    println!("steps: p50 {:.1} ms", percentile(&usual, 50));
    for (what, mut times) in [("back", back), ("reset", resumed)] {
        times.sort_unstable();
        let [p50, p99, most] = [50, 99, 100].map(|it| percentile(&times, it));
        println!(
            "{what}: {} times, p50 {p50:.0} ms, p99 {p99:.0} ms, most {most:.0} ms",
            times.len()
        );
    }
}
