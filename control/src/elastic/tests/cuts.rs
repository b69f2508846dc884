//! Connections between members that are cut while the processes at both ends live.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use unisum_link::handshake::{self, Hello, Purpose, job_hash};

use super::joining::FIRST_NEWCOMER;
use super::*;
use crate::dial::{self, Again};
use crate::tests::relay::{How, Relay};

const ALL: [How; 4] = [How::Reset, How::Close, How::ResetDialer, How::ResetListener];

fn surviving(time: Duration) -> ViewsConfig {
    ViewsConfig { reconnect_timeout: time, ..config() }
}

/// Members that reach each other through relays, one before each of them.
fn found_relayed(members: usize, time: Duration) -> (Vec<Views>, Vec<Relay>) {
    let mut relays = Vec::new();
    let relayed = |_, addresses: Vec<SocketAddr>| {
        relays.push(Relay::new(IpAddr::from([127, 0, 0, 1]), addresses[0]));
        vec![relays.last().unwrap().address]
    };
    let all = found_at(members, &surviving(time), relayed);
    (all, relays)
}

fn drawn(below: u64) -> u64 {
    let [random] = handshake::random().unwrap();
    u64::from(random) * below / 256
}

fn pause(below_ms: u64) {
    std::thread::sleep(Duration::from_millis(drawn(below_ms)));
}

/// Cuts all connections there are at random moments until that `is_over`, now and then with a
/// longer and longer rest, so that something gets done on any machine.
fn cut_often(relays: &[Relay], is_over: impl Fn() -> bool) {
    let mut rest = Duration::from_millis(100);
    for round in 1.. {
        relays.iter().for_each(|it| it.cut(ALL[drawn(4) as usize]));
        pause(80);
        if round % 4 == 0 {
            std::thread::sleep(rest);
            rest = rest * 10 / 9;
        }
        if is_over() {
            return;
        }
    }
}

/// Nothing is cut any more after a failure either.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Whatever is agreed on and told, nobody is lost: each epoch is one that was asked for, with all
/// members, and its first rank's word reaches them all.
#[test]
fn members_agree_and_tell_while_their_connections_are_cut() {
    let (all, relays) = found_relayed(4, PATIENCE);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| cut_often(&relays, || is_over.load(Ordering::SeqCst)));
        let _over = Over(&is_over);
        for epoch in 1..=12 {
            let text = format!("at {epoch}");
            all[0].tell(epoch, text.as_bytes());
            for it in &all {
                assert_eq!(it.told(epoch, soon()).as_deref(), Some(text.as_bytes()), "{it:?}");
            }
            let asks = &all[drawn(4) as usize];
            asks.change(epoch, Vec::new(), false);
            for it in &all {
                let known = it.await_change(epoch, soon());
                assert_eq!((known.view.epoch, known.end), (epoch + 1, None), "{it:?}");
                assert_eq!(known.view.members, [0, 1, 2, 3].map(Member));
            }
        }
    });
    let relayed: u64 = relays.iter().map(Relay::relayed).sum();
    assert!(relayed > 12, "{relayed} connections, of which 6 were the first");
}

/// Nobody waits longer than the others for who has left, and nobody takes it for a death, which
/// would change the view.
#[test]
fn members_leave_in_order_while_their_connections_are_cut() {
    for _ in 0..3 {
        let (mut all, relays) = found_relayed(3, PATIENCE);
        while all.len() > 1 {
            let leaves = all.swap_remove(drawn(all.len() as u64) as usize);
            let started = Instant::now();
            std::thread::scope(|scope| {
                let cutting = scope.spawn(|| {
                    for _ in 0..3 {
                        relays.iter().for_each(|it| it.cut(ALL[drawn(4) as usize]));
                        pause(20);
                    }
                });
                pause(40);
                drop(leaves);
                cutting.join().unwrap();
            });
            assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
            // Longer than asking a port takes that refuses.
            std::thread::sleep(Duration::from_millis(200));
            for it in &all {
                let known = it.membership();
                assert_eq!((known.view.epoch, known.is_changing), (1, false), "{it:?}");
            }
        }
    }
}

/// Who does not come back is lost when the time is up, and not before.
#[test]
fn a_member_that_does_not_come_back_is_lost_in_time() {
    let time = Duration::from_secs(2);
    let (all, relays) = found_relayed(3, time);
    // The others dial it here; it dials nobody.
    let started = Instant::now();
    relays[0].go_down();
    let known = all[1].await_change(1, soon());
    let took = started.elapsed();
    assert!(took >= time, "{took:?}");
    assert!(took < time * 4, "{took:?}");
    assert_eq!(known.view.members, [1, 2].map(Member), "{known:?}");
}

