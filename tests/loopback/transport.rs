//! A transport of a program's own: Unix sockets between the processes of a host. It is the example
//! of docs/design/transports.md: short, and not fast.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::time::Timespec;
use unisum::Rank;
use unisum::link::frame::{HEADER_BYTES, Header};
use unisum::link::{
    Call, Connected, Endpoint, EndpointInfo, Group, Landing, Link, LinkCounters, LinkError,
    LinkErrorKind, PeerCounts, Reach, Refusal, Region, Regions, Setup, Site, Ticket, Transport,
    Wake,
};

/// The transport. Its value says whom it reaches: ranks of a host as a node, or all.
#[derive(Debug)]
pub(crate) struct Loopback(pub(crate) Reach);

impl Transport for Loopback {
    fn name(&self) -> &'static str {
        "loopback"
    }

    fn reach(&self) -> Reach {
        self.0
    }

    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal> {
        if std::env::var("LOOPBACK_REFUSED").is_ok() {
            return Err(Refusal::Own("it was told to refuse".into()));
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only the number matters.
        let name = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("unisum-loopback-{}-{}", name.0, name.1));
        let listener = UnixListener::bind(&path);
        let listener = listener.map_err(|error| Refusal::system("binding a socket", error))?;
        Ok(Box::new(End { rank: site.rank, listener, path, streams: BTreeMap::new() }))
    }
}

/// This rank's socket, and the connections that it has opened: to the ranks below it.
#[derive(Debug)]
struct End {
    rank: Rank,
    listener: UnixListener,
    path: PathBuf,
    streams: BTreeMap<Rank, UnixStream>,
}

impl Endpoint for End {
    fn info(&self) -> EndpointInfo {
        EndpointInfo::Same(self.path.to_str().expect("a temporary directory").into())
    }

    /// Connects to the ranks below: who knows the session, which strangers don't, is a rank.
    fn agree(&mut self, infos: &[Vec<u8>], setup: &Setup<'_>) -> Result<Rank, Refusal> {
        let has_end = |rank: &Rank| !infos[*rank].is_empty();
        for rank in (0..self.rank).filter(has_end) {
            let path = String::from_utf8_lossy(&infos[rank]).into_owned();
            let mut stream = UnixStream::connect(&path)
                .map_err(|error| Refusal::system(&format!("connecting to {path}"), error))?;
            let hello = [&setup.session[..], &self.rank.to_le_bytes()].concat();
            stream.write_all(&hello).map_err(|error| Refusal::system("a hello", error))?;
            self.streams.insert(rank, stream);
        }
        Ok((0..infos.len()).find(has_end).unwrap_or(self.rank))
    }

