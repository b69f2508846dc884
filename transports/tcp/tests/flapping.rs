//! Connections that break, at any byte and again and again: with a time for reconnecting, what was
//! sent arrives once and in order all the same, and without a new connection the error is the one
//! that there would have been.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;
#[path = "common/proxy.rs"]
mod proxy;

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proxy::{Fate, Proxy, Random};
use unisum_kernels::Dtype;
use unisum_link::frame::HEADER_BYTES;
use unisum_link::handshake::{self, Hello, Purpose, Secret};
use unisum_link::secure::Credentials;
#[cfg(feature = "tls")]
use unisum_link::secure::Sealing;
use unisum_link::{Call, Landing, Link, LinkError, LinkErrorKind, Region, Regions, Ticket};
use unisum_tcp::{TcpConfig, TcpLink};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const SECRET: &[u8] = b"the token of these tests";

fn clear() -> Credentials {
    Credentials::clear(Secret::new(SECRET))
}

#[cfg(feature = "tls")]
fn encrypted() -> Credentials {
    Credentials::token(Secret::new(SECRET), Sealing::Everywhere).unwrap()
}

fn seed() -> u64 {
    let given = std::env::var("UNISUM_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(|| u64::from_le_bytes(handshake::random().unwrap()));
    println!("UNISUM_TEST_SEED={seed}");
    seed.max(1)
}

fn call(number: u64) -> Call {
    Call::all_reduce(number, Dtype::U8, 1)
}

/// Two ranks, of which the second reaches the first through a relay.
struct Pair {
    links: [TcpLink; 2],
    proxy: Proxy,
    target: SocketAddr,
    /// Whether the second is in the job still, as far as its port knows.
    is_second_there: Arc<AtomicBool>,
}

fn pair(credentials: &Credentials, sockets: u8, limit: Duration, fate: Fate, seed: u64) -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    let proxy = Proxy::new(target, fate, seed);
    let second = TcpListener::bind("127.0.0.1:0").unwrap();
    let behind = second.local_addr().unwrap();
    let links = [0, 1].map(|rank| {
        let routes = [proxy.address, behind].map(|it| Arc::new(it.into())).to_vec();
        TcpLink::new(TcpConfig {
            rank,
            routes,
            session: [7; 16],
            job: [8; 16],
            credentials: credentials.clone(),
            sockets_per_peer: sockets,
            connect_timeout: PATIENCE,
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout: limit,
        })
        .unwrap()
    });
    common::accept(listener, links[0].inbox(), credentials.clone(), usize::MAX);
    let is_second_there = Arc::new(AtomicBool::new(true));
    let (is_there, inbox) = (is_second_there.clone(), links[1].inbox());
    let is_there = move || is_there.load(Ordering::SeqCst);
    common::accept_while(second, inbox, credentials.clone(), usize::MAX, is_there);
    Pair { links, proxy, target, is_second_there }
}

fn region(memory: &mut [u8]) -> Region {
    let start = NonNull::from(&mut *memory).cast();
    // SAFETY: the memory outlives the link's use of it, and nothing else touches it meanwhile.
    unsafe { Region::new(start, memory.len(), None) }
}

fn text(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random(seed * 2 + 1);
    let mut text = vec![0; bytes];
    text.chunks_mut(7).for_each(|part| part.fill(random.below(251) as u8));
    text
}

/// Waits until these are done.
fn wait(link: &mut TcpLink, tickets: &[Ticket]) -> Result<(), LinkError> {
    let until = Instant::now() + PATIENCE;
    let mut open: HashSet<Ticket> = tickets.iter().copied().collect();
    let mut done = Vec::new();
    while !open.is_empty() {
        link.progress(&mut done)?;
        let found = !done.is_empty();
        for ticket in done.drain(..) {
            assert!(open.remove(&ticket), "{ticket:?} is done twice");
        }
        if !found && !open.is_empty() {
            link.park(until.min(Instant::now() + Duration::from_secs(1)), open.len())?;
        }
        assert!(Instant::now() < until, "{open:?} hang");
    }
    Ok(())
}

