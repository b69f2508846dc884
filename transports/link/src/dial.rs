//! Connecting to a process that told several addresses, of which some may lead nowhere, or to
//! somebody else.
//!
//! Source: RFC 8305 (Happy Eyeballs): one attempt after the other, but without waiting for the end
//! of one that takes long.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};

mod within;

pub use within::Within;

/// How long an address has to itself before the next is tried beside it (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// How long an address that does not answer is waited for until it is tried anew.
const AGAIN: Duration = Duration::from_millis(50);
/// How long the first of several attempts at an address may take, and most of the others at a time.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
const BESIDE: usize = 3;

/// What became of the attempts at a process's addresses, when none led to it.
#[derive(Debug)]
pub struct Unreached<E> {
    /// In the order of their ends: the address and why not. There is one for each address.
    pub tried: Vec<(SocketAddr, Failure<E>)>,
}

/// Why an address did not lead to the process that was looked for.
#[derive(Debug)]
pub enum Failure<E> {
    /// No connection came about.
    Connect(io::Error),
    /// Nothing came back from there for so long.
    Silent(Duration),
    /// A connection did, and whoever is there was not the one.
    Met(E),
}

impl<E: fmt::Debug> std::error::Error for Unreached<E>
where
    Self: fmt::Display,
{
    /// What the system said to the first attempt that it refused.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.tried.iter().find_map(|(_, failure)| match failure {
            Failure::Connect(error) => Some(error as _),
            _ => None,
        })
    }
}

/// Connects to the addresses in this order until `meet` finds at the other end who is looked for,
/// and gives what it gave. An address that does not answer within 250 ms goes on being tried
/// beside the next ones. `prepare` sees each socket before it connects. Blocks until `until`, and
/// for as long as `meet` does.
///
/// # Errors
/// What became of each address.
pub fn dial<T, E>(
    addresses: &[SocketAddr],
    until: Instant,
    prepare: impl Fn(&Socket, SocketAddr),
    meet: impl FnMut(TcpStream, SocketAddr) -> Result<T, E>,
) -> Result<T, Unreached<E>> {
    connect(addresses, (until, false), prepare, meet)
}

/// The same where the network may be away, and back at any moment: an address that does not answer
/// is tried anew every 50 ms, where the kernel alone would repeat its attempt after 1, 3 and 7 s.
/// A network that leads nowhere for now is no answer; a refusal is.
///
/// # Errors
/// What became of each address.
pub fn redial<T, E>(
    addresses: &[SocketAddr],
    until: Instant,
    prepare: impl Fn(&Socket, SocketAddr),
    meet: impl FnMut(TcpStream, SocketAddr) -> Result<T, E>,
) -> Result<T, Unreached<E>> {
    connect(addresses, (until, true), prepare, meet)
}

fn connect<T, E>(
    addresses: &[SocketAddr],
    (until, repeats): (Instant, bool),
    prepare: impl Fn(&Socket, SocketAddr),
    mut meet: impl FnMut(TcpStream, SocketAddr) -> Result<T, E>,
) -> Result<T, Unreached<E>> {
    let begun = Instant::now();
    let (under_way, open, tried) = (Vec::new(), Vec::new(), Vec::new());
    let mut attempts = Attempts { repeats, under_way, open, tried };
    let (mut untried, mut next_at) = (addresses.iter(), begun);
    loop {
        let now = Instant::now();
        if now >= next_at
            && let Some(&address) = untried.next()
        {
            let is_under_way = attempts.begin(address, &prepare, now);
            next_at = if is_under_way { now + STAGGER } else { now };
            continue;
        }
        attempts.repeat(&prepare, now);
        let has_more = untried.len() > 0;
        if attempts.open.is_empty() && !has_more {
            return Err(Unreached { tried: attempts.tried });
        }
        if now >= until {
            let silent = attempts.open.into_iter().map(|it| it.address);
            let silent = silent.chain(untried.copied());
            let silent = silent.map(|address| (address, Failure::Silent(now - begun)));
            attempts.tried.extend(silent);
            return Err(Unreached { tried: attempts.tried });
        }
        let Some((stream, address)) = attempts.next(if has_more { next_at } else { until }) else {
            // An address that has failed need not be waited for.
            if attempts.open.is_empty() {
                next_at = now;
            }
            continue;
        };
        match meet(stream, address) {
            Ok(met) => return Ok(met),
            Err(error) => attempts.tried.push((address, Failure::Met(error))),
        }
        next_at = Instant::now();
    }
}

struct Attempts<E> {
    repeats: bool,
    /// By the time when they began.
    under_way: Vec<(Socket, SocketAddr, Instant)>,
    /// Those of which it is not known yet where they lead.
    open: Vec<Open>,
    tried: Vec<(SocketAddr, Failure<E>)>,
}

struct Open {
    address: SocketAddr,
    /// When it is tried anew, if it is.
    again: Option<Instant>,
}