    fn connect(
        mut self: Box<Self>,
        members: &[Rank],
        setup: &Setup<'_>,
    ) -> Result<Connected, Refusal> {
        let failed = |error| Refusal::system("accepting a connection", error);
        self.listener.set_nonblocking(true).map_err(failed)?;
        while let Some(missing) =
            members.iter().find(|it| **it != self.rank && !self.streams.contains_key(it))
        {
            if setup.limit.check().is_err() {
                return Err(Refusal::Others(vec![*missing], "did not connect in time".into()));
            }
            let until = Instant::now() + setup.limit.nap();
            if !readable(self.listener.as_fd(), until).map_err(|it| failed(it.into()))? {
                continue;
            }
            let (mut stream, _) = self.listener.accept().map_err(failed)?;
            let mut hello = [0; 24];
            stream.set_read_timeout(Some(Duration::from_secs(1))).map_err(failed)?;
            let (session, rank) = match stream.read_exact(&mut hello) {
                Ok(()) => hello.split_at(16),
                // Who says nothing is no rank.
                Err(_) => continue,
            };
            let rank = Rank::from_le_bytes(rank.try_into().expect("8 of 24 bytes"));
            if session == setup.session && members.contains(&rank) && rank > self.rank {
                self.streams.insert(rank, stream);
            }
        }
        let streams = std::mem::take(&mut self.streams).into_iter();
        let streams = streams.filter(|(rank, _)| members.contains(rank));
        let link = Sockets::new(self.rank, streams);
        Ok(Connected::new(Box::new(link.map_err(|error| Refusal::system("a queue", error))?)))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Nobody connects any more, and nobody needs the name.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The link: a socket to each member.
#[derive(Debug)]
struct Sockets {
    rank: Rank,
    peers: BTreeMap<Rank, Peer>,
    queue: OwnedFd,
    bell: Arc<Bell>,
    current: Option<Call>,
    counts: HashMap<Rank, PeerCounts>,
    is_marked: bool,
    arrived: HashMap<Ticket, Vec<u8>>,
    /// Messages that are through.
    counters: Arc<LinkCounters>,
}

#[derive(Debug)]
struct Peer {
    stream: UnixStream,
    sends: VecDeque<Message>,
    receives: VecDeque<Message>,
}

/// A message under way: its header and its memory, of which so much is through.
#[derive(Debug)]
struct Message {
    ticket: Ticket,
    call: Call,
    header: [u8; HEADER_BYTES],
    memory: Region,
    slot: Option<Vec<u8>>,
    through: usize,
}

impl Message {
    /// What is not through yet, of the header or else of the memory.
    fn rest(&mut self) -> &mut [u8] {
        if self.through < HEADER_BYTES {
            return &mut self.header[self.through..];
        }
        let of_memory = self.through - HEADER_BYTES;
        match &mut self.slot {
            Some(slot) => &mut slot[of_memory..],
            None => {
                let rest = of_memory..self.memory.bytes();
                // SAFETY: whoever posted the message lent its memory until it is done or dropped,
                // and only this thread touches it meanwhile.
                unsafe { std::slice::from_raw_parts_mut(self.memory.pointer(&rest), rest.len()) }
            }
        }
    }

    const fn is_through(&self) -> bool {
        self.through == HEADER_BYTES + self.memory.bytes()
    }

    /// Compares a header that has come with the call, and says whether it carries the mark.
    fn check(&self, peer: Rank) -> Result<bool, LinkError> {
        let (ours, bytes) = (self.call, self.memory.bytes() as u64);
        let header = Header::decode(&self.header);
        let header = header.map_err(|error| LinkError::protocol(peer, error.to_string()))?;
        if header.call != ours {
            let kind = LinkErrorKind::Mismatch { ours, theirs: header.call };
            return Err(LinkError { peer, kind });
        }
        match header.bytes == bytes {
            true => Ok(header.marked),
            false => Err(LinkError::protocol(peer, format!("{} bytes for {bytes}", header.bytes))),
        }
    }
}

impl Peer {
    /// Moves what the socket takes and gives; whether a marked message came.
    fn move_on(&mut self, rank: Rank, mut done: impl FnMut(Message)) -> Result<bool, LinkError> {
        let (mut marked, mut stream) = (false, &self.stream);
        while let Some(message) = self.sends.front_mut() {
            let Some(bytes) = moved(rank, stream.write(message.rest()))? else { break };
            message.through += bytes;
            if message.is_through() {
                done(self.sends.pop_front().expect("it was there"));
            }
        }
        while let Some(message) = self.receives.front_mut() {
            let Some(bytes) = moved(rank, stream.read(message.rest()))? else { break };
            message.through += bytes;
            if message.through == HEADER_BYTES {
                marked |= message.check(rank)?;
            }
            if message.is_through() {
                done(self.receives.pop_front().expect("it was there"));
            }
        }
        Ok(marked)
    }
}

/// How many bytes moved; `None` if the socket has to be waited for.
fn moved(peer: Rank, result: std::io::Result<usize>) -> Result<Option<usize>, LinkError> {
    use std::io::ErrorKind;
    match result {
        Ok(0) => Err(LinkError::closed(peer)),
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock => Ok(None),
            ErrorKind::Interrupted => Ok(Some(0)),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Err(LinkError::closed(peer)),
            _ => Err(LinkError::system(peer, "moving bytes", error)),
        },
    }
}

impl Sockets {
    fn new(rank: Rank, streams: impl Iterator<Item = (Rank, UnixStream)>) -> std::io::Result<Self> {
        let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&queue, &bell, data, epoll::EventFlags::IN)?;
        let mut peers = BTreeMap::new();
        for (rank, stream) in streams {
            stream.set_nonblocking(true)?;
            let (sends, receives) = (VecDeque::new(), VecDeque::new());
            peers.insert(rank, Peer { stream, sends, receives });
        }
        Ok(Self {
            rank,
            peers,
            queue,
            bell: Arc::new(Bell(bell)),
            current: None,
            counts: HashMap::new(),
            is_marked: false,
            arrived: HashMap::new(),
            counters: Arc::new(LinkCounters::new("loopback", &["messages"])),
        })
    }