/// Exchanges messages of all sizes with the other rank, in calls of which both know from the seed
/// what they are.
fn exchange(mut link: TcpLink, rank: usize, seed: u64, calls: u64, most: u64) {
    let mut random = Random(seed);
    for number in 0..calls {
        let sizes = [(); 2].map(|()| {
            (0..1 + random.below(3)).map(|_| random.about(most) as usize).collect::<Vec<usize>>()
        });
        let is_one_way = random.below(4) == 0;
        let content = |rank: usize, at: usize| number * 1000 + rank as u64 * 100 + at as u64;
        let mut whole = [0];
        link.begin(&call(number), &Regions::in_place(region(&mut whole)));
        let (mut sent, mut heard, mut tickets) = (Vec::new(), Vec::new(), Vec::new());
        if !(is_one_way && rank == 1) {
            for (at, bytes) in sizes[1 - rank].iter().enumerate() {
                let lands = if at == 1 { Landing::Slot } else { Landing::Place };
                let mut memory = vec![0xee; *bytes];
                let ticket = Ticket(at as u64);
                link.receive(1 - rank, region(&mut memory), lands, ticket).unwrap();
                heard.push(memory);
                tickets.push(ticket);
            }
        }
        if !(is_one_way && rank == 0) {
            for (at, bytes) in sizes[rank].iter().enumerate() {
                let mut memory = text(content(rank, at), *bytes);
                let ticket = Ticket(100 + at as u64);
                link.send(1 - rank, region(&mut memory), ticket).unwrap();
                sent.push(memory);
                tickets.push(ticket);
            }
        }
        wait(&mut link, &tickets).unwrap_or_else(|error| panic!("call {number}: {error}"));
        for (at, memory) in heard.into_iter().enumerate() {
            let bytes = memory.len();
            let came = match at {
                1 => {
                    let start = link.arrived(Ticket(1));
                    // SAFETY: the slot holds as many bytes until it is released.
                    let came = unsafe { std::slice::from_raw_parts(start, bytes) }.to_vec();
                    link.release(Ticket(1)).unwrap();
                    came
                }
                _ => memory,
            };
            assert!(came == text(content(1 - rank, at), bytes), "call {number}, message {at}");
        }
    }
}

/// Exchanges again with what another seed says until there were enough breaks: how many a seed
/// makes is chance.
fn flaps(credentials: &Credentials, sockets: u8, calls: u64, most: u64, bytes: u64) {
    let limit = Duration::from_secs(50);
    let (mut breaks, first) = (0, seed());
    for seed in (0..20).map(|round| first.wrapping_add(round).max(1)) {
        let Pair { links, proxy, .. } =
            pair(credentials, sockets, limit, Fate::Break { bytes }, seed);
        thread::scope(|scope| {
            for (rank, link) in links.into_iter().enumerate() {
                scope.spawn(move || exchange(link, rank, seed, calls, most));
            }
        });
        breaks += proxy.breaks();
        println!("{breaks} breaks in {calls} calls with seed {seed}");
        if breaks > 10 {
            return;
        }
    }
    panic!("{breaks} breaks");
}

/// How many times as much as each time.
fn scale() -> u64 {
    std::env::var("UNISUM_TEST_FLAPS").map_or(1, |text| text.parse().unwrap())
}

#[test]
fn what_breaks_at_any_byte_arrives_once() {
    flaps(&clear(), 1, 60 * scale(), 3 << 20, 1 << 20);
}

#[test]
fn small_messages_on_connections_that_hardly_stand_arrive_once() {
    flaps(&clear(), 1, 100 * scale(), 1 << 10, 4 << 10);
}

#[test]
fn what_is_split_over_sockets_that_break_arrives_once() {
    flaps(&clear(), 3, 30 * scale(), 3 << 20, 512 << 10);
}

#[cfg(feature = "tls")]
#[test]
fn what_is_encrypted_and_breaks_arrives_once() {
    flaps(&encrypted(), 1, 40 * scale(), 1 << 20, 512 << 10);
    flaps(&encrypted(), 2, 20 * scale(), 64 << 10, 16 << 10);
}

