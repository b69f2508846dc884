//! Starts that fail: who is missing, and why, is told by all ranks, at once where it is known.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use support::{Ended, World, tell};
use unisum::Communicator;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn rank_process() {
    support::run_if_rank(&[("join", join), ("joined", joined)]);
}

fn join() {
    let started = Instant::now();
    let error = Communicator::from_environment().unwrap_err();
    let text = error.to_string().replace('\n', " | ");
    tell(format!("{:?} after {} s: {text}", error.failed_ranks(), started.elapsed().as_secs()));
}

/// A world on this host that meets at a port that nobody has yet.
fn world(ranks: usize) -> World {
    let port = support::free_ports(1)[0];
    World::new(ranks, "join").set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{port}"))
}

#[track_caller]
fn check(ended: &[Ended], failed_ranks: &str, texts: &[&str]) {
    for rank in ended {
        let [told] = &rank.told[..] else { panic!("{ended:#?}") };
        assert!(told.starts_with(failed_ranks), "{ended:#?}");
        assert!(texts.iter().all(|text| told.contains(text)), "{ended:#?}");
    }
}

#[test]
fn the_rank_that_never_comes_is_named_by_all_and_by_the_log_before() {
    let ended = world(4).set("UNISUM_CONNECT_TIMEOUT", 15).start_ranks(&[0, 1, 2]).wait(LIMIT);
    check(&ended, "[3]", &["rank 3 did not join within 15 s"]);
    assert!(ended[0].log.contains("waiting for rank 3 of 4 (10 s)"), "{}", ended[0].log);
}

#[test]
fn of_timeouts_that_differ_the_shortest_ends_the_wait_of_all() {
    let world = world(4);
    for impatient in 0..3 {
        let patient: Vec<usize> = (0..3).filter(|&rank| rank != impatient).collect();
        let mut running = world.start_ranks(&patient);
        running.add(&world.clone().set("UNISUM_CONNECT_TIMEOUT", 6), impatient);
        check(&running.wait(LIMIT / 2), "[3]", &["rank 3 did not join within 6 s"]);
    }
}

#[test]
fn a_rank_that_can_not_listen_is_named_by_all_with_the_reason() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let world = world(3);
    let mut running = world.start_ranks(&[0, 1]);
    running.add(&world.set("UNISUM_PORT_RANGE", port), 2);
    let ended = running.wait(LIMIT);
    check(&ended, "[2] after ", &["ports", &port.to_string(), "in use"]);
}

#[test]
fn a_rank_with_another_setting_or_an_unknown_one_is_named_by_all() {
    for (name, value, texts) in [
        ("UNISUM_WINDOW", "3", ["UNISUM_WINDOW=3", "rank 1"]),
        ("UNISUM_ELASTIC", "2", ["rank 0 has UNISUM_ELASTIC=0, rank 1 has UNISUM_ELASTIC=2", ""]),
        ("UNISUM_TUNING", "/a", ["rank 0 has no UNISUM_TUNING, rank 1 has UNISUM_TUNING set", ""]),
        ("UNISUM_ALGORITHM", "fastest", ["fastest", "rank 1"]),
    ] {
        let world = world(3);
        let mut running = world.start_ranks(&[0, 2]);
        running.add(&world.clone().set(name, value), 1);
        let ended = running.wait(LIMIT);
        // The one itself may say so without its own name.
        check(&ended[..2], "[1]", &texts);
        check(&ended[2..], "", &texts[..1]);
    }
}

#[test]
fn a_wrong_token_is_told_on_both_sides_with_where_it_is_from() {
    let world = world(2).set("UNISUM_CONNECT_TIMEOUT", 8);
    let mut running = world.start_ranks(&[0]);
    running.add(&world.set("UNISUM_TOKEN", "quite another token, long enough"), 1);
    let ended = running.wait(LIMIT);
    check(
        &ended[..1],
        "[1]",
        &["127.0.0.1 said it was this rank", "wrong token (rank 0's is from"],
    );
    check(&ended[1..], "[0]", &["times 127.0.0.1:", "wrong token", "is from UNISUM_TOKEN"]);
}

#[test]
fn another_job_is_told_on_both_sides_with_what_names_it() {
    let world = world(2).set("UNISUM_CONNECT_TIMEOUT", 8);
    let mut running = world.clone().set("UNISUM_JOB", "mine").start_ranks(&[0]);
    running.add(&world.set("UNISUM_JOB", "yours"), 1);
    let ended = running.wait(LIMIT);
    check(&ended[..1], "[1]", &["another job: is UNISUM_JOB the same on all ranks?"]);
    check(&ended[1..], "[0]", &["another job", "this rank's job is `yours`: UNISUM_JOB"]);
    // Once, not once an attempt.
    assert_eq!(ended[0].log.matches("refused a connection").count(), 1, "{}", ended[0].log);
}

#[test]
fn ranks_that_are_refused_are_told_why_and_not_how_to_meet() {
    let bare = |_| ["env", "-u", "UNISUM_RENDEZVOUS"].map(str::to_owned).to_vec();
    let world = World::new(2, "join").set("UNISUM_LOCAL_SIZE", 2).through(bare);
    let world = world.set("UNISUM_JOB", format!("starting-{}", std::process::id()));
    let world = world.set("UNISUM_CONNECT_TIMEOUT", 4);
    let mut running = world.start_ranks(&[0]);
    running.add(&world.set("UNISUM_TOKEN", "quite another token, long enough"), 1);
    let ended = running.wait(LIMIT);
    check(&ended, "", &["wrong token"]);
    assert!(ended.iter().all(|rank| !rank.told[0].contains("UNISUM_JOB")), "{ended:#?}");
}

