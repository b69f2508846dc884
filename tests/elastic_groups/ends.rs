//! How groups of elastic jobs end otherwise, who may come to their ports, and what they cost.

use std::net::SocketAddr;
use std::time::Instant;

use unisum_control::address::Rendezvous;
use unisum_control::{Control, ControlConfig};
use unisum_link::handshake::{Build, Secret};
use unisum_link::secure::{Credentials, Sealing};

use super::*;

/// Rank 3, number 1 of the group, drops it while the other two need it: it is in the job still.
pub(super) fn leave_group() {
    let communicator = connect();
    let group = communicator.subset(&[1, 3, 2]).unwrap();
    if let Some(group) = group {
        assert!(step(&group, 1, true).unwrap());
        if group.rank() != 1 {
            let error = group.barrier().unwrap_err();
            assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::RankLost, &[1][..]));
            assert!(error.to_string().contains("left the communicator"), "{error}");
        }
    }
    communicator.barrier().unwrap();
    tell(format!("{:?}", view(&communicator)));
}

#[test]
fn who_leaves_a_group_is_not_lost_to_the_job() {
    for transport in support::transports() {
        let world = World::new(4, "leave_group").set("UNISUM_TRANSPORT", transport);
        for told in world.succeed(LIMIT) {
            assert_eq!(told, ["(1, [0, 1, 2, 3])"], "{transport}");
        }
    }
}

/// Rank 3 ends in order while a group still calls on it: then it is lost.
pub(super) fn end_in_order() {
    let communicator = connect();
    let group = communicator.subset(&[1, 3]).unwrap();
    meet("made", 4);
    if communicator.rank() == 3 {
        return;
    }
    if let Some(group) = group {
        let error = group.barrier().unwrap_err();
        assert_eq!((error.kind(), error.lost()), (ErrorKind::ViewChanged, &[1][..]), "{error}");
        reach("lost");
    }
    // Until then nobody else misses it.
    await_others("lost", 1, LIMIT);
    let rebuilt = rebuild_until(communicator, 3).unwrap();
    tell(format!("{:?}", view(&rebuilt).1));
}

#[test]
fn a_member_that_has_ended_in_order_is_lost_once_its_group_needs_it() {
    for transport in support::transports() {
        let world = World::new(4, "end_in_order").set("UNISUM_TRANSPORT", transport);
        for told in &world.succeed(LIMIT)[..3] {
            assert_eq!(*told, ["[0, 1, 2]"], "{transport}");
        }
    }
}

/// Rank 3, number 1 of the group, does not come to a call of the group in time.
pub(super) fn be_late() {
    let communicator = connect();
    if let Some(group) = communicator.subset(&[0, 3, 1]).unwrap() {
        if group.rank() == 1 {
            await_others("given_up", 2, LIMIT);
        } else {
            let error = group.barrier().unwrap_err();
            assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Timeout, &[1][..]));
            reach("given_up");
        }
        assert!(group.barrier().is_err());
    }
    await_others("given_up", 2, LIMIT);
    // Nobody is lost, and the job's communicator goes on.
    communicator.barrier().unwrap();
    tell(format!("{:?}", view(&communicator)));
}

#[test]
fn a_call_of_a_group_that_is_overdue_ends_the_group_alone_and_names_who_is_late() {
    for transport in support::transports() {
        let world =
            World::new(4, "be_late").set("UNISUM_TRANSPORT", transport).set("UNISUM_TIMEOUT", 4);
        for told in world.succeed(LIMIT) {
            assert_eq!(told, ["(1, [0, 1, 2, 3])"], "{transport}");
        }
    }
}

/// Streams in the group of the last ranks, one of which is stopped.
pub(super) fn be_stopped() {
    let communicator = connect();
    let group = communicator.subset(&[1, 2, 3]).unwrap();
    let Some(group) = group else {
        await_others("gone", 2, LIMIT);
        return tell(view(&rebuild_until(communicator, 3).unwrap()).0);
    };
    let error = stream(&group, "streaming", &AtomicBool::new(false)).unwrap_err();
    if error.kind() != ErrorKind::ViewChanged {
        return tell_error(&error);
    }
    assert_eq!(error.lost(), [1]);
    reach("gone");
    tell(view(&rebuild_until(communicator, 3).unwrap()).0);
}

