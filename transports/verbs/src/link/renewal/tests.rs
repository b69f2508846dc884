//! Streams of messages between links whose queue pairs fail, on simulated devices.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;

use unisum_kernels::Dtype;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Heard, Secret};
use unisum_link::secure::{Credentials, Listening, Proven};
use unisum_link::{Call, Landing, Link as _, Rank, Region, Regions, Ticket};

use super::*;
use crate::domain::Domain;
use crate::ffi::simulated;
use crate::{Offer, Registry, VerbsConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const SESSION: [u8; 16] = [5; 16];
const JOB: [u8; 16] = [6; 16];

/// The devices are one world: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn credentials() -> Credentials {
    Credentials::clear(Secret::new(b"the token of these tests"))
}

#[derive(Debug)]
struct Silent;

impl Wake for Silent {
    fn wake(&self) {}
}

/// Proves a connection that came, as the thread does that accepts.
fn admit(mut stream: TcpStream, own: Rank, inbox: &Inbox) {
    let mut listening = Listening::new(random().unwrap(), true);
    let mut buffer = [0; 256];
    loop {
        let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
        match listening.feed(&buffer[..read], &credentials(), |_| Ok(())) {
            Heard::More => {}
            Heard::Send(send) => stream.write_all(&send).unwrap(),
            Heard::Admitted(hello, send) => {
                assert_eq!((hello.session, hello.job, hello.to), (SESSION, JOB, own as u32));
                stream.write_all(&send).unwrap();
                let proven = Proven::new(ParentOnly::new(stream), None);
                return inbox.deliver(hello.from as Rank, hello.socket, proven);
            }
            Heard::Refused(refusal, _) => panic!("{refusal}"),
        }
    }
}

/// Connected links, by rank, and their ports.
fn links(world: usize, limit: Option<Duration>, pairs: usize) -> Vec<(VerbsLink, TcpListener)> {
    let listeners: Vec<_> = (0..world).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<Vec<SocketAddr>> =
        listeners.iter().map(|it| vec![it.local_addr().unwrap()]).collect();
    let offers: Vec<Offer> = (0..world)
        .map(|rank| {
            let (port, gid) = simulated::port();
            let domain = Domain::open_with(simulated::library(), port, gid).unwrap();
            let peers: Vec<Rank> = (0..world).filter(|peer| *peer != rank).collect();
            let config = VerbsConfig { pairs_per_peer: pairs, ..VerbsConfig::default() };
            let registry = Registry::new(vec![domain]);
            let offer = Offer::beside(&registry, rank, world, &peers, config).unwrap();
            match limit {
                Some(limit) => {
                    let ways = Ways::new(addresses.clone(), JOB, credentials(), limit);
                    offer.with_ways(ways, SESSION)
                }
                None => offer,
            }
        })
        .collect();
    let cards: Vec<Vec<Vec<u8>>> = offers.iter().map(Offer::cards).collect();
    let links: Vec<VerbsLink> = offers
        .into_iter()
        .enumerate()
        .map(|(rank, offer)| {
            let told: Vec<_> = cards.iter().map(|cards| cards[rank].clone()).collect();
            offer.connect(&told).unwrap()
        })
        .collect();
    let prove = |mut link: VerbsLink| {
        thread::spawn(move || {
            link.prove(Instant::now() + PATIENCE).unwrap();
            link
        })
    };
    let proofs: Vec<_> = links.into_iter().map(prove).collect();
    let links = proofs.into_iter().map(|proof| proof.join().unwrap());
    links.zip(listeners).collect()
}

/// Takes what comes to a link's port, for as long as the test's process lives. With `cuts`, most
/// connections break after 0 to 1.4 ms.
fn serve(rank: Rank, link: &VerbsLink, listener: &TcpListener, cuts: bool) {
    let (inbox, listener) = (link.inbox().unwrap(), listener.try_clone().unwrap());
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let other = stream.try_clone().unwrap();
            admit(stream, rank, &inbox);
            let [moment] = random().unwrap();
            if cuts && moment < 144 {
                thread::sleep(Duration::from_micros(u64::from(moment) * 10));
                // It may have ended by itself.
                let _ = other.shutdown(Shutdown::Both);
            }
        }
    });
}

