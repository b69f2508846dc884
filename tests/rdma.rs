//! Worlds over RDMA devices: what their set-up refuses and says, how outages end, what is left.
//!
//! Where there is no device the tests say so and pass, unless UNISUM_TEST_RDMA is `required`, as
//! in the virtual machine of tests/softroce. They change the state of network interfaces: run them
//! one by one, and there only.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Ended, Running, World, has_rdma, reach, setting, tell};
use unisum::{Communicator, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("join", join),
        ("reduce_forever", reduce_forever),
        ("reduce_for_a_while", reduce_for_a_while),
        ("allocate_and_free", allocate_and_free),
        ("lend_much", lend_much),
        ("register_own", register_own),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);

fn world(ranks: usize, scenario: &'static str) -> World {
    World::new(ranks, scenario).set("UNISUM_TRANSPORT", "verbs")
}

fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn join() {
    match Communicator::from_environment() {
        Ok(communicator) => tell(communicator.transport()),
        Err(error) => tell(format!("{:?} {error}", error.kind())),
    }
}

/// Every rank of a world that is asked for RDMA ends with an error that says all of `words`.
fn is_refused(world: &World, kind: ErrorKind, words: &[&str]) {
    for told in world.succeed(LIMIT) {
        let told = &told[0];
        assert!(told.starts_with(&format!("{kind:?} ")), "{told}");
        assert!(words.iter().all(|word| told.contains(word)), "{words:?} in: {told}");
    }
}

#[test]
fn what_is_missing_is_named_by_all_ranks() {
    if !has_rdma() {
        return;
    }
    let wrong_gid = world(2, "join").set("UNISUM_VERBS_GID_INDEX", 77);
    let words = ["rank 0: ", "rank 1: ", "has no GID 77; it has 0: ", "(RoCE v2)"];
    is_refused(&wrong_gid, ErrorKind::Configuration, &words);
    let no_device = world(3, "join").set("UNISUM_VERBS_DEVICE", "=mlx5_0");
    let words = ["the filter =mlx5_0 leaves none", "rxe0:1 RoCE in software, ACTIVE"];
    is_refused(&no_device, ErrorKind::Configuration, &words);
}

#[test]
fn too_little_locked_memory_is_named_with_what_to_do() {
    if !has_rdma() {
        return;
    }
    // The superuser may lock any amount, unless it lacks the capability.
    let limited = world(2, "join").through(|_| {
        let words = "prlimit --memlock=65536 setpriv --bounding-set=-ipc_lock";
        words.split(' ').map(str::to_owned).collect()
    });
    let words = ["Cannot allocate memory", "64 KiB", "RLIMIT_MEMLOCK", "ulimit -l"];
    is_refused(&limited, ErrorKind::Resources, &words);
}

fn lend_much() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 4 << 20];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert!(data.iter().all(|&sum| sum == 2.0));
    // What is registered for a collective is so until the next begins.
    tell(pinned() >= size_of_val(&data[..]));
}

/// Bytes that are registered by this process. (`rdma resource` does not say whose what is that
/// threads other than the first have registered.)
fn pinned() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

const MIB: usize = 1 << 20;

fn register_own() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_i32; 2 * MIB];
    let bytes = size_of_val(&data[..]);
    let before = pinned();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        communicator.with_registered(&mut data, |data| {
            let after = |since: usize| pinned() - since;
            assert_eq!(after(before), bytes);
            communicator.all_reduce(data, ReduceOp::Sum).unwrap();
            communicator.all_reduce(&mut data[MIB..], ReduceOp::Sum).unwrap();
            assert!(after(before) < bytes + bytes / 2, "it is registered once");
            assert!(data[..MIB].iter().all(|&sum| sum == 2));
            assert!(data[MIB..].iter().all(|&sum| sum == 4));
            panic!("registrations end even so");
        })
    }));
    assert!(outcome.is_err());
    let what = "of what was pinned, slots are at most left";
    support::wait_until(what, Duration::from_secs(10), || pinned() < before + bytes / 2);
}

