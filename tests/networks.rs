//! Networks as clusters have them: names that mislead, families of addresses that some hosts lack,
//! bridges that lead nowhere, several networks. All are made of network namespaces.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::net::Ipv4Addr;
use std::time::Duration;

use support::hosts::{Hosts, inside};
use support::{World, tell};
use unisum::{Communicator, Elastic, ErrorKind, ReduceOp};

const LIMIT: Duration = Duration::from_secs(100);

#[test]
fn rank_process() {
    support::run_if_rank(&[("meet", meet), ("fail", fail), ("join", join), ("go_on", go_on)]);
}

/// Every pair of ranks opens a connection, in the job and in a group.
fn meet() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let group = communicator.split(Some(0), -(rank as i64)).unwrap().unwrap();
    for communicator in [&communicator, &group] {
        let rank = communicator.rank();
        let blocks: Vec<u32> = (0..world).map(|to| (rank * world + to) as u32).collect();
        let mut received = vec![0_u32; world];
        communicator.all_to_all(&blocks, &mut received).unwrap();
        let expected = (0..world).map(|from| (from * world + rank) as u32);
        assert!(received.into_iter().eq(expected));
        let mut one = [1.0_f32];
        communicator.all_reduce(&mut one, ReduceOp::Sum).unwrap();
        assert_eq!(one[0], world as f32);
    }
    tell("met");
}

fn world(ranks: usize, rendezvous: &str) -> World {
    let world = World::new(ranks, "meet").set("UNISUM_INTERFACE", "");
    let world = world.set("UNISUM_TRANSPORT", if ranks > 2 { "tcp" } else { "auto" });
    if rendezvous.is_empty() { world } else { world.set("UNISUM_RENDEZVOUS", rendezvous) }
}

/// Two and four ranks on two hosts meet, with rank 0 on either. `name` gives the rendezvous (none
/// for a file) if rank 0 is on this host.
fn all_meet(name: impl Fn(usize) -> String) {
    let first: fn(usize) -> Vec<String> = |rank| inside(rank % 2);
    let second: fn(usize) -> Vec<String> = |rank| inside((rank + 1) % 2);
    for (host, through) in [first, second].into_iter().enumerate() {
        for ranks in [2, 4] {
            world(ranks, &name(host)).through(through).succeed(LIMIT);
        }
    }
}

/// As Debian's installer writes it.
#[test]
fn a_name_that_is_a_loopback_address_on_its_own_host_serves_all() {
    let Some(hosts) = Hosts::new(2) else { return };
    hosts.set_names(0, "127.0.1.1 zero\n10.77.0.2 one");
    hosts.set_names(1, "127.0.1.1 one\n10.77.0.1 zero");
    all_meet(|host| format!("tcp://{}:7100", ["zero", "one"][host]));
}

#[test]
fn a_family_of_addresses_that_one_host_lacks_is_done_without() {
    let Some(hosts) = Hosts::without_addresses(2) else { return };
    // Resolvers give IPv6 first.
    let names = "fd77::1 zero\n10.77.0.1 zero\nfd77::2 one\n10.77.0.2 one";
    for host in 0..2 {
        hosts.set_names(host, names);
        hosts.on(host, &format!("ip addr add 10.77.0.{}/24 dev eth0", host + 1));
    }
    hosts.on(0, "ip addr add fd77::1/64 dev eth0 nodad");
    all_meet(|host| format!("tcp://{}:7100", ["zero", "one"][host]));
    all_meet(|_| String::new());
    // Both have IPv6 now, and one of them nothing else.
    hosts.on(1, "ip addr add fd77::2/64 dev eth0 nodad");
    hosts.on(1, "ip addr del 10.77.0.2/24 dev eth0");
    all_meet(|host| format!("tcp://{}:7100", ["zero", "one"][host]));
}

#[test]
fn link_local_addresses_serve_whatever_number_an_interface_has_there() {
    let Some(hosts) = Hosts::without_addresses(2) else { return };
    for host in 0..2 {
        hosts.on(host, &format!("ip addr add fe80::{}/64 dev eth0 nodad", host + 1));
    }
    all_meet(|host| format!("tcp://[fe80::{}%eth0]:7100", host + 1));
    all_meet(|_| String::new());
}

/// Bridges of the same address everywhere, of which one has something behind it.
#[test]
fn bridges_that_lead_to_no_other_host_are_passed_by() {
    let Some(hosts) = Hosts::without_addresses(2) else { return };
    for host in 0..2 {
        for bridge in ["docker0", "br-1"] {
            hosts.on(host, &format!("ip link add {bridge} type bridge"));
            hosts.on(host, &format!("ip link set {bridge} addrgenmode none up"));
        }
        hosts.on(host, "ip addr add 172.17.0.1/16 dev docker0");
        hosts.on(host, "ip addr add 172.18.0.1/16 dev br-1");
        hosts.on(host, "ip link add inside type veth peer name container");
        hosts.on(host, "ip link set inside master br-1 up");
        hosts.on(host, "ip link set container up");
        hosts.on(host, &format!("ip addr add 10.77.0.{}/24 dev eth0", host + 1));
    }
    all_meet(|_| String::new());
    all_meet(|host| format!("tcp://10.77.0.{}:7100", host + 1));
}