fn call(number: u64) -> Call {
    Call { number, ..Call::all_reduce(0, Dtype::U8, 1) }
}

/// The bytes of a message.
fn content(from: Rank, to: Rank, round: u64, bytes: usize) -> impl Iterator<Item = u8> {
    let seed = from as u64 * 31 + to as u64 * 17 + round * 101;
    (0..bytes as u64).map(move |at| (seed + at * 7 + at / 251) as u8)
}

/// The length of a round's message: one of four goes through a cell, or all but one.
fn length(from: Rank, to: Rank, round: u64) -> usize {
    let mix = (from as u64 * 7919 + to as u64 * 104_729 + round * 1_299_709) % 1000;
    match round % 4 {
        0 => 1 + (mix as usize * 211),
        _ => 1 + mix as usize * 5,
    }
}

const ROOM: usize = 256 << 10;

/// Sends to all others and receives of all, so many times; `pause` is awaited in some rounds.
fn stream(link: &mut VerbsLink, world: usize, rounds: u64, pause: Duration) {
    let rank = link.state.rank;
    let mut memory = vec![0_u8; 2 * world * ROOM];
    let base = NonNull::from(&mut memory[..]).cast();
    // SAFETY: the memory outlives the link's transfers, and is touched only between them.
    let region = unsafe { Region::new(base, 2 * world * ROOM, None) };
    for round in 0..rounds {
        for peer in (0..world).filter(|peer| *peer != rank) {
            let bytes = length(rank, peer, round);
            let place = &mut memory[peer * ROOM..][..bytes];
            place.iter_mut().zip(content(rank, peer, round, bytes)).for_each(|(to, it)| *to = it);
        }
        memory[world * ROOM..].fill(0);
        link.begin(&call(round), &Regions::in_place(region));
        let mut open = 0;
        for peer in (0..world).filter(|peer| *peer != rank) {
            let (there, here) = (length(rank, peer, round), length(peer, rank, round));
            let from = region.part(&(peer * ROOM..peer * ROOM + there));
            let into = (world + peer) * ROOM;
            let into = region.part(&(into..into + here));
            link.receive(peer, into, Landing::Place, Ticket(2 * peer as u64)).unwrap();
            link.send(peer, from, Ticket(2 * peer as u64 + 1)).unwrap();
            open += 2;
        }
        let (mut done, until) = (Vec::new(), Instant::now() + PATIENCE);
        while done.len() < open {
            link.progress(&mut done).unwrap();
            assert!(Instant::now() < until, "rank {rank} hangs in round {round}");
            if done.len() < open {
                link.park(Instant::now() + Duration::from_millis(100), 1).unwrap();
            }
        }
        for peer in (0..world).filter(|peer| *peer != rank) {
            let bytes = length(peer, rank, round);
            let came = memory[(world + peer) * ROOM..][..bytes].iter().copied();
            let is_right = came.eq(content(peer, rank, round, bytes));
            assert!(is_right, "what rank {peer} sent to {rank} in round {round} is not what came");
        }
        if (round + rank as u64).is_multiple_of(16) {
            thread::sleep(pause);
        }
    }
}

/// Streams between all, while queue pairs fail; how many did.
fn streams(world: usize, rounds: u64, pairs: usize, one_in: u64, cuts: bool) -> u64 {
    let links = links(world, Some(Duration::from_secs(20)), pairs);
    let before = simulated::failures();
    simulated::fail_one_in(one_in);
    let barrier = Barrier::new(world);
    thread::scope(|scope| {
        for (rank, (mut link, listener)) in links.into_iter().enumerate() {
            serve(rank, &link, &listener, cuts);
            let barrier = &barrier;
            scope.spawn(move || {
                stream(&mut link, world, rounds, Duration::from_millis(1));
                // They leave at different times.
                drop(link);
                barrier.wait();
            });
        }
    });
    simulated::fail_one_in(0);
    simulated::failures() - before
}

#[test]
fn nothing_is_lost_or_doubled_where_queue_pairs_fail_at_any_moment() {
    let _alone = alone();
    for (world, pairs) in [(2, 1), (2, 2), (3, 2)] {
        let failed = streams(world, 400, pairs, 60, false);
        assert!(failed >= 10, "only {failed} queue pairs failed");
    }
}