#[test]
fn memory_from_elsewhere_is_registered_for_as_long_as_its_owner_says() {
    if has_rdma() {
        world(2, "register_own").succeed(LIMIT);
    }
}

/// 16 MiB are registered whatever was measured, where they may be.
#[test]
fn borrowed_memory_beyond_the_limit_is_copied() {
    if !has_rdma() {
        return;
    }
    let limited = |limit: bool| {
        let world = world(2, "lend_much");
        match limit {
            true => world.through(|_| {
                let words = "prlimit --memlock=8388608 setpriv --bounding-set=-ipc_lock";
                words.split(' ').map(str::to_owned).collect()
            }),
            false => world,
        }
    };
    assert_eq!(limited(false).succeed(LIMIT), [["true"], ["true"]]);
    assert_eq!(limited(true).succeed(LIMIT), [["false"], ["false"]]);
}

#[test]
fn a_port_that_is_down_is_named_by_all_ranks() {
    if !has_rdma() {
        return;
    }
    sh("ip link set net0 down");
    let down = world(2, "join");
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        is_refused(
            &down,
            ErrorKind::Configuration,
            &["no port of the RDMA devices is active", "rxe0:1", "DOWN"],
        );
    }));
    sh("ip link set net0 up");
    outcome.unwrap();
}

fn reduce_forever() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = communicator.allocate::<f32>(setting("COUNT").parse().unwrap()).unwrap();
    for round in 0_u64.. {
        if let Err(error) = communicator.all_reduce(&mut data, ReduceOp::Sum) {
            tell(format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()));
            let again = communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Aborted);
            return;
        }
        if round == 0 {
            reach("reducing");
        }
    }
}

/// Starts a world that reduces for ever, and waits until it does.
fn reducing(world: &World, ranks: usize) -> Running {
    let running = world.start();
    running.wait_for("reducing", ranks, LIMIT);
    running
}

/// The device fails what it is asked to send; the control connections go on.
#[test]
fn an_interface_that_goes_down_ends_the_operation_with_queue_pair_and_status() {
    if !has_rdma() {
        return;
    }
    let world = world(2, "reduce_forever").set("COUNT", 300_000).set("UNISUM_VERBS_TIMEOUT", 14);
    let running = reducing(&world, 2);
    sh("ip link set net0 down");
    let ended = catch_unwind(AssertUnwindSafe(|| running.wait(Duration::from_secs(60))));
    sh("ip link set net0 up");
    names_the_queue_pair(&ended.unwrap());
}

fn names_the_queue_pair(ended: &[Ended]) {
    for (rank, Ended { status, told, log }) in ended.iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
        let names_it =
            ["queue pair ", " of rxe", "status "].iter().all(|word| told[0].contains(word));
        assert!(names_it && told[0].starts_with("RankLost"), "rank {rank}: {}", told[0]);
    }
}

fn reduce_for_a_while() {
    let seconds = std::env::var("SECONDS").map_or(3, |it| it.parse().unwrap());
    let communicator = Communicator::from_environment().unwrap();
    let mut data = communicator.allocate::<i32>(200_000).unwrap();
    let start = Instant::now();
    let (mut first, mut longest) = (true, Duration::ZERO);
    // The ranks agree on when to stop.
    loop {
        data.fill(1);
        let began = Instant::now();
        let is_over = i32::from(start.elapsed() > Duration::from_secs(seconds));
        data[0] = is_over;
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        longest = longest.max(began.elapsed());
        assert!(data[1..].iter().all(|&sum| sum == 2));
        if std::mem::take(&mut first) {
            reach("reducing");
        }
        if data[0] > 0 {
            return tell(longest.as_millis());
        }
    }
}