#[test]
fn a_stopped_member_is_left_behind_by_the_job_when_a_call_of_its_group_is_overdue() {
    let world =
        World::new(4, "be_stopped").set("UNISUM_TIMEOUT", 5).set("UNISUM_HEARTBEAT_TIMEOUT", 5);
    let running = world.start();
    running.wait_for("streaming", 3, LIMIT);
    running.signal(2, libc::SIGSTOP);
    support::wait_until("the others end", LIMIT, || {
        [0, 1, 3].iter().all(|&rank| !running.lives(rank))
    });
    running.signal(2, libc::SIGCONT);
    let ended = running.wait(LIMIT);
    for rank in [0, 1, 3] {
        assert_eq!(ended[rank].told, ["2"], "{ended:#?}");
    }
    assert!(ended[2].told[0].starts_with("RankLost "), "{ended:#?}");
}

/// A rank ends its group by [`Communicator::abort`]: the job goes on.
pub(super) fn be_aborted() {
    let communicator = connect();
    if let Some(group) = communicator.subset(&[3, 1]).unwrap() {
        let error = match group.rank() {
            0 => group.abort("it has had enough"),
            _ => group.barrier().unwrap_err(),
        };
        assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Aborted, &[0][..]));
    }
    communicator.barrier().unwrap();
    tell(format!("{:?}", view(&communicator)));
}

#[test]
fn a_group_that_is_aborted_ends_alone() {
    for told in World::new(4, "be_aborted").succeed(LIMIT) {
        assert_eq!(told, ["(1, [0, 1, 2, 3])"]);
    }
}

/// The ports that this process listens at.
fn listening() -> Vec<u16> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let links = links.filter_map(|it| std::fs::read_link(it.path()).ok());
    let own: Vec<String> = links.map(|it| it.to_string_lossy().into_owned()).collect();
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    let tables: Vec<String> =
        tables.iter().filter_map(|it| std::fs::read_to_string(it).ok()).collect();
    let rows = tables.iter().flat_map(|table| table.lines().skip(1));
    let rows = rows.map(|row| row.split_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row[3] == "0A" && own.contains(&format!("socket:[{}]", row[9])));
    ours.map(|row| u16::from_str_radix(row[1].rsplit_once(':').unwrap().1, 16).unwrap()).collect()
}

/// Rank 2, no member, comes to the port of the group's rank 0 with other tokens and names.
pub(super) fn intrude() {
    let communicator = connect();
    let before = listening();
    let group = communicator.subset(&[0, 1]).unwrap();
    let new: Vec<u16> = listening().into_iter().filter(|it| !before.contains(it)).collect();
    let mut ports = [new.first().copied().map_or(0, u64::from)];
    communicator.broadcast(&mut ports, 0).unwrap();
    let at = SocketAddr::from(([127, 0, 0, 1], ports[0] as u16));
    if let Some(group) = &group {
        assert_eq!(new.len(), 1, "each member listens for the group");
        communicator.barrier().unwrap();
        assert!(step(group, 3, true).unwrap());
        return tell("disturbed by nobody");
    }
    assert!(new.is_empty(), "who is not in it does not listen for it");
    for (token, expected) in
        [("another token, as long", "token"), ("a token of the tests, long enough", "another job")]
    {
        let secret = Secret::new(token.as_bytes());
        let credentials = match setting("UNISUM_TLS").as_str() {
            "off" => Credentials::clear(secret),
            _ => Credentials::token(secret, Sealing::BetweenHosts).unwrap(),
        };
        let error = Control::start(ControlConfig {
            rank: 1,
            world: 2,
            rendezvous: Rendezvous::Store { key: "guessed".into(), addresses: vec![at] },
            job: "guessed".into(),
            credentials,
            secret_origin: "the test".into(),
            interface: None,
            port_range: None,
            towards: None,
            connect_timeout: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(5),
            reconnect_timeout: Duration::ZERO,
            build: Build { version: [0, 0, 0], sources: 0 },
            prepare_listener: |_| (),
            publish: None,
            is_moot: None,
        });
        let error = error.unwrap_err().to_string();
        tell(format!("{} {error}", error.contains(expected)));
    }
    communicator.barrier().unwrap();
}