#[test]
fn nothing_is_lost_or_doubled_where_the_ways_to_agree_on_that_are_cut_too() {
    let _alone = alone();
    let failed = streams(2, 200, 2, 60, true) + streams(3, 200, 1, 60, true);
    assert!(failed >= 10, "only {failed} queue pairs failed");
}

#[test]
fn a_link_without_ways_fails_at_once() {
    let _alone = alone();
    let mut links = links(2, None, 1);
    let link = &mut links[0].0;
    assert!(link.inbox().is_none());
    simulated::fail(link.peers[0].connections[0].pair.number());
    let until = Instant::now() + PATIENCE;
    let error = loop {
        if let Err(error) = link.progress(&mut Vec::new()) {
            break error;
        }
        assert!(Instant::now() < until);
    };
    assert_eq!(error.peer, 1);
}

/// Has `own`'s queue pair to a peer that is `gone` fail; how long it takes until that is an error.
fn lost(own: Rank, limit: Duration, gone: impl FnOnce(TcpListener)) -> (Duration, LinkError) {
    let mut links = links(2, Some(limit), 1);
    let (there, listener) = links.remove(1 - own);
    let (mut link, own_listener) = links.remove(0);
    serve(own, &link, &own_listener, false);
    gone(listener);
    let mut memory = vec![0_u8; 1 << 10];
    let base = NonNull::from(&mut memory[..]).cast();
    // SAFETY: the memory outlives the link's transfers.
    let region = unsafe { Region::new(base, 1 << 10, None) };
    link.begin(&call(0), &Regions::in_place(region));
    link.receive(1 - own, region, Landing::Place, Ticket(0)).unwrap();
    simulated::fail(link.peers[0].connections[0].pair.number());
    let since = Instant::now();
    let error = loop {
        if let Err(error) = link.progress(&mut Vec::new()) {
            break error;
        }
        assert!(since.elapsed() < PATIENCE);
        link.park(Instant::now() + Duration::from_millis(20), 1).unwrap();
    };
    let took = since.elapsed();
    link.abort();
    // It is as if its process had ended: it says nothing any more.
    std::mem::forget(there);
    (took, error)
}

#[test]
fn a_port_that_refuses_is_a_death_for_who_dials_and_for_who_asks() {
    let _alone = alone();
    for own in [0, 1] {
        let (took, error) = lost(own, Duration::from_secs(50), drop);
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(error.peer, 1 - own);
        assert!(error.to_string().contains("queue pair"), "{error}");
    }
}

#[test]
fn who_dies_while_queue_pairs_are_made_anew_is_noticed() {
    let _alone = alone();
    let (took, error) = lost(1, Duration::from_secs(50), |listener| {
        let inbox = Inbox::new(Arc::new(Silent));
        thread::spawn(move || {
            admit(listener.accept().unwrap().0, 0, &inbox);
            thread::sleep(Duration::from_millis(300));
            // Its port closes, and then what was taken there.
            drop(listener);
            drop(inbox);
        });
    });
    assert!((Duration::from_millis(300)..Duration::from_secs(10)).contains(&took), "{took:?}");
    assert_eq!(error.peer, 0);
}

#[test]
fn who_does_not_answer_is_waited_for_as_long_as_was_set() {
    let _alone = alone();
    for own in [0, 1] {
        let limit = Duration::from_millis(700);
        // Nobody accepts.
        let (took, error) = lost(own, limit, std::mem::forget);
        assert!((limit..Duration::from_secs(10)).contains(&took), "{took:?}");
        assert_eq!(error.peer, 1 - own);
    }
}

