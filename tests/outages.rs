//! Networks that are away for a while, and hosts that are lost: outages that are shorter than the
//! limit delay a job, longer ones end it, in calls and between them.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use support::hosts::{Hosts, inside, sh};
use support::stopwatch::Stopwatch;
use support::{Ended, Random, Running, World, await_others, reach, setting, tell, tell_error};
use unisum::{Communicator, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("busy", busy),
        ("idle", idle),
        ("large", large),
        ("summing", summing),
        ("around", around),
        ("waiting", waiting),
        ("sending", sending),
        ("grouping", grouping),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);
/// Half the deadline of calls.
const SOON: Duration = Duration::from_secs(30);

fn world(ranks: usize, scenario: &'static str, port: u16) -> World {
    World::new(ranks, scenario)
        .set("UNISUM_RENDEZVOUS", format!("tcp://10.77.0.1:{port}"))
        .set("UNISUM_INTERFACE", "")
        // Longer than a connection may take to repeat what an outage lost.
        .set("UNISUM_TIMEOUT", 60)
}

/// Calls without a pause, until the test says that it is enough, or one fails.
fn busy() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 10_000];
    for round in 0_u64.. {
        let mut is_enough = [u8::from(has("enough"))];
        let done = communicator
            .all_reduce(&mut data, ReduceOp::Max)
            .and_then(|()| communicator.broadcast(&mut is_enough, 0));
        match done {
            Err(error) => return tell_error(&error),
            Ok(()) if is_enough[0] == 1 => return tell("enough"),
            Ok(()) if round == 0 => reach("working"),
            Ok(()) => {}
        }
    }
}

/// Calls once, and once more when the test says so.
fn idle() {
    let communicator = Communicator::from_environment().unwrap();
    communicator.barrier().unwrap();
    reach("working");
    await_others("again", 1, LIMIT);
    let start = Instant::now();
    match communicator.barrier() {
        Err(error) => tell_error(&error),
        Ok(()) => tell("enough"),
    }
    tell(start.elapsed().as_millis());
}

fn has(mark: &str) -> bool {
    std::path::Path::new(&setting("TEST_MARKS")).join(format!("{mark}.test")).exists()
}

/// Cuts a host off, or ends that. The last host sees that its cable is out; the others see nothing,
/// as behind a switch that has failed.
fn plug(hosts: &Hosts, host: usize, is_in: bool) {
    let how = match (host, is_in) {
        (2, true) => "up",
        (2, false) => "down",
        (_, true) => "master br0",
        (_, false) => "nomaster",
    };
    sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
}

/// Cuts the connection between hosts 1 and 2, both of which still reach host 0, or ends that.
fn cut_pair(hosts: &Hosts, is_cut: bool) {
    let how = if is_cut { "on" } else { "off" };
    for host in [1, 2] {
        let port = format!("link set port{host} type bridge_slave isolated {how}");
        sh(&format!("ip -n {} {port}", hosts.switch())).unwrap();
    }
}

/// Two worlds, one that calls all the time and one that does not, on three hosts.
fn worlds(through: fn(usize) -> Vec<String>, ranks: usize, limit: f64) -> [Running; 2] {
    let start = |(scenario, port)| {
        let world = world(ranks, scenario, port).through(through);
        world.set("UNISUM_HEARTBEAT_TIMEOUT", limit).start()
    };
    let running = [("busy", 7001), ("idle", 7002)].map(start);
    running.iter().for_each(|running| running.wait_for("working", ranks, LIMIT));
    running
}

#[test]
fn an_outage_that_is_shorter_than_the_limit_is_survived() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    for victim in [0, 2] {
        let [busy, idle] = worlds(inside, 3, 10.0);
        plug(&hosts, victim, false);
        thread::sleep(Duration::from_secs(4));
        plug(&hosts, victim, true);
        // Longer than the limit since the outage began.
        thread::sleep(Duration::from_secs(7));
        busy.mark("enough");
        idle.mark("again");
        for ended in busy.wait(LIMIT).iter().chain(&idle.wait(LIMIT)) {
            assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
        }
    }
}

/// Ranks 2 and 3 are on one host.
fn two_on_the_last(rank: usize) -> Vec<String> {
    inside(rank.min(2))
}

#[test]
fn a_host_that_is_lost_is_named_with_its_address_in_calls_and_between_them() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    for victim in [0, 2] {
        let [busy, idle] = worlds(two_on_the_last, 4, 4.0);
        plug(&hosts, victim, false);
        let cut = Stopwatch::start();
        let busy = busy.wait(LIMIT);
        assert!(cut.elapsed() >= Duration::from_secs(4), "after {:?}", cut.elapsed());
        // A host is lost after a second more, and the last of several two seconds later.
        cut.assert_within(Duration::from_secs(14), SOON, "since the host was cut off");
        thread::sleep(Duration::from_secs(12).saturating_sub(cut.elapsed()));
        idle.mark("again");
        let idle = idle.wait(LIMIT);
        for ended in &idle {
            let millis: u64 = ended.told[1].parse().unwrap();
            assert!(millis < 4000, "it was known before the call: {ended:#?}");
        }
        for ended in [busy, idle] {
            check(&ended, victim);
        }
        plug(&hosts, victim, true);
    }
}

