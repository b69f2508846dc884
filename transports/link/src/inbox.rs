//! Where connections arrive: those that peers opened, and those that this rank dials.
//!
//! Dialling and its handshake block, so a thread does them; the thread ends when nothing is left
//! to dial. The link finds finished connections here and never blocks on one. A peer that does not
//! answer, or breaks the connection off before this rank has proven the token, is dialled again
//! after the others: there may be too many strangers at its door.
//!
//! Connections that are dialled anew have a thread for each peer, which tries it again and again:
//! the network may be back at any moment, to all peers at once.

mod route;
mod ways;

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, Socket};

use crate::congestion;
use crate::dial::{Failure, Unreached, Within, dial, redial};
use crate::fork::ParentOnly;
use crate::handshake::{HandshakeError, Hello, STEADY};
use crate::secure::{self, Credentials, Proven};
use crate::{Cause, LinkError, LinkErrorKind, Rank, Wake};

pub use self::route::Route;
pub use self::ways::Ways;

/// How long the first attempt at a peer may take until it asks for the proof; the next ones may
/// take twice as long each, up to the second of these.
const ATTEMPT_MIN: Duration = Duration::from_secs(1);
const ATTEMPT_MAX: Duration = Duration::from_secs(8);
/// The pause after the first attempt; after the next ones it is twice as long each, up to the
/// second of these.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(320);

/// The entrance for connections that proved the job token. Shared with the thread that accepts.
#[derive(Debug)]
pub struct Inbox {
    waker: Arc<dyn Wake>,
    state: Mutex<State>,
    /// Told of new dials, and of the end.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    arrived: Vec<Arrived>,
    to_dial: Vec<Pending>,
    /// Whose threads run. A second handle of the connection being dialled there, so that closing
    /// interrupts its handshake.
    diallers: BTreeMap<Lane, Option<ParentOnly<TcpStream>>>,
}

/// What one thread dials: all first connections, or the later ones to one peer.
type Lane = Option<u32>;

/// A finished or failed connection.
#[derive(Debug)]
pub struct Arrived {
    /// Who is at the other end.
    pub peer: Rank,
    /// Which of the connections between the two it is.
    pub socket: u8,
    /// Its number, where this rank dialled it; 0 where the peer did.
    pub attempt: u32,
    /// The connection, or why there is none.
    pub result: Result<Proven, LinkError>,
    /// Whether nothing has ended the attempts but that their time was up.
    pub is_late: bool,
}

/// A connection to open.
#[derive(Debug)]
pub struct Dial {
    /// Where the peer listens.
    pub route: Arc<Route>,
    /// This rank's own.
    pub own: Arc<Route>,
    /// As whom it introduces itself, to whom.
    pub hello: Hello,
    /// By what it proves itself.
    pub credentials: Credentials,
    /// How long that may take, with all attempts.
    pub timeout: Duration,
    /// After how long it begins.
    pub pause: Duration,
    /// Which connection of its socket that will be, from 1 on.
    pub attempt: u32,
    /// Whether the peer counts it only once this rank has spoken on it.
    pub resumes: bool,
}

impl Dial {
    const fn lane(&self) -> Lane {
        if self.attempt > 1 { Some(self.hello.to) } else { None }
    }

    /// What there is at the least once the peer has asked for the proof: where the network is back
    /// at the last moment, that need not be for nothing.
    const fn time_to_prove(&self) -> Duration {
        if self.lane().is_some() { ATTEMPT_MIN } else { Duration::ZERO }
    }
}

/// A connection to open, and the attempts so far.
#[derive(Debug)]
struct Pending {
    dial: Dial,
    since: Instant,
    attempts: u32,
    /// How many of the last ones the peer has refused, one after the other.
    refused: u32,
    /// What became of the last one in which somebody said something.
    heard: Option<Unreached<HandshakeError>>,
    next: Instant,
}