    fn call(&self) -> Call {
        self.current.expect("a call begins before its transfers")
    }

    fn peer(&mut self, rank: Rank) -> Result<&mut Peer, LinkError> {
        self.peers.get_mut(&rank).ok_or_else(|| LinkError::closed(rank))
    }
}

impl Link for Sockets {
    fn begin(&mut self, call: &Call, _: &Regions) {
        (self.current, self.is_marked) = (Some(*call), false);
        self.counts.clear();
    }

    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts) {
        self.counts.insert(peer, counts);
    }

    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError> {
        let call =
            self.counts.get(&to).map_or_else(|| self.call(), |counts| counts.told(self.call()));
        let header = Header { marked: self.is_marked, bytes: memory.bytes() as u64, call };
        let header = header.encode();
        let message = Message { ticket, call, header, memory, slot: None, through: 0 };
        self.peer(to)?.sends.push_back(message);
        Ok(())
    }

    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError> {
        let call =
            self.counts.get(&from).map_or_else(|| self.call(), |counts| counts.heard(self.call()));
        let slot = (landing == Landing::Slot).then(|| vec![0; memory.bytes()]);
        let header = [0; HEADER_BYTES];
        let message = Message { ticket, call, header, memory, slot, through: 0 };
        self.peer(from)?.receives.push_back(message);
        Ok(())
    }

    fn retract(&mut self, from: Rank, ticket: Ticket) -> bool {
        let Some(peer) = self.peers.get_mut(&from) else { return false };
        let is_it = |last: &Message| last.ticket == ticket && last.through == 0;
        peer.receives.back().is_some_and(is_it) && peer.receives.pop_back().is_some()
    }

    fn hears_leaving(&self, _: Rank) -> bool {
        true
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        for (&rank, peer) in &mut self.peers {
            self.is_marked |= peer.move_on(rank, |message| {
                done.push(message.ticket);
                self.counters.add(0, 1);
                if let Some(slot) = message.slot {
                    self.arrived.insert(message.ticket, slot);
                }
            })?;
        }
        Ok(())
    }

    fn counters(&self) -> Option<Arc<LinkCounters>> {
        Some(self.counters.clone())
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.arrived[&ticket].as_ptr()
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        self.arrived.remove(&ticket);
        Ok(())
    }

    fn mark(&mut self) {
        self.is_marked = true;
    }

    fn is_marked(&self) -> bool {
        self.is_marked
    }

    fn park(&mut self, until: Instant, _: usize) -> Result<(), LinkError> {
        self.arm();
        let slept = readable(self.queue.as_fd(), until);
        self.disarm();
        slept.map(drop).map_err(|error| LinkError::os(self.rank, "waiting for sockets", error))
    }

    fn arm(&mut self) -> bool {
        for peer in self.peers.values() {
            let mut wanted = epoll::EventFlags::empty();
            wanted.set(epoll::EventFlags::IN, !peer.receives.is_empty());
            wanted.set(epoll::EventFlags::OUT, !peer.sends.is_empty());
            // One that nothing is wanted of is not in the queue: its end would wake this rank for
            // ever. Fails where it was not there.
            let _ = epoll::delete(&self.queue, &peer.stream);
            if !wanted.is_empty() {
                let data = epoll::EventData::new_u64(0);
                // Else this rank wakes at the end of its wait.
                let _ = epoll::add(&self.queue, &peer.stream, data, wanted);
            }
        }
        // What can move already makes the queue readable.
        true
    }

    fn disarm(&mut self) {
        let mut word = [0; 8];
        // Nothing to read: nobody has woken it.
        let _ = rustix::io::read(&self.bell.0, &mut word);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.bell.clone()
    }

    fn abort(&mut self) {
        // The messages with their memory, and what peers were in the middle of.
        self.peers.clear();
        self.arrived.clear();
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        None
    }

    fn description(&self) -> String {
        format!("loopback: {} sockets", self.peers.len())
    }
}

/// Waits for a descriptor; whether it is readable.
fn readable(descriptor: BorrowedFd<'_>, until: Instant) -> rustix::io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    let mut watched = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
    match poll(&mut watched, Some(&left)) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        result => Ok(result? > 0),
    }
}

#[derive(Debug)]
struct Bell(OwnedFd);

impl Wake for Bell {
    fn wake(&self) {
        // Full: it has been woken often enough.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}