/// As `(UNISUM_RANK=0 ./program) & (UNISUM_RANK=1 ./program)`.
#[test]
fn ranks_that_different_processes_start_are_told_how_to_meet() {
    let subshell = |rank: usize| {
        let run = format!("UNISUM_RANK={rank} \"$@\"; exit $?");
        let words = ["env", "-u", "UNISUM_RANK", "-u", "UNISUM_RENDEZVOUS", "sh", "-c", &run, "sh"];
        words.map(str::to_owned).to_vec()
    };
    let world = World::new(2, "join").set("UNISUM_LOCAL_SIZE", 2).through(subshell);
    let ended = world.set("UNISUM_CONNECT_TIMEOUT", 3).run(LIMIT);
    check(&ended, "", &["set UNISUM_JOB"]);
}

/// What is wrong with a rank's own variables is told before anybody waits for it.
#[test]
fn a_rank_whose_variable_is_malformed_is_named_by_all_at_once() {
    for rendezvous in ["port", "file"] {
        let world = match rendezvous {
            "port" => world(3),
            _ => World::new(3, "join"),
        };
        let mut running = world.start_ranks(&[0, 1]);
        running.add(&world.clone().set("UNISUM_SLICE_BYTES", "a lot"), 2);
        let ended = running.wait(LIMIT / 2);
        check(&ended[..2], "[2] after ", &["rank 2 can't join", "UNISUM_SLICE_BYTES"]);
        check(&ended[2..], "[] after ", &["UNISUM_SLICE_BYTES", "a lot"]);
    }
}

/// Rank 0 opens only to tell the others, which came before it.
#[test]
fn a_rank_0_whose_variable_is_malformed_is_named_by_all_at_once() {
    for rendezvous in ["port", "file"] {
        let world = match rendezvous {
            "port" => world(3),
            _ => World::new(3, "join"),
        };
        let mut running = world.start_ranks(&[1, 2]);
        running.add(&world.clone().set("UNISUM_SLICE_BYTES", "a lot"), 0);
        let ended = running.wait(LIMIT / 2);
        check(&ended[..2], "[0] after ", &["rank 0 can't join", "UNISUM_SLICE_BYTES"]);
        check(&ended[2..], "[] after ", &["UNISUM_SLICE_BYTES", "a lot"]);
    }
}

/// Each of them would wait for the others, as long as it may.
#[test]
fn two_processes_that_are_rank_0_are_told_of_each_other_at_once() {
    for rendezvous in ["port", "file"] {
        let world = match rendezvous {
            "port" => world(2),
            _ => World::new(2, "join"),
        };
        let mut running = world.start_ranks(&[0]);
        running.add(&world, 0);
        let pids = [running.pid(0), running.pid(1)];
        let ended = running.wait(LIMIT / 2);
        check(&ended, "[0] after ", &["rank 0 is taken", "is UNISUM_RANK the same for both"]);
        let both = |text: &str| pids.iter().all(|pid| text.contains(&format!("process {pid} ")));
        assert!(ended.iter().all(|it| both(&it.told[0])), "{pids:?}: {ended:#?}");
    }
}

/// What a killed job left is no rank 0, and neither is one of another job.
#[test]
fn a_file_that_leads_to_nobody_is_replaced() {
    let scratch = std::env::temp_dir().join(format!("unisum-starting-{}", std::process::id()));
    std::fs::write(&scratch, "unisum2 00 127.0.0.1:1 192.0.2.77:9\n").unwrap();
    let world = World::new(2, "joined");
    let world = world.set("UNISUM_RENDEZVOUS", format!("file://{}", scratch.display()));
    world.succeed(LIMIT);
    assert!(!scratch.exists());
}

fn joined() {
    Communicator::from_environment().unwrap();
}

/// Nobody is there to be told, and nobody waits for that long.
#[test]
fn a_variable_that_is_malformed_on_all_ranks_ends_all_within_seconds() {
    let ended = world(3).set("UNISUM_TIMEOUT", "never").run(LIMIT);
    check(&ended, "[] after ", &["UNISUM_TIMEOUT", "never"]);
    let seconds = |ended: &Ended| {
        let (_, rest) = ended.told[0].split_once(" after ").unwrap();
        rest.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(ended.iter().all(|ended| seconds(ended) < 30), "{ended:#?}");
}

/// They belong to the job, and have other numbers: whoever waits reads of them.
#[test]
fn ranks_with_another_world_or_a_number_that_is_taken_are_told_to_those_who_wait() {
    let of_three = world(3).set("UNISUM_CONNECT_TIMEOUT", 9);
    let of_eight = |rank| {
        let mut running = of_three.start_ranks(&[0, 1]);
        running.add(&of_three.clone().set("UNISUM_WORLD", 8), rank);
        running.wait(LIMIT)
    };
    let refused = "was refused: world of 8, but this job's is 3";
    check(&of_eight(5)[..2], "[2] after ", &["127.0.0.1 said it was rank 5", refused]);
    check(&of_eight(2)[..2], "[2] after ", &["127.0.0.1 said it was this rank", refused]);
    let mut running = of_three.start_ranks(&[0, 1]);
    running.add(&of_three, 1);
    let pids = [running.pid(1), running.pid(2)];
    let ended = running.wait(LIMIT);
    check(&ended[..1], "[2] after ", &["127.0.0.1 said it was rank 1", "rank 1 is taken"]);
    // Whichever was first, both are told, by their processes.
    let both = |text: &str| pids.iter().all(|pid| text.contains(&format!("process {pid} ")));
    assert!(both(&ended[0].told[0]), "{pids:?}: {ended:#?}");
    let refused = |ended: &Ended| ended.told[0].contains("rank 1 is taken");
    assert!(ended[1..].iter().any(|it| refused(it) && both(&it.told[0])), "{ended:#?}");
}
