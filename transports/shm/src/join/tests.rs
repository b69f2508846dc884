use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use unisum_link::handshake::Secret;

use super::*;
use crate::card::Card;

const SESSION: [u8; 16] = [3; 16];

fn offers(secrets: &[&[u8]]) -> (Vec<Offer>, Vec<Vec<u8>>) {
    let offers: Vec<Offer> =
        secrets.iter().map(|secret| Offer::new(&Secret::new(secret)).unwrap()).collect();
    let cards = offers.iter().map(Offer::card).collect();
    (offers, cards)
}

/// Joins each offer as the rank of its index; `deadline` for all.
fn join_all(
    offers: Vec<Offer>,
    cards: &[Vec<u8>],
    within: Duration,
) -> Vec<Result<Candidate, ShmError>> {
    let deadline = Instant::now() + within;
    thread::scope(|scope| {
        let join = |(rank, offer): (Rank, Offer)| {
            scope.spawn(move || offer.join(rank, cards, SESSION, Some(4 << 20), deadline))
        };
        let ranks: Vec<_> = offers.into_iter().enumerate().map(join).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn dial(card: &[u8]) -> UnixStream {
    let name = Card::decode(card).unwrap().socket;
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}

#[test]
fn silence_garbage_and_floods_keep_nobody_from_joining() {
    let (offers, cards) = offers(&[b"job".as_slice(); 5]);
    // More silent connections than are kept, one that drips, one that talks nonsense.
    let silent: Vec<_> = (0..100).map(|_| dial(&cards[0])).collect();
    let mut dripping = dial(&cards[0]);
    dripping.write_all(&[1]).unwrap();
    dial(&cards[0]).write_all(&[0xff; 500]).unwrap();
    dial(&cards[0]).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let start = Instant::now();
    let joined = join_all(offers, &cards, Duration::from_secs(60));
    assert!(joined.iter().all(Result::is_ok), "{joined:?}");
    assert!(start.elapsed() < Duration::from_secs(30), "strangers held the job up");
    drop(silent);
}

#[test]
fn a_wrong_secret_gets_no_memory_and_the_others_go_on() {
    let (offers, cards) = offers(&[b"job", b"job", b"other"]);
    let mut joined = join_all(offers, &cards, Duration::from_secs(4));
    let refused = joined.pop().unwrap().unwrap_err();
    assert!(matches!(refused, ShmError::Refused { leader: 0, .. }), "{refused}");
    let links = thread::scope(|scope| {
        let deadline = Instant::now() + Duration::from_secs(10);
        let connect = |candidate: Result<Candidate, ShmError>| {
            scope.spawn(move || candidate.unwrap().connect(&[0, 1], deadline))
        };
        let links: Vec<_> = joined.into_iter().map(connect).collect();
        links.into_iter().map(|link| link.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(links.iter().all(Result::is_ok), "{links:?}");
}

#[test]
fn an_impostor_leader_gets_no_member() {
    let (mut offers, cards) = offers(&[b"other", b"job"]);
    let member = offers.pop().unwrap();
    let listener = offers.pop().unwrap().listener;
    listener.set_nonblocking(false).unwrap();
    let impostor = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[1; CHALLENGE_BYTES]).unwrap();
        let mut request = [0; REQUEST_BYTES];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&[9; GRANT_BYTES]).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    let error = member.join(1, &cards, SESSION, None, deadline).unwrap_err();
    assert!(matches!(error, ShmError::Refused { leader: 0, .. }), "{error}");
    impostor.join().unwrap();
}

#[test]
fn a_silent_leader_is_late() {
    let (mut offers, cards) = offers(&[b"job", b"job"]);
    let member = offers.pop().unwrap();
    let deadline = Instant::now() + Duration::from_millis(100);
    let error = member.join(1, &cards, SESSION, None, deadline).unwrap_err();
    assert!(matches!(&error, ShmError::Late(ranks) if *ranks == [0]), "{error}");
}

#[test]
fn a_member_that_never_comes_leaves_the_others_a_memory() {
    let (mut offers, cards) = offers(&[b"job".as_slice(); 3]);
    offers.pop();
    let joined = join_all(offers, &cards, Duration::from_secs(3));
    assert!(joined.iter().all(Result::is_ok), "{joined:?}");
    // A member that does not connect is named.
    let leader = joined.into_iter().next().unwrap().unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = leader.connect(&[0, 1], deadline).unwrap_err();
    assert!(matches!(&error, ShmError::Late(ranks) if *ranks == [1]), "{error}");
}

#[test]
fn a_rank_without_company_is_told_so() {
    let (mut offers, cards) = offers(&[b"job"]);
    let offer = offers.pop().unwrap();
    let error = offer.join(0, &cards, SESSION, None, Instant::now()).unwrap_err();
    assert!(matches!(error, ShmError::Alone), "{error}");
}
