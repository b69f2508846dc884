//! Groups of elastic jobs on several hosts, each a network namespace: connections are cut, hosts
//! vanish, and newcomers enter while groups are made and in their calls.
//!
//! `UNISUM_TEST_CUTS` resets, or so many rounds of cuts and kills, by hand.

use std::time::Instant;

use super::support::hosts::{Hosts, inside, sh};
use super::*;

const HOSTS: usize = 3;
/// Two on each host.
const RANKS: usize = 6;
/// What connections have to go on.
const RECONNECT: Duration = Duration::from_secs(20);

fn often(default: usize) -> usize {
    std::env::var("UNISUM_TEST_CUTS").map_or(default, |it| it.parse().unwrap())
}

fn world(scenario: &'static str) -> World {
    World::new(RANKS, scenario)
        .through(|rank| inside(rank / 2))
        .set("UNISUM_INTERFACE", "eth0")
        .set("UNISUM_REPRODUCIBLE", 1)
}

/// Resets all connections between a host and the others.
fn reset(hosts: &Hosts, host: usize) {
    hosts.on(host, "ss -H -K -t dst 10.77.0.0/24 > /dev/null");
}

/// Takes a host off the switch, or puts it back.
fn plug(hosts: &Hosts, host: usize, is_in: bool) {
    let how = if is_in { "master br0" } else { "nomaster" };
    sh(&format!("ip -n {} link set port{host} {how}", hosts.switch())).unwrap();
}

/// Resets a host's connections, or has them silent for a moment.
fn disturb(hosts: &Hosts, random: &mut Random) {
    let host = random.below(HOSTS);
    if random.below(8) > 0 {
        return reset(hosts, host);
    }
    plug(hosts, host, false);
    std::thread::sleep(Duration::from_millis(50 + random.below(500) as u64));
    plug(hosts, host, true);
}

fn has(mark: &str) -> bool {
    std::path::Path::new(&setting("TEST_MARKS")).join(format!("{mark}.test")).exists()
}

/// Makes groups, and groups of them, again and again.
pub(super) fn knit() {
    let communicator = connect();
    communicator.barrier().unwrap();
    reach("working");
    let mut slowest = Duration::ZERO;
    for round in 0.. {
        let rank = communicator.rank();
        let began = Instant::now();
        let group = communicator.split(Some((rank + round) as u32 % 2), 0).unwrap().unwrap();
        assert!(step(&group, 4, true).unwrap());
        let inner = group.split((group.rank() > 0).then_some(1), 0).unwrap();
        assert!(inner.is_none_or(|inner| step(&inner, 7, true).unwrap()));
        slowest = slowest.max(began.elapsed());
        if step(&communicator, 1, has("enough")).unwrap() {
            break;
        }
    }
    tell(format!("{:?}", view(&communicator)));
    tell(slowest.as_millis());
}

#[test]
fn groups_can_be_made_while_connections_are_cut() {
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    let mut random = Random::new();
    let running = world("knit").set("UNISUM_RECONNECT_TIMEOUT", RECONNECT.as_secs()).start();
    running.wait_for("working", RANKS, LIMIT);
    for _ in 0..often(25) {
        disturb(&hosts, &mut random);
        std::thread::sleep(Duration::from_millis(random.below(60) as u64));
        if (0..RANKS).any(|rank| !running.lives(rank)) {
            break;
        }
    }
    running.mark("enough");
    let ended = running.wait(LIMIT);
    for (rank, told) in succeeded(&ended, &[]) {
        assert_eq!(told[0], "(1, [0, 1, 2, 3, 4, 5])", "rank {rank}");
        let slowest = Duration::from_millis(told[1].parse().unwrap());
        println!("rank {rank}: {slowest:?}");
        assert!(slowest < RECONNECT / 2, "rank {rank}: a round took {slowest:?}: {ended:#?}");
    }
}

