//! Several hosts: network namespaces, joined by veth pairs and a bridge in one more namespace.
//!
//! They need root. Without it the tests say so and pass, unless UNISUM_TEST_NAMESPACES is
//! `required`, as in CI.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod sequence;
mod support;

use std::time::{Duration, Instant};

use support::hosts::{Hosts, inside, namespace, sh};
use support::{World, reach, tell};
use unisum::{Collective, Communicator, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("sums", sums),
        ("lose_a_host", lose_a_host),
        ("describe", describe),
        ("first_calls", first_calls),
        ("too_slow", too_slow),
        ("sequence", sequence::run_sequence),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);

fn world(ranks: usize, scenario: &'static str, rendezvous: &str) -> World {
    World::new(ranks, scenario).set("UNISUM_RENDEZVOUS", rendezvous).set("UNISUM_INTERFACE", "")
}

#[test]
fn ranks_on_several_hosts_share_memory_inside_and_use_tcp_across() {
    let Some(_hosts) = Hosts::new(3) else { return };
    for rendezvous in ["tcp://10.77.0.1:7001", "tcp://[fd77::1]:7001"] {
        // Uneven: two ranks on host 0, three on host 1, one on host 2.
        let world = world(6, "sums", rendezvous).through(|rank| inside([0, 0, 1, 1, 1, 2][rank]));
        let told = world.succeed(LIMIT);
        let transports: Vec<&str> = told.iter().map(|told| told[0].as_str()).collect();
        assert_eq!(transports, ["shm+tcp", "shm+tcp", "shm+tcp", "shm+tcp", "shm+tcp", "tcp"]);
    }
}

#[test]
fn ranks_placed_in_turn_on_the_hosts_are_grouped_by_host() {
    let Some(_hosts) = Hosts::new(2) else { return };
    let told =
        world(5, "sums", "tcp://10.77.0.1:7001").through(|rank| inside(rank % 2)).succeed(LIMIT);
    assert!(told.iter().all(|told| told[0] == "shm+tcp"), "{told:?}");
}

/// Hierarchical plans of all collectives, uneven, and with ranks that take turns on the hosts.
#[test]
fn sequences_are_right_on_several_hosts() {
    let Some(_hosts) = Hosts::new(3) else { return };
    let seed = sequence::seed();
    let uneven = |rank: usize| inside([0, 0, 1, 1, 1, 2][rank]);
    let in_turn = |rank: usize| inside(rank % 2);
    for (ranks, through) in [(6, uneven as fn(usize) -> Vec<String>), (5, in_turn), (8, in_turn)] {
        let world = world(ranks, "sequence", "tcp://10.77.0.1:7001").through(through);
        sequence::check(&world, seed + ranks as u64, 40, 30_000);
    }
}

fn sums() {
    let communicator = Communicator::from_environment().unwrap();
    tell(communicator.transport());
    let (rank, world) = (communicator.rank(), communicator.world());
    for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
        communicator.set_algorithm(Some(algorithm)).unwrap();
        for count in [1, world + 1, 5000, 200_003] {
            let mut private: Vec<f64> = (0..count).map(|at| (at * (rank + 1)) as f64).collect();
            let mut registered = communicator.allocate::<f64>(count).unwrap();
            registered.copy_from_slice(&private);
            for (data, op, divisor) in
                [(&mut private[..], ReduceOp::Sum, 1), (&mut registered, ReduceOp::Average, world)]
            {
                communicator.all_reduce(data, op).unwrap();
                for (at, &element) in data.iter().enumerate() {
                    let expected = (at * world * (world + 1) / 2) as f64 / divisor as f64;
                    assert_eq!(element, expected, "{algorithm}, {op}, element {at} of {count}");
                }
            }
        }
    }
}

