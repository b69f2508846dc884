//! What launchers of local ranks leave behind: nothing, or the next one removes it.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use support::{World, reach, tell};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("launch", launch),
        ("launch_and_wait", launch_and_wait),
        ("join", join),
    ]);
}

const LIMIT: Duration = Duration::from_secs(30);

/// A launcher of ranks that never end.
fn launch() {
    let ranks = unisum::local::spawn(2, |_| {
        let mut command = Command::new("sleep");
        command.arg("1000");
        command
    });
    let mut ranks = ranks.unwrap();
    ranks.pids().iter().for_each(tell);
    reach("launched");
    let _ = ranks.wait();
}

fn launch_and_wait() {
    unisum::local::spawn(2, |_| Command::new("true")).unwrap().wait().unwrap();
}

fn is_running(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // What has ended may wait for somebody to collect it.
    status.is_ok_and(|status| !status.contains(") Z "))
}

/// Whether what this process starts ignores the signal, as under `nohup`.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> (signal - 1) & 1 == 1
}

#[test]
fn launchers_ended_by_any_signal_leave_no_rank_and_no_file_to_the_next() {
    let place = format!("unisum-leftovers-{}", std::process::id());
    let place = std::env::temp_dir().join(place);
    std::fs::create_dir(&place).unwrap();
    let entries = || std::fs::read_dir(&place).unwrap().count();
    let world = |scenario| World::new(1, scenario).set("TMPDIR", place.display());

    // One that lives on all the while keeps what is its.
    let living = world("launch").start();
    living.wait_for("launched", 1, LIMIT);
    let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGKILL];
    for signal in signals.into_iter().filter(|signal| !is_ignored(*signal)) {
        let launcher = world("launch").start();
        launcher.wait_for("launched", 1, LIMIT);
        assert_eq!(entries(), 2, "of the one that lives, and of this one");
        launcher.signal(0, signal);
        let ended = launcher.wait(LIMIT);
        assert_eq!(ended[0].status, 128 + signal);
        let deadline = Instant::now() + LIMIT;
        while ended[0].told.iter().any(|pid| is_running(pid)) {
            assert!(Instant::now() < deadline, "ranks outlive their launcher: {:?}", ended[0]);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    world("launch_and_wait").succeed(LIMIT);
    assert_eq!(entries(), 1, "of the one that lives");
    drop(living);
    world("launch_and_wait").succeed(LIMIT);
    assert_eq!(entries(), 0);
    std::fs::remove_dir(&place).unwrap();
}

fn join() {
    unisum::Communicator::from_environment().unwrap();
}

#[test]
fn jobs_killed_at_the_start_leave_no_rendezvous_file_to_the_next() {
    let place = std::env::temp_dir().join(format!("unisum-starts-{}", std::process::id()));
    DirBuilder::new().mode(0o700).create(&place).unwrap();
    let files = || std::fs::read_dir(place.join("unisum")).map_or(0, Iterator::count);
    let await_files = |expected| {
        let deadline = Instant::now() + LIMIT;
        while files() != expected {
            assert!(Instant::now() < deadline, "{} files, not {expected}", files());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let job = |name: &str, ranks: usize| {
        World::new(ranks, "join")
            .set("XDG_RUNTIME_DIR", place.display())
            .set("UNISUM_RENDEZVOUS", "")
            .set("UNISUM_JOB", name)
            .set("UNISUM_WORLD", 2)
            .set("UNISUM_LOCAL_SIZE", 2)
    };
    // Rank 0 alone, which waits for the other one.
    let living = job("living", 1).start();
    await_files(1);
    for name in ["one", "two", "two"] {
        let killed = job(name, 1).start();
        // The file that the one before has left is removed by this one.
        await_files(2);
        killed.signal(0, libc::SIGKILL);
        killed.wait(LIMIT);
    }
    job("last", 2).succeed(LIMIT);
    await_files(1);
    drop(living);
    job("last", 2).succeed(LIMIT);
    await_files(0);
    std::fs::remove_dir_all(&place).unwrap();
}
