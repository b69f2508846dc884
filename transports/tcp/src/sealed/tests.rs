use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::Call;
use unisum_link::fork::ParentOnly;
use unisum_link::frame::Header;
use unisum_link::secure::Proven;

use super::*;
use crate::fuzzing::secure::sessions;
use crate::sleep::Ready;
use crate::socket::{Moving, Socket, Span};

const PATIENCE: Duration = Duration::from_secs(20);

/// Two sockets, and what is at their other ends: what goes over the wire is for the test to move.
struct Ends {
    sockets: [Socket; 2],
    wires: [TcpStream; 2],
    moving: [Moving; 2],
}

impl Ends {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut wires = Vec::new();
        let sockets = sessions().map(|session| {
            let wire = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            wire.set_nonblocking(true).unwrap();
            wire.set_nodelay(true).unwrap();
            wires.push(wire);
            let (stream, _) = listener.accept().unwrap();
            stream.set_nonblocking(true).unwrap();
            let mut socket = Socket::new(1, None);
            let stream = ParentOnly::new(stream);
            socket.connect(2, Proven::new(stream, Some(session)));
            socket
        });
        let wires = wires.try_into().unwrap();
        Self { sockets, wires, moving: [Moving::default(), Moving::default()] }
    }

    /// What socket 0 sends, whole.
    fn sent(&mut self, messages: usize) -> Vec<u8> {
        let (mut wire, until) = (Vec::new(), Instant::now() + PATIENCE);
        while self.moving[0].finished.len() < messages {
            assert!(Instant::now() < until, "it is never sent");
            self.ready(0);
            self.sockets[0].flush(1, &mut self.moving[0]).unwrap();
            // It ends in `WouldBlock`.
            let _ = self.wires[0].read_to_end(&mut wire);
        }
        while wire.is_empty() {
            let _ = self.wires[0].read_to_end(&mut wire);
        }
        std::thread::sleep(Duration::from_millis(2));
        let _ = self.wires[0].read_to_end(&mut wire);
        wire
    }

    fn ready(&mut self, socket: usize) {
        self.sockets[socket].ready(Ready { socket, reads: true, writes: true });
    }

    fn drain(&mut self, call: Call) -> Result<(), LinkError> {
        self.ready(1);
        self.sockets[1].drain(0, call, &mut self.moving[1])
    }

    /// Has socket 1 receive these bytes, until so many messages are there or it fails.
    fn receive(&mut self, wire: &[u8], call: Call, messages: usize) -> Result<(), LinkError> {
        let (mut left, until) = (wire, Instant::now() + PATIENCE);
        while self.moving[1].finished.len() < messages {
            assert!(Instant::now() < until, "it is never received");
            if !left.is_empty()
                && let Ok(written) = self.wires[1].write(left)
            {
                left = &left[written..];
            }
            self.drain(call)?;
        }
        Ok(())
    }
}

fn call(bytes: usize) -> Call {
    Call::all_reduce(7, Dtype::U8, bytes as u64)
}

fn text(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}

fn span(memory: &mut [u8]) -> Span {
    Span { start: memory.as_mut_ptr(), bytes: memory.len() }
}

/// On either side of each limit.
const SIZES: [usize; 10] = [
    0,
    1,
    WHOLE_BYTES - HEADER_BYTES,
    WHOLE_BYTES - HEADER_BYTES + 1,
    RECORD_BYTES_MAX,
    RECORD_BYTES_MAX + 1,
    2 * RECORD_BYTES_MAX - 1,
    LARGE_BUFFER,
    5 * RECORD_BYTES_MAX + 7,
    1 << 20,
];

#[test]
fn messages_of_all_sizes_arrive_and_show_nothing_on_the_wire() {
    for bytes in SIZES {
        let (mut ends, mut from, mut to) = (Ends::new(), text(bytes), vec![1; bytes]);
        ends.sockets[0].post_send(3, true, call(bytes), span(&mut from));
        ends.sockets[1].post_receive(4, span(&mut to));
        let wire = ends.sent(1);
        let known = [
            &from[..bytes.min(64)],
            &Header::encode(&Header { marked: true, bytes: bytes as u64, call: call(bytes) })[..],
        ];
        for known in known.iter().flat_map(|known| known.windows(12)) {
            assert!(!wire.windows(12).any(|part| part == known), "{bytes}");
        }
        ends.receive(&wire, call(bytes), 1).unwrap();
        assert_eq!(
            (&ends.moving[0].finished[..], &ends.moving[1].finished[..]),
            (&[3][..], &[4][..])
        );
        assert!(ends.moving[1].marked && to == from, "{bytes}");
    }
}

