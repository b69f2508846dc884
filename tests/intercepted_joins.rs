//! Somebody between a process that joins an elastic job and the job's members: whatever it does to
//! their connections, no step has a wrong result, nobody hangs, errors say whom they concern, and
//! the members go on.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/middle.rs"]
#[allow(dead_code, reason = "other tests need more of it")]
mod middle;
mod support;

use std::ops::RangeInclusive;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use middle::{Change, Middle, Plan, address};
use support::hosts::inside;
use support::{Ended, Random, World, reach, setting, tell};
use unisum::{Communicator, Elastic, Error, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("train", train), ("newcomer", newcomer)]);
}

/// All time-outs together, and a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const PORTS: RangeInclusive<u16> = 7001..=7004;
const MEMBERS: usize = 2;
/// Steps of a view with the newcomer, after which all is over.
const STEPS: u64 = 3;

fn elastic() -> unisum::Builder {
    Communicator::builder().elastic(Elastic { minimum: 1 })
}

fn train() {
    let communicator = elastic().connect().unwrap();
    reach("training");
    conclude(steps(communicator));
}

fn newcomer() {
    conclude(elastic().join().and_then(steps));
}

fn conclude(result: Result<usize, Error>) {
    match result {
        Ok(world) => tell(format!("right, of {world}")),
        Err(error) => {
            tell(format!("{:?} {}", error.kind(), error.to_string().replace('\n', " | ")));
        }
    }
}

/// Until all have been there for some steps, or the test says that somebody will not come.
fn steps(mut communicator: Communicator) -> Result<usize, Error> {
    loop {
        match steps_in_view(&communicator) {
            Ok(true) => return Ok(communicator.world()),
            Ok(false) => communicator = communicator.admit()?,
            Err(error) if error.kind() == ErrorKind::ViewChanged => {
                communicator = communicator.rebuild()?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether it is over; else all know of a newcomer.
fn steps_in_view(communicator: &Communicator) -> Result<bool, Error> {
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    for step in 1.. {
        let is_over = Path::new(&setting("TEST_MARKS")).join("enough.test").exists();
        let mut sums: Vec<u64> = (0..2000).map(|at| at * (rank + 1)).collect();
        sums.extend([u64::from(communicator.newcomers() > 0), u64::from(is_over)]);
        communicator.all_reduce(&mut sums, ReduceOp::Sum)?;
        let flags = sums.split_off(2000);
        let expected = |at: u64| at * world * (world + 1) / 2;
        assert!((0..).zip(&sums).all(|(at, &sum)| sum == expected(at)), "a wrong sum");
        if flags[1] > 0 || world > MEMBERS as u64 && step >= STEPS {
            return Ok(true);
        }
        if flags[0] == world {
            return Ok(false);
        }
    }
    unreachable!("steps do not end")
}

fn world(record: &Path, settings: &[(&str, u32)]) -> World {
    let world = World::new(MEMBERS, "train")
        .set("UNISUM_TLS", "token")
        .set("UNISUM_RENDEZVOUS", format!("tcp://{}:{}", address(0), PORTS.start()))
        .set("UNISUM_MEMBERS", record.display())
        .set("UNISUM_INTERFACE", "")
        .set("UNISUM_PORT_RANGE", format!("{}-{}", PORTS.start(), PORTS.end()))
        .set("UNISUM_ALGORITHM", "ring")
        .set("UNISUM_TIMEOUT", 4)
        .set("UNISUM_HEARTBEAT_TIMEOUT", 2)
        .set("UNISUM_CONNECT_TIMEOUT", 10)
        .through(inside);
    settings.iter().fold(world, |world, (name, value)| world.set(name, value))
}

/// A job that somebody joins; how many connections there were before, and what came of all.
fn job(middle: &Middle, plan: Option<Plan>, settings: &[(&str, u32)]) -> (usize, Vec<Ended>) {
    let folder = tempfile::tempdir().unwrap();
    let world = world(&folder.path().join("members"), settings);
    middle.begin(plan);
    let mut running = world.start();
    running.wait_for("training", MEMBERS, LIMIT);
    let before = middle.seen().said.keys().map(|(connection, _)| connection + 1).max().unwrap_or(0);
    let newcomer = world.running("newcomer").set("UNISUM_RANK", "").set("UNISUM_WORLD", "");
    running.add(&newcomer, MEMBERS);
    let until = Instant::now() + LIMIT;
    while (0..=MEMBERS).all(|rank| running.lives(rank)) && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    running.mark("enough");
    (before, running.wait(LIMIT))
}

fn draw(random: &mut Random, places: &[(usize, bool, usize)]) -> Plan {
    let (connection, is_of_dialer, bytes) = random.of(places);
    let is_early = random.below(4) == 0;
    let at = random.below(if is_early { bytes.min(2000) } else { bytes });
    let length = [1, 20, 100, 1000][random.below(4)];
    let change = match random.below(12) {
        0..=2 => Change::Flip(random.below(8) as u8),
        3 => Change::Cut,
        4 => Change::Drop(length),
        5 => Change::Repeat(length),
        6 => Change::Swap(length),
        7 => Change::Inject((0..length).map(|_| random.below(256) as u8).collect()),
        8 => Change::Reflect,
        9 => Change::Redirect,
        10 => Change::Withhold,
        _ => Change::End,
    };
    Plan { connection, is_of_dialer, at, change }
}

fn check(ended: &[Ended], plan: &Plan) -> bool {
    let outcomes: Vec<&str> = ended
        .iter()
        .map(|ended| {
            assert!(ended.status == 0 && ended.told.len() == 1, "{plan:?}: {ended:#?}");
            ended.told[0].as_str()
        })
        .collect();
    for outcome in &outcomes {
        let names_one = ["rank", "process", "10.78.0."].iter().any(|it| outcome.contains(it))
            && outcome.chars().any(|c| c.is_ascii_digit());
        assert!(outcome.starts_with("right") || names_one, "{plan:?}: {outcomes:#?}");
    }
    outcomes.iter().all(|it| *it == "right, of 3")
}

fn meddle(what: &str, settings: &[(&str, u32)]) {
    // The namespaces have fixed names within this process.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(middle) = Middle::new(MEMBERS + 1, PORTS) else { return };
    let (before, ended) = job(&middle, None, settings);
    assert!(ended.iter().all(|it| it.told == ["right, of 3"]), "{ended:#?}");
    let seen = middle.seen();
    let places: Vec<(usize, bool, usize)> = seen
        .said
        .iter()
        .filter(|((connection, _), said)| *connection >= before && !said.is_empty())
        .map(|(&(connection, is_of_dialer), said)| (connection, is_of_dialer, said.len()))
        .collect();
    let trials = std::env::var("UNISUM_TEST_MEDDLED").map_or(4, |it| it.parse().unwrap());
    let mut random = Random::new();
    let (mut made, mut changed, mut joined) = (0, 0, 0);
    while changed < trials {
        assert!(made < 4 * trials + 20, "it does next to nothing");
        made += 1;
        let plan = draw(&mut random, &places);
        let (_, ended) = job(&middle, Some(plan.clone()), settings);
        changed += usize::from(middle.seen().is_changed);
        joined += usize::from(check(&ended, &plan));
    }
    println!("{what}: of {made}, {changed} changed, and {joined} joined all the same");
}

#[test]
fn nothing_that_is_done_to_who_joins_is_a_wrong_result_or_a_hang() {
    meddle("joins", &[]);
}

#[test]
fn nor_is_what_is_done_where_connections_resume() {
    meddle("joins that resume", &[("UNISUM_RECONNECT_TIMEOUT", 2)]);
}
