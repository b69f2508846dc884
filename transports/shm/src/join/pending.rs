//! Connections to the leader that have not been accepted: of candidates, of strangers, and silent
//! ones.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::geteuid;
use unisum_link::Rank;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{mac, random, verify};

use super::host::nonce_words;
use super::{CHALLENGE_BYTES, GRANT_BYTES, Proof, REQUEST_BYTES, SEEN};
use crate::ffi::peer_user;
use crate::mapping::Mapping;

/// Connections kept besides the candidates': the oldest silent one goes first.
const STRANGERS_MAX: usize = 64;

pub(super) struct PendingConnections<'a> {
    listener: &'a UnixListener,
    proof: &'a Proof,
    mapping: &'a Mapping,
    nonce: [u8; 16],
    ranks: Vec<(Rank, JoinState)>,
    pending: Vec<PendingConnection>,
    /// The system lacks resources for a connection, usually descriptors: when to try again, unless
    /// a present one goes away before.
    full_until: Option<Instant>,
    has_told_full: bool,
}

/// How long connections may take to close by themselves, to make room for another one.
const FULL_TIME: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq)]
enum JoinState {
    Empty,
    Mapping,
    Taken,
    Failed,
}

struct PendingConnection {
    stream: ParentOnly<UnixStream>,
    challenge: [u8; CHALLENGE_BYTES],
    received: Vec<u8>,
    /// Whether it is of another user, as far as this process's user namespace tells.
    is_foreign: bool,
    /// The local index that it proved to have, and the identity it must write there.
    proven: Option<(usize, [u8; 16])>,
}

/// What happens to a connection after a step.
enum Next {
    Stay,
    Leave,
}

impl<'a> PendingConnections<'a> {
    pub(super) fn new(
        listener: &'a UnixListener,
        proof: &'a Proof,
        mapping: &'a Mapping,
        nonce: [u8; 16],
        candidates: &[Rank],
    ) -> Self {
        let mut ranks: Vec<_> = candidates.iter().map(|&rank| (rank, JoinState::Empty)).collect();
        // The leader itself.
        ranks[0].1 = JoinState::Taken;
        Self {
            listener,
            proof,
            mapping,
            nonce,
            ranks,
            pending: Vec::new(),
            full_until: None,
            has_told_full: false,
        }
    }

    /// Whether some candidate may still come.
    pub(super) fn is_waiting(&self) -> bool {
        self.ranks.iter().any(|(_, state)| matches!(state, JoinState::Empty | JoinState::Mapping))
    }

    /// The candidates that did not make it, and how far they came.
    pub(super) fn absent(&self) -> impl Iterator<Item = (Rank, &'static str)> {
        self.ranks.iter().filter_map(|&(rank, state)| match state {
            JoinState::Empty => Some((rank, "it never asked")),
            JoinState::Mapping => Some((rank, "it was mapping the memory")),
            JoinState::Failed => Some((rank, "it gave up")),
            JoinState::Taken => None,
        })
    }

    /// Waits for something to happen, at most for `time`, and deals with it.
    ///
    /// # Errors
    /// If this process can't take in anybody.
    pub(super) fn turn(&mut self, time: Duration) -> io::Result<()> {
        let readable = self.poll(time)?;
        let mut at = 0;
        for ready in &readable[1..] {
            match if *ready { self.step(at) } else { Next::Stay } {
                Next::Stay => at += 1,
                Next::Leave => {
                    self.pending.remove(at);
                    self.full_until = None;
                }
            }
        }
        if readable[0] { self.accept() } else { Ok(()) }
    }

    fn is_full(&self) -> bool {
        self.full_until.is_some_and(|until| Instant::now() < until)
    }

