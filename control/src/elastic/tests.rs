//! Members and newcomers on loopback: real sockets and threads, all in one process.

use std::time::{Duration, Instant};

use unisum_link::handshake::{Build, Refusal, Secret};
use unisum_link::secure::Credentials;

use super::*;

mod cuts;
mod newcomers;
mod partings;
mod starts;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const SESSION: [u8; 16] = [9; 16];

fn config() -> ViewsConfig {
    ViewsConfig {
        job: "a job of these tests".into(),
        credentials: Credentials::clear(Secret::new(b"the token of these tests")),
        interface: Some("=lo".parse().unwrap()),
        port_range: None,
        silence: Duration::from_secs(5),
        connect_timeout: PATIENCE,
        reconnect_timeout: Duration::ZERO,
        build: Build { version: [1, 2, 3], sources: 4 },
        terms: "minimum:1 other:7".into(),
        newcomer: None,
    }
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// A job of so many members.
fn found(members: usize) -> Vec<Views> {
    found_at(members, &config(), |_, addresses| addresses)
}

/// The same, where others are told that a member listens elsewhere.
fn found_at(
    members: usize,
    config: &ViewsConfig,
    mut at: impl FnMut(usize, Vec<SocketAddr>) -> Vec<SocketAddr>,
) -> Vec<Views> {
    let prospects: Vec<_> =
        (0..members).map(|_| Prospect::listen(config.clone(), None).unwrap()).collect();
    let listening = prospects.iter().map(|it| it.addresses().to_vec());
    let addresses: Vec<_> = listening.enumerate().map(|(rank, it)| at(rank, it)).collect();
    let founded = prospects.into_iter().enumerate().map(|(rank, prospect)| {
        let addresses = addresses.clone();
        std::thread::spawn(move || prospect.found(SESSION, rank, addresses, &|| None).unwrap())
    });
    let founded: Vec<_> = founded.collect();
    founded.into_iter().map(|it| it.join().unwrap()).collect()
}

/// Asks to be let in, on a thread of its own.
fn ask(
    record: Record,
    config: ViewsConfig,
    until: Instant,
) -> std::thread::JoinHandle<Result<Views, ControlError>> {
    std::thread::spawn(move || Views::join(&config, &mut || Ok(record.clone()), until))
}

fn record(of: &[Views]) -> Record {
    of[0].record(&of[0].membership().view)
}

/// Waits until all members know of so many that ask.
fn await_asking(members: &[Views], count: usize) {
    for member in members {
        let known = member.shared.wait(soon(), |it| it.newcomers == count);
        assert_eq!(known.newcomers, count, "{known:?}");
    }
}

/// All members of the job let those in that ask.
fn admit(members: &[Views]) {
    let epoch = members[0].membership().view.epoch;
    members.iter().for_each(|it| it.change(epoch, Vec::new(), true));
}

/// The view that all are in.
fn common_view(all: &[Views], world: usize) -> View {
    let views: Vec<View> = all
        .iter()
        .map(|it| {
            let known = it.shared.wait(soon(), |it| it.view.members.len() == world);
            assert!(known.end.is_none() && known.standing == Standing::Inside, "{known:?}");
            known.view
        })
        .collect();
    assert!(views.iter().all(|it| *it == views[0]), "{views:?}");
    views[0].clone()
}

#[test]
fn those_that_ask_enter_behind_the_members_and_reach_each_other() {
    let mut all = found(3);
    let asking: Vec<_> = (0..3).map(|_| ask(record(&all), config(), soon())).collect();
    await_asking(&all, 3);
    admit(&all);
    all.extend(asking.into_iter().map(|it| it.join().unwrap().unwrap()));
    let view = common_view(&all, 6);
    assert_eq!(view.members[..3], [0, 1, 2].map(Member));
    // The first of them tells the others something, whoever of the old ones is left.
    drop(all.drain(..3));
    let epoch = view.epoch;
    let first = all.iter().find(|it| it.own() == view.members[3]).unwrap();
    first.tell(epoch, b"here");
    for other in &all {
        assert_eq!(other.told(epoch, soon()).as_deref(), Some(&b"here"[..]), "{other:?}");
    }
    // Newcomers tell each other where they listen as they meet, which may come after the rest.
    let until = soon();
    while first.record(&view).members.len() < 6 {
        let known = first.record(&view);
        assert!(Instant::now() < until, "it knows where all are: {known:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn one_that_goes_before_it_is_let_in_is_forgotten() {
    let members = found(2);
    // Time for all members to hear of it.
    let asking = ask(record(&members), config(), Instant::now() + Duration::from_secs(4));
    await_asking(&members, 1);
    let error = asking.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("in epoch 1, have not let this process in"), "{error}");
    await_asking(&members, 0);
    let views = members.iter().map(|it| it.membership().view.epoch);
    assert!(views.eq([1, 1]), "nobody was disturbed");
}

#[test]
fn one_of_another_build_job_or_with_other_settings_is_refused_before_it_asks() {
    let members = found(2);
    let build = Build { sources: 5, ..config().build };
    let secret = Secret::new(b"another token of these tests");
    for (other, why) in [
        (ViewsConfig { build, ..config() }, "all need the same build"),
        (ViewsConfig { job: "another".into(), ..config() }, "another job"),
        (ViewsConfig { credentials: Credentials::clear(secret), ..config() }, "token"),
        (
            ViewsConfig { terms: "minimum:1 other:8".into(), ..config() },
            "this process has other:8, the job has other:7",
        ),
    ] {
        let error = ask(record(&members), other, soon()).join().unwrap().unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(members.iter().all(|it| it.membership().newcomers == 0));
}

#[test]
fn a_record_of_an_earlier_start_is_found_out() {
    let members = found(1);
    let stale = Record { session: [8; 16], ..record(&members) };
    let started = Instant::now();
    let error = ask(stale, config(), soon()).join().unwrap().unwrap_err().to_string();
    assert!(error.contains("so it has ended"), "{error}");
    assert!(error.contains("another session of the job"), "{error}");
    assert!(started.elapsed() < PATIENCE / 2);
}

#[test]
fn one_that_waits_hears_at_once_that_the_job_ends() {
    let members = found(2);
    let asking = ask(record(&members), config(), soon());
    await_asking(&members, 1);
    let ended = Instant::now();
    drop(members);
    let error = asking.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("the job ended while this process waited"), "{error}");
    assert!(ended.elapsed() < Duration::from_secs(5), "{:?}", ended.elapsed());
}

#[test]
fn who_leaves_in_order_is_lost_while_anybody_needs_all() {
    let mut all = found(3);
    for need in [true, true, false] {
        all[0].need_all(need);
    }
    drop(all.pop());
    let known = all[0].await_change(1, soon());
    assert_eq!(known.view.members, [0, 1].map(Member), "{known:?}");
    all[0].need_all(false);
    assert_eq!(all[1].await_change(1, soon()).view.epoch, 2);
    // What is said after it is done after it.
    all[0].tell(2, b"counted");
    assert!(all[1].told(2, soon()).is_some());
    drop(all.pop());
    let known = all[0].await_change(2, Instant::now() + Duration::from_millis(300));
    assert_eq!(known.view.epoch, 2, "nobody misses it");
}
