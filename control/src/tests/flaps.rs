//! Connections that are cut while the processes at both ends live.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::relay::{How, Relay};
use super::*;

/// Where it is to pass.
const TIMEOUT: Duration = Duration::from_secs(2);

fn flapping(
    rank: Rank,
    world: usize,
    rendezvous: Rendezvous,
    reconnect_timeout: Duration,
) -> ControlConfig {
    ControlConfig { reconnect_timeout, ..config(rank, world, rendezvous) }
}

/// Ranks, each of which reaches rank 0 through a relay.
struct Flapping {
    relay: Relay,
    controls: Vec<Control>,
}

/// Whether the ranks are told where rank 0 itself listens, beside the relay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    All,
    Relay,
}

/// The relay is at another address than the ranks, so that there are pulses, too.
fn start_through_relay(world: usize, told: Told, time: Duration) -> Flapping {
    let first = Control::start(flapping(0, world, at(0), time)).unwrap();
    let target = first.addresses()[0];
    let relay = Relay::new(IpAddr::from([127, 0, 0, 2]), target);
    let (host, port) = (relay.address.ip().to_string(), relay.address.port());
    let starts: Vec<_> = (1..world)
        .map(|rank| {
            let rendezvous = Rendezvous::Tcp { host: host.clone(), port };
            let config = flapping(rank, world, rendezvous, time);
            thread::spawn(|| Control::start(config).unwrap())
        })
        .collect();
    let mut controls = vec![first];
    controls.extend(starts.into_iter().map(|start| start.join().unwrap()));
    exchange(&controls, 0);
    assert!(relay.carries(), "the ranks come past the relay");
    let mut addresses: Vec<Vec<SocketAddr>> =
        controls.iter().map(|it| it.addresses().to_vec()).collect();
    if told == Told::Relay {
        addresses[0] = vec![relay.address];
    }
    controls.iter().for_each(|control| control.set_addresses(addresses.clone()));
    Flapping { relay, controls }
}

/// Cuts connections a number of times, at random moments; after every third time `rest` lets them
/// go on, however busy the machine is.
fn cut_often(relay: &Relay, times: usize, mut rest: impl FnMut()) {
    let all = [How::Reset, How::Close, How::ResetDialer, How::ResetListener];
    for time in 1..=times {
        thread::sleep(Duration::from_millis(drawn(0, 60)));
        relay.cut(all[drawn(0, 3) as usize]);
        if time % 3 == 0 {
            rest();
        }
    }
}

fn drawn(from: u64, to: u64) -> u64 {
    let [random] = handshake::random().unwrap();
    from + u64::from(random) * (to - from) / 255
}

/// Exchanges, lines to keep and groups that are left: nothing of it is lost, doubled or in another
/// order, and there is no verdict.
#[test]
fn cuts_at_random_moments_lose_and_double_nothing() {
    let Flapping { relay, controls } = start_through_relay(4, Told::Relay, PATIENCE);
    let (rounds, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let cutting = scope.spawn(|| {
            cut_often(&relay, CUTS, || {
                let next = rounds.load(Ordering::SeqCst) + 2;
                while rounds.load(Ordering::SeqCst) < next && !is_over.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
            });
        });
        let _over = Over(&is_over);
        let mut kept = 0;
        while !cutting.is_finished() {
            let round = rounds.fetch_add(1, Ordering::SeqCst) as u32 + 1;
            for _ in 0..3 {
                controls[2].keep(format!("line {kept}"));
                kept += 1;
            }
            exchange(&controls, round as u8);
            for (rank, control) in controls.iter().enumerate() {
                control.enroll(round, [round as u8; 16], (rank, (0..4).collect()));
                control.withdraw(round);
            }
        }
        let expected: Vec<_> = (0..kept).map(|number| format!("line {number}")).collect();
        let until = Instant::now() + PATIENCE;
        let mut arrived = Vec::new();
        while arrived.len() < expected.len() {
            assert!(Instant::now() < until, "{} of {} lines came", arrived.len(), expected.len());
            arrived.extend(controls[0].kept().take());
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(arrived, expected);
    });
    for control in &controls {
        assert_eq!(control.verdict(), None);
    }
    // After each third cut at least, all three ranks have dialled again.
    assert!(relay.relayed() >= CUTS as u64, "{} connections", relay.relayed());
}

const CUTS: usize = 18;