#[test]
fn what_was_sent_last_arrives_also_where_its_sender_leaves() {
    let _alone = alone();
    for sender in [0, 1] {
        let mut links = links(2, Some(Duration::from_secs(20)), 1);
        for (rank, (link, listener)) in links.iter().enumerate() {
            serve(rank, link, listener, false);
        }
        let (mut own, _listener) = links.remove(sender);
        let (mut other, _other_listener) = links.remove(0);
        let mut memory = [vec![7_u8; 1 << 10], vec![0_u8; 1 << 10]];
        let regions = memory.each_mut().map(|memory| {
            // SAFETY: the memory outlives the links' transfers.
            unsafe { Region::new(NonNull::from(&mut memory[..]).cast(), 1 << 10, None) }
        });
        // It fails with the message in it, before that is reported.
        simulated::fail_one_in(1);
        own.begin(&call(0), &Regions::in_place(regions[0]));
        own.send(1 - sender, regions[0], Ticket(0)).unwrap();
        let (mut done, until) = (Vec::new(), Instant::now() + PATIENCE);
        while done.is_empty() {
            own.progress(&mut done).unwrap();
            assert!(Instant::now() < until);
        }
        let number = own.peers[0].connections[0].pair.number();
        while own.peers[0].renewal.is_none() {
            own.progress(&mut done).unwrap();
            assert!(Instant::now() < until, "queue pair {number} does not fail");
        }
        simulated::fail_one_in(0);
        let leaving = thread::spawn(move || drop(own));
        // The other one computes meanwhile.
        thread::sleep(Duration::from_millis(600));
        assert!(!leaving.is_finished(), "it left without an answer");
        other.begin(&call(0), &Regions::in_place(regions[1]));
        other.receive(sender, regions[1], Landing::Place, Ticket(0)).unwrap();
        let mut done = Vec::new();
        while done.is_empty() {
            other.progress(&mut done).unwrap();
            assert!(Instant::now() < until, "the last message was lost");
        }
        while !leaving.is_finished() {
            // What is still asked is answered.
            let _ = other.progress(&mut done);
            assert!(Instant::now() < until, "it does not leave");
        }
        leaving.join().unwrap();
        drop(other);
        assert!(memory[1].iter().all(|byte| *byte == 7));
    }
}

/// What becomes of a link and of the connection, when rank 1 says these words to rank 0.
fn say(first: &First) -> (Option<LinkError>, bool) {
    let mut links = links(2, Some(Duration::from_secs(50)), 1);
    let (there, _there_listener) = links.remove(1);
    let (mut link, listener) = links.remove(0);
    serve(0, &link, &listener, false);
    let addresses = [&listener, &_there_listener].map(|it| vec![it.local_addr().unwrap()]);
    let ways = Ways::new(addresses.to_vec(), JOB, credentials(), PATIENCE);
    let inbox = Arc::new(Inbox::new(Arc::new(Silent)));
    inbox.dial(ways.dial((1, 0), SESSION, 2, (Duration::ZERO, PATIENCE))).unwrap();
    let until = Instant::now() + PATIENCE;
    let mut proven = loop {
        if let Some(arrived) = inbox.take().pop() {
            break arrived.result.unwrap();
        }
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(1));
    };
    proven.write_all(&first.encode()).unwrap();
    proven.stream.set_nonblocking(true).unwrap();
    let mut is_closed = false;
    let mut error = None;
    while error.is_none() && !is_closed {
        error = link.progress(&mut Vec::new()).err();
        is_closed = matches!((&*proven.stream).read(&mut [0; 64]), Ok(0));
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(1));
    }
    drop(proven);
    std::mem::forget((there, link));
    (error, is_closed)
}

#[test]
fn words_that_cannot_be_are_an_error_and_old_ones_are_left() {
    let _alone = alone();
    let first = First { attempt: 2, psn: 3, connections: vec![(5, 1 << 40)] };
    let wrong = [
        first.clone(),
        First { connections: vec![(NUMBER_LIMIT, 1)], ..first.clone() },
        First { psn: NUMBER_LIMIT, connections: vec![(5, 1)], ..first },
    ];
    for first in wrong {
        let (error, _) = say(&first);
        let kind = error.map(|error| error.kind);
        assert!(matches!(kind, Some(LinkErrorKind::Protocol(_))), "{first:?}: {kind:?}");
    }
    let old = First { attempt: FIRST_ATTEMPT, connections: vec![(5, 1)], ..first };
    let (error, is_closed) = say(&old);
    assert!(error.is_none() && is_closed, "{error:?}");
}