/// Host 2 is on the second network only, where it knows host 0 by the same name.
#[test]
fn each_pair_uses_the_network_that_both_are_on() {
    let Some(hosts) = Hosts::without_addresses(3) else { return };
    for host in 0..3 {
        let number = host + 1;
        if host < 2 {
            hosts.on(host, &format!("ip addr add 10.77.0.{number}/24 dev eth0"));
            hosts.set_names(host, "10.77.0.1 zero");
        } else {
            hosts.set_names(host, "10.78.0.1 zero");
        }
        hosts.on(host, &format!("ip addr add 10.78.0.{number}/24 dev eth0"));
    }
    let placements: [fn(usize) -> Vec<String>; 2] =
        [|rank| inside(rank % 3), |rank| inside([0, 2, 1, 2][rank])];
    for through in placements {
        for ranks in [3, 4] {
            world(ranks, "tcp://zero:7100").through(through).succeed(LIMIT);
            world(ranks, "").through(through).succeed(LIMIT);
        }
    }
}

fn fail() {
    let error = Communicator::from_environment().unwrap_err();
    let text = error.to_string().replace('\n', " | ");
    tell(format!("{:?} {text}", error.failed_ranks()));
}

/// As behind a firewall that drops packets: rank 0 is reached by all, and two others not by each
/// other.
#[test]
fn all_that_was_tried_is_told_when_two_ranks_can_not_reach_each_other() {
    let Some(hosts) = Hosts::new(3) else { return };
    for address in ["10.77.0.2", "fd77::2"] {
        hosts.on(2, &format!("ip neigh replace {address} lladdr 02:00:00:00:00:99 dev eth0"));
    }
    let running = World::new(3, "fail")
        .set("UNISUM_INTERFACE", "")
        .set("UNISUM_CONNECT_TIMEOUT", 10)
        .set("UNISUM_RENDEZVOUS", "tcp://10.77.0.1:7100")
        .through(inside)
        .start();
    for ended in running.wait(LIMIT) {
        let told = &ended.told[0];
        assert!(told.starts_with("[1, 2] "), "{told}");
        for text in [
            "rank 2 reports",
            "do not reach each other",
            "10.77.0.2:",
            "[fd77::2]:",
            "no answer",
            "firewall",
        ] {
            assert!(told.contains(text), "{text}: {told}");
        }
    }
}

/// 8 Mbit/s: a megabyte there and back takes two seconds.
#[test]
fn a_slow_link_does_not_hold_the_start_up() {
    let Some(hosts) = Hosts::new(2) else { return };
    for host in 0..2 {
        hosts.on(host, "tc qdisc add dev eth0 root tbf rate 8mbit burst 32kb latency 400ms");
    }
    let world = World::new(2, "join").set("UNISUM_INTERFACE", "");
    let world = world.set("UNISUM_RENDEZVOUS", "tcp://10.77.0.1:7100").through(inside);
    for told in world.succeed(LIMIT) {
        let millis: u64 = told[0].parse().unwrap();
        assert!(millis < 8000, "{millis} ms");
    }
}

fn join() {
    let begun = std::time::Instant::now();
    let communicator = Communicator::from_environment().unwrap();
    tell(begun.elapsed().as_millis());
    communicator.barrier().unwrap();
}

/// To where connections of this host lead.
fn connected() -> Vec<Ipv4Addr> {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    let established = rows.filter(|row| row[3] == "01");
    let remote = established.map(|row| u32::from_str_radix(&row[2][..8], 16).unwrap());
    remote.map(|it| Ipv4Addr::from(it.to_ne_bytes())).collect()
}

fn check_network(communicator: &Communicator) {
    let world = communicator.world();
    let mut received = vec![0_u32; world];
    communicator.all_to_all(&vec![1; world], &mut received).unwrap();
    let all = connected();
    let is_elsewhere = |it: &Ipv4Addr| it.octets()[..3] != [10, 78, 0];
    assert!(all.len() >= world - 1 && !all.iter().any(is_elsewhere), "{all:?}");
}

/// The last rank dies, and the others go on.
fn go_on() {
    let elastic = Communicator::builder().elastic(Elastic::default());
    let communicator = elastic.connect().unwrap();
    check_network(&communicator);
    let group = communicator.subset(&[1, 0]).unwrap();
    group.iter().for_each(check_network);
    communicator.barrier().unwrap();
    if communicator.rank() == 3 {
        std::process::abort();
    }
    drop(group);
    let error = communicator.barrier().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ViewChanged, "{error}");
    let rebuilt = communicator.rebuild().unwrap();
    check_network(&rebuilt);
    rebuilt.barrier().unwrap();
    tell(rebuilt.world());
}

/// The default route leads to the other network.
#[test]
fn an_elastic_job_stays_in_the_network_in_which_it_met() {
    let Some(hosts) = Hosts::without_addresses(4) else { return };
    for host in 0..4 {
        for network in [77, 78] {
            let address = format!("10.{network}.0.{}/24", host + 1);
            hosts.on(host, &format!("ip addr add {address} dev eth0"));
        }
        hosts.on(host, "ip route add default via 10.77.0.99");
    }
    let world = world(4, "tcp://10.78.0.1:7100").running("go_on").through(inside);
    let ended = world.start().wait(LIMIT);
    for survivor in &ended[..3] {
        assert_eq!(survivor.told, ["3"], "{ended:#?}");
    }
}
