//! An elastic job whose network falls into two parts: one goes on at most, and the other says why
//! it does not. Eight hosts, each a network namespace, on a switch. And a job that is parted as it
//! starts.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::cell::Cell;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use support::hosts::{Hosts, inside, sh};
use support::{World, reach, tell, tell_error};
use unisum::{Communicator, Elastic, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[("go_on", go_on), ("start", start)]);
}

const RANKS: usize = 8;
const LIMIT: Duration = Duration::from_secs(100);

/// Calls until ranks are lost, and then some more without them.
fn go_on() {
    let mut communicator = Communicator::builder().elastic(Elastic::default()).connect().unwrap();
    let mut left = u64::MAX;
    for round in 0_u64.. {
        match communicator.barrier() {
            Ok(()) if left == 0 => break,
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::ViewChanged => {
                match communicator.rebuild() {
                    Ok(rebuilt) => communicator = rebuilt,
                    Err(error) => return tell_error(&error),
                }
                left = 100;
            }
            Err(error) => return tell_error(&error),
        }
        if round == 10 {
            reach("working");
        }
        left = left.saturating_sub(u64::from(left < u64::MAX));
    }
    tell(format!("{:?}", communicator.view().unwrap().processes));
}

/// Those behind the first so many hosts go to a switch of their own.
fn part(hosts: &Hosts, first: usize) {
    let switch = hosts.switch();
    for host in first..RANKS {
        sh(&format!("ip -n {switch} link set port{host} master br1")).unwrap();
    }
}

fn parted(first: usize) {
    let Some(hosts) = Hosts::new(RANKS) else { return };
    let switch = hosts.switch();
    sh(&format!("ip -n {switch} link add br1 type bridge")).unwrap();
    sh(&format!("ip -n {switch} link set br1 up")).unwrap();
    let world = World::new(RANKS, "go_on")
        .through(inside)
        .set("UNISUM_INTERFACE", "eth0")
        .set("UNISUM_HEARTBEAT_TIMEOUT", 2)
        .set("UNISUM_REPRODUCIBLE", 1);
    let running = world.start();
    running.wait_for("working", RANKS, LIMIT);
    part(&hosts, first);
    let cut = Instant::now();
    let ended = running.wait(LIMIT);
    println!("{first} + {}: over after {:.1?}", RANKS - first, cut.elapsed());
    // Half goes on if it has rank 0.
    let goes_on = |rank: usize| if 2 * first >= RANKS { rank < first } else { rank >= first };
    let those: Vec<usize> = (0..RANKS).filter(|&rank| goes_on(rank)).collect();
    for (rank, it) in ended.iter().enumerate() {
        let told = it.told.first().unwrap_or_else(|| panic!("rank {rank}: {ended:#?}"));
        if goes_on(rank) {
            assert_eq!(*told, format!("{those:?}"), "rank {rank}: {ended:#?}");
        } else {
            let says_why = told.starts_with("RankLost ") && told.contains("are no quorum");
            assert!(says_why, "rank {rank}: {told}");
        }
    }
}

#[test]
fn of_three_and_five_the_five_go_on() {
    parted(3);
}

#[test]
fn of_four_and_four_those_with_the_first_rank_go_on() {
    parted(4);
}

thread_local! {
    /// At how many ports this thread listens.
    static LISTENS: Cell<usize> = const { Cell::new(0) };
}

/// What a rank of the next test logs: it waits there as it listens as a member.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if String::from_utf8_lossy(bytes).contains("other ranks reach this rank here") {
            LISTENS.set(LISTENS.get() + 1);
            // The first port is that of the start, at which data connections end, too.
            if LISTENS.get() == 2 {
                reach("listening");
                support::await_others("cut", 1, LIMIT);
            }
        }
        io::stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Does not start.
fn start() {
    let connect = || Communicator::builder().elastic(Elastic::default()).connect().unwrap_err();
    let log = tracing_subscriber::fmt().with_writer(|| Log).with_ansi(false).finish();
    let rank: usize = support::setting("UNISUM_RANK").parse().unwrap();
    let error = if rank < 2 { connect() } else { tracing::subscriber::with_default(log, connect) };
    tell_error(&error);
}

fn has_thread(pid: i32, name: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().filter_map(Result::ok);
    let mut names = tasks.filter_map(|it| std::fs::read_to_string(it.path().join("comm")).ok());
    names.any(|it| it.trim() == name)
}

/// Ranks 2 and 3 lose their way to rank 1 as members are about to connect, and it dies while they
/// look for one: all have met at rank 0 by then.
#[test]
fn one_that_dies_while_the_members_connect_ends_the_start_at_once() {
    let Some(hosts) = Hosts::new(4) else { return };
    let world = World::new(4, "start").through(inside).set("UNISUM_INTERFACE", "eth0");
    let running = world.start();
    running.wait_for("listening", 2, LIMIT / 2);
    for host in [2, 3] {
        hosts.on(host, "ip route add unreachable 10.77.0.2/32");
        hosts.on(host, "ip route add unreachable fd77::2/128");
    }
    running.mark("cut");
    support::wait_until("ranks 2 and 3 are members", LIMIT / 2, || {
        [2, 3].iter().all(|&rank| has_thread(running.pid(rank), "unisum-views"))
    });
    running.signal(1, libc::SIGKILL);
    let killed = Instant::now();
    let ended = running.wait(LIMIT);
    let took = killed.elapsed();
    for rank in [0, 2, 3] {
        let [told] = &ended[rank].told[..] else { panic!("{ended:#?}") };
        assert!(told.starts_with("Rendezvous [1] rank 1 died"), "{ended:#?}");
    }
    // Of the 60 s that connecting may take.
    assert!(took < Duration::from_secs(20), "{took:?}");
}