/// Begins a call on both ranks.
fn begin(links: &mut [TcpLink; 2], whole: &mut [u8; 1]) {
    let region = region(whole);
    links.iter_mut().for_each(|link| link.begin(&call(0), &Regions::in_place(region)));
}

/// Has a first message go each way, so that the connection stands.
fn greet(links: &mut [TcpLink; 2], whole: &mut [u8; 1]) {
    begin(links, whole);
    let mut memory = [[1; 8], [2; 8], [0; 8], [0; 8]];
    let parts = memory.each_mut().map(|memory| region(memory));
    thread::scope(|scope| {
        for (rank, link) in links.iter_mut().enumerate() {
            let (own, other) = (parts[rank], parts[rank + 2]);
            link.receive(1 - rank, other, Landing::Place, Ticket(0)).unwrap();
            link.send(1 - rank, own, Ticket(1)).unwrap();
            scope.spawn(move || wait(link, &[Ticket(0), Ticket(1)]).unwrap());
        }
    });
    assert_eq!(memory, [[1; 8], [2; 8], [2; 8], [1; 8]]);
}

/// What is lost after the call that sent it is sent again while that rank computes, by whichever
/// rank the connection was dialled.
#[test]
fn what_was_lost_after_a_call_comes_while_its_sender_computes() {
    for sender in [0, 1] {
        let limit = PATIENCE;
        let Pair { mut links, proxy, .. } = pair(&clear(), 1, limit, Fate::Pass, seed());
        let mut whole = [0];
        greet(&mut links, &mut whole);
        proxy.set(Fate::Hold);
        let (mut sent, mut heard) = (text(3, 100_000), vec![0; 100_000]);
        links[sender].send(1 - sender, region(&mut sent), Ticket(2)).unwrap();
        wait(&mut links[sender], &[Ticket(2)]).unwrap();
        // The kernel had it, and the relay has it now.
        let receiver = &mut links[1 - sender];
        receiver.receive(sender, region(&mut heard), Landing::Place, Ticket(2)).unwrap();
        let mut done = Vec::new();
        receiver.progress(&mut done).unwrap();
        assert!(done.is_empty());
        proxy.set(Fate::Pass);
        proxy.break_all();
        wait(receiver, &[Ticket(2)]).unwrap();
        assert!(heard == sent);
    }
}

/// What was acknowledged on a connection that broke, and not read there, is acknowledged again: a
/// sender may have filled its window, and its receiver have nothing new to acknowledge.
#[test]
fn acknowledgements_that_were_lost_are_said_again() {
    // As in the link: most bytes that are not acknowledged, and how many are acknowledged at once.
    const WINDOW: usize = 4 << 20;
    const EACH: usize = 256 << 10;
    for sender in [0, 1] {
        let Pair { mut links, proxy, .. } = pair(&clear(), 1, PATIENCE, Fate::Pass, seed());
        let mut whole = [0];
        greet(&mut links, &mut whole);
        let greeted = HEADER_BYTES + 8;
        // Each but the last is acknowledged, and leaves one byte of the window. Who has nothing to
        // receive reads no acknowledgements before the window is full.
        let last = EACH - greeted - 1;
        let all = [EACH; WINDOW / EACH - 1].into_iter().chain([last]).map(|it| it - HEADER_BYTES);
        let pass = |links: &mut [TcpLink; 2], bytes: usize| {
            let (mut sent, mut heard) = (text(bytes as u64, bytes), vec![0; bytes]);
            links[sender].send(1 - sender, region(&mut sent), Ticket(2)).unwrap();
            let receiver = &mut links[1 - sender];
            receiver.receive(sender, region(&mut heard), Landing::Place, Ticket(2)).unwrap();
            thread::scope(|scope| {
                for link in links.iter_mut() {
                    scope.spawn(|| wait(link, &[Ticket(2)]).unwrap());
                }
            });
            assert!(heard == sent);
        };
        all.for_each(|bytes| pass(&mut links, bytes));
        proxy.break_all();
        pass(&mut links, 100_000);
    }
}

