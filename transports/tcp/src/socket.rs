//! One socket to one peer: its queue of posted sends and its queue of posted receives. Where
//! connections that break are dialled anew, it goes on in others.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;

use rustix::net::{self, RecvFlags, SendFlags};
use unisum_link::fork::ParentOnly;
use unisum_link::frame::{HEADER_BYTES, Header};
use unisum_link::secure::Proven;
use unisum_link::silence::{self, Told};
use unisum_link::{Call, LinkError, LinkErrorKind, Rank};

use crate::resume::{Arriving, Flow, Handle};
use crate::sealed::Sealed;
use crate::sleep::{Ready, Watched};

/// A message's memory: part of the region, or of a slot the link keeps until the message is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) start: *mut u8,
    pub(crate) bytes: usize,
}

// SAFETY: a span points into a region (which may move between threads) or into a slot that the
// same link owns; it is used by the one thread that drives the link.
unsafe impl Send for Span {}

/// A message under way, with the link's name for the transfer it belongs to.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) transfer: usize,
    pub(crate) header: [u8; HEADER_BYTES],
    span: Span,
    /// Bytes of header and payload that are through; where records are sent, those that are sealed.
    pub(crate) through: usize,
    /// Where records are sent: at which of their bytes the message ends, once it is sealed.
    pub(crate) ends_at: u64,
}

impl Message {
    const fn new(transfer: usize, header: [u8; HEADER_BYTES], span: Span) -> Self {
        Self { transfer, header, span, through: 0, ends_at: 0 }
    }

    pub(crate) const fn total(&self) -> usize {
        HEADER_BYTES + self.span.bytes
    }

    /// The part of header and payload that is not through yet.
    pub(crate) fn rest(&mut self) -> (&mut [u8], &mut [u8]) {
        let of_header = self.through.min(HEADER_BYTES);
        let of_payload = self.through - of_header;
        // SAFETY: `of_payload` is at most `span.bytes`, so the address stays inside the span.
        let start = unsafe { self.span.start.add(of_payload) };
        // SAFETY: whoever posted the message lent the span until it is done or dropped, and only
        // this thread touches it meanwhile (contract of `Region`).
        let payload =
            unsafe { std::slice::from_raw_parts_mut(start, self.span.bytes - of_payload) };
        (&mut self.header[of_header..], payload)
    }
}

/// What a socket's receive buffer holds at the least.
const BUFFERED_BYTES: usize = 32 << 10;

/// Messages up to this size pass through one buffer: a message in two places costs the kernel more
/// than copying it costs here.
const SMALL_BYTES: usize = 1 << 10;

/// What sockets move their messages with.
#[derive(Debug)]
pub(crate) struct Moving {
    /// Transfers of which a part is through.
    pub(crate) finished: Vec<usize>,
    /// Whether a marked message came.
    pub(crate) marked: bool,
    buffer: Box<[u8; SMALL_BYTES]>,
}

impl Default for Moving {
    fn default() -> Self {
        Self { finished: Vec::new(), marked: false, buffer: Box::new([0; SMALL_BYTES]) }
    }
}

/// One socket. Until the connection is there, messages wait in the queues.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) peer: Rank,
    stream: Option<ParentOnly<TcpStream>>,
    /// What is in place of the stream, where connections that break are dialled anew.
    flow: Option<Box<Resumed>>,
    /// What is between the messages and the stream, unless that is in clear text.
    pub(crate) sealed: Option<Box<Sealed>>,
    sends: VecDeque<Message>,
    receives: VecDeque<Message>,
    /// Whether a try is worth it: cleared when the kernel has no more, set by its next event.
    readable: bool,
    writable: bool,
    /// Whether the link lists it among those with work.
    pub(crate) listed: bool,
}

/// A socket's end of its flow.
#[derive(Debug)]
struct Resumed {
    flow: Handle,
    /// The flow's connection, when this socket saw it last, and which of the flow's that is.
    stream: Option<Arc<ParentOnly<TcpStream>>>,
    stood: u32,
}

impl Resumed {
    /// Whether the flow has a connection, and the socket has seen it.
    fn is_newest(&self, flow: &Flow) -> bool {
        let both = flow.stream().zip(self.stream.as_ref());
        both.is_some_and(|(newest, seen)| Arc::ptr_eq(newest, seen))
    }
}

impl Socket {
    /// A socket to a rank, without its connection.
    pub(crate) fn new(peer: Rank, flow: Option<Handle>) -> Self {
        Self {
            peer,
            stream: None,
            flow: flow.map(|flow| Box::new(Resumed { flow, stream: None, stood: 0 })),
            sealed: None,
            sends: VecDeque::new(),
            receives: VecDeque::new(),
            readable: false,
            writable: false,
            listed: false,
        }
    }

