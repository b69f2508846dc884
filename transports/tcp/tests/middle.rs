//! Somebody in the middle of an encrypted connection, who relays it and does something to the
//! bytes: what arrives is what was sent, or the link fails and says so.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]
#![cfg(feature = "tls")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::handshake::Secret;
use unisum_link::secure::{Credentials, Sealing};
use unisum_link::{Call, Landing, Link, LinkError, Region, Regions, Ticket};
use unisum_tcp::{TcpConfig, TcpLink};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of each message. The first is small, the others are several records.
const MESSAGES: [usize; 4] = [100, 150_000, 70_000, 100];

/// What the middle does once, at a byte of one direction.
#[derive(Clone, Copy, Debug)]
enum Attack {
    Nothing,
    /// Flips this bit.
    Flip(u8),
    /// Leaves bytes out.
    Leave(usize),
    /// Says the last bytes again.
    Repeat(usize),
    /// Says bytes that nobody said.
    Insert(usize),
    /// Has bytes change places with the next ones.
    Swap(usize),
    /// Ends both directions.
    Cut,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    attack: Attack,
    at: usize,
    from_dialer: bool,
}

/// A relay between a dialer and `target`. The plan holds for the first connection only.
struct Middle {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
    recorded: Arc<Mutex<Vec<u8>>>,
}

impl Middle {
    fn new(target: SocketAddr, plan: Plan) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (is_over, recorded) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let middle =
            Self { address, is_over: Arc::clone(&is_over), recorded: Arc::clone(&recorded) };
        thread::spawn(move || {
            let nothing = Plan { attack: Attack::Nothing, ..plan };
            for plan in [plan].into_iter().chain(std::iter::repeat(nothing)) {
                let (dialer, _) = listener.accept().unwrap();
                // Relaxed: it is only to be seen some time.
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let listening = TcpStream::connect(target).unwrap();
                for from_dialer in [true, false] {
                    let (from, to) = (dialer.try_clone().unwrap(), listening.try_clone().unwrap());
                    let (from, to) = if from_dialer { (from, to) } else { (to, from) };
                    let here = plan.from_dialer == from_dialer;
                    let plan = if here { plan } else { nothing };
                    let recorded = Arc::clone(&recorded);
                    thread::spawn(move || relay(from, to, plan, &recorded));
                }
            }
        });
        middle
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        // Relaxed: as above.
        self.is_over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, plan: Plan, recorded: &Mutex<Vec<u8>>) {
    let (mut passed, mut is_done) = (0, matches!(plan.attack, Attack::Nothing));
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        let mut said = bytes[..read].to_vec();
        recorded.lock().unwrap().extend(&said);
        if !is_done && passed + read > plan.at {
            is_done = true;
            let at = plan.at - passed;
            match plan.attack {
                Attack::Nothing => {}
                Attack::Flip(bit) => said[at] ^= 1 << bit,
                Attack::Leave(bytes) => drop(said.drain(at..(at + bytes).min(read))),
                Attack::Repeat(bytes) => {
                    let again = said[at.saturating_sub(bytes)..=at].to_vec();
                    said.splice(at..at, again);
                }
                Attack::Insert(bytes) => drop(said.splice(at..at, (0..bytes).map(|at| at as u8))),
                Attack::Swap(bytes) => {
                    let bytes = bytes.min((read - at) / 2);
                    said[at..at + 2 * bytes].rotate_left(bytes);
                }
                Attack::Cut => break,
            }
        }
        passed += read;
        if to.write_all(&said).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn credentials() -> Credentials {
    Credentials::token(Secret::new(b"the token of these tests"), Sealing::Everywhere).unwrap()
}

/// Rank 0, which listens, and rank 1, which reaches it through the middle.
fn links(plan: Plan) -> (TcpLink, TcpLink, Middle) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle = Middle::new(listener.local_addr().unwrap(), plan);
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let [first, second] = [0, 1].map(|rank| {
        TcpLink::new(TcpConfig {
            rank,
            routes: [middle.address, nowhere].map(|it| Arc::new(it.into())).to_vec(),
            session: [7; 16],
            job: [8; 16],
            credentials: credentials(),
            sockets_per_peer: 1,
            connect_timeout: PATIENCE,
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::ZERO,
        })
        .unwrap()
    });
    common::accept(listener, first.inbox(), credentials(), 2);
    (first, second, middle)
}

fn region(memory: &mut [u8]) -> Region {
    let start = NonNull::from(&mut *memory).cast();
    // SAFETY: the memory outlives both links' use of it, and nothing else touches it meanwhile.
    unsafe { Region::new(start, memory.len(), None) }
}