#[test]
fn a_group_streams_on_while_connections_are_cut_and_others_die() {
    let Some(hosts) = Hosts::new(HOSTS) else { return };
    let mut random = Random::new();
    for _ in 0..often(10).div_ceil(10) {
        let (members, victims) = ([4, 1, 3], [0, 5]);
        let running = world("outlive")
            .set("UNISUM_RECONNECT_TIMEOUT", RECONNECT.as_secs())
            .set("MEMBERS", "4 1 3")
            .set("LAST", RANKS - victims.len())
            .start();
        running.wait_for("streaming", members.len(), LIMIT);
        (0..3).for_each(|_| disturb(&hosts, &mut random));
        for victim in victims {
            disturb(&hosts, &mut random);
            running.signal(victim, libc::SIGKILL);
            disturb(&hosts, &mut random);
        }
        // As long as they go on.
        while members.iter().any(|&rank| running.lives(rank)) {
            std::thread::sleep(Duration::from_millis(random.below(300) as u64));
            disturb(&hosts, &mut random);
        }
        for (rank, told) in succeeded(&running.wait(LIMIT), &victims) {
            match members.contains(&rank) {
                true => assert!(told[0].ends_with(" [1, 2, 3, 4] true"), "{rank}: {told:?}"),
                false => assert_eq!(told, ["no member"]),
            }
        }
    }
}

/// Streams in groups of ranks of two hosts, of all three, and of one alone, until a host vanishes.
pub(super) fn lose_host() {
    let communicator = connect();
    let sets = ["NEAR", "FAR", "APART"];
    let groups = sets.map(|it| communicator.subset(&ranks(it)).unwrap());
    let is_done = AtomicBool::new(false);
    let (rebuilt, ends) = std::thread::scope(|scope| {
        let streams: Vec<_> = sets
            .iter()
            .zip(&groups)
            .filter_map(|(set, group)| Some((*set, group.as_ref()?)))
            .map(|(set, group)| (set, scope.spawn(|| stream(group, set, &is_done))))
            .collect();
        let rebuilt = rebuild_until(communicator, 4);
        // Release: pairs with the Acquire load of the streams.
        is_done.store(true, Ordering::Release);
        let ends: Vec<_> = streams.into_iter().map(|(set, it)| (set, it.join().unwrap())).collect();
        (rebuilt, ends)
    });
    tell(match rebuilt {
        Ok(rebuilt) => format!("{:?}", view(&rebuilt).1),
        Err(error) => format!("{:?}", error.kind()),
    });
    for (set, end) in ends {
        tell(match end {
            Ok(_) => format!("{set} goes on"),
            Err(error) => format!("{set} {:?} {:?}", error.kind(), error.lost()),
        });
    }
}

#[test]
fn groups_without_a_rank_of_a_host_that_vanishes_go_on_and_others_name_it() {
    // Rank 0 coordinates the job and the second group of all hosts.
    let cases = vec![(2, "3 0 1", "1 4 3"), (0, "2 5 4", "0 3 4")];
    for (host, near, far) in support::sample(cases, 1) {
        let Some(hosts) = Hosts::new(HOSTS) else { return };
        let apart = format!("{} {}", 2 * host, 2 * host + 1);
        let running = world("lose_host")
            .set("UNISUM_HEARTBEAT_TIMEOUT", 1)
            .set("NEAR", near)
            .set("FAR", far)
            .set("APART", &apart)
            .start();
        for (set, ranks) in [("NEAR", 3), ("FAR", 3), ("APART", 2)] {
            running.wait_for(set, ranks, LIMIT);
        }
        plug(&hosts, host, false);
        let cut = Instant::now();
        let ended = running.wait(LIMIT);
        println!("host {host} vanished: all over after {:.1?}", cut.elapsed());
        let left: Vec<Rank> = (0..RANKS).filter(|rank| rank / 2 != host).collect();
        for (rank, told) in succeeded(&ended, &[]) {
            let context = format!("host {host}, rank {rank}: {told:?}");
            let is_left = left.contains(&rank);
            let expected = if is_left { format!("{left:?}") } else { "RankLost".into() };
            assert_eq!(told[0], expected, "{context}");
            for told in &told[1..] {
                let lost = if host == 2 { "[1]" } else { "[0]" };
                let is_right = match (told.split_once(' ').unwrap(), is_left) {
                    (("NEAR", how), true) => how == "goes on",
                    (("FAR", how), true) => how == format!("ViewChanged {lost}"),
                    // Who is no longer in the job is told so in all of its groups.
                    (("FAR" | "APART", how), false) => how.starts_with("RankLost "),
                    _ => false,
                };
                assert!(is_right, "{context}");
            }
        }
    }
}