/// The device fails all queue pairs when its interface goes down. They are made anew once it is
/// back, as often as it takes.
#[test]
fn queue_pairs_that_fail_with_their_interface_are_made_anew() {
    if !has_rdma() {
        return;
    }
    let world = world(2, "reduce_for_a_while")
        .set("UNISUM_RECONNECT_TIMEOUT", 20)
        .set("UNISUM_VERBS_TIMEOUT", 14)
        .set("SECONDS", 12);
    let running = reducing(&world, 2);
    for pause in ["0.5", "3"] {
        sh(&format!("ip link set net0 down; sleep {pause}; ip link set net0 up; sleep 1"));
    }
    for (rank, Ended { status, told, log }) in running.wait(LIMIT).iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
        let gap: u64 = told[0].parse().unwrap();
        println!("rank {rank}: longest call {gap} ms, with outages of 500 and 3000 ms");
        assert!(gap > 2_500, "rank {rank} has not noticed the outage: {gap} ms");
    }
}

/// The process's end is told by the control connection, however long queue pairs may be away.
#[test]
fn a_rank_that_dies_while_its_queue_pairs_are_made_anew_is_named() {
    if !has_rdma() {
        return;
    }
    for victim in [0, 1] {
        let world = world(2, "reduce_forever")
            .set("COUNT", 300_000)
            .set("UNISUM_VERBS_TIMEOUT", 14)
            .set("UNISUM_RECONNECT_TIMEOUT", 90);
        let running = reducing(&world, 2);
        sh("ip link set net0 down; sleep 0.5");
        running.signal(victim, libc::SIGKILL);
        sh("ip link set net0 up");
        let killed = Instant::now();
        let ended = &running.wait(Duration::from_secs(60))[1 - victim];
        assert_eq!(ended.status, 0, "{:?} {}", ended.told, ended.log);
        let named = format!("RankLost [{victim}]");
        assert!(ended.told[0].starts_with(&named), "{}", ended.told[0]);
        println!("rank {victim} is named {:.1?} after its end", killed.elapsed());
        // The next ranks find the device as it was: with its port and all of its addresses.
        sh("until grep -q ACTIVE /sys/class/infiniband/*/ports/1/state; do sleep 0.1; done; \
            sleep 1; while [ -n \"$(ip -6 addr show dev net0 tentative)\" ]; do sleep 0.1; done");
    }
}

/// Whether the machine has several devices. Where devices are required, it must.
fn has_several_devices() -> bool {
    has_rdma() && {
        let devices = unisum::rdma_devices();
        let required = std::env::var("UNISUM_TEST_RDMA").is_ok_and(|word| word == "required");
        assert!(devices.len() > 1 || !required, "one device, or none: {devices:?}");
        devices.len() > 1
    }
}

/// Two ranks, each on a device of its own, with a bridge between them.
fn apart(scenario: &'static str) -> World {
    world(2, scenario).through(|rank| vec!["env".into(), format!("UNISUM_VERBS_DEVICE==rxe{rank}")])
}

/// What the ranks ended with after the bridge went down, while it was.
fn cut_for_good(world: &World) -> Vec<Ended> {
    let running = reducing(world, 2);
    sh("ip link set bridge0 down");
    let ended = catch_unwind(AssertUnwindSafe(|| running.wait(Duration::from_secs(60))));
    sh("ip link set bridge0 up");
    ended.unwrap()
}

#[test]
fn a_short_outage_between_two_devices_is_survived() {
    if !has_several_devices() {
        return;
    }
    // 7 repetitions of 1.07 s each.
    let world = apart("reduce_for_a_while").set("UNISUM_VERBS_TIMEOUT", 18);
    let running = reducing(&world, 2);
    sh("ip link set bridge0 down; sleep 0.3; ip link set bridge0 up");
    for (rank, Ended { status, told, log }) in running.wait(LIMIT).iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
    }
}

/// The time between repetitions follows from how long an outage may be: 10 s here. 6 repetitions
/// 1.07 s apart would be over before.
#[test]
fn an_outage_between_two_devices_that_is_as_long_as_it_may_be_is_survived() {
    if !has_several_devices() {
        return;
    }
    let world = apart("reduce_for_a_while")
        .set("UNISUM_HEARTBEAT_TIMEOUT", 1)
        .set("UNISUM_RECONNECT_TIMEOUT", 10)
        .set("UNISUM_VERBS_RETRIES", 6)
        .set("SECONDS", 16);
    let running = reducing(&world, 2);
    sh("ip link set bridge0 down; sleep 9.5; ip link set bridge0 up");
    let back = Instant::now();
    for (rank, Ended { status, told, log }) in running.wait(LIMIT).iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
        let gap: u64 = told[0].parse().unwrap();
        println!(
            "rank {rank}: longest call {gap} ms, over {:.1?} after the outage",
            back.elapsed()
        );
        assert!(gap > 9_000, "rank {rank} has not noticed the outage: {gap} ms");
    }
}