/// All name the ranks that they have lost.
fn check(ended: &[Ended], victim: usize) {
    for (rank, ended) in ended.iter().enumerate() {
        let told = &ended.told[0];
        let (failed_ranks, why) = match (victim, rank) {
            (0, 0) => ("[1, 2, 3]", "rank 1 at 10.77.0.2, rank 2 at 10.77.0.3, rank 3 at"),
            (2, 0 | 1) => ("[2, 3]", "rank 2 at 10.77.0.3, rank 3 at 10.77.0.3 unreachable for"),
            _ => ("[0]", "rank 0 at 10.77.0.1 unreachable for more than 4 s"),
        };
        let is_named = told.starts_with(&format!("RankLost {failed_ranks} ")) && told.contains(why);
        assert!(is_named, "host {victim} lost, rank {rank}: {told}");
    }
}

/// Each rank talks to both neighbours, until that fails.
fn around() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 100_000];
    for round in 0_u64.. {
        match communicator.all_reduce(&mut data, ReduceOp::Max) {
            Err(error) => return tell_error(&error),
            Ok(()) if round == 0 => reach("working"),
            Ok(()) => {}
        }
    }
}

/// Ranks 1 and 2 exchange messages, of which the first is lost after the connection was idle.
fn waiting() {
    let communicator = Communicator::from_environment().unwrap();
    let (messenger, rank) = (Messenger::new(&communicator).unwrap(), communicator.rank());
    let exchange = || {
        let (data, mut received) = ([1_f32; 100], [0_f32; 100]);
        match rank {
            0 => messenger.receive(&mut received, 1, 2),
            1 => messenger.send(&data, 2, 1),
            _ => messenger.receive(&mut received, 1, 1),
        }
    };
    if rank > 0 {
        exchange().unwrap();
    }
    reach("working");
    await_others("again", 1, LIMIT);
    loop {
        // What is sent has left when the kernel has it.
        if let Err(error) = exchange() {
            return tell_error(&error);
        }
    }
}

#[test]
fn two_hosts_that_do_not_reach_each_other_are_both_named_long_before_the_deadline() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    let start = |(scenario, port)| {
        let world = world(3, scenario, port).through(inside).set("UNISUM_ALGORITHM", "ring");
        world.set("UNISUM_HEARTBEAT_TIMEOUT", 2).start()
    };
    let running = [("around", 7001), ("waiting", 7002)].map(start);
    running.iter().for_each(|running| running.wait_for("working", 3, LIMIT));
    cut_pair(&hosts, true);
    let cut = Stopwatch::start();
    running[1].mark("again");
    for ended in running.map(|running| running.wait(LIMIT)).iter().flatten() {
        let told = &ended.told[0];
        assert!(told.starts_with("RankLost [1, 2] "), "{told}");
        assert!(told.contains("ranks 1 and 2 do not reach each other: rank "), "{told}");
    }
    // An attempt after the limit, a second for the answer, and four to find no other cause.
    cut.assert_within(Duration::from_secs(15), SOON, "since the two were cut apart");
    cut_pair(&hosts, false);
}

/// Loses what one host sends another, or ends that: it takes the other's card for one that is not
/// there. What comes the other way arrives.
fn cut_one_way(hosts: &Hosts, from: usize, to: usize, is_cut: bool) {
    let number = to + 1;
    for (family, address) in
        [("-4", format!("10.77.0.{number}")), ("-6", format!("fd77::{number}"))]
    {
        let how = match is_cut {
            true => format!("replace {address} lladdr 02:00:00:00:00:01 nud permanent"),
            false => format!("del {address}"),
        };
        hosts.on(from, &format!("ip {family} neigh {how} dev eth0"));
    }
}

