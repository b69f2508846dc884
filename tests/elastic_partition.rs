//! An elastic job whose network falls into two parts: one goes on at most, and the other says why
//! it does not. Eight hosts, each a network namespace, on a switch.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::hosts::{Hosts, inside, sh};
use support::{World, reach, tell, tell_error};
use unisum::{Communicator, Elastic, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[("go_on", go_on)]);
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