    /// Takes over the `number`-th connection to a peer.
    pub(crate) fn connect(&mut self, number: u8, connection: Proven) {
        let Proven { stream, session, .. } = connection;
        self.sealed = session.map(|session| Box::new(Sealed::new(number, session)));
        (self.stream, self.readable, self.writable) = (Some(stream), true, true);
    }

    /// Takes over what has become of the flow; its connection, if that is another one.
    pub(crate) fn renew(&mut self) -> Option<Arc<ParentOnly<TcpStream>>> {
        let resumed = self.flow.as_mut()?;
        let flow = resumed.flow.lock();
        let stream = flow.stream().cloned();
        let stood = std::mem::replace(&mut resumed.stood, flow.stood());
        let is_new = stood != resumed.stood;
        resumed.stream.clone_from(&stream);
        (self.readable, self.writable) = (true, true);
        stream.filter(|_| is_new)
    }

    /// Takes over that the connection failed: what the link has to say, unless it is dialled anew.
    pub(crate) fn broke(&self, error: LinkError) -> Option<LinkError> {
        let Some(resumed) = &self.flow else { return Some(error) };
        let mut flow = resumed.flow.lock();
        // Another one may stand meanwhile.
        if resumed.is_newest(&flow) { flow.broke(error).err() } else { None }
    }