/// Neither hears that anything it sends arrives, so that it is as if nothing did. Where rank 0 is
/// one of the two, each ends with the other one's name, or, as what one says may arrive, all end
/// with the same.
#[test]
fn hosts_of_which_one_does_not_reach_the_other_are_named_as_if_neither_did() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    for (from, to) in [(1, 2), (2, 1), (0, 2), (2, 0)] {
        let world = world(3, "around", 7001).through(inside).set("UNISUM_ALGORITHM", "ring");
        let running = world.set("UNISUM_HEARTBEAT_TIMEOUT", 2).start();
        running.wait_for("working", 3, LIMIT);
        cut_one_way(&hosts, from, to, true);
        let cut = Stopwatch::start();
        let ended = running.wait(LIMIT);
        cut.assert_within(Duration::from_secs(15), SOON, "since one way was cut");
        cut_one_way(&hosts, from, to, false);
        let names = |rank: usize, failed: &str| {
            ended[rank].told[0].starts_with(&format!("RankLost {failed} "))
        };
        let context = format!("{from} does not reach {to}: {ended:#?}");
        if from.min(to) > 0 {
            assert!((0..3).all(|rank| names(rank, "[1, 2]")), "{context}");
            continue;
        }
        let first = if names(0, "[2]") { "[2]" } else { "[0]" };
        assert!(names(0, first) && names(1, first), "{context}");
        assert!(names(2, first) || names(2, "[0]"), "{context}");
    }
}

/// Nothing is under way between the two when they are cut apart: their kernels find out.
#[test]
fn two_hosts_that_are_cut_apart_between_calls_are_both_named() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    let world = world(3, "idle", 7001).through(inside).set("UNISUM_ALGORITHM", "ring");
    let running = world.set("UNISUM_HEARTBEAT_TIMEOUT", 2).start();
    running.wait_for("working", 3, LIMIT);
    cut_pair(&hosts, true);
    // Longer than the kernels take, which give up after the limit and some attempts.
    thread::sleep(Duration::from_secs(10));
    running.mark("again");
    for ended in running.wait(LIMIT) {
        let told = &ended.told[0];
        assert!(told.starts_with("RankLost [1, 2] "), "{told}");
    }
    cut_pair(&hosts, false);
}

/// Between the attempts to send again what was lost, the pauses double: the last of them is longer
/// than the limit here.
#[test]
fn two_hosts_that_reach_each_other_again_within_the_limit_go_on() {
    let Some(hosts) = Hosts::beside_others(3) else { return };
    let world = world(3, "busy", 7001).through(inside).set("UNISUM_ALGORITHM", "ring");
    let running = world.set("UNISUM_HEARTBEAT_TIMEOUT", 11).start();
    running.wait_for("working", 3, LIMIT);
    cut_pair(&hosts, true);
    // The attempts are made after 0.2, 0.6, 1.4, 3, 6.2 and 12.6 s.
    thread::sleep(Duration::from_secs(7));
    cut_pair(&hosts, false);
    thread::sleep(Duration::from_secs(7));
    running.mark("enough");
    for ended in running.wait(LIMIT) {
        assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
    }
}

/// Rank 0 sends rank 1 a message each time that the test says so.
fn sending() {
    let communicator = Communicator::from_environment().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    reach("working");
    for round in 0_u64.. {
        let mut heard = [0];
        if communicator.rank() == 0 {
            await_others(&format!("send{round}"), 1, LIMIT);
            heard[0] = if has("enough") { u64::MAX } else { round };
            messenger.send(&heard, 1, 7).unwrap();
        } else {
            messenger.receive(&mut heard, 0, 7).unwrap();
            reach(&format!("heard{round}"));
        }
        if heard[0] == u64::MAX {
            return tell("enough");
        }
        assert_eq!(heard[0], round);
    }
}

/// Only the end that has something to send can know that nothing arrives, and it is not the one
/// that dials. TCP alone would repeat it after 0.2, 0.6, 1.4 and 3 s.
#[test]
fn what_one_end_sends_in_an_outage_arrives_as_soon_as_that_is_over() {
    let Some(hosts) = Hosts::new(2) else { return };
    let world = world(2, "sending", 7001).through(inside).set("UNISUM_RECONNECT_TIMEOUT", 20);
    let running = world.start();
    running.wait_for("working", 2, LIMIT);
    let mut round = 0;
    let mut send = || {
        running.mark(&format!("send{round}"));
        round += 1;
        format!("heard{}", round - 1)
    };
    running.wait_for(&send(), 1, LIMIT);
    // What only noise delays is measured until it is good once.
    let is_soon = (0..10).any(|_| {
        plug(&hosts, 1, false);
        let heard = send();
        thread::sleep(Duration::from_millis(1700));
        plug(&hosts, 1, true);
        let back = Instant::now();
        running.wait_for(&heard, 1, LIMIT);
        println!("{:.1?} after the outage", back.elapsed());
        back.elapsed() < Duration::from_millis(200)
    });
    assert!(is_soon);
    running.mark("enough");
    send();
    for ended in running.wait(LIMIT) {
        assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
    }
}

/// Makes a group, over control alone, each time that the test says so.
fn grouping() {
    let communicator = Communicator::from_environment().unwrap();
    communicator.barrier().unwrap();
    reach("working");
    for round in 0_u64.. {
        await_others(&format!("group{round}"), 1, LIMIT);
        if has("enough") {
            return tell("enough");
        }
        communicator.split(Some(0), 0).unwrap();
        reach(&format!("grouped{round}"));
    }
}

