//! Fuzz targets (see `unisum_link::fuzzing`) for connections that resume: two ends between which a
//! network cuts, and one end whose peer says what it likes, in clear text and in records.

mod pair;
mod peer;
#[cfg(feature = "tls")]
pub(crate) mod secure;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags};
use unisum_kernels::Dtype;
use unisum_link::fork::ParentOnly;
use unisum_link::frame::{HEADER_BYTES, Header};
use unisum_link::fuzzing::Target;
use unisum_link::secure::Session;
use unisum_link::{Call, LinkError, Rank};

use super::WINDOW;
use super::flow::Flow;
use super::keeper::{Handle, move_on};
use crate::sleep::{Bell, Ready};
use crate::socket::{Moving, Socket, Span};

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target { name: "resumed_pair", check: pair::check, seeds: pair::seeds },
    Target { name: "resumed_peer", check: peer::check, seeds: peer::seeds },
    #[cfg(feature = "tls")]
    Target { name: "resumed_peer_sealed", check: peer::check_sealed, seeds: peer::sealed_seeds },
];

/// The call that all messages are of.
const CALL: Call = Call::all_reduce(7, Dtype::U8, 1);
/// Transfers from here on are receives.
const RECEIVES: usize = 1 << 20;
/// What a socket's buffer holds at most.
const READ_BYTES: usize = 256 << 10;

/// The messages that an end sends, one behind the other as their headers and payloads lie in the
/// stream.
struct Stream {
    bytes: Vec<u8>,
    /// Where each message begins, and the last one ends.
    places: Vec<usize>,
}

/// Payloads, again and again, and how many bytes of them there are at most.
const PLANS: [(&[usize], usize); 4] = [
    (&[0, 1, 40, 900, 972, 3000], 20 << 10),
    (&[1025, 1, 17], 10 << 10),
    (&[5000, 0, 70_000, 300], 300 << 10),
    // More than a window.
    (&[300_000, 1000, 1_500_000, 65_500], 5700 << 10),
];

impl Stream {
    /// Of the two directions of a connection, by the script's first byte.
    fn of(plan: u8, direction: usize) -> &'static Self {
        static ALL: [OnceLock<Stream>; 2 * PLANS.len()] =
            [const { OnceLock::new() }; 2 * PLANS.len()];
        let plan = usize::from(plan) % PLANS.len();
        ALL[2 * plan + direction].get_or_init(|| Self::new(PLANS[plan], direction as u64))
    }

    fn new((sizes, limit): (&[usize], usize), direction: u64) -> Self {
        let (mut bytes, mut places) = (Vec::new(), vec![0]);
        for &size in sizes.iter().cycle() {
            if bytes.len() + HEADER_BYTES + size > limit {
                break;
            }
            bytes.extend(Header { marked: false, bytes: size as u64, call: CALL }.encode());
            // Bytes that differ by where they are, and between the directions.
            let from = bytes.len() as u64;
            let mix = |at: u64| (at ^ direction << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
            bytes.extend((from..from + size as u64).map(|at| mix(at) as u8));
            places.push(bytes.len());
        }
        Self { bytes, places }
    }

    fn count(&self) -> usize {
        self.places.len() - 1
    }

    fn payload(&self, message: usize) -> &[u8] {
        &self.bytes[self.places[message] + HEADER_BYTES..self.places[message + 1]]
    }
}

/// Messages of a stream that were posted.
struct Posted {
    stream: &'static Stream,
    memory: Vec<Vec<u8>>,
    /// How many of them are through.
    done: usize,
}

impl Posted {
    const fn new(stream: &'static Stream) -> Self {
        Self { stream, memory: Vec::new(), done: 0 }
    }

    /// Bytes of the stream that were posted.
    fn bytes(&self) -> u64 {
        self.stream.places[self.memory.len()] as u64
    }

    fn is_done(&self) -> bool {
        self.done == self.memory.len()
    }
}

/// One end: what its link and its keeper have of a socket.
struct End {
    handle: Handle,
    socket: Socket,
    moving: Moving,
    sends: Posted,
    receives: Posted,
    /// Connections that the socket has seen.
    stood: u32,
    /// Up to where what came was looked at.
    looked: u64,
}

impl End {
    fn new(rank: Rank, plan: u8) -> Self {
        let bell = Arc::new(Bell::new().expect("there are descriptors"));
        let flow = Flow::new((1 - rank, 0), Duration::from_secs(1 << 20), bell);
        let handle = Handle::new(flow);
        Self {
            socket: Socket::new(1 - rank, Some(handle.clone())),
            handle,
            moving: Moving::default(),
            sends: Posted::new(Stream::of(plan, rank)),
            receives: Posted::new(Stream::of(plan, 1 - rank)),
            stood: 0,
            looked: 0,
        }
    }

    fn post_send(&mut self) {
        let number = self.sends.memory.len();
        if number < self.sends.stream.count() {
            let mut memory = self.sends.stream.payload(number).to_vec();
            let span = Span { start: memory.as_mut_ptr(), bytes: memory.len() };
            self.sends.memory.push(memory);
            self.socket.post_send(number, false, CALL, span);
        }
    }

    fn post_receive(&mut self) {
        let number = self.receives.memory.len();
        if number < self.receives.stream.count() {
            let mut memory = vec![0; self.receives.stream.payload(number).len()];
            let span = Span { start: memory.as_mut_ptr(), bytes: memory.len() };
            self.receives.memory.push(memory);
            self.socket.post_receive(RECEIVES + number, span);
        }
    }