/// Ranks of a host share no memory here, so that only where they are tells which links cross.
#[test]
fn a_slow_link_between_hosts_is_measured_and_named() {
    let Some(_hosts) = Hosts::new(3) else { return };
    let shape = "tc qdisc add dev eth0 root tbf rate 500mbit burst 128kb latency 100ms";
    sh(&format!("ip netns exec {} {shape}", namespace(2))).unwrap();
    let told = world(6, "describe", "tcp://10.77.0.1:7001")
        .through(|rank| inside(rank / 2))
        .set("UNISUM_TRANSPORT", "tcp")
        .succeed(LIMIT);
    for lines in &told {
        let line = |start: &str| lines.iter().find(|line| line.starts_with(start));
        assert!(line("across nodes: ").unwrap().ends_with("(median of 2 links)"), "{lines:?}");
        assert!(line("slowest of them: ").unwrap().ends_with("(ranks 2 and 4)"), "{lines:?}");
    }
    // All ranks have the same figures.
    assert!(told.iter().all(|lines| lines[1..] == told[0][1..]), "{told:?}");
}

fn describe() {
    let communicator = Communicator::from_environment().unwrap();
    let described = communicator.describe();
    tell(described.summary());
    let across = |what: &str| what == "across nodes" || what == "slowest of them";
    described.costs.iter().filter(|cost| across(&cost.what)).for_each(tell);
}

/// Over 10 Mbit/s to one of four hosts, where trying every algorithm would take minutes: one call
/// in which some may be tried, and one that takes longer than trying may.
#[test]
fn a_first_call_over_a_slow_link_takes_a_second_more_than_a_call() {
    let Some(hosts) = Hosts::new(4) else { return };
    let shape = "tc qdisc add dev port3 root tbf rate 10mbit burst 64kb latency 2s";
    sh(&format!("ip netns exec {} {shape}", hosts.switch())).unwrap();
    let world = |scenario| world(4, scenario, "tcp://10.77.0.1:7001").through(inside);
    let is_quick = |told: &Vec<Vec<String>>| {
        told.iter().flatten().all(|line| {
            let seconds: Vec<f64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
            seconds[0] < 1.2 * seconds[1].max(seconds[2]) + 1.0
        })
    };
    // Others may have the processors in one run.
    let run = |_| world("first_calls").set("UNISUM_TIMEOUT", 8).succeed(LIMIT);
    assert!((0..4).map(run).any(|told| is_quick(&told)), "too long in each of four runs");
    for ended in world("too_slow").set("UNISUM_TIMEOUT", 2).run(LIMIT) {
        // The deadline, and until all know what it means.
        assert!(ended.told[0].parse::<f64>().unwrap() < 30.0, "{ended:?}");
    }
}

fn first_calls() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank() as f32;
    for count in [16_000, 400_000] {
        let seconds = [0, 1, 2].map(|_| {
            let mut data = vec![rank; count];
            let begun = Instant::now();
            communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
            let seconds = begun.elapsed().as_secs_f64();
            assert!(data.iter().all(|&it| it == 6.0), "{count}");
            seconds
        });
        tell(format!("{} {} {}", seconds[0], seconds[1], seconds[2]));
    }
}

fn too_slow() {
    let communicator = Communicator::from_environment().unwrap();
    let begun = Instant::now();
    communicator.all_reduce(&mut vec![1_f32; 2_000_000], ReduceOp::Sum).unwrap_err();
    tell(begun.elapsed().as_secs_f64());
}

#[test]
fn an_unplugged_host_is_named_by_the_deadline() {
    let Some(hosts) = Hosts::new(3) else { return };
    let running = world(3, "lose_a_host", "tcp://10.77.0.1:7001")
        .through(inside)
        .set("UNISUM_TIMEOUT", 5)
        .start();
    running.wait_for("reducing", 3, LIMIT);
    sh(&format!("ip -n {} link set port2 down", hosts.switch())).unwrap();
    let cut = Instant::now();
    for ended in &running.wait(LIMIT)[..2] {
        let told = &ended.told[0];
        assert!(told.starts_with("[2] "), "{told}");
    }
    println!("all ended {:?} after the host was unplugged", cut.elapsed());
}

fn lose_a_host() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 100_000];
    for round in 0.. {
        if let Err(error) = communicator.all_reduce(&mut data, ReduceOp::Max) {
            return tell(format!("{:?} {error}", error.failed_ranks()));
        }
        if round == 0 {
            reach("reducing");
        }
    }
}