/// Repetitions that are over long before the outage: queue pairs are made anew, fail again, and
/// go on once packets come through.
#[test]
fn an_outage_between_two_devices_that_is_longer_than_they_repeat_is_survived() {
    if !has_several_devices() {
        return;
    }
    // 0.5 s in all.
    let world = apart("reduce_for_a_while")
        .set("UNISUM_RECONNECT_TIMEOUT", 20)
        .set("UNISUM_VERBS_TIMEOUT", 14)
        .set("UNISUM_VERBS_RETRIES", 6)
        .set("SECONDS", 10);
    let running = reducing(&world, 2);
    sh("ip link set bridge0 down; sleep 3; ip link set bridge0 up");
    for (rank, Ended { status, told, log }) in running.wait(LIMIT).iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
        let gap: u64 = told[0].parse().unwrap();
        println!("rank {rank}: longest call {gap} ms, with an outage of 3000 ms");
        assert!(gap > 2_500, "rank {rank} has not noticed the outage: {gap} ms");
    }
}

/// Soft-RoCE repeats for ever if it is told to repeat 7 times, the most there is.
#[test]
fn a_long_outage_between_two_devices_ends_with_queue_pair_and_status() {
    if !has_several_devices() {
        return;
    }
    let world = apart("reduce_forever")
        .set("COUNT", 300_000)
        .set("UNISUM_VERBS_TIMEOUT", 14)
        .set("UNISUM_VERBS_RETRIES", 6);
    let ended = cut_for_good(&world);
    let exhausted = |told: &String| told.contains("retry counter exceeded (status 12)");
    assert!(ended.iter().any(|ended| ended.told.iter().any(exhausted)), "{ended:?}");
    names_the_queue_pair(&ended);
}

#[test]
fn an_outage_between_two_devices_that_they_never_report_ends_at_the_deadline() {
    if !has_several_devices() {
        return;
    }
    let world = apart("reduce_forever")
        .set("COUNT", 300_000)
        .set("UNISUM_VERBS_RETRIES", 7)
        .set("UNISUM_TIMEOUT", 5);
    for (rank, Ended { status, told, log }) in cut_for_good(&world).iter().enumerate() {
        assert_eq!(*status, 0, "rank {rank}: {told:?} {log}");
        assert!(told[0].contains(" is overdue on rank "), "rank {rank}: {}", told[0]);
    }
}

fn allocate_and_free() {
    let communicator = Communicator::from_environment().unwrap();
    let mut before = None;
    for round in 0..3 {
        let mut buffer = communicator.allocate::<f32>(1 << 18).unwrap();
        let mut borrowed = vec![1_f32; 1 << 19];
        buffer.fill(1.0);
        communicator.all_reduce(&mut buffer, ReduceOp::Sum).unwrap();
        communicator.all_reduce(&mut borrowed, ReduceOp::Sum).unwrap();
        assert!(buffer.iter().chain(&borrowed).all(|&sum| sum == 2.0), "round {round}");
        drop(buffer);
        // The borrowed memory's registration ends when the next collective begins.
        communicator.all_reduce(&mut [0_u8; 1], ReduceOp::Sum).unwrap();
        // The first round made what is kept for all; a slot more or less depends on the time.
        let now = pinned();
        assert!(now < *before.get_or_insert(now) + MIB, "round {round}: {now} bytes");
    }
}

#[test]
fn freed_memory_is_not_registered_any_more() {
    if has_rdma() {
        world(2, "allocate_and_free").succeed(LIMIT);
    }
}

#[test]
fn several_devices_carry_the_same_sums() {
    if has_several_devices() {
        world(2, "reduce_for_a_while").succeed(LIMIT);
    }
}