impl<E> Attempts<E> {
    /// Begins to connect to another address; `false` if that has failed already.
    fn begin(
        &mut self,
        address: SocketAddr,
        prepare: &impl Fn(&Socket, SocketAddr),
        now: Instant,
    ) -> bool {
        let again = self.repeats.then(|| now + jittered(AGAIN));
        self.open.push(Open { address, again });
        self.attempt(address, prepare, now)
    }

    fn attempt(
        &mut self,
        address: SocketAddr,
        prepare: &impl Fn(&Socket, SocketAddr),
        now: Instant,
    ) -> bool {
        match begin(address, prepare) {
            Ok(socket) => self.under_way.push((socket, address, now)),
            Err(error) => self.failed(address, error),
        }
        self.open.iter().any(|it| it.address == address)
    }

    /// Tries those anew that are due. The first of an address's attempts has its time, in which an
    /// answer may come from afar; of the later ones there are [`BESIDE`] at a time.
    fn repeat(&mut self, prepare: &impl Fn(&Socket, SocketAddr), now: Instant) {
        let is_due = |it: &Open| it.again.is_some_and(|again| again <= now);
        let due: Vec<_> = self.open.iter().filter(|it| is_due(it)).map(|it| it.address).collect();
        for address in due {
            self.under_way.retain(|(_, it, since)| *it != address || now - *since < ATTEMPT_MAX);
            let mut own = self.under_way.iter().enumerate().filter(|(_, it)| it.1 == address);
            let second = own.nth(1).map(|(at, _)| at);
            if let Some(second) = second.filter(|_| own.count() + 1 >= BESIDE) {
                self.under_way.remove(second);
            }
            self.open
                .iter_mut()
                .filter(|it| it.address == address)
                .for_each(|it| it.again = Some(now + jittered(AGAIN)));
            self.attempt(address, prepare, now);
        }
    }

    /// Waits until a connection stands; `None` if none does by `until`, some have failed, or there
    /// are addresses to be tried anew.
    fn next(&mut self, until: Instant) -> Option<(TcpStream, SocketAddr)> {
        let flags = PollFlags::OUT;
        let mut polled: Vec<_> = self
            .under_way
            .iter()
            .map(|(socket, ..)| PollFd::from_borrowed_fd(socket.as_fd(), flags))
            .collect();
        let again = self.open.iter().filter_map(|it| it.again);
        let until = again.chain([until]).min().unwrap_or(until);
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        // Whatever ends it early, the caller looks at the time and comes back.
        let _ = poll(&mut polled, left.as_ref());
        // One at a time: the others' news is still there next time.
        let at = polled.iter().position(|it| !it.revents().is_empty())?;
        let (socket, address, _) = self.under_way.remove(at);
        match finish(&socket) {
            Ok(()) => {
                self.decided(address);
                Some((socket.into(), address))
            }
            Err(error) => {
                self.failed(address, error);
                None
            }
        }
    }

    /// An attempt has failed, and its address with it, unless another one may do better.
    fn failed(&mut self, address: SocketAddr, error: io::Error) {
        use io::ErrorKind::{HostUnreachable, NetworkDown, NetworkUnreachable};
        let is_away = matches!(error.kind(), HostUnreachable | NetworkDown | NetworkUnreachable);
        let has_others = || self.under_way.iter().any(|it| it.1 == address);
        if self.repeats && (is_away || crate::is_lack(&error) && has_others()) {
            return;
        }
        self.decided(address);
        self.tried.push((address, Failure::Connect(error)));
    }

    /// Where an address leads is known.
    fn decided(&mut self, address: SocketAddr) {
        self.open.retain(|it| it.address != address);
        self.under_way.retain(|(_, it, _)| *it != address);
    }
}

/// Between three quarters and one and a quarter of the time: all that were cut off together dial
/// when the network is back, but not all at once.
fn jittered(time: Duration) -> Duration {
    let [random] = crate::handshake::random().unwrap_or([128]);
    time * 3 / 4 + time * u32::from(random) / 512
}

fn begin(address: SocketAddr, prepare: &impl Fn(&Socket, SocketAddr)) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    prepare(&socket, address);
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

fn finish(socket: &Socket) -> io::Result<()> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    let ends = (socket.local_addr()?.as_socket(), socket.peer_addr()?.as_socket());
    if ends.0 == ends.1 {
        // Nobody listens on a port from which the kernel let this very socket connect: it has
        // connected to itself (RFC 9293, 3.5: simultaneous open).
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    }
    socket.set_nonblocking(false)
}

impl<E: fmt::Display> fmt::Display for Failure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => error.fmt(f),
            Self::Silent(time) => write!(f, "no answer within {:.1} s", time.as_secs_f64()),
            Self::Met(error) => error.fmt(f),
        }
    }
}

impl<E: fmt::Display> fmt::Display for Unreached<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (address, failure)) in self.tried.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{address} ({failure})")?;
        }
        if self.tried.is_empty() { f.write_str("no address") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
