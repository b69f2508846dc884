//! How members part, or don't, when a connection between them breaks at an awkward moment.

use std::net::IpAddr;

use unisum_link::handshake::{Hello, Purpose};

use super::*;
use crate::dial::{self, Again};
use crate::tests::relay::{How, Relay};

fn surviving(time: Duration) -> ViewsConfig {
    ViewsConfig { reconnect_timeout: time, ..config() }
}

/// What was reset before its thread took it over goes on like any other: the kernel does not know
/// any more who was at the other end.
#[test]
fn a_connection_that_breaks_before_it_is_taken_over_goes_on() {
    let config = surviving(PATIENCE);
    let prospects: Vec<_> =
        (0..2).map(|_| Prospect::listen(config.clone(), None).unwrap()).collect();
    let relay = Relay::new(IpAddr::from([127, 0, 0, 1]), prospects[0].addresses()[0]);
    let addresses = vec![vec![relay.address], prospects[1].addresses().to_vec()];
    let [first, second] = <[Prospect; 2]>::try_from(prospects).ok().unwrap();
    let first = first.found(SESSION, 0, addresses.clone(), &|| None).unwrap();
    let own = Member(1);
    let dialer = Dialer::new(&config, own, SESSION);
    let view = View::first([0, 1].map(Member).into());
    let directory = (0..).map(Member).zip(addresses.clone()).collect();
    let with = (directory, dialer.clone());
    let second = second.spawn(own, Some(view), SESSION, with).unwrap();
    let (proven, at) = dialer.dial(Member(0), &addresses[0], || false).unwrap();
    relay.cut(How::Reset);
    let until = soon();
    while proven.stream.peer_addr().is_ok() {
        assert!(Instant::now() < until, "it is not reset");
        std::thread::sleep(Duration::from_millis(1));
    }
    second.command(Command::Connected(Member(0), proven, at));
    second.change(1, Vec::new(), false);
    for it in [&first, &second] {
        let known = it.await_change(1, soon());
        assert_eq!((known.view.epoch, known.end), (2, None), "{it:?}");
        assert_eq!(known.view.members, [0, 1].map(Member));
    }
}

/// Who leaves stays for as long as it takes until its goodbye is taken, also where no connection is
/// away yet that a reset destroys later.
#[test]
fn a_goodbye_that_is_stuck_and_then_destroyed_is_said_again() {
    let mut relay = None;
    let mut all = found_at(2, &surviving(PATIENCE), |rank, addresses| {
        if rank > 0 {
            return addresses;
        }
        let relay = relay.insert(Relay::new(IpAddr::from([127, 0, 0, 1]), addresses[0]));
        vec![relay.address]
    });
    let relay = relay.unwrap();
    // It is connected through the relay.
    all[1].tell(1, b"here");
    assert_eq!(all[0].told(1, soon()).as_deref(), Some(&b"here"[..]));
    let leaves = all.pop().unwrap();
    relay.hold(true);
    let leaving = std::thread::spawn(move || drop(leaves));
    // Longer than those stay whose goodbyes were taken.
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!leaving.is_finished(), "nobody has taken the goodbye");
    relay.cut(How::Reset);
    relay.hold(false);
    let destroyed = Instant::now();
    leaving.join().unwrap();
    assert!(destroyed.elapsed() < PATIENCE / 2, "{:?}", destroyed.elapsed());
    // Longer than asking a port takes that refuses.
    std::thread::sleep(Duration::from_millis(500));
    let known = all[0].membership();
    assert_eq!((known.view.epoch, known.is_changing), (1, false), "{known:?}");
}

/// Says to a member, for the last one, that it has taken what was never said.
fn say_impossible(members: u32, to: u32, at: SocketAddr) {
    let hello = Hello {
        purpose: Purpose::Resume,
        socket: 0,
        from: members - 1,
        to,
        world: 0,
        session: SESSION,
        job: job_hash(&config().job),
        build: config().build,
    };
    let until = Instant::now() + PATIENCE / 4;
    let with = (&hello, &config().credentials);
    let again = dial::again(&[at], with, (1 << 60, 1_000_000), until, false);
    assert!(!matches!(again, Again::Reached(..)));
}

/// A process that does not know what was said on a connection, such as one that was started anew
/// under an old number, is no end of it. The one that finds that out is believed: the other one,
/// which it refuses from then on, does not accuse it in turn.
#[test]
fn who_has_taken_what_was_never_said_is_lost() {
    for _ in 0..5 {
        let mut ports = Vec::new();
        let all = found_at(3, &surviving(PATIENCE), |_, addresses| {
            ports.push(addresses[0]);
            addresses
        });
        say_impossible(3, 1, ports[1]);
        let started = Instant::now();
        for it in &all[..2] {
            let known = it.await_change(1, soon());
            assert_eq!(known.view.members, [0, 1].map(Member), "{it:?}");
        }
        let known = all[2].await_change(1, soon());
        let why = known.end.unwrap();
        assert!(why.contains("the other ranks went on without this one"), "{why}");
        drop(all);
        assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    }
}

/// Where nobody else is there to say so, who is refused knows it when the time is up.
#[test]
fn who_is_refused_by_the_only_other_member_is_stranded_in_time() {
    let time = Duration::from_secs(2);
    let mut ports = Vec::new();
    let all = found_at(2, &surviving(time), |_, addresses| {
        ports.push(addresses[0]);
        addresses
    });
    let started = Instant::now();
    say_impossible(2, 0, ports[0]);
    assert_eq!(all[0].await_change(1, soon()).view.members, [Member(0)]);
    let known = all[1].await_change(1, soon());
    let took = started.elapsed();
    assert!(known.end.is_some_and(|why| why.contains("no quorum")), "{:?}", all[1]);
    assert!(time <= took && took < time * 4, "{took:?}");
}