/// Of another attempt after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Hope {
    /// The failure passes, or somebody in between has brought it about.
    Some,
    /// The peer has refused: somebody in between may have led the connection elsewhere.
    Little,
    /// It would end in the same way.
    None,
}

/// Said where an address gave no answer.
const FIREWALL: &str = ": is there a firewall between the two? UNISUM_PORT_RANGE says on which \
                        ports ranks listen";

impl Inbox {
    /// An entrance that wakes `waker` when a connection has arrived, or is not to be had.
    pub fn new(waker: Arc<dyn Wake>) -> Self {
        Self { waker, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Takes over a connection that `peer` opened as its `socket`-th to this rank, and whose
    /// handshake is done.
    pub fn deliver(&self, peer: Rank, socket: u8, connection: Proven) {
        self.put(Arrived { peer, socket, attempt: 0, result: Ok(connection), is_late: false });
    }

    fn put(&self, arrived: Arrived) {
        let mut state = self.lock();
        if !state.closed {
            state.arrived.push(arrived);
            drop(state);
            self.waker.wake();
        }
    }

    /// What has arrived since the last time.
    pub fn take(&self) -> Vec<Arrived> {
        std::mem::take(&mut self.lock().arrived)
    }

    /// Whether nothing has arrived since.
    pub fn is_empty(&self) -> bool {
        self.lock().arrived.is_empty()
    }

    /// Opens a connection in the background; it arrives here like any other.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn dial(self: &Arc<Self>, dial: Dial) -> Result<(), LinkError> {
        let (peer, lane) = (dial.hello.to as Rank, dial.lane());
        let now = Instant::now();
        let mut state = self.lock();
        let next = now + dial.pause;
        let heard = None;
        state.to_dial.push(Pending { dial, since: now, attempts: 0, refused: 0, heard, next });
        if state.diallers.contains_key(&lane) {
            self.changed.notify_all();
            return Ok(());
        }
        let inbox = Arc::clone(self);
        thread::Builder::new()
            .name("unisum-dial".into())
            .spawn(move || inbox.run_dialler(lane))
            .map_err(|error| LinkError::lacking(peer, "starting a thread to dial", error))?;
        state.diallers.insert(lane, None);
        Ok(())
    }

    fn run_dialler(&self, lane: Lane) {
        while let Some(mut pending) = self.next_dial(lane) {
            pending.attempts += 1;
            let result = self.open(&pending);
            let goes_on = result.as_ref().err().is_some_and(|it| !pending.is_final(it));
            let now = Instant::now();
            let mut state = self.lock();
            state.diallers.insert(lane, None);
            match result {
                Err(unreached) if goes_on && now < pending.until() => {
                    let rank = pending.dial.hello.to;
                    tracing::debug!(rank, error = %unreached, "a connection is not open yet");
                    pending.next =
                        (now + pending.doubled(PAUSE_MIN, PAUSE_MAX)).min(pending.until());
                    if says_something(&unreached) {
                        pending.heard = Some(unreached);
                    }
                    state.to_dial.push(pending);
                }
                result => {
                    drop(state);
                    let Hello { to, socket, .. } = pending.dial.hello;
                    let attempt = pending.dial.attempt;
                    let result = result.map_err(|unreached| pending.given_up(unreached, goes_on));
                    let peer = to as Rank;
                    self.put(Arrived { peer, socket, attempt, result, is_late: goes_on });
                }
            }
        }
    }

    /// Waits for the time of the next attempt; `None` if there is nothing left to dial.
    fn next_dial(&self, lane: Lane) -> Option<Pending> {
        let mut state = self.lock();
        loop {
            let own = (0..state.to_dial.len()).filter(|&at| state.to_dial[at].dial.lane() == lane);
            let next = own.min_by_key(|&at| state.to_dial[at].next);
            let Some(at) = next.filter(|_| !state.closed) else {
                state.diallers.remove(&lane);
                return None;
            };
            let pause = state.to_dial[at].next.saturating_duration_since(Instant::now());
            if pause.is_zero() {
                return Some(state.to_dial.swap_remove(at));
            }
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// One attempt at a connection, at all addresses. Before the proof it may be broken off, for
    /// the peer takes nothing over that has not proven the token; after it there is time until the
    /// deadline, or the peer could have the same connection twice.
    fn open(&self, pending: &Pending) -> Result<Proven, Unreached<HandshakeError>> {
        let wanted = &pending.dial;
        let time = pending.doubled(ATTEMPT_MIN, ATTEMPT_MAX).min(pending.left());
        let prepare = |socket: &Socket, address: SocketAddr| {
            if wanted.own.has(address.ip()) {
                congestion::inside(&SockRef::from(socket));
            }
        };
        let meet = |stream, address| {
            let stream = ParentOnly::new(stream);
            self.prepare(&stream, time, wanted.lane())?;
            let (hello, credentials) = (&wanted.hello, &wanted.credentials);
            let ends = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
            let wants_records = credentials.want_records(hello.purpose, ends.0, ends.1);
            let mut within = Within::new(&stream, time);
            let challenged = secure::greet(&mut within, hello, credentials, wants_records)?;
            drop(within);
            let time = pending.left().max(wanted.time_to_prove());
            set_timeouts(&stream, time)?;
            let session = challenged.prove(&mut Within::new(&stream, time), credentials)?;
            wanted.route.worked_at(address);
            Ok(Proven::new(stream, session))
        };
        let (addresses, until) = (wanted.route.in_order(), Instant::now() + time);
        match wanted.lane() {
            None => dial(&addresses, until, prepare, meet),
            Some(_) => redial(&addresses, until, prepare, meet),
        }
    }

    fn prepare(&self, stream: &TcpStream, timeout: Duration, lane: Lane) -> io::Result<()> {
        stream.set_nodelay(true)?;
        set_timeouts(stream, timeout)?;
        let handle = ParentOnly::new(stream.try_clone()?);
        let mut state = self.lock();
        if state.closed {
            handle.shutdown(Shutdown::Both)?;
        } else {
            state.diallers.insert(lane, Some(handle));
        }
        Ok(())
    }

    /// Refuses everything from here on and interrupts a handshake under way.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.arrived.clear();
        state.to_dial.clear();
        for stream in state.diallers.values_mut().filter_map(Option::take) {
            // It may have ended by itself: then there is nothing to interrupt.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn until(&self) -> Instant {
        self.since + self.dial.timeout
    }

    /// What is left of the time; a moment at least, for no time-out may be zero.
    fn left(&self) -> Duration {
        self.until().saturating_duration_since(Instant::now()).max(PAUSE_MIN)
    }

    /// `first`, doubled with each attempt, `most` at most.
    fn doubled(&self, first: Duration, most: Duration) -> Duration {
        first.saturating_mul(1 << self.attempts.saturating_sub(1).min(16)).min(most)
    }

    /// Whether another attempt would end in the same way, at each address.
    fn is_final(&mut self, unreached: &Unreached<HandshakeError>) -> bool {
        let hopes = unreached.tried.iter().map(|(_, failure)| self.hope(failure));
        let most = hopes.min().unwrap_or(Hope::None);
        self.refused = if most == Hope::Some { 0 } else { self.refused + 1 };
        most == Hope::None || self.refused >= STEADY
    }

    fn hope(&self, failure: &Failure<HandshakeError>) -> Hope {
        // The peer may have admitted this rank, and takes the same connection but once.
        let is_once = !self.dial.resumes;
        let is_clear = !self.dial.credentials.encrypt();
        match failure {
            Failure::Connect(error) | Failure::Met(HandshakeError::Io(error)) => {
                if may_pass(error) { Hope::Some } else { Hope::None }
            }
            Failure::Met(HandshakeError::Altered) if is_once => Hope::None,
            // In clear text an answer to the proof is not told from another one.
            Failure::Met(error) if error.is_answer() && is_once && is_clear => Hope::None,
            Failure::Met(error) if error.is_refusal() => Hope::Little,
            Failure::Silent(_) | Failure::Met(_) => Hope::Some,
        }
    }

    /// Why there is no connection. If the time was up, what an earlier attempt was told says more
    /// than that there was none left for the last one; of what kind it is the last one says.
    fn given_up(&self, unreached: Unreached<HandshakeError>, is_late: bool) -> LinkError {
        let earlier = self.heard.as_ref().filter(|_| is_late && !says_something(&unreached));
        let peer = self.dial.hello.to as Rank;
        if unreached.tried.iter().any(|(_, it)| matches!(it, Failure::Met(HandshakeError::Altered)))
            && !self.dial.resumes
        {
            let socket = self.dial.hello.socket;
            return LinkError { peer, kind: LinkErrorKind::Altered { socket, at: 0 } };
        }
        if unreached.tried.iter().any(|(_, failure)| is_lack(failure)) {
            return LinkError::lacking(peer, "connecting failed", Cause::other(unreached));
        }
        let seconds = self.since.elapsed().as_secs_f64();
        let attempts = self.attempts;
        let told = match earlier {
            Some(heard) => {
                format!(" and {attempts} attempts, the last one that had an answer: {heard}")
            }
            None if attempts == 1 => format!(": {unreached}"),
            None => format!(" and {attempts} attempts, the last one: {unreached}"),
        };
        let is_silent = unreached.tried.iter().any(|(_, failure)| is_silence(failure));
        let hint = if is_silent && earlier.is_none() { FIREWALL } else { "" };
        let why = format!("connecting failed after {seconds:.1} s{told}{hint}");
        let is_own = |failure: &Failure<_>| {
            matches!(failure, Failure::Met(HandshakeError::OwnCertificate(_)))
        };
        let kind = if unreached.tried.iter().any(|(_, failure)| is_own(failure)) {
            LinkErrorKind::NotAccepted(why)
        } else if is_silent {
            LinkErrorKind::Unanswered(why)
        } else {
            LinkErrorKind::Unreachable(why)
        };
        LinkError { peer, kind }
    }
}

/// Whether somebody was there and said what is no unisum, or not that of a peer.
fn says_something(unreached: &Unreached<HandshakeError>) -> bool {
    let mut failures = unreached.tried.iter().map(|(_, failure)| failure);
    failures.any(|it| matches!(it, Failure::Met(error) if !matches!(error, HandshakeError::Io(_))))
}

fn is_silence(failure: &Failure<HandshakeError>) -> bool {
    match failure {
        Failure::Silent(_) => true,
        Failure::Connect(error) => error.kind() == io::ErrorKind::TimedOut,
        Failure::Met(_) => false,
    }
}

/// Whether this process, or its host, has used something up that a connection takes.
fn is_lack(failure: &Failure<HandshakeError>) -> bool {
    match failure {
        Failure::Connect(error) | Failure::Met(HandshakeError::Io(error)) => crate::is_lack(error),
        _ => false,
    }
}

/// Whether an error says that the network, or the other end, has no time for this rank now:
/// strangers may crowd it, use up the ports of this host, or a network may be away. Where nobody
/// listens there will be nobody: ranks listen until they end.
fn may_pass(error: &io::Error) -> bool {
    use io::ErrorKind::{
        AddrInUse, AddrNotAvailable, BrokenPipe, ConnectionAborted, ConnectionReset,
        HostUnreachable, Interrupted, NetworkDown, NetworkUnreachable, NotConnected, TimedOut,
        UnexpectedEof, WouldBlock,
    };
    matches!(
        error.kind(),
        AddrInUse
            | AddrNotAvailable
            | BrokenPipe
            | ConnectionAborted
            | ConnectionReset
            | HostUnreachable
            | Interrupted
            | NetworkDown
            | NetworkUnreachable
            | NotConnected
            | TimedOut
            | UnexpectedEof
            | WouldBlock
    )
}

fn set_timeouts(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

#[cfg(test)]
mod tests;