#[test]
fn what_control_says_in_an_outage_arrives_as_soon_as_that_is_over() {
    let Some(hosts) = Hosts::new(2) else { return };
    let world = world(2, "grouping", 7001).through(inside).set("UNISUM_RECONNECT_TIMEOUT", 20);
    let running = world.start();
    running.wait_for("working", 2, LIMIT);
    // What only noise delays is measured until it is good once.
    let is_soon = (0..10).any(|round| {
        plug(&hosts, 1, false);
        running.mark(&format!("group{round}"));
        // The attempts are made after 0.2, 0.6, 1.4, 3 and 6.2 s.
        thread::sleep(Duration::from_secs(4));
        plug(&hosts, 1, true);
        let back = Instant::now();
        running.wait_for(&format!("grouped{round}"), 2, LIMIT);
        println!("{:.1?} after the outage", back.elapsed());
        if back.elapsed() > Duration::from_millis(200) {
            return false;
        }
        running.mark("enough");
        running.mark(&format!("group{}", round + 1));
        true
    });
    assert!(is_soon);
    for ended in running.wait(LIMIT) {
        assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
    }
}

/// More than the buffers on the way hold.
fn large() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 4 << 20];
    communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
    if communicator.rank() == setting("STOPS").parse::<usize>().unwrap() {
        reach("stopped");
        // SAFETY: stops this process until the test has it continue.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
    communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
    tell("enough");
}

#[test]
fn a_process_that_is_stopped_for_longer_than_the_limit_is_no_lost_host() {
    let Some(_hosts) = Hosts::beside_others(3) else { return };
    for stops in [0, 2] {
        let world = world(3, "large", 7001).through(inside);
        let world = world.set("UNISUM_HEARTBEAT_TIMEOUT", 1).set("STOPS", stops);
        let running = world.start();
        running.wait_for("stopped", 1, LIMIT);
        thread::sleep(Duration::from_secs(6));
        running.signal(stops, libc::SIGCONT);
        for ended in running.wait(LIMIT) {
            assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
        }
    }
}

/// Sums and messages, each of which is looked at, until the test says that it is enough.
fn summing() {
    let communicator = Communicator::from_environment().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    for round in 0_u64.. {
        let count = [3, 5_000, 400_000][round as usize % 3];
        let mut numbers: Vec<u64> = (0..count).map(|at| (at ^ round) * (rank + 1)).collect();
        let mut is_enough = [u8::from(has("enough"))];
        let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
        let (sent, mut received) = (vec![round + rank; 900], vec![0; 900]);
        let messages = &mut [
            Message::Send { data: &sent, to: next as usize, tag: 3 },
            Message::Receive { data: &mut received, from: last as usize, tag: 3 },
        ];
        let done = communicator
            .all_reduce(&mut numbers, ReduceOp::Sum)
            .and_then(|()| messenger.exchange(messages))
            .and_then(|()| communicator.broadcast(&mut is_enough, 0));
        if let Err(error) = done {
            return tell_error(&error);
        }
        let sum = world * (world + 1) / 2;
        assert!((0..).zip(&numbers).all(|(at, &it)| it == (at ^ round) * sum), "a wrong sum");
        assert!(received.iter().all(|&it| it == round + last), "a wrong message");
        if is_enough[0] == 1 {
            return tell("enough");
        }
        if round == 0 {
            reach("working");
        }
    }
}

/// Resets all connections between a host and the others, those of data, of control, and pulses;
/// how many there were.
fn reset(host: usize) -> usize {
    let mut command = inside(host);
    command.extend(["ss", "-H", "-K", "-t", "dst", "10.77.0.0/24"].map(str::to_owned));
    let output = Command::new(&command[0]).args(&command[1..]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().count()
}

/// `UNISUM_TEST_RESETS` resets so often, by hand.
#[test]
fn all_connections_of_a_host_may_be_reset_and_go_on() {
    let Some(_hosts) = Hosts::new(3) else { return };
    let often = std::env::var("UNISUM_TEST_RESETS").map_or(9, |often| often.parse().unwrap());
    let world = world(3, "summing", 7001).through(inside).set("UNISUM_RECONNECT_TIMEOUT", 20);
    let running = world.start();
    running.wait_for("working", 3, LIMIT);
    let mut random = Random::new();
    let (mut resets, mut rounds) = (0, 0);
    while rounds < often || resets <= often {
        resets += reset(rounds % 3);
        rounds += 1;
        // Some fall into those that go on after the last one.
        thread::sleep(Duration::from_millis(random.below(400) as u64));
        assert!(rounds < 100 * often, "{resets} connections were reset");
    }
    running.mark("enough");
    for ended in running.wait(LIMIT) {
        assert_eq!((ended.status, ended.told[0].as_str()), (0, "enough"), "{ended:#?}");
    }
}