/// Without the setting the end of a connection is a loss at once.
#[test]
fn without_the_setting_a_cut_is_a_loss() {
    let (all, relays) = found_relayed(3, Duration::ZERO);
    relays[0].cut(How::Reset);
    assert_eq!(all[1].await_change(1, soon()).view.members, [1, 2].map(Member));
}

/// Only the process itself goes on for it: the same number, in the same session, with an attempt
/// that it has not made before, at a member that has a connection with it.
#[test]
fn nobody_else_goes_on_for_a_member() {
    let (all, relays) = found_relayed(3, PATIENCE);
    // So that the member itself has gone on once.
    relays[1].cut(How::Reset);
    all[1].tell(1, b"here");
    assert_eq!(all[2].told(1, soon()).as_deref(), Some(&b"here"[..]));
    let target = [relays[1].address];
    let hello = Hello {
        purpose: Purpose::Resume,
        socket: 0,
        from: 2,
        to: 1,
        world: 0,
        session: SESSION,
        job: job_hash(&config().job),
        build: config().build,
    };
    let token = Secret::new(b"another token of these tests");
    let another = Credentials::clear(token);
    let again = |hello: &Hello, credentials: &Credentials, attempt, time| {
        let until = Instant::now() + time;
        dial::again(&target, (hello, credentials), (attempt, 0), until, false)
    };
    let own = config().credentials;
    let late = 1 << 60;
    for (what, hello) in [
        ("another start of the job", Hello { session: [8; 16], ..hello }),
        ("another job", Hello { job: job_hash("another"), ..hello }),
        ("another build", Hello { build: Build { sources: 5, ..hello.build }, ..hello }),
        ("a newcomer that was never met", Hello { from: 1 << 31, ..hello }),
        ("one that this member dials", Hello { from: 0, ..hello }),
        ("itself", Hello { from: 1, ..hello }),
        ("what is meant for another member", Hello { to: 0, ..hello }),
        ("a connection of another kind", Hello { purpose: Purpose::Control, ..hello }),
        ("a first connection", Hello { purpose: Purpose::View, ..hello }),
    ] {
        let met = again(&hello, &own, late, PATIENCE / 4);
        assert!(matches!(met, Again::Refused(_)), "{what}");
    }
    let met = again(&hello, &another, late, PATIENCE / 4);
    assert!(matches!(met, Again::Refused(_)), "another token");
    // Nor is one heard that was made before.
    let met = again(&hello, &own, 0, Duration::from_millis(300));
    assert!(matches!(met, Again::Silent), "an old attempt");
    all[2].change(1, Vec::new(), false);
    let view = View { epoch: 2, members: [0, 1, 2].map(Member).into() };
    for it in &all {
        assert_eq!(it.await_change(1, soon()).view, view, "nobody was disturbed");
    }
}

/// A newcomer dials a member that the record names, be its number larger or smaller. Whichever it
/// is, the connection goes on after a cut.
#[test]
fn a_newcomer_below_all_members_is_let_in_and_goes_on() {
    for how in [None].into_iter().chain(ALL.map(Some)) {
        let time = if how.is_some() { PATIENCE } else { Duration::ZERO };
        let with_number = |number| {
            let newcomer = Some(Member(FIRST_NEWCOMER + number));
            ViewsConfig { newcomer, ..surviving(time) }
        };
        let mut all = found_at(1, &surviving(time), |_, addresses| addresses);
        let asking = [20, 30].map(|number| ask(record(&all), with_number(number), soon()));
        await_asking(&all, 2);
        admit(&all);
        all.extend(asking.map(|it| it.join().unwrap().unwrap()));
        let view = common_view(&all, 3);
        drop(all.remove(0));
        all.iter().for_each(|it| it.change(view.epoch, vec![Member(0)], false));
        common_view(&all, 2);
        let mut record = record(&all);
        record.members.truncate(1);
        let relay = Relay::new(IpAddr::from([127, 0, 0, 1]), record.members[0].1[0]);
        record.members[0].1 = vec![relay.address];
        let asking = ask(record, with_number(10), soon());
        await_asking(&all, 1);
        admit(&all);
        all.push(asking.join().unwrap().unwrap());
        let view = common_view(&all, 3);
        let Some(how) = how else { continue };
        relay.cut(how);
        all[drawn(3) as usize].change(view.epoch, Vec::new(), false);
        for it in &all {
            let known = it.await_change(view.epoch, soon());
            assert_eq!(known.view.members, view.members, "{how:?}: {known:?}");
        }
    }
}