fn text(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| ((at * 7 + seed * 13) % 251) as u8).collect()
}

/// Sends all messages both ways at once. Gives what the first failure said, and checks all that
/// arrived.
fn exchange(plan: Plan) -> Option<LinkError> {
    let (first, second, middle) = links(plan);
    let mut links = [first, second];
    let mut sent = [0, 1].map(|rank| MESSAGES.map(|bytes| text(rank + 5, bytes)));
    let mut heard = [0, 1].map(|_| MESSAGES.map(|bytes| vec![0xee; bytes]));
    let mut whole = [0, 1].map(|_| vec![0xee_u8; 1]);
    for (rank, link) in links.iter_mut().enumerate() {
        link.begin(&call(), &Regions::in_place(region(&mut whole[rank])));
        for at in 0..MESSAGES.len() {
            let from = region(&mut heard[rank][at]);
            link.receive(1 - rank, from, Landing::Place, Ticket(at as u64)).unwrap();
            link.send(1 - rank, region(&mut sent[rank][at]), Ticket(100 + at as u64)).unwrap();
        }
    }
    let (until, mut done) = (Instant::now() + PATIENCE, [Vec::new(), Vec::new()]);
    let mut failed = None;
    while failed.is_none() && done.iter().any(|done| done.len() < 2 * MESSAGES.len()) {
        assert!(Instant::now() < until, "it hangs: {plan:?}");
        for (rank, link) in links.iter_mut().enumerate() {
            if let Err(error) = link.progress(&mut done[rank]) {
                assert_eq!(error.peer, 1 - rank, "{error}");
                failed = Some(error);
            }
        }
        // Where bytes were left out, the rest may be waited for: the call's deadline ends that.
        if !matches!(plan.attack, Attack::Nothing | Attack::Cut)
            && until - Instant::now() < PATIENCE - Duration::from_millis(700)
        {
            break;
        }
        thread::yield_now();
    }
    links.iter_mut().for_each(Link::abort);
    for (rank, done) in done.iter().enumerate() {
        for ticket in done.iter().filter(|ticket| ticket.0 < 100) {
            let at = ticket.0 as usize;
            assert!(heard[rank][at] == sent[1 - rank][at], "a wrong result: {plan:?}");
        }
    }
    let recorded = middle.recorded.lock().unwrap();
    if matches!(plan.attack, Attack::Nothing) {
        assert!(recorded.len() > 400_000);
        for known in sent.iter().flatten().flat_map(|sent| sent[..64].windows(16)) {
            assert!(!recorded.windows(16).any(|part| part == known), "payload is on the wire");
        }
    }
    failed
}

fn call() -> Call {
    Call::all_reduce(0, Dtype::U8, 1)
}

#[test]
fn who_only_relays_sees_nothing_and_changes_nothing() {
    let nothing = Plan { attack: Attack::Nothing, at: 0, from_dialer: true };
    assert_eq!(exchange(nothing), None);
}

/// A handshake that fails is made anew; after it the link fails.
#[test]
fn whoever_alters_the_bytes_gives_no_wrong_result() {
    let random = |below: usize| {
        let drawn = u64::from_le_bytes(unisum_link::handshake::random().unwrap());
        (drawn % below as u64) as usize
    };
    let mut outcomes = [0, 0];
    for trial in 0..120 {
        let attack = match trial % 6 {
            0 | 1 => Attack::Flip(random(8) as u8),
            2 => Attack::Leave(1 + random(3000)),
            3 => Attack::Repeat(1 + random(3000)),
            4 => Attack::Insert(1 + random(3000)),
            _ => Attack::Swap(1 + random(200)),
        };
        // In the handshake, in the first records, or anywhere.
        let at = random([1500, 3000, 200_000][trial % 3]);
        let plan = Plan { attack, at, from_dialer: trial % 2 == 0 };
        let failed = exchange(plan);
        outcomes[usize::from(failed.is_some())] += 1;
    }
    println!("{} went on, {} failed", outcomes[0], outcomes[1]);
    assert!(outcomes[1] > 20, "{outcomes:?}");
}

#[test]
fn a_connection_that_is_cut_is_a_closed_one() {
    for at in [5000, 60_000, 150_300] {
        let plan = Plan { attack: Attack::Cut, at, from_dialer: at != 60_000 };
        let error = exchange(plan).expect("it can't go on");
        assert!(error.to_string().contains("closed by the peer"), "{error}");
    }
}