/// What a rank sent last arrives although the connection breaks as the rank leaves.
#[test]
fn what_was_sent_last_comes_after_its_sender_has_left() {
    for sender in [0, 1] {
        let Pair { mut links, proxy, .. } = pair(&clear(), 1, PATIENCE, Fate::Pass, seed());
        let mut whole = [0];
        greet(&mut links, &mut whole);
        proxy.set(Fate::Hold);
        let (mut sent, mut heard) = (text(3, 100_000), vec![0; 100_000]);
        links[sender].send(1 - sender, region(&mut sent), Ticket(2)).unwrap();
        wait(&mut links[sender], &[Ticket(2)]).unwrap();
        let [first, second] = links;
        let (leaver, mut stayer) = if sender == 0 { (first, second) } else { (second, first) };
        let leaving = thread::spawn(move || drop(leaver));
        proxy.set(Fate::Pass);
        proxy.break_all();
        leaving.join().unwrap();
        stayer.receive(sender, region(&mut heard), Landing::Place, Ticket(2)).unwrap();
        wait(&mut stayer, &[Ticket(2)]).unwrap();
        assert!(heard == sent);
        // And then it is known to have left.
        stayer.receive(sender, region(&mut heard), Landing::Place, Ticket(3)).unwrap();
        let error = wait(&mut stayer, &[Ticket(3)]).unwrap_err();
        assert_eq!(error, LinkError::closed(sender));
    }
}