    /// Which of the listener (first) and the pending can be read.
    fn poll(&self, time: Duration) -> io::Result<Vec<bool>> {
        // Who can't be taken in now is no reason to wake up.
        let events = if self.is_full() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(self.listener, events)];
        fds.extend(
            self.pending.iter().map(|connection| PollFd::new(&*connection.stream, PollFlags::IN)),
        );
        let time =
            Timespec::try_from(time.min(Duration::from_secs(3600))).expect("an hour is a time");
        match poll(&mut fds, Some(&time)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    /// Takes in one connection, and challenges it.
    fn accept(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                self.full_until = None;
                match PendingConnection::greet(ParentOnly::new(stream)) {
                    Ok(connection) => self.pending.push(connection),
                    Err(error) => {
                        unisum_link::warning!(%error, "refused a connection for shared memory")
                    }
                }
            }
            Err(error) if is_shortage(&error) => return self.wait_for_room(error),
            // Nobody is there (any more).
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => unisum_link::warning!(%error, "a connection for shared memory failed"),
        }
        if self.pending.len() > STRANGERS_MAX + self.ranks.len() && self.drop_stranger() {
            unisum_link::warning!("dropped a silent connection for shared memory");
        }
        Ok(())
    }

    /// Makes room for a connection that cannot be accepted: some of the present ones close before
    /// long, and if none does, one is dropped.
    fn wait_for_room(&mut self, error: io::Error) -> io::Result<()> {
        if self.pending.is_empty() {
            return Err(error);
        }
        if !std::mem::replace(&mut self.has_told_full, true) {
            unisum_link::warning!(
                %error, "the ranks of this host share memory one after the other"
            );
        }
        if self.full_until.is_some() {
            self.drop_stranger();
        }
        self.full_until = Some(Instant::now() + FULL_TIME);
        Ok(())
    }

    /// Drops the oldest connection that has proven nothing, preferably one of another user: a rank
    /// of the job that this affects dials again.
    fn drop_stranger(&mut self) -> bool {
        let mut strangers = (0..self.pending.len()).filter(|&at| self.pending[at].proven.is_none());
        let oldest = strangers.clone().next();
        let stranger = strangers.find(|&at| self.pending[at].is_foreign).or(oldest);
        stranger.map(|at| self.pending.remove(at)).is_some()
    }

    /// Continues with a connection that can be read.
    fn step(&mut self, at: usize) -> Next {
        let wanted = if self.pending[at].proven.is_some() { 1 } else { REQUEST_BYTES };
        let outcome = match self.pending[at].fill(wanted) {
            Ok(false) => return Next::Stay,
            Ok(true) if wanted == 1 => self.confirm(at),
            Ok(true) => self.grant(at),
            Err(error) => Err(error),
        };
        let Err(error) = outcome else {
            return Next::Stay;
        };
        if let Some((local_index, _)) = self.pending[at].proven {
            let (rank, state) = &mut self.ranks[local_index];
            if *state == JoinState::Mapping {
                *state = JoinState::Failed;
                unisum_link::warning!(rank = *rank, %error, "a rank could not share memory");
            }
        } else {
            unisum_link::warning!(%error, "refused a stranger who asked for shared memory");
        }
        Next::Leave
    }

    /// Checks a request, and hands over the memory.
    fn grant(&mut self, at: usize) -> io::Result<()> {
        let connection = &mut self.pending[at];
        let request = std::mem::take(&mut connection.received);
        let (who, proof) = request.split_at(REQUEST_BYTES - 32);
        let parts = [&self.proof.session[..], who, &connection.challenge];
        if !verify(&self.proof.secret, "shm member", &parts, proof) {
            return Err(io::Error::other("it does not know the job's secret"));
        }
        let (rank, nonce) = who.split_at(4);
        let rank = rank.try_into().map_or(0, u32::from_le_bytes) as Rank;
        let local_index = self
            .ranks
            .iter()
            .position(|&(candidate, state)| candidate == rank && state == JoinState::Empty)
            .ok_or_else(|| io::Error::other(format!("rank {rank} is not expected (any more)")))?;
        let heap = self.mapping.layout().heap_bytes().to_le_bytes();
        let parts = [&self.proof.session[..], who, &connection.challenge, &heap, &self.nonce];
        let answer = [&heap[..], &self.nonce, &mac(&self.proof.secret, "shm leader", &parts)];
        send_memory(&connection.stream, &answer.concat(), self.mapping)?;
        let mut identity = [0; 16];
        identity.copy_from_slice(&nonce[..16]);
        connection.proven = Some((local_index, identity));
        self.ranks[local_index].1 = JoinState::Mapping;
        Ok(())
    }

    /// Looks for what the member says it wrote.
    fn confirm(&mut self, at: usize) -> io::Result<()> {
        let Some((local_index, identity)) = self.pending[at].proven else {
            return Ok(());
        };
        let control = self.mapping.layout().control(local_index as u64);
        let found = [control.identity(), control.identity() + 8]
            .map(|offset| self.mapping.wide(offset).load(Ordering::Relaxed));
        if found != nonce_words(&identity) {
            return Err(io::Error::other("it mapped other memory than ours"));
        }
        self.pending[at].stream.write_all(&[SEEN])?;
        self.pending[at].received.clear();
        self.ranks[local_index].1 = JoinState::Taken;
        Ok(())
    }
}

impl PendingConnection {
    fn greet(mut stream: ParentOnly<UnixStream>) -> io::Result<Self> {
        let is_foreign = peer_user(&stream)? != geteuid().as_raw();
        stream.set_nonblocking(true)?;
        let challenge = random()?;
        // A fresh socket has room for it.
        stream.write_all(&challenge)?;
        Ok(Self { stream, challenge, received: Vec::new(), is_foreign, proven: None })
    }

    /// Reads up to `wanted` bytes; whether they are all there.
    fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        let mut bytes = [0; REQUEST_BYTES];
        let room = wanted - self.received.len();
        match self.stream.read(&mut bytes[..room]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                self.received.extend_from_slice(&bytes[..read]);
                Ok(read == room)
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether the system lacks resources for a new connection.
fn is_shortage(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
        .contains(&Errno::from_io_error(error).unwrap_or(Errno::INVAL))
}

/// Sends an answer together with the memory.
fn send_memory(stream: &UnixStream, answer: &[u8], mapping: &Mapping) -> io::Result<()> {
    let memory = mapping.memory();
    let fds = [memory.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(stream, &[IoSlice::new(answer)], &mut control, SendFlags::NOSIGNAL)?;
    if sent != GRANT_BYTES {
        return Err(io::Error::other("its socket is full"));
    }
    Ok(())
}
