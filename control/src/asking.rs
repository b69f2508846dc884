//! Whether a process is still there whose control connection has ended: its listening port is asked
//! again and again. Who listens lives; where the host refuses a connection, nobody does any more.
//! No answer says nothing.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

/// Between two questions: a process that ends closes its connections a moment before its port, or
/// after it.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How long an answer may take before the question is asked anew.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks about one process.
#[derive(Debug)]
pub(super) struct Asking {
    /// Where it listens.
    addresses: Vec<SocketAddr>,
    /// The questions that are not answered yet.
    under_way: Vec<Socket>,
    /// How many of the addresses have refused in this round.
    refused: usize,
    /// When the next round begins, or this one ends at the latest.
    next: Instant,
    pause: Duration,
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Connected,
    Refused,
    None,
}

impl Asking {
    /// About the process that listens at these addresses.
    pub(super) fn new(addresses: Vec<SocketAddr>, now: Instant) -> Self {
        let (under_way, refused, next, pause) = (Vec::new(), 0, now, PAUSE_MIN);
        Self { addresses, under_way, refused, next, pause }
    }

    /// Asks what is due and looks at the answers: whether the process is gone for certain, because
    /// all addresses refuse. Never blocks.
    pub(super) fn finds_none(&mut self, now: Instant) -> bool {
        if now >= self.next {
            self.ask(now);
        }
        for socket in std::mem::take(&mut self.under_way) {
            match answer(&socket) {
                Answer::Refused => self.refused += 1,
                Answer::None => self.under_way.push(socket),
                Answer::Connected => {
                    // It is told nothing, and need not hear of the end either.
                    let _ = socket.set_linger(Some(Duration::ZERO));
                    self.under_way.clear();
                    return self.rest(now);
                }
            }
        }
        if !self.addresses.is_empty() && self.refused == self.addresses.len() {
            return true;
        }
        // What is left could not be asked.
        self.under_way.is_empty() && self.next > now + self.pause && self.rest(now)
    }

    /// When to look again.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        if self.under_way.is_empty() { self.next } else { self.next.min(now + PAUSE_MIN) }
    }

    /// Begins a round; the questions of the last one are given up.
    fn ask(&mut self, now: Instant) {
        (self.refused, self.next) = (0, now + PATIENCE);
        self.under_way.clear();
        for &address in &self.addresses {
            match begin(address) {
                Ok(socket) => self.under_way.push(socket),
                Err(error) if is_refusal(&error) => self.refused += 1,
                // There may be no descriptor, or no route: that says nothing about the process.
                Err(error) => tracing::debug!(%address, %error, "a port can't be asked"),
            }
        }
    }

    /// Lets some time pass before the next round. Gives `false`, for the process is not gone.
    fn rest(&mut self, now: Instant) -> bool {
        self.refused = 0;
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        false
    }
}

fn begin(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
        _ => Ok(socket),
    }
}

fn answer(socket: &Socket) -> Answer {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    if !poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
        return Answer::None;
    }
    match socket.take_error() {
        Ok(Some(error)) if is_refusal(&error) => Answer::Refused,
        Ok(None) => match (socket.local_addr(), socket.peer_addr()) {
            // Where nobody listens the kernel may have this socket connect to itself (RFC 9293,
            // 3.5: simultaneous open).
            (Ok(own), Ok(peer)) if own.as_socket() == peer.as_socket() => Answer::Refused,
            (_, Ok(_)) => Answer::Connected,
            _ => Answer::None,
        },
        _ => Answer::None,
    }
}

fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// Whether the process turns out gone within `time`.
    fn finds_none(asking: &mut Asking, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let now = Instant::now();
            if asking.finds_none(now) || now >= until {
                return now < until;
            }
            std::thread::sleep(asking.deadline(now).saturating_duration_since(now));
        }
    }

    #[test]
    fn who_listens_is_there_until_it_does_not_any_more() {
        let (first, second) = (listener(), listener());
        let addresses = [&first, &second].map(|it| it.local_addr().unwrap());
        let mut asking = Asking::new(addresses.into(), Instant::now());
        assert!(!finds_none(&mut asking, Duration::from_millis(300)));
        drop(first);
        assert!(!finds_none(&mut asking, Duration::from_millis(300)), "the other one answers");
        drop(second);
        assert!(finds_none(&mut asking, LIMIT));
    }

    #[test]
    fn a_port_that_does_not_answer_says_nothing() {
        // A full queue drops what comes: as a host does that is cut off.
        let silent = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        silent.bind(&any.into()).unwrap();
        silent.listen(0).unwrap();
        let address = silent.local_addr().unwrap().as_socket().unwrap();
        let _queued: Vec<_> = (0..8).filter_map(|_| begin(address).ok()).collect();
        let refusing = listener();
        let gone = refusing.local_addr().unwrap();
        drop(refusing);
        let mut asking = Asking::new(vec![gone, address], Instant::now());
        assert!(!finds_none(&mut asking, Duration::from_millis(1500)));
        let mut nowhere = Asking::new(Vec::new(), Instant::now());
        assert!(!finds_none(&mut nowhere, Duration::from_millis(50)));
    }
}