/// Small messages leave together, and come in any two pieces; what was read with another message is
/// not slept over.
#[test]
fn messages_come_in_any_pieces_and_none_is_slept_over() {
    let sizes = [8, 0, 5000, 100];
    for step in [1, 7, 61, 400] {
        let mut ends = Ends::new();
        let mut from: Vec<_> = sizes.iter().map(|&bytes| text(bytes)).collect();
        let mut to: Vec<_> = sizes.iter().map(|&bytes| vec![1; bytes]).collect();
        for (at, from) in from.iter_mut().enumerate() {
            ends.sockets[0].post_send(at, false, call(1), span(from));
        }
        let wire = ends.sent(sizes.len());
        ends.sockets[1].post_receive(0, span(&mut to[0]));
        for piece in wire.chunks(step) {
            ends.wires[1].write_all(piece).unwrap();
            std::thread::yield_now();
            ends.drain(call(1)).unwrap();
        }
        ends.receive(&[], call(1), 1).unwrap();
        // All the rest is in the socket or with the kernel.
        for (at, to) in to.iter_mut().enumerate().skip(1) {
            ends.sockets[1].post_receive(at, span(to));
            let until = Instant::now() + PATIENCE;
            while ends.moving[1].finished.len() <= at {
                assert!(Instant::now() < until, "message {at} is slept over");
                ends.drain(call(1)).unwrap();
            }
        }
        assert_eq!(to, from);
    }
}

#[test]
fn a_record_that_was_read_can_move_without_an_event() {
    let (mut ends, mut from, mut to) = (Ends::new(), [text(8), text(8)], [[0; 8], [0; 8]]);
    for (at, from) in from.iter_mut().enumerate() {
        ends.sockets[0].post_send(at, false, call(8), span(from));
    }
    let wire = ends.sent(2);
    ends.sockets[1].post_receive(0, span(&mut to[0]));
    ends.receive(&wire, call(8), 1).unwrap();
    let until = Instant::now() + PATIENCE;
    while !ends.sockets[1].can_move_when_posted() {
        assert!(Instant::now() < until, "the second message came with the first");
        ends.drain(call(8)).unwrap();
    }
    ends.sockets[1].post_receive(1, span(&mut to[1]));
    assert!(ends.sockets[1].can_move(), "it would be slept over");
    ends.sockets[1].drain(0, call(8), &mut ends.moving[1]).unwrap();
    assert_eq!((&ends.moving[1].finished[..], &to[1][..]), (&[0, 1][..], &from[1][..]));
}

/// Wherever a bit is flipped, the message is not there, and the error names the peer, the socket
/// and the byte; the parts that are told to be through are those that were sent.
#[test]
fn an_altered_message_is_an_error_with_its_place() {
    for bytes in [100, 200_000] {
        let places = (0..200).map(|at| at * 997);
        for at in places.chain(0..20) {
            let (mut ends, mut from, mut to) = (Ends::new(), text(bytes), vec![1; bytes]);
            ends.sockets[0].post_send(0, false, call(bytes), span(&mut from));
            ends.sockets[1].post_receive(0, span(&mut to));
            let mut wire = ends.sent(1);
            let at = at % wire.len();
            wire[at] ^= 1 << (at % 8);
            // A length that grew is waited for: what comes next is not that.
            wire.extend([0; WHOLE_BYTES + RECORD_OVERHEAD]);
            let error = ends.receive(&wire, call(bytes), 1).unwrap_err();
            let LinkErrorKind::Altered { socket: 2, at: told } = error.kind else {
                panic!("byte {at} of {bytes}: {error}");
            };
            let before = if bytes == 100 || at < HEADER_BYTES + RECORD_OVERHEAD {
                0
            } else {
                let at = at - HEADER_BYTES - RECORD_OVERHEAD;
                HEADER_BYTES + at / (RECORD_BYTES_MAX + RECORD_OVERHEAD) * RECORD_BYTES_MAX
            };
            assert_eq!((error.peer, told), (0, before as u64), "byte {at} of {bytes}");
            assert!(ends.moving[1].finished.is_empty());
            assert!(error.to_string().starts_with("link to rank 0: what came after byte"));
            let good = before.saturating_sub(HEADER_BYTES);
            assert_eq!(to[..good], from[..good]);
        }
    }
}

#[test]
fn another_call_is_told_in_its_words() {
    for (theirs, ours) in [(10, 100_000), (100_000, 10), (10, 20)] {
        let (mut ends, mut from, mut to) = (Ends::new(), text(theirs), vec![1; ours]);
        ends.sockets[0].post_send(0, false, call(theirs), span(&mut from));
        ends.sockets[1].post_receive(0, span(&mut to));
        let wire = ends.sent(1);
        let error = ends.receive(&wire, call(ours), 1).unwrap_err();
        assert!(matches!(error.kind, LinkErrorKind::Mismatch { .. }), "{error}");
    }
}

impl Socket {
    /// Whether it holds a record.
    fn can_move_when_posted(&self) -> bool {
        self.sealed.as_ref().is_some_and(|sealed| sealed.has_record())
    }
}
