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

/// How long an address has to itself before the next is tried beside it (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

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
    mut meet: impl FnMut(TcpStream, SocketAddr) -> Result<T, E>,
) -> Result<T, Unreached<E>> {
    let begun = Instant::now();
    let mut attempts = Attempts { under_way: Vec::new(), tried: Vec::new() };
    let (mut untried, mut next_at) = (addresses.iter(), begun);
    loop {
        let now = Instant::now();
        if now >= next_at
            && let Some(&address) = untried.next()
        {
            let is_under_way = attempts.begin(address, &prepare);
            next_at = if is_under_way { now + STAGGER } else { now };
            continue;
        }
        let has_more = untried.len() > 0;
        if attempts.under_way.is_empty() && !has_more {
            return Err(Unreached { tried: attempts.tried });
        }
        if now >= until {
            let silent = attempts.under_way.into_iter().map(|(_, address)| address);
            let silent = silent.chain(untried.copied());
            let silent = silent.map(|address| (address, Failure::Silent(now - begun)));
            attempts.tried.extend(silent);
            return Err(Unreached { tried: attempts.tried });
        }
        let Some((stream, address)) = attempts.next(if has_more { next_at } else { until }) else {
            // An address that has failed need not be waited for.
            if attempts.under_way.is_empty() {
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
    under_way: Vec<(Socket, SocketAddr)>,
    tried: Vec<(SocketAddr, Failure<E>)>,
}

impl<E> Attempts<E> {
    /// Begins to connect; `false` if that has failed already.
    fn begin(&mut self, address: SocketAddr, prepare: &impl Fn(&Socket, SocketAddr)) -> bool {
        match begin(address, prepare) {
            Ok(socket) => {
                self.under_way.push((socket, address));
                true
            }
            Err(error) => {
                self.tried.push((address, Failure::Connect(error)));
                false
            }
        }
    }

    /// Waits until a connection stands; `None` if none does by `until`, or some have failed.
    fn next(&mut self, until: Instant) -> Option<(TcpStream, SocketAddr)> {
        let flags = PollFlags::OUT;
        let mut polled: Vec<_> = self
            .under_way
            .iter()
            .map(|(socket, _)| PollFd::from_borrowed_fd(socket.as_fd(), flags))
            .collect();
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).ok();
        // Whatever ends it early, the caller looks at the time and comes back.
        let _ = poll(&mut polled, left.as_ref());
        // One at a time: the others' news is still there next time.
        let at = polled.iter().position(|it| !it.revents().is_empty())?;
        let (socket, address) = self.under_way.remove(at);
        match finish(&socket) {
            Ok(()) => Some((socket.into(), address)),
            Err(error) => {
                self.tried.push((address, Failure::Connect(error)));
                None
            }
        }
    }
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
