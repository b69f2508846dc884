//! Whom a newcomer reaches by a record of which some addresses are somebody else's by now.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::*;

/// A record whose first members are somewhere else, before those that there are.
fn behind(elsewhere: &[SocketAddr], members: &[Views]) -> Record {
    let mut record = record(members);
    let lost = elsewhere.iter().zip(100..).map(|(&at, number)| (Member(number), vec![at]));
    record.members.splice(0..0, lost);
    record
}

fn address(views: &Views) -> SocketAddr {
    record(std::slice::from_ref(views)).members[0].1[0]
}

#[test]
fn somebody_else_at_a_lost_members_port_does_not_keep_a_newcomer_out() {
    let mut all = found(2);
    let other = ViewsConfig { job: "another".into(), ..config() };
    let secret = Credentials::clear(Secret::new(b"another token of these tests"));
    let stranger = ViewsConfig { credentials: secret, ..config() };
    let others =
        [&other, &stranger].map(|config| found_at(1, config, |_, addresses| addresses).remove(0));
    // One of the job itself, which is another rank than the newcomer looks for.
    let own = address(&all[1]);
    let elsewhere = [address(&others[0]), address(&others[1]), own];
    let asking = ask(behind(&elsewhere, &all), config(), soon());
    await_asking(&all, 1);
    admit(&all);
    all.push(asking.join().unwrap().unwrap());
    assert_eq!(common_view(&all, 3).members[..2], [0, 1].map(Member));
}

#[test]
fn if_all_refuse_the_one_that_knows_most_is_told_at_once() {
    let members = found(2);
    let secret = Credentials::clear(Secret::new(b"another token of these tests"));
    let another = ViewsConfig { job: "another".into(), credentials: secret, ..config() };
    let another = found_at(1, &another, |_, addresses| addresses).remove(0);
    let build = Build { sources: 5, ..config().build };
    let started = Instant::now();
    let record = behind(&[address(&another)], &members);
    let error = ask(record, ViewsConfig { build, ..config() }, soon()).join().unwrap();
    let error = error.unwrap_err().to_string();
    assert!(error.contains("all need the same build"), "{error}");
    // Nobody of the job is left.
    let mut record = behind(&[address(&another)], &members);
    record.members.truncate(1);
    let error = ask(record, config(), soon()).join().unwrap().unwrap_err().to_string();
    assert!(error.contains("token"), "{error}");
    assert!(started.elapsed() < STALE, "{:?}", started.elapsed());
}

/// Less than a record without an answer is tried for.
const STALE: Duration = Duration::from_secs(3);

/// One member has no file descriptor for a moment, and the other's port is another job's.
#[test]
fn who_has_no_descriptor_is_asked_again() {
    let mut all = found(1);
    let another = ViewsConfig { job: "another".into(), ..config() };
    let another = found_at(1, &another, |_, addresses| addresses).remove(0);
    let door = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, target) = (door.local_addr().unwrap(), address(&all[0]));
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    // The first two visitors are turned away, and all others led to the member. It ends with the
    // process.
    std::thread::spawn(move || {
        for visitor in door.incoming() {
            let mut visitor = visitor.unwrap();
            // Nothing else is ordered by it.
            if counter.fetch_add(1, Relaxed) < 2 {
                let _ = visitor.read(&mut [0; 256]);
                visitor.write_all(&Refusal::Exhausted.encode()).unwrap();
                continue;
            }
            let member = std::net::TcpStream::connect(target).unwrap();
            let (mut from, mut to) = (visitor.try_clone().unwrap(), member.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            let (mut from, mut to) = (member, visitor);
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        }
    });
    let mut record = behind(&[address(&another)], &all);
    record.members[1].1 = vec![at];
    let asking = ask(record, config(), soon());
    await_asking(&all, 1);
    admit(&all);
    all.push(asking.join().unwrap().unwrap());
    assert_eq!(common_view(&all, 2).members[0], Member(0));
    assert!(asked.load(Relaxed) > 2);
}
