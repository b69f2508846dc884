//! Everyone who connects to the leader: candidates, strangers, and whoever says nothing.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::geteuid;
use unisum_link::Rank;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{mac, random, verify};

use super::host::nonce_words;
use super::{CHALLENGE_BYTES, GRANT_BYTES, Proof, REQUEST_BYTES, SEEN};
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
}

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
        Self { listener, proof, mapping, nonce, seats, guests: Vec::new() }
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

    /// Waits for something to happen, at most until `deadline`, and deals with it.
    pub(super) fn turn(&mut self, deadline: Instant) -> io::Result<()> {
        let readable = self.poll(deadline)?;
        let mut at = 0;
        for ready in &readable[1..] {
            let next = if *ready { self.step(at) } else { Next::Stay };
            match next {
                Next::Stay => at += 1,
                Next::Leave => drop(self.guests.remove(at)),
            }
        }
        if readable[0] {
            self.accept();
        }
        Ok(())
    }

    /// Which of the listener (first) and the guests can be read.
    fn poll(&self, deadline: Instant) -> io::Result<Vec<bool>> {
        let mut fds = vec![PollFd::new(self.listener, PollFlags::IN)];
        fds.extend(self.guests.iter().map(|guest| PollFd::new(&*guest.stream, PollFlags::IN)));
        let left = deadline.saturating_duration_since(Instant::now());
        let left =
            Timespec::try_from(left.min(Duration::from_secs(3600))).expect("an hour is a time");
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    /// Takes in one connection of our own user, and challenges it.
    fn accept(&mut self) {
        let guest =
            self.listener.accept().and_then(|(stream, _)| Guest::greet(ParentOnly::new(stream)));
        match guest {
            Ok(guest) => self.guests.push(guest),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => tracing::warn!(%error, "refused a connection for shared memory"),
        }
        if self.guests.len() > STRANGERS_MAX + self.seats.len()
            && let Some(oldest) = self.guests.iter().position(|guest| guest.proven.is_none())
        {
            tracing::warn!("dropped a silent connection for shared memory");
            self.guests.remove(oldest);
        }
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
        let user = socket_peercred(&*stream)?.uid;
        if user != geteuid() {
            return Err(io::Error::other(format!("it came from user {}", user.as_raw())));
        }
        stream.set_nonblocking(true)?;
        let challenge = random()?;
        // A fresh socket has room for it.
        stream.write_all(&challenge)?;
        Ok(Self { stream, challenge, received: Vec::new(), proven: None })
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
