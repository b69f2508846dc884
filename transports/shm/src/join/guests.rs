//! Everyone who connects to the leader: candidates, strangers, and whoever says nothing.

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

/// Connections kept beside the candidates': the oldest silent one goes first.
const STRANGERS_MAX: usize = 64;

pub(super) struct Guests<'a> {
    listener: &'a UnixListener,
    proof: &'a Proof,
    mapping: &'a Mapping,
    nonce: [u8; 16],
    seats: Vec<(Rank, Seat)>,
    guests: Vec<Guest>,
    /// The system lacks what a guest takes, descriptors mostly: when to try again, unless one of
    /// those that are here goes before.
    full_until: Option<Instant>,
    has_told_full: bool,
}

/// How long guests may take to go by themselves, so that there is room for another one.
const FULL_TIME: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Seat {
    Empty,
    Mapping,
    Taken,
    Failed,
}

struct Guest {
    stream: ParentOnly<UnixStream>,
    challenge: [u8; CHALLENGE_BYTES],
    received: Vec<u8>,
    /// Whether it is of another user, as far as this process's user namespace tells.
    is_foreign: bool,
    /// The seat that it proved to have, and the identity it must write there.
    proven: Option<(usize, [u8; 16])>,
}

/// What becomes of a guest after a step.
enum Next {
    Stay,
    Leave,
}

impl<'a> Guests<'a> {
    pub(super) fn new(
        listener: &'a UnixListener,
        proof: &'a Proof,
        mapping: &'a Mapping,
        nonce: [u8; 16],
        candidates: &[Rank],
    ) -> Self {
        let mut seats: Vec<_> = candidates.iter().map(|&rank| (rank, Seat::Empty)).collect();
        // The leader itself.
        seats[0].1 = Seat::Taken;
        Self {
            listener,
            proof,
            mapping,
            nonce,
            seats,
            guests: Vec::new(),
            full_until: None,
            has_told_full: false,
        }
    }

    /// Whether some candidate may still come.
    pub(super) fn is_waiting(&self) -> bool {
        self.seats.iter().any(|(_, seat)| matches!(seat, Seat::Empty | Seat::Mapping))
    }