#[test]
fn who_has_not_the_jobs_token_or_guesses_the_groups_name_is_refused_at_its_port() {
    for tls in ["off", "token"] {
        let world = World::new(3, "intrude").set("UNISUM_TLS", tls);
        let told = world.succeed(LIMIT);
        assert!(told[..2].iter().all(|it| *it == ["disturbed by nobody"]), "{told:?}");
        assert!(
            told[2].len() == 2 && told[2].iter().all(|it| it.starts_with("true ")),
            "{told:#?}"
        );
    }
}

/// Makes pairs again and again; tells what one of them holds, and how long it took in the middle.
pub(super) fn count_costs() {
    let communicator = match setting("IS_ELASTIC").as_str() {
        "1" => connect(),
        _ => Communicator::from_environment().unwrap(),
    };
    let pair = || communicator.split(Some(communicator.rank() as u32 / 2), 0).unwrap().unwrap();
    // What the first call alone opens.
    assert!(step(&communicator, 1, true).unwrap());
    let (files, threads) = open_files_and_threads();
    let mut groups = Vec::new();
    let mut times: Vec<_> = (0..11)
        .map(|_| {
            let began = Instant::now();
            groups.push(pair());
            began.elapsed()
        })
        .collect();
    times.sort();
    let now = open_files_and_threads();
    let each = |now: usize, before: usize| (now - before) as f64 / groups.len() as f64;
    tell(each(now.1, threads));
    tell(each(now.0, files));
    tell(times[times.len() / 2].as_micros());
    assert!(groups.iter().all(|group| step(group, 1, true).unwrap()));
}

#[test]
fn a_group_has_one_thread_and_a_few_descriptors_in_an_elastic_job_and_none_in_others() {
    for transport in support::transports() {
        for (is_elastic, threads, files) in [(0, 0.0, 6.0), (1, 1.0, 12.0)] {
            let world = World::new(4, "count_costs")
                .set("UNISUM_TRANSPORT", transport)
                // Or the first calls try algorithms.
                .set("UNISUM_REPRODUCIBLE", 1)
                .set("IS_ELASTIC", is_elastic);
            let told = world.succeed(LIMIT);
            println!("{transport}, elastic {is_elastic}: {told:?}");
            for told in told {
                let told: Vec<f64> = told.iter().map(|it| it.parse().unwrap()).collect();
                assert!(told[0] == threads && told[1] <= files, "{transport}: {told:?}");
            }
        }
    }
}

/// Makes a group whose rank 0 can't listen: none of the job's ports is free.
pub(super) fn lack_a_port() {
    let communicator = connect();
    let (first, last) = (setting("FIRST_PORT"), setting("LAST_PORT"));
    let (first, last): (u16, u16) = (first.parse().unwrap(), last.parse().unwrap());
    let take = |port| std::net::TcpListener::bind(("0.0.0.0", port)).ok();
    let taken: Vec<_> = match communicator.rank() {
        0 => (first..=last).filter_map(take).collect(),
        _ => Vec::new(),
    };
    communicator.barrier().unwrap();
    let begun = Instant::now();
    let error = communicator.subset(&[0, 1]).unwrap_err();
    // It is no cut, which is waited out.
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    communicator.barrier().unwrap();
    drop(taken);
    let group = communicator.subset(&[0, 1]).unwrap();
    group.iter().for_each(|group| group.barrier().unwrap());
    communicator.barrier().unwrap();
    tell(format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()));
}

#[test]
fn a_group_whose_first_rank_can_not_listen_fails_at_once_where_cuts_are_waited_out() {
    let ports = support::free_ports(24);
    let (first, last) = (ports[0], ports[23]);
    let world = World::new(3, "lack_a_port")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_RECONNECT_TIMEOUT", 60)
        .set("UNISUM_PORT_RANGE", format!("{first}-{last}"))
        .set("FIRST_PORT", first)
        .set("LAST_PORT", last);
    for (rank, told) in succeeded(&world.start().wait(LIMIT), &[]) {
        // Its peer knows that it is not there, whoever is not in the group knows why.
        let (kind, why) = match rank {
            1 => ("Rendezvous [0] ", "rank 0 of the group has not connected"),
            _ => ("Configuration [0] ", "listening on"),
        };
        assert!(told[0].starts_with(kind) && told[0].contains(why), "rank {rank}: {told:?}");
    }
}
