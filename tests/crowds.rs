//! What strangers cost a job of 12 ranks at each of its stages: its start, calls, groups being
//! made, its end. Nothing fails, and memory and descriptors are bounded. How much slower the ranks
//! are on the same share of the processors is printed: it depends on the rate, and that on the
//! machine.
//!
//! The ranks have one processor and the strangers another one. As others may use both, what a rank
//! does is counted by the processor time that the ranks got. Strangers have their price wherever
//! they knock: a program next door, on the ranks' processor, does nothing but let the same
//! strangers in and close, and its time counts as well. `UNISUM_TEST_CROWD_SECONDS` says how long
//! each stage lasts, in CI a moment.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/strangers.rs"]
mod strangers;
mod support;

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use strangers::{Flood, Kind};
use support::{Running, World, free_ports, reach, setting, tell};
use unisum::{Communicator, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work), ("neighbour", neighbour)]);
}

const LIMIT: Duration = Duration::from_secs(300);
const RANKS: usize = 12;
const PROCESSOR_OF_RANKS: &str = "0";
const PROCESSOR_OF_STRANGERS: usize = 1;
/// Turns, of calls and of groups each, with strangers at each of these places.
const TURNS: usize = 2;
const PLACES: [Place; 3] = [Place::Here, Place::Nowhere, Place::NextDoor];

/// Where the strangers knock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    Nowhere,
    NextDoor,
}
/// Some that break off, some that hold on, some that speak, and some that begin TLS.
const CROWD: [Kind; 6] = [
    Kind::Reset,
    Kind::Reset,
    Kind::Says(b"GET / HTTP/1.1\r\nHost: unisum\r\n\r\n"),
    Kind::Silent,
    Kind::HalfHello,
    Kind::Claims,
];

fn sum(communicator: &Communicator) {
    let mut data = vec![1_f32; 2000];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert!(data.iter().all(|&it| it == communicator.world() as f32));
}

fn has(mark: &str) -> bool {
    Path::new(&setting("TEST_MARKS")).join(format!("{mark}.test")).exists()
}

fn group(communicator: &Communicator, round: u32) {
    let (rank, world) = (communicator.rank(), communicator.world());
    sum(&communicator.duplicate().unwrap());
    let messenger = Messenger::new(communicator).unwrap();
    let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
    let (mut data, sent) = ([0_u32; 8], [round; 8]);
    let send = Message::Send { data: &sent, to: next, tag: 7 };
    messenger
        .exchange(&mut [send, Message::Receive { data: &mut data, from: last, tag: 7 }])
        .unwrap();
    assert_eq!(data, sent);
}

/// Calls and groups in turns, until the test says that a turn is over; rank 0 tells how many.
fn work() {
    let started = Instant::now();
    let communicator = Communicator::from_environment().unwrap();
    sum(&communicator);
    tell(started.elapsed().as_millis());
    reach("joined");
    for turn in 0..setting("TURNS").parse().unwrap() {
        let makes_groups = turn % 2 == 1;
        let mut rounds = 0_u32;
        loop {
            // Looking has its price: not before each call.
            for _ in 0..if makes_groups { 1 } else { 20 } {
                match makes_groups {
                    true => group(&communicator, rounds),
                    false => sum(&communicator),
                }
                rounds += 1;
            }
            let mut is_over = [u8::from(has(&format!("over-{turn}")))];
            communicator.broadcast(&mut is_over, 0).unwrap();
            if is_over[0] == 1 {
                break;
            }
        }
        tell(rounds);
        reach(&format!("turn-{turn}"));
    }
}

/// Has this thread, and those that it starts, run on one processor; `false` if there is none.
fn stay_on(processor: usize) -> bool {
    // SAFETY: an empty set is a valid one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the processor's number is less than a set holds.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: plain system call.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) == 0 }
}

/// Lets in whoever comes, as many ports as ranks have, and closes.
fn neighbour() {
    for port in setting("PORTS").split(',') {
        let listener = TcpListener::bind(("127.0.0.1", port.parse().unwrap())).unwrap();
        thread::spawn(move || listener.incoming().for_each(drop));
    }
    reach("listens");
    // It ends with the test at the latest.
    while !has("moves") {
        thread::sleep(Duration::from_millis(50));
    }
}

/// Processor time that these have had, in clock ticks.
fn ticks(running: &Running, processes: usize) -> u64 {
    let of = |rank| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", running.pid(rank))).unwrap();
        let fields = stat.rsplit(')').next().unwrap().split_whitespace();
        fields.skip(11).take(2).map(|it| it.parse::<u64>().unwrap()).sum::<u64>()
    };
    (0..processes).map(of).sum()
}