    /// The candidates that did not make it, and how far they came.
    pub(super) fn absent(&self) -> impl Iterator<Item = (Rank, &'static str)> {
        self.seats.iter().filter_map(|&(rank, seat)| match seat {
            Seat::Empty => Some((rank, "it never asked")),
            Seat::Mapping => Some((rank, "it was mapping the memory")),
            Seat::Failed => Some((rank, "it gave up")),
            Seat::Taken => None,
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
                    self.guests.remove(at);
                    self.full_until = None;
                }
            }
        }
        if readable[0] { self.accept() } else { Ok(()) }
    }

    fn is_full(&self) -> bool {
        self.full_until.is_some_and(|until| Instant::now() < until)
    }

    /// Which of the listener (first) and the guests can be read.
    fn poll(&self, time: Duration) -> io::Result<Vec<bool>> {
        // Who can't be taken in now is no reason to wake up.
        let events = if self.is_full() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(self.listener, events)];
        fds.extend(self.guests.iter().map(|guest| PollFd::new(&*guest.stream, PollFlags::IN)));
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
                match Guest::greet(ParentOnly::new(stream)) {
                    Ok(guest) => self.guests.push(guest),
                    Err(error) => tracing::warn!(%error, "refused a connection for shared memory"),
                }
            }
            Err(error) if is_shortage(&error) => return self.wait_for_room(error),
            // Nobody is there (any more).
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => tracing::warn!(%error, "a connection for shared memory failed"),
        }
        if self.guests.len() > STRANGERS_MAX + self.seats.len() && self.drop_stranger() {
            tracing::warn!("dropped a silent connection for shared memory");
        }
        Ok(())
    }

    /// Makes room for a guest that can't be taken in: of those that are here, some go by themselves
    /// before long, and of those that don't, one has to.
    fn wait_for_room(&mut self, error: io::Error) -> io::Result<()> {
        if self.guests.is_empty() {
            return Err(error);
        }
        if !std::mem::replace(&mut self.has_told_full, true) {
            tracing::warn!(%error, "the ranks of this host share memory one after the other");
        }
        if self.full_until.is_some() {
            self.drop_stranger();
        }
        self.full_until = Some(Instant::now() + FULL_TIME);
        Ok(())
    }

    /// Drops the oldest guest that has proven nothing, one of another user if there is one: a rank
    /// of the job that this meets dials again.
    fn drop_stranger(&mut self) -> bool {
        let mut strangers = (0..self.guests.len()).filter(|&at| self.guests[at].proven.is_none());
        let oldest = strangers.clone().next();
        let stranger = strangers.find(|&at| self.guests[at].is_foreign).or(oldest);
        stranger.map(|at| self.guests.remove(at)).is_some()
    }

    /// Goes on with a guest that can be read.
    fn step(&mut self, at: usize) -> Next {
        let wanted = if self.guests[at].proven.is_some() { 1 } else { REQUEST_BYTES };
        let outcome = match self.guests[at].fill(wanted) {
            Ok(false) => return Next::Stay,
            Ok(true) if wanted == 1 => self.confirm(at),
            Ok(true) => self.grant(at),
            Err(error) => Err(error),
        };
        let Err(error) = outcome else {
            return Next::Stay;
        };
        if let Some((seat, _)) = self.guests[at].proven {
            if self.seats[seat].1 == Seat::Mapping {
                self.seats[seat].1 = Seat::Failed;
                tracing::warn!(rank = self.seats[seat].0, %error, "a rank could not share memory");
            }
        } else {
            tracing::warn!(%error, "refused a stranger who asked for shared memory");
        }
        Next::Leave
    }

    /// Checks a request, and hands over the memory.
    fn grant(&mut self, at: usize) -> io::Result<()> {
        let guest = &mut self.guests[at];
        let request = std::mem::take(&mut guest.received);
        let (who, proof) = request.split_at(REQUEST_BYTES - 32);
        let parts = [&self.proof.session[..], who, &guest.challenge];
        if !verify(&self.proof.secret, "shm member", &parts, proof) {
            return Err(io::Error::other("it does not know the job's secret"));
        }
        let (rank, nonce) = who.split_at(4);
        let rank = rank.try_into().map_or(0, u32::from_le_bytes) as Rank;
        let seat = self
            .seats
            .iter()
            .position(|&(candidate, seat)| candidate == rank && seat == Seat::Empty)
            .ok_or_else(|| io::Error::other(format!("rank {rank} is not expected (any more)")))?;
        let heap = self.mapping.layout().heap_bytes().to_le_bytes();
        let parts = [&self.proof.session[..], who, &guest.challenge, &heap, &self.nonce];
        let answer = [&heap[..], &self.nonce, &mac(&self.proof.secret, "shm leader", &parts)];
        send_memory(&guest.stream, &answer.concat(), self.mapping)?;
        let mut identity = [0; 16];
        identity.copy_from_slice(&nonce[..16]);
        guest.proven = Some((seat, identity));
        self.seats[seat].1 = Seat::Mapping;
        Ok(())
    }

    /// Looks for what the member says it wrote.
    fn confirm(&mut self, at: usize) -> io::Result<()> {
        let Some((seat, identity)) = self.guests[at].proven else {
            return Ok(());
        };
        let control = self.mapping.layout().control(seat as u64);
        let found = [control.identity(), control.identity() + 8]
            .map(|offset| self.mapping.wide(offset).load(Ordering::Relaxed));
        if found != nonce_words(&identity) {
            return Err(io::Error::other("it mapped other memory than ours"));
        }
        self.guests[at].stream.write_all(&[SEEN])?;
        self.guests[at].received.clear();
        self.seats[seat].1 = Seat::Taken;
        Ok(())
    }
}

impl Guest {
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

/// Whether the system lacks what a new connection takes.
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
