//! Strangers at the ranks' ports: whatever they send, and however many they are, nobody is harmed.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/strangers.rs"]
mod strangers;
mod support;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use strangers::{Flood, KINDS, Kind};
use support::{World, free_ports, open_files_and_threads, reach, setting, tell};
use unisum::{Communicator, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work), ("join", join)]);
}

const LIMIT: Duration = Duration::from_secs(100);

fn world(ranks: u16, scenario: &'static str) -> (World, Vec<u16>) {
    // A few more than ranks: others on this host may take one meanwhile.
    let ports = free_ports(usize::from(ranks) + 4);
    let (first, last) = (ports[1], ports[ports.len() - 1]);
    let world = World::new(ranks.into(), scenario)
        .set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{}", ports[0]))
        .set("UNISUM_PORT_RANGE", format!("{first}-{last}"))
        .set("UNISUM_JOB", "flooded")
        .set("UNISUM_TRANSPORT", "tcp");
    (world, ports)
}

/// Joins, makes groups and messengers, and works, with strangers at all ports all the time.
fn work() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let sum = |communicator: &Communicator| {
        let mut data = vec![1_f32; 5000];
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!(data.iter().all(|&it| it == communicator.world() as f32));
    };
    sum(&communicator);
    reach("joined");
    for round in 0..setting("ROUNDS").parse().unwrap() {
        sum(&communicator.duplicate().unwrap());
        let half = communicator.split(Some((rank % 2) as u32), 0).unwrap().unwrap();
        sum(&half);
        let messenger = Messenger::new(&communicator).unwrap();
        let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
        let (mut data, sent) = ([0_u32; 8], [round; 8]);
        let send = Message::Send { data: &sent, to: next, tag: 7 };
        messenger
            .exchange(&mut [send, Message::Receive { data: &mut data, from: last, tag: 7 }])
            .unwrap();
        assert_eq!(data, sent);
    }
    let until = Instant::now() + Duration::from_millis(500);
    let most = (0..).map(|_| {
        sum(&communicator);
        let mut over = [u8::from(Instant::now() >= until)];
        communicator.broadcast(&mut over, 0).unwrap();
        (open_files_and_threads().0, over[0] == 1)
    });
    let mut files = 0;
    for (open, is_over) in most {
        files = files.max(open);
        if is_over {
            break;
        }
    }
    tell(files);
    tell(resident_kib());
}

/// Memory of this process that is nobody else's.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn withstand(ranks: u16, rounds: usize, kinds: &[Kind]) {
    // One at a time: two floods would be another test.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (world, ports) = world(ranks, "work");
    let world = world.set("ROUNDS", rounds);
    let start = Instant::now();
    let flood = Flood::new(&ports, kinds);
    let told = world.succeed(LIMIT);
    println!("{ranks} ranks, {kinds:?}: {:?}, files and KiB {told:?}", start.elapsed());
    drop(flood);
    for lines in told {
        let (files, kib): (usize, usize) = (lines[0].parse().unwrap(), lines[1].parse().unwrap());
        // Guests, the sockets of two communicators, and what any process has.
        assert!(files < 128 + usize::from(ranks) * 3 + 40, "{files} descriptors");
        assert!(kib < 100 << 10, "{kib} KiB");
    }
}

#[test]
fn floods_of_one_kind_harm_nobody_at_the_start_in_groups_or_at_work() {
    // All of them take minutes: some, drawn anew each time, unless all are asked for.
    let all = std::env::var("UNISUM_TEST_ALL").is_ok();
    let seed = std::process::id() as usize;
    println!("seed {seed}");
    for (at, kind) in KINDS.into_iter().enumerate() {
        if all || (at + seed).is_multiple_of(4) {
            withstand(4, 4, &[kind; 3]);
        }
    }
}

#[test]
fn a_flood_of_all_kinds_harms_nobody() {
    withstand(8, 2, &[Kind::Silent, Kind::Claims, Kind::HalfHello, Kind::Reset]);
}

fn join() {
    Communicator::from_environment().unwrap().barrier().unwrap();
}

/// More strangers than descriptors, each of whom holds on to its connection.
#[test]
fn strangers_do_not_use_up_the_descriptors_of_a_rank() {
    let (world, ports) = world(3, "join");
    let mut running = world.clone().through(|_| limited()).start_ranks(&[0]);
    let flood = Flood::new(&ports[..1], &[Kind::Silent, Kind::HalfHello]);
    let until = Instant::now() + LIMIT;
    while flood.made.load(Ordering::Relaxed) < 500 {
        assert!(Instant::now() < until, "no flood");
        thread::sleep(Duration::from_millis(1));
    }
    for rank in 1..3 {
        running.add(&world, rank);
    }
    for ended in running.wait(LIMIT) {
        assert_eq!(ended.status, 0, "{ended:#?}");
    }
}

/// Runs a command with 64 descriptors.
fn limited() -> Vec<String> {
    ["sh", "-c", "ulimit -n 64; exec \"$0\" \"$@\""].map(str::to_owned).to_vec()
}