/// The most descriptors and KiB of memory of its own that a rank has.
fn most_held(running: &Running) -> (usize, usize) {
    let of = |rank| {
        let folder = format!("/proc/{}", running.pid(rank));
        let files = std::fs::read_dir(format!("{folder}/fd")).unwrap().count();
        let status = std::fs::read_to_string(format!("{folder}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        (files, line.trim().trim_end_matches(" kB").parse::<usize>().unwrap())
    };
    let held = (0..RANKS).map(of);
    held.fold((0, 0), |most, (files, kib)| (most.0.max(files), most.1.max(kib)))
}

struct Turn {
    makes_groups: bool,
    place: Place,
    /// Of the ranks and of who is next door.
    ticks: u64,
    strangers: usize,
    seconds: f64,
}

fn on_one_processor(world: World) -> World {
    world.through(|_| ["taskset", "-c", PROCESSOR_OF_RANKS].map(str::to_owned).to_vec())
}

/// A job from its start to its end; what its turns took, what the ranks told, and how long they
/// took to join and to leave. In a crowd there are strangers at the start and the end, and in every
/// third turn of each kind; without one there are no turns.
fn job(seconds: u64, is_flooded: bool) -> (Vec<Turn>, Vec<Vec<String>>, [Duration; 2]) {
    let count = if is_flooded { 2 * PLACES.len() * TURNS } else { 0 };
    let all = free_ports(2 * RANKS + 4);
    let (next_door, ports) = all.split_at(RANKS);
    let (first, last) = (ports[1], ports[ports.len() - 1]);
    let list = next_door.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    let neighbour = on_one_processor(World::new(1, "neighbour").set("PORTS", list)).start();
    neighbour.wait_for("listens", 1, LIMIT);
    let world = World::new(RANKS, "work")
        .set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{}", ports[0]))
        .set("UNISUM_PORT_RANGE", format!("{first}-{last}"))
        .set("UNISUM_JOB", "flooded")
        .set("UNISUM_TLS", "auto")
        .set("UNISUM_ALGORITHM", "ring")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("TURNS", count);
    let flood = |place| match place {
        Place::Here => Some(Flood::of(ports, &CROWD, usize::MAX)),
        Place::NextDoor => Some(Flood::of(next_door, &CROWD, usize::MAX)),
        Place::Nowhere => None,
    };
    let mut crowd = is_flooded.then(|| flood(Place::Here)).flatten();
    let started = Instant::now();
    let running = on_one_processor(world).start();
    running.wait_for("joined", RANKS, LIMIT);
    let joined = started.elapsed();
    let mut turns = Vec::new();
    for turn in 0..count {
        // No place comes always behind the same one.
        let (round, at) = (turn / 2 / PLACES.len(), turn / 2 % PLACES.len());
        let place = PLACES[if round % 2 == 0 { at } else { PLACES.len() - 1 - at }];
        drop(crowd.take());
        let spent = || ticks(&running, RANKS) + ticks(&neighbour, 1);
        let before = spent();
        crowd = flood(place);
        let since = Instant::now();
        thread::sleep(Duration::from_secs(seconds));
        let (files, kib) = most_held(&running);
        running.mark(&format!("over-{turn}"));
        running.wait_for(&format!("turn-{turn}"), RANKS, LIMIT);
        // Guests, the sockets of the communicators, and what any process has.
        assert!(files < 128 + RANKS * 5 + 60, "{files} descriptors");
        assert!(kib < 100 << 10, "{kib} KiB");
        let (ticks, seconds) = (spent() - before, since.elapsed().as_secs_f64());
        let strangers = crowd.as_ref().map_or(0, |it| it.made.load(Ordering::Relaxed));
        println!("turn {turn}: {place:?}, at most {files} descriptors, {kib} KiB");
        turns.push(Turn { makes_groups: turn % 2 == 1, place, ticks, strangers, seconds });
    }
    drop(crowd.take());
    crowd = is_flooded.then(|| flood(Place::Here)).flatten();
    let leaving = Instant::now();
    let ended = running.wait(LIMIT);
    let left = leaving.elapsed();
    drop(crowd);
    neighbour.mark("moves");
    for ended in ended.iter().chain(&neighbour.wait(LIMIT)) {
        assert_eq!(ended.status, 0, "{ended:#?}");
    }
    (turns, ended.into_iter().map(|ended| ended.told).collect(), [joined, left])
}

/// Of one place and kind: rounds for each tick, strangers for each tick and in a second.
fn paces(turns: &[Turn], rounds: &[String], chosen: (bool, Place)) -> [f64; 3] {
    let (mut made, mut ticks, mut strangers, mut seconds) = (0.0, 0.0, 0.0, 0.0);
    for (turn, told) in turns.iter().zip(rounds) {
        if (turn.makes_groups, turn.place) == chosen {
            made += told.parse::<f64>().unwrap();
            ticks += turn.ticks as f64;
            strangers += turn.strangers as f64;
            seconds += turn.seconds;
        }
    }
    [made / ticks, strangers / ticks, strangers / seconds]
}

#[test]
fn a_crowd_at_each_stage_ends_no_job_and_takes_bounded_memory() {
    if !stay_on(PROCESSOR_OF_STRANGERS) {
        println!("skipped: this test needs two processors");
        return;
    }
    let seconds = std::env::var("UNISUM_TEST_CROWD_SECONDS");
    let seconds = seconds.map_or(1, |it| it.parse().unwrap());
    let (_, _, quiet) = job(0, false);
    let (turns, told, crowded) = job(seconds, true);
    println!(
        "joined after {:?}, in a crowd {:?}; left after {:?}, {:?}",
        quiet[0], crowded[0], quiet[1], crowded[1]
    );
    for (makes_groups, what) in [(false, "calls"), (true, "groups")] {
        let of = |place| paces(&turns, &told[0][1..], (makes_groups, place));
        let [quiet, ..] = of(Place::Nowhere);
        for place in [Place::Here, Place::NextDoor] {
            let [pace, density, rate] = of(place);
            // What a stranger takes of a tick of 10 ms.
            let each = (1.0 - pace / quiet) / density * 1e4;
            println!(
                "{what}, {place:?}: {:.2} times the processor time at {rate:.0} strangers/s, \
                 {each:.1} µs for each",
                quiet / pace
            );
        }
        let ratio = of(Place::NextDoor)[0] / of(Place::Here)[0];
        println!("{what}: {ratio:.2} times of what it takes where they knock next door");
    }
}