/// Nobody waits for what does not come any more after a failure.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The goodbye is no message that may be lost either: who has left has not died.
#[test]
fn ranks_leave_in_order_while_connections_are_cut() {
    for first in 0..3 {
        let started = start_through_relay(3, Told::Relay, PATIENCE);
        let Flapping { relay, mut controls } = started;
        controls.rotate_left(first);
        for at in 0..controls.len() {
            assert_eq!(controls[at].verdict(), None);
            thread::scope(|scope| {
                scope.spawn(|| cut_often(&relay, 2, || {}));
                thread::sleep(Duration::from_millis(drawn(0, 60)));
                controls[at].leave();
            });
            for other in &controls[at + 1..] {
                let until = Instant::now() + PATIENCE;
                while !other.has_left_job(controls[at].shared.rank) {
                    assert_eq!(other.verdict(), None);
                    assert!(Instant::now() < until, "nobody heard the goodbye");
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

/// What others find out meanwhile reaches who is cut off for a while.
#[test]
fn a_verdict_reaches_a_rank_whose_connection_was_cut() {
    for how in [How::Reset, How::ResetDialer, How::ResetListener, How::Close] {
        let Flapping { relay, controls } = start_through_relay(3, Told::All, PATIENCE);
        relay.cut(how);
        let finding = Finding::Aborted;
        controls[1].accuse(Report::new(0, 1, finding, "the program has had enough"));
        expect_verdict(&controls, PATIENCE, VerdictKind::Aborted, &[1]);
    }
}

#[test]
fn a_way_that_is_gone_for_good_is_an_error_in_time_that_names_the_other_end() {
    let Flapping { relay, controls } = start_through_relay(3, Told::Relay, TIMEOUT);
    let started = Instant::now();
    relay.go_down();
    // Each rank names the coordinator, which names both.
    expect_verdict(&controls[..1], PATIENCE, VerdictKind::Unreachable, &[1, 2]);
    let took = started.elapsed();
    assert!(took >= TIMEOUT / 2 && took < TIMEOUT * 4, "{took:?}");
    expect_verdict(&controls[1..], PATIENCE, VerdictKind::Unreachable, &[0]);
    assert!(started.elapsed() < TIMEOUT * 6);
    let text = controls[0].verdict().unwrap().text;
    assert!(text.starts_with("rank 1 at 127.0.0.1, rank 2 at 127.0.0.1 unreachable"), "{text}");
}

/// Where the relay is gone, rank 0's own port is tried.
#[test]
fn another_address_of_the_coordinator_will_do() {
    let Flapping { relay, controls } = start_through_relay(3, Told::All, PATIENCE);
    relay.go_down();
    exchange(&controls, 1);
    assert_eq!(controls[1].verdict(), None);
}

/// The test's own member ends, and its port with it: that is a death at once.
#[test]
fn a_member_whose_port_refuses_has_died() {
    let first = Control::start(flapping(0, 3, at(0), PATIENCE)).unwrap();
    let rendezvous = at(first.addresses()[0].port());
    let second = {
        let config = flapping(1, 3, rendezvous.clone(), PATIENCE);
        thread::spawn(|| Control::start(config).unwrap())
    };
    let dying = join_by_hand(2, 3, &rendezvous);
    let controls = [first, second.join().unwrap()];
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut addresses: Vec<_> = controls.iter().map(|it| it.addresses().to_vec()).collect();
    addresses.push(vec![port.local_addr().unwrap()]);
    controls.iter().for_each(|control| control.set_addresses(addresses.clone()));
    // Its connection ends a while before its port, as that of a process that takes its time.
    drop(dying);
    thread::sleep(Duration::from_millis(200));
    assert!(controls.iter().all(|control| control.verdict().is_none()));
    drop(port);
    expect_verdict(&controls, PATIENCE / 4, VerdictKind::Died, &[2]);
}

/// Who knows the token and the session of the job has the place of a rank only with what that rank
/// has not used: its next attempt.
#[test]
fn nobody_goes_on_for_a_rank_with_an_attempt_that_was_made_before() {
    let Flapping { relay, controls } = start_through_relay(2, Told::All, PATIENCE);
    relay.cut(How::Reset);
    exchange(&controls, 1);
    let target = controls[0].addresses()[0];
    let session = controls[0].session();
    let hello = Hello { purpose: Purpose::Resume, session, ..hello(1, 2) };
    let again = |hello: &Hello, attempt, time| {
        let until = Instant::now() + time;
        dial::again(&[target], (hello, &credentials()), (attempt, 0), until, true)
    };
    // One that was made before is not answered; nor is one for another session, or rank.
    assert!(matches!(again(&hello, 0, Duration::from_millis(300)), dial::Again::Silent));
    let other = Hello { session: [9; 16], ..hello };
    assert!(matches!(again(&other, 1 << 60, PATIENCE), dial::Again::Refused(_)));
    let nobody = Hello { from: 0, ..hello };
    assert!(matches!(again(&nobody, 1 << 60, PATIENCE), dial::Again::Refused(_)));
    exchange(&controls, 2);
    assert_eq!(controls[0].verdict(), None);
}

/// Numbers of messages that were never sent are no way in either.
#[test]
fn who_has_taken_more_than_was_said_breaks_the_protocol() {
    let Flapping { relay: _relay, controls } = start_through_relay(2, Told::All, PATIENCE);
    let session = controls[0].session();
    let hello = Hello { purpose: Purpose::Resume, session, ..hello(1, 2) };
    let until = Instant::now() + PATIENCE / 4;
    let numbers = (1 << 60, 1_000_000);
    let target = [controls[0].addresses()[0]];
    let again = dial::again(&target, (&hello, &credentials()), numbers, until, true);
    assert!(!matches!(again, dial::Again::Reached(..)));
    expect_verdict(&controls[..1], PATIENCE, VerdictKind::Protocol, &[1]);
}

/// Off, a cut is what it was: a death, at once.
#[test]
fn without_the_setting_a_cut_is_a_death() {
    let (first, _) = coordinator(2);
    let relay = Relay::new(IpAddr::from([127, 0, 0, 1]), first.addresses()[0]);
    let second = Control::start(config(1, 2, at(relay.address.port()))).unwrap();
    let controls = [first, second];
    exchange(&controls, 0);
    let addresses: Vec<_> = controls.iter().map(|it| it.addresses().to_vec()).collect();
    controls.iter().for_each(|control| control.set_addresses(addresses.clone()));
    relay.cut(How::Reset);
    expect_verdict(&controls[..1], 2 * AT_ONCE, VerdictKind::Died, &[1]);
    expect_verdict(&controls[1..], 2 * AT_ONCE, VerdictKind::Died, &[0]);
}