/// The dialling end has left, and its last answer did not arrive: the other end finds out that it
/// will not come back, and does not wait until the time is up.
#[test]
fn who_has_left_is_not_waited_for_where_its_answer_was_lost() {
    let limit = PATIENCE * 10;
    let Pair { mut links, is_second_there, .. } = pair(&clear(), 1, limit, Fate::Pass, seed());
    let mut whole = [0];
    // What was sent here has arrived and is not acknowledged.
    greet(&mut links, &mut whole);
    let [first, mut second] = links;
    // As if it had said so.
    second.abort();
    drop(second);
    is_second_there.store(false, Ordering::SeqCst);
    let begun = Instant::now();
    drop(first);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// Who is there, and is kept from coming back, is waited for, and has what was sent last.
#[test]
fn who_is_still_there_is_waited_for() {
    let Pair { mut links, proxy, .. } = pair(&clear(), 1, PATIENCE, Fate::Pass, seed());
    let mut whole = [0];
    greet(&mut links, &mut whole);
    proxy.set(Fate::Hold);
    let (mut sent, mut heard) = (text(3, 100_000), vec![0; 100_000]);
    links[0].send(1, region(&mut sent), Ticket(2)).unwrap();
    wait(&mut links[0], &[Ticket(2)]).unwrap();
    proxy.set(Fate::Down);
    let [first, mut second] = links;
    let leaving = thread::spawn(move || drop(first));
    // Long enough to be asked for several times.
    thread::sleep(Duration::from_secs(3));
    assert!(!leaving.is_finished(), "what was sent has not arrived");
    proxy.set(Fate::Pass);
    leaving.join().unwrap();
    second.receive(0, region(&mut heard), Landing::Place, Ticket(2)).unwrap();
    wait(&mut second, &[Ticket(2)]).unwrap();
    assert!(heard == sent);
}

/// Without another connection, both ranks name each other as if none had been tried: when the time
/// is up, or at once where nobody listens any more.
#[test]
fn what_does_not_come_back_is_closed_by_the_peer() {
    let limit = Duration::from_millis(1500);
    let Pair { mut links, proxy, .. } = pair(&clear(), 1, limit, Fate::Pass, seed());
    let mut whole = [0];
    greet(&mut links, &mut whole);
    let begun = Instant::now();
    proxy.set(Fate::Down);
    thread::scope(|scope| {
        for (rank, link) in links.iter_mut().enumerate() {
            scope.spawn(move || {
                let mut memory = [0; 8];
                let ticket = Ticket(5);
                link.receive(1 - rank, region(&mut memory), Landing::Place, ticket).unwrap();
                let error = wait(link, &[ticket]).unwrap_err();
                assert_eq!(error, LinkError::closed(1 - rank));
            });
        }
    });
    let took = begun.elapsed();
    assert!(took >= limit && took < limit + Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_peer_that_nobody_listens_for_any_more_is_gone_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let [mut first, mut second] = [0, 1].map(|rank| {
        TcpLink::new(TcpConfig {
            rank,
            routes: [target, nowhere].map(|it| Arc::new(it.into())).to_vec(),
            session: [7; 16],
            job: [8; 16],
            credentials: clear(),
            sockets_per_peer: 1,
            connect_timeout: PATIENCE,
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout: PATIENCE * 10,
        })
        .unwrap()
    });
    // One connection, and then there is no listener.
    common::accept(listener, first.inbox(), clear(), 1);
    let (mut whole, mut memory) = ([0], [0; 8]);
    let regions = Regions::in_place(region(&mut whole));
    [&mut first, &mut second].into_iter().for_each(|link| link.begin(&call(0), &regions));
    let part = region(&mut memory);
    first.send(1, part, Ticket(0)).unwrap();
    second.receive(0, part, Landing::Place, Ticket(0)).unwrap();
    wait(&mut first, &[Ticket(0)]).unwrap();
    wait(&mut second, &[Ticket(0)]).unwrap();
    second.receive(0, part, Landing::Place, Ticket(1)).unwrap();
    // As a process that dies, it says nothing.
    first.abort();
    drop(first);
    let error = wait(&mut second, &[Ticket(1)]).unwrap_err();
    assert_eq!(error, LinkError::closed(0));
}

/// Whoever does not know the token, repeats what was recorded, or comes with a number that is not
/// new, takes over nothing; the connection that stands goes on.
#[test]
fn strangers_and_recordings_take_no_lane_over() {
    let Pair { mut links, proxy, target, .. } =
        pair(&clear(), 1, Duration::from_secs(5), Fate::Pass, seed());
    let mut whole = [0];
    greet(&mut links, &mut whole);
    let hello = Hello {
        purpose: Purpose::Data,
        socket: 0,
        from: 1,
        to: 0,
        world: 2,
        session: [7; 16],
        job: [8; 16],
        build: Default::default(),
    };
    let come = || {
        let stream = TcpStream::connect(target).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    // Without the token.
    let other = Secret::new(b"another token");
    assert!(handshake::dial(&mut come(), &hello, &other).is_err());
    // A recording of the dialer.
    let mut stream = come();
    stream.write_all(&proxy.said()[0]).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    // With the token, but the number of the connection that stands; and with no words at all.
    let secret = Secret::new(SECRET);
    let mut firsts: Vec<Vec<u8>> = vec![b"GET / HTTP/1.1\r\n".to_vec()];
    firsts.push([&b"usmR"[..], &1_u32.to_le_bytes(), &0_u64.to_le_bytes()].concat());
    for first in firsts {
        let mut stream = come();
        handshake::dial(&mut stream, &hello, &secret).unwrap();
        stream.write_all(&first).unwrap();
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{end:?}");
    }
    // One that claims to have what was never sent: it has the token, and is wrong.
    greet(&mut links, &mut whole);
    assert_eq!(proxy.said().len(), 1, "the first connection went on");
    let mut stream = come();
    handshake::dial(&mut stream, &hello, &secret).unwrap();
    let first = [&b"usmR"[..], &9_u32.to_le_bytes(), &(1_u64 << 40).to_le_bytes()].concat();
    stream.write_all(&first).unwrap();
    let mut memory = [0; 8];
    links[0].receive(1, region(&mut memory), Landing::Place, Ticket(9)).unwrap();
    let error = wait(&mut links[0], &[Ticket(9)]).unwrap_err();
    assert!(matches!(error.kind, LinkErrorKind::Protocol(_)), "{error}");
}
