//! Something between the ranks cuts their control connections, while they start, call, make groups
//! and leave; and a rank that dies meanwhile is told from one that is cut off.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[allow(dead_code, reason = "others use the rest")]
#[path = "../control/src/tests/relay.rs"]
mod relay;
mod support;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use relay::{How, Relay};
use support::stopwatch::Stopwatch;
use support::{Ended, Random, Running, World, reach, setting, tell, tell_error};
use unisum::{Communicator, Error, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work), ("reduce_forever", reduce_forever)]);
}

const LIMIT: Duration = Duration::from_secs(60);
const RANKS: usize = 3;

/// Calls, groups, messages of groups, and leaving, for so many rounds and until the test says that
/// it is enough.
fn work() {
    let communicator = Communicator::from_environment().unwrap();
    sum(&communicator).unwrap();
    reach("working");
    let (rank, until) = (communicator.rank(), setting("ROUNDS").parse::<u32>().unwrap());
    let enough = Path::new(&setting("TEST_MARKS")).join("enough.test");
    for round in 0.. {
        let mut is_over = [u8::from(round >= until && enough.exists())];
        communicator.broadcast(&mut is_over, 0).unwrap();
        if is_over[0] == 1 {
            break;
        }
        sum(&communicator).unwrap();
        let color = (round as usize + rank) as u32 % 2;
        if let Some(group) = communicator.split(Some(color), 0).unwrap() {
            sum(&group).unwrap();
        }
        sum(&communicator.duplicate().unwrap()).unwrap();
    }
    drop(communicator);
    tell("left");
}

fn sum(communicator: &Communicator) -> Result<(), Error> {
    let mut numbers = [communicator.rank() as u64 + 1; 300];
    communicator.all_reduce(&mut numbers, ReduceOp::Sum)?;
    let world = communicator.world() as u64;
    assert!(numbers.iter().all(|&it| it == world * (world + 1) / 2), "a wrong sum");
    Ok(())
}

fn reduce_forever() {
    let communicator = Communicator::from_environment().unwrap();
    sum(&communicator).unwrap();
    reach("working");
    loop {
        if let Err(error) = sum(&communicator) {
            return tell_error(&error);
        }
    }
}

/// A world whose ranks reach rank 0 through a relay, at another address than their own, or not.
fn start(scenario: &'static str, rounds: u32, is_relayed: bool) -> (Running, Relay) {
    let free = SocketAddr::from(([127, 0, 0, 1], support::free_ports(1)[0]));
    let relay = Relay::new(IpAddr::from([127, 0, 0, 2]), free);
    let address = if is_relayed { relay.address } else { free };
    let through = move |rank: usize| match rank {
        0 => vec!["env".into(), format!("UNISUM_RENDEZVOUS=tcp://{free}")],
        _ => vec!["env".into(), format!("UNISUM_RENDEZVOUS=tcp://{address}")],
    };
    let world = World::new(RANKS, scenario)
        .set("UNISUM_RECONNECT_TIMEOUT", 60)
        .set("ROUNDS", rounds)
        // Ranks that are told different meeting places name different jobs otherwise.
        .set("UNISUM_JOB", "cut")
        .through(through);
    let running = world.start();
    running.wait_for("working", RANKS, LIMIT);
    (running, relay)
}

#[test]
fn every_call_succeeds_while_control_connections_are_cut_at_random_moments() {
    let mut random = Random::new();
    let rounds = std::env::var("UNISUM_TEST_CUT_ROUNDS").map_or(100, |it| it.parse().unwrap());
    let (mut cuts, mut connections) = (0, 0);
    for world in 0.. {
        assert!(world < 20, "{cuts} cuts, {connections} connections made anew");
        if cuts >= 6 && connections >= 9 {
            break;
        }
        let (there, made) = call_while_cut(&mut random, rounds, 9 - connections.min(8));
        (cuts, connections) = (cuts + there, connections + made);
    }
}

/// Cuts the connections of a world that calls until so many were made anew, or none goes through
/// the relay any more: a rank whose attempt to come back was cut as well tries rank 0's own address
/// next. How often they were cut while there were any, and how many were made anew.
fn call_while_cut(random: &mut Random, rounds: u32, connections: u64) -> (u64, u64) {
    let (running, relay) = start("work", rounds, true);
    let (is_over, cuts, passed_by) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let ended = thread::scope(|scope| {
        scope.spawn(|| {
            let all = [How::Reset, How::Close, How::ResetDialer, How::ResetListener];
            let (mut rest, mut number) = (Duration::from_millis(500), 0);
            while !is_over.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(random.below(80) as u64));
                let is_any_cut = relay.carries();
                relay.cut(random.of(&all));
                cuts.fetch_add(u64::from(is_any_cut), Ordering::SeqCst);
                // Longer and longer, so that calls get done on any machine.
                number += 1;
                if number % 3 == 0 {
                    thread::sleep(rest);
                    rest = rest * 10 / 9;
                    if !relay.carries() {
                        passed_by.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        let _over = Over(&is_over);
        let made_anew = || relay.relayed().saturating_sub(RANKS as u64 - 1);
        let are_few = || cuts.load(Ordering::SeqCst) < 6 || made_anew() < connections;
        let limit = LIMIT + Duration::from_millis(u64::from(rounds) * 200);
        let until = Instant::now() + limit;
        // Who is late comes back by the second time.
        while are_few()
            && passed_by.load(Ordering::SeqCst) < 2
            && (0..RANKS).all(|rank| running.lives(rank))
        {
            assert!(Instant::now() < until, "{cuts:?} cuts, {} connections anew", made_anew());
            thread::sleep(Duration::from_millis(5));
        }
        running.mark("enough");
        running.wait(limit)
    });
    for ended in &ended {
        assert_eq!((ended.status, &ended.told[..]), (0, &["left".to_owned()][..]), "{ended:#?}");
    }
    (cuts.into_inner(), relay.relayed().saturating_sub(RANKS as u64 - 1))
}

/// Nothing is cut any more after a failure either.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Kills a rank, and checks what the others say, and how soon.
fn kill(running: Running, victim: usize) -> Vec<Ended> {
    running.signal(victim, libc::SIGKILL);
    let killed = Stopwatch::start();
    let ended = running.wait(LIMIT);
    // Half of the time that a connection has to be there again.
    killed.assert_within(Duration::from_secs(5), LIMIT / 2, &format!("{ended:#?}"));
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        assert!(ended.told[0].contains(&format!("[{victim}]")), "rank {rank}: {ended:#?}");
    }
    ended
}

#[test]
fn a_rank_that_is_killed_is_named_at_once() {
    // In rank 0's place the relay would go on to answer.
    for (victim, is_relayed) in [(0, false), (2, false), (2, true)] {
        let (running, _relay) = start("reduce_forever", 0, is_relayed);
        kill(running, victim);
    }
}

#[test]
fn a_rank_that_is_killed_just_as_its_connection_is_cut_is_named_at_once() {
    for (victim, how) in [(1, How::Reset), (2, How::ResetListener), (1, How::ResetDialer)] {
        let (running, relay) = start("reduce_forever", 0, true);
        relay.cut(how);
        kill(running, victim);
    }
}