    /// What the link does in a call, where something may be ready.
    fn drive(&mut self) -> Result<(), LinkError> {
        self.renew();
        self.socket.ready(Ready { socket: 0, reads: true, writes: true });
        let peer = self.socket.peer;
        let moved = self.socket.flush(peer, &mut self.moving);
        moved.and_then(|()| self.socket.drain(peer, CALL, &mut self.moving))
    }

    /// What the keeper does when something has happened to the connection.
    fn keep(&self) -> Result<(), LinkError> {
        let mut flow = self.handle.lock();
        let result = move_on(&mut flow);
        if let Err(error) = &result {
            flow.fail(error.clone());
        }
        result
    }

    fn renew(&mut self) {
        let stood = self.handle.lock().stood();
        if stood != std::mem::replace(&mut self.stood, stood) {
            self.socket.renew();
        }
    }

    /// The messages that are through since the last look; all are in order.
    fn finished(&mut self) -> Vec<usize> {
        let mut received = Vec::new();
        for transfer in std::mem::take(&mut self.moving.finished) {
            let posted = if transfer < RECEIVES { &mut self.sends } else { &mut self.receives };
            assert_eq!(transfer % RECEIVES, posted.done, "transfers end in order");
            posted.done += 1;
            if transfer >= RECEIVES {
                received.push(transfer - RECEIVES);
            }
        }
        received
    }

    /// What holds of a flow, whatever the peer has said.
    fn check_bounds(&self) {
        let flow = self.handle.lock();
        assert!(flow.acknowledged <= flow.sent && flow.sent <= flow.promised, "{flow:?}");
        assert!(flow.promised <= flow.acknowledged + flow.kept.len() as u64, "{flow:?}");
        assert!(flow.kept.len() <= WINDOW && flow.told <= flow.taken, "{flow:?}");
    }

    /// What holds of it unless the peer has lied: what is held is what came.
    fn check_stash(&mut self, came: &[u8]) {
        let flow = self.handle.lock();
        assert_eq!(flow.taken + flow.stash.len() as u64, flow.received);
        assert!(flow.stash.len() <= WINDOW && flow.received <= came.len() as u64);
        let (first, second) = flow.stash.as_slices();
        // What was looked at does not change.
        let looked = self.looked.max(flow.taken);
        let came = &came[looked as usize..flow.received as usize];
        let skipped = (looked - flow.taken) as usize;
        let (first, second) = match skipped.checked_sub(first.len()) {
            None => (&first[skipped..], second),
            Some(skipped) => (&[][..], &second[skipped..]),
        };
        assert!(came.strip_prefix(first) == Some(second), "what is held");
        self.looked = flow.received;
    }
}

/// A connection's two ends. Sockets of a host behave as TCP's do in all that is used here.
fn connection() -> [TcpStream; 2] {
    let (one, two) = UnixStream::pair().expect("there are descriptors");
    [one, two].map(|end| {
        end.set_nonblocking(true).expect("it is a socket");
        TcpStream::from(OwnedFd::from(end))
    })
}

/// The keys of an end's connection, and the peer's.
#[cfg_attr(not(feature = "tls"), expect(unused_variables, reason = "there are no keys"))]
fn sessions(is_sealed: bool, is_dialer: bool) -> [Option<Box<Session>>; 2] {
    #[cfg(feature = "tls")]
    if is_sealed {
        let [dialer, listener] = secure::sessions();
        return if is_dialer { [dialer, listener] } else { [listener, dialer] }.map(Some);
    }
    [None, None]
}

/// Has a flow take over a connection, as its dialer if that has a number.
fn meet(flow: &mut Flow, stream: TcpStream, session: Option<Box<Session>>, number: Option<u32>) {
    // If the other end is gone already, that is one more thing that can happen.
    let _ = flow.meet(Arc::new(ParentOnly::new(stream)), session, number);
}

/// Reads once, so many bytes at most; whether nothing will follow.
fn read(from: &TcpStream, to: &mut impl for<'a> Extend<&'a u8>, most: usize) -> bool {
    let mut buffer = vec![0; most.min(READ_BYTES)];
    match net::recv(from, &mut buffer[..], RecvFlags::empty()) {
        Ok((_, received)) => {
            to.extend(&buffer[..received]);
            received == 0 && most > 0
        }
        Err(error) => error != Errno::AGAIN,
    }
}

/// How many of these bytes the connection takes: where it has ended, it takes and loses them all.
fn write(to: &TcpStream, bytes: &[u8]) -> usize {
    match net::send(to, bytes, SendFlags::NOSIGNAL) {
        Ok(sent) => sent,
        Err(Errno::AGAIN) => 0,
        Err(_) => bytes.len(),
    }
}

/// A script, which the fuzzer writes.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// The next byte, or 0 where there is none.
    fn byte(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A number of bytes, mostly near a place where something changes.
    fn bytes(&mut self) -> usize {
        let (kind, more) = (self.byte(), usize::from(self.byte()));
        match kind % 8 {
            0 => more % 16,
            1 => 12 + more % 4,
            2 => more,
            3 => 1000 + more,
            4 => (64 << 10) - 128 + more,
            5 => (256 << 10) - 128 + more,
            6 => more << 8,
            _ => more << 14,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::TARGETS.iter().for_each(|target| target.attack(&bytes));
        }
    }
}