    pub(crate) fn is_connected(&self) -> bool {
        match &self.flow {
            None => self.stream.is_some(),
            Some(resumed) => resumed.flow.lock().stream().is_some(),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.flow {
            None => self.stream.as_ref().map(|stream| stream.as_fd()),
            Some(resumed) => resumed.stream.as_ref().map(|stream| stream.as_fd()),
        }
    }

    /// What the kernel says of the connection. Of one that broke it says for long that what was
    /// sent there is not acknowledged: there is nothing to say of that any more.
    pub(crate) fn told(&self) -> io::Result<Told> {
        match (&self.flow, self.fd()) {
            (Some(resumed), _) if !resumed.is_newest(&resumed.flow.lock()) => Ok(Told::NOTHING),
            (_, Some(fd)) => silence::ask(fd),
            (_, None) => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Takes over that it may be ready.
    pub(crate) const fn ready(&mut self, ready: Ready) {
        self.readable |= ready.reads;
        self.writable |= ready.writes;
    }

    /// What to sleep on; nothing before the connection is there.
    pub(crate) fn watched(&self, socket: usize) -> Option<Watched<'_>> {
        let fd = self.fd()?;
        let (mut reads, mut writes) = (!self.receives.is_empty(), !self.sends.is_empty());
        if let Some(resumed) = &self.flow {
            let flow = resumed.flow.lock();
            // A connection that broke is ready for ever.
            flow.stream()?;
            reads |= writes && flow.is_full();
            writes &= !flow.is_full();
        }
        Some(Watched { socket, fd, reads, writes })
    }

    /// Whether only one message is awaited, so small that the socket's buffer holds it: its
    /// sender is not held back while nobody reads.
    pub(crate) fn waits_for_little(&self) -> bool {
        let small = |message: &Message| message.total() <= BUFFERED_BYTES;
        self.sends.is_empty() && self.receives.len() == 1 && self.receives.iter().all(small)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.sends.is_empty() && self.receives.is_empty()
    }

    /// Whether `flush` or `drain` could move something without a new event.
    pub(crate) fn can_move(&self) -> bool {
        if let Some(resumed) = &self.flow {
            let flow = resumed.flow.lock();
            let reads = !self.receives.is_empty() || flow.is_full();
            let sends = self.writable && !self.sends.is_empty() && !flow.is_full();
            let is_there = flow.stream().is_some();
            return flow.has_news() || is_there && (sends || self.readable && reads);
        }
        // What was read already makes no event.
        let has_input = self.readable || self.sealed.as_ref().is_some_and(|it| it.has_record());
        self.is_connected()
            && (self.writable && !self.sends.is_empty() || has_input && !self.receives.is_empty())
    }

    pub(crate) fn post_send(&mut self, transfer: usize, marked: bool, call: Call, span: Span) {
        let header = Header { marked, bytes: span.bytes as u64, call }.encode();
        self.sends.push_back(Message::new(transfer, header, span));
    }

    pub(crate) fn post_receive(&mut self, transfer: usize, span: Span) {
        self.receives.push_back(Message::new(transfer, [0; HEADER_BYTES], span));
    }

    /// The transfer of the newest posted receive, if nothing of that has come.
    pub(crate) fn newest_untouched(&self) -> Option<usize> {
        self.receives.back().filter(|message| message.through == 0).map(|message| message.transfer)
    }

    /// Drops the newest posted receive.
    pub(crate) fn retract(&mut self) {
        self.receives.pop_back();
    }

    pub(crate) fn clear(&mut self) {
        self.sends.clear();
        self.receives.clear();
        self.listed = false;
    }

    /// Sends what the kernel takes.
    pub(crate) fn flush(&mut self, peer: Rank, moving: &mut Moving) -> Result<(), LinkError> {
        if let Some(resumed) = &self.flow {
            let through = resumed.flow.lock().flush(&mut self.sends, &mut self.writable)?;
            moving.finished.extend(self.sends.drain(..through).map(|it| it.transfer));
            return Ok(());
        }
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        if let Some(sealed) = &mut self.sealed {
            return match sealed.flush(stream, &mut self.sends, &mut self.writable) {
                Ok(through) => {
                    moving.finished.extend(self.sends.drain(..through).map(|it| it.transfer));
                    Ok(())
                }
                Err(error) => Err(failed(peer, "sending", error)),
            };
        }
        while self.writable {
            let Some(message) = self.sends.front_mut() else {
                break;
            };
            match send(stream, message, &mut moving.buffer) {
                Ok(sent) => {
                    message.through += sent;
                    // A short send found the buffer full: the next event tells of room.
                    self.writable = message.through == message.total();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(peer, "sending", error)),
            }
            if message.through == message.total() {
                moving.finished.push(message.transfer);
                self.sends.pop_front();
            }
        }
        Ok(())
    }

    /// Receives what is there and posted.
    pub(crate) fn drain(
        &mut self,
        peer: Rank,
        ours: Call,
        moving: &mut Moving,
    ) -> Result<(), LinkError> {
        if let Some(resumed) = &self.flow {
            let (receives, call) = (&mut self.receives, Some(ours));
            let mut arriving = Arriving { receives, call, moving };
            let mut flow = resumed.flow.lock();
            flow.drain(&mut arriving, &mut self.readable, false)?;
            if flow.owes() {
                let through = flow.flush(&mut self.sends, &mut self.writable)?;
                moving.finished.extend(self.sends.drain(..through).map(|it| it.transfer));
            }
            return Ok(());
        }
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        if let Some(sealed) = &mut self.sealed {
            while let Some(message) = self.receives.front_mut() {
                let check = |message: &Message, header| check(message, header, peer, ours);
                if !sealed.receive(message, peer, check, &mut moving.marked)? {
                    match sealed.read(stream, message, &mut self.readable) {
                        Ok(true) => continue,
                        Ok(false) => break,
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                            return Err(LinkError::closed(peer));
                        }
                        Err(error) => return Err(failed(peer, "receiving", error)),
                    }
                }
                if message.through == message.total() {
                    moving.finished.push(message.transfer);
                    self.receives.pop_front();
                }
            }
            return Ok(());
        }
        while self.readable {
            let Some(message) = self.receives.front_mut() else {
                break;
            };
            match receive(stream, message, &mut moving.buffer) {
                Ok(0) => return Err(LinkError::closed(peer)),
                Ok(received) => {
                    // A short receive found the buffer empty: the next event tells of more.
                    self.readable = message.through + received == message.total();
                    moving.marked |= advance(message, received, peer, ours)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(peer, "receiving", error)),
            }
            if message.through == message.total() {
                moving.finished.push(message.transfer);
                self.receives.pop_front();
            }
        }
        Ok(())
    }
}

/// Counts received bytes and checks the header when it has become complete; whether that is
/// marked.
pub(crate) fn advance(
    message: &mut Message,
    received: usize,
    peer: Rank,
    ours: Call,
) -> Result<bool, LinkError> {
    let complete_before = message.through >= HEADER_BYTES;
    message.through += received;
    if complete_before || message.through < HEADER_BYTES {
        return Ok(false);
    }
    check(message, message.header, peer, ours)
}

/// Whether a header says what the message is to be, and whether that is marked.
fn check(
    message: &Message,
    header: [u8; HEADER_BYTES],
    peer: Rank,
    ours: Call,
) -> Result<bool, LinkError> {
    let header =
        Header::decode(&header).map_err(|error| LinkError::protocol(peer, error.to_string()))?;
    if header.call != ours {
        let kind = LinkErrorKind::Mismatch { ours, theirs: header.call };
        return Err(LinkError { peer, kind });
    }
    if header.bytes != message.span.bytes as u64 {
        let (theirs, ours) = (header.bytes, message.span.bytes);
        let what = format!("a message of {theirs} bytes where the plan has {ours}");
        return Err(LinkError::protocol(peer, what));
    }
    Ok(header.marked)
}

fn send(
    stream: &TcpStream,
    message: &mut Message,
    buffer: &mut [u8; SMALL_BYTES],
) -> io::Result<usize> {
    let (header, payload) = message.rest();
    let bytes = header.len() + payload.len();
    // NOSIGNAL: the host program may not ignore SIGPIPE.
    let flags = SendFlags::NOSIGNAL;
    if bytes <= SMALL_BYTES {
        buffer[..header.len()].copy_from_slice(header);
        buffer[header.len()..bytes].copy_from_slice(payload);
        return Ok(net::send(stream, &buffer[..bytes], flags)?);
    }
    let parts = [IoSlice::new(header), IoSlice::new(payload)];
    Ok(net::sendmsg(stream, &parts, &mut Default::default(), flags)?)
}

fn receive(
    stream: &TcpStream,
    message: &mut Message,
    buffer: &mut [u8; SMALL_BYTES],
) -> io::Result<usize> {
    let (header, payload) = message.rest();
    let bytes = header.len() + payload.len();
    let flags = RecvFlags::empty();
    if bytes <= SMALL_BYTES {
        let (received, _) = net::recv(stream, &mut buffer[..bytes], flags)?;
        let of_header = received.min(header.len());
        header[..of_header].copy_from_slice(&buffer[..of_header]);
        payload[..received - of_header].copy_from_slice(&buffer[of_header..received]);
        return Ok(received);
    }
    let mut parts = [IoSliceMut::new(header), IoSliceMut::new(payload)];
    Ok(net::recvmsg(stream, &mut parts, &mut Default::default(), flags)?.bytes)
}

/// What an error of a connection means.
pub(crate) fn failed(peer: Rank, doing: &str, error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => LinkError::closed(peer),
        _ => LinkError::system(peer, doing, error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use unisum_kernels::Dtype;

    use super::*;

    /// A connected socket, and what is at its other end.
    fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let other = TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        let (own, _) = listener.accept().expect("connected");
        own.set_nonblocking(true).expect("a socket");
        other.set_nodelay(true).expect("a socket");
        let mut socket = Socket::new(1, None);
        socket.connect(0, ParentOnly::new(own).into());
        (socket, other)
    }

    fn receive_until(socket: &mut Socket, call: Call, moving: &mut Moving, through: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while socket.receives.front().is_some_and(|message| message.through < through) {
            assert!(Instant::now() < deadline, "{through} bytes never came");
            socket.ready(Ready { socket: 0, reads: true, writes: true });
            socket.drain(1, call, moving).expect("it is a message of this call");
            std::thread::yield_now();
        }
    }

    /// On either side of what passes through one buffer.
    #[test]
    fn messages_may_come_in_any_two_pieces() {
        for bytes in [4, SMALL_BYTES - HEADER_BYTES, SMALL_BYTES - HEADER_BYTES + 4] {
            let call = Call::all_reduce(7, Dtype::F32, bytes as u64 / 4);
            let payload: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8 + 1).collect();
            let header = Header { marked: false, bytes: bytes as u64, call }.encode();
            let wire = [&header[..], &payload].concat();
            let (mut socket, mut other) = pair();
            for split in (1..wire.len()).filter(|split| split % 7 == 0 || *split < 60) {
                let mut memory = vec![0; bytes];
                let mut moving = Moving::default();
                socket.post_receive(split, Span { start: memory.as_mut_ptr(), bytes });
                other.write_all(&wire[..split]).expect("it is connected");
                receive_until(&mut socket, call, &mut moving, split);
                assert!(moving.finished.is_empty(), "{split} of {bytes}");
                other.write_all(&wire[split..]).expect("it is connected");
                receive_until(&mut socket, call, &mut moving, wire.len());
                assert_eq!(moving.finished, [split]);
                assert_eq!(memory, payload, "{split} of {bytes}");
            }
        }
    }

    #[test]
    fn an_end_within_a_small_message_is_a_closed_connection() {
        let (mut socket, mut other) = pair();
        let call = Call::all_reduce(0, Dtype::F32, 1);
        let (mut memory, mut moving) = ([0; 4], Moving::default());
        socket.post_receive(0, Span { start: memory.as_mut_ptr(), bytes: 4 });
        let header = Header { marked: false, bytes: 4, call }.encode();
        other.write_all(&header[..9]).expect("it is connected");
        receive_until(&mut socket, call, &mut moving, 9);
        drop(other);
        let deadline = Instant::now() + Duration::from_secs(10);
        let error = loop {
            assert!(Instant::now() < deadline, "nobody saw the end");
            socket.ready(Ready { socket: 0, reads: true, writes: true });
            if let Err(error) = socket.drain(1, call, &mut moving) {
                break error;
            }
        };
        assert!(matches!(error.kind, LinkErrorKind::Closed), "{error}");
        assert!(moving.finished.is_empty());
    }
}
