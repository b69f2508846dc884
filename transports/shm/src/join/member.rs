//! A member's side: it asks the leader for the memory, and proves that it mapped it.

use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, socket_with,
};
use unisum_link::Rank;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{mac, random, verify};

use super::host::nonce_words;
use super::{CHALLENGE_BYTES, GRANT_BYTES, Mapped, Proof, SEEN};
use crate::ShmError;
use crate::card::Card;
use crate::layout::{Layout, MAGIC, NONCE};
use crate::mapping::Mapping;

/// Gets the memory from the leader (the first of `candidates`) and takes this rank's seat.
pub(super) fn join(
    proof: &Proof,
    candidates: &[Rank],
    me: Rank,
    leader: &Card,
    deadline: Instant,
) -> Result<Mapped, ShmError> {
    let late = |error: io::Error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ShmError::Late(vec![candidates[0]]),
        _ => ShmError::Refused { leader: candidates[0], reason: error.to_string() },
    };
    let mut stream = dial(&leader.socket, deadline).map(ParentOnly::new).map_err(late)?;
    let grant = ask(&mut stream, proof, me, deadline).map_err(late)?;
    let refused =
        |reason: &str| ShmError::Refused { leader: candidates[0], reason: reason.to_string() };
    let layout = Layout::new(candidates.len(), grant.heap_bytes)
        .ok_or_else(|| refused("it describes impossible memory"))?;
    let mapping = Mapping::new(grant.memory, layout)?;
    // Relaxed: written before the message that brought us the memory.
    let found = [NONCE, NONCE + 8].map(|offset| mapping.wide(offset).load(Ordering::Relaxed));
    let magic = mapping.wide(0).load(Ordering::Relaxed);
    if magic != MAGIC || found != nonce_words(&grant.nonce) {
        return Err(refused("the memory is not what it says"));
    }
    let seat = candidates.binary_search(&me).expect("this rank is a candidate") as u64;
    let control = mapping.layout().control(seat);
    let words = nonce_words(&grant.identity);
    for (offset, word) in [control.identity(), control.identity() + 8].into_iter().zip(words) {
        mapping.wide(offset).store(word, Ordering::Relaxed);
    }
    let mapped = Mapped::new(mapping, seat)?;
    stream.write_all(&[SEEN]).map_err(late)?;
    let [SEEN] = read_within(&mut stream, deadline).map_err(late)? else {
        return Err(refused("it doesn't see what we wrote"));
    };
    Ok(mapped)
}

/// What the leader hands over.
pub(super) struct Grant {
    memory: OwnedFd,
    heap_bytes: u64,
    nonce: [u8; 16],
    identity: [u8; 16],
}

/// Proves that we belong to the job, and checks that the leader does.
pub(super) fn ask(
    stream: &mut UnixStream,
    proof: &Proof,
    me: Rank,
    deadline: Instant,
) -> io::Result<Grant> {
    let challenge: [u8; CHALLENGE_BYTES] = read_within(stream, deadline)?;
    let nonce: [u8; 32] = random()?;
    let rank = u32::try_from(me).map_err(|_| io::Error::other("ranks have 32 bits"))?;
    let who = [&rank.to_le_bytes()[..], &nonce].concat();
    let parts = [&proof.session[..], &who, &challenge];
    let request = [&who[..], &mac(&proof.secret, "shm member", &parts)].concat();
    stream.write_all(&request)?;

    let (memory, answer) = receive_memory(stream, deadline)?;
    let (heap, rest) = answer.split_first_chunk().expect("8 of 56 bytes");
    let (memory_nonce, answer_proof) = rest.split_first_chunk().expect("16 of 48 bytes");
    let parts = [&proof.session[..], &who, &challenge, heap, memory_nonce];
    if !verify(&proof.secret, "shm leader", &parts, answer_proof) {
        return Err(io::Error::other("it does not know the job's secret"));
    }
    let mut identity = [0; 16];
    identity.copy_from_slice(&nonce[..16]);
    Ok(Grant { memory, heap_bytes: u64::from_le_bytes(*heap), nonce: *memory_nonce, identity })
}

/// Connects to a leader whose backlog may be full; a Unix socket has no event for that.
fn dial(name: &[u8; 32], deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new_abstract_name(name)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Err(ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn read_within<const BYTES: usize>(
    stream: &mut UnixStream,
    deadline: Instant,
) -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    let mut got = 0;
    while got < BYTES {
        limit(stream, deadline)?;
        match stream.read(&mut bytes[got..]) {
            Ok(0) => return Err(io::Error::other("it closed the connection")),
            Ok(read) => got += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// Makes the next read end by `deadline`.
fn limit(stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))
}

/// The leader's answer, which arrives as one piece, and the memory that comes with it.
fn receive_memory(
    stream: &UnixStream,
    deadline: Instant,
) -> io::Result<(OwnedFd, [u8; GRANT_BYTES])> {
    let mut answer = [0; GRANT_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        limit(stream, deadline)?;
        let mut parts = [IoSliceMut::new(&mut answer)];
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            outcome => break outcome?.bytes,
        }
    };
    let memory = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match memory {
        Some(memory) if received == GRANT_BYTES => Ok((memory, answer)),
        _ if received == 0 => Err(io::Error::other("it refused this rank")),
        _ => Err(io::Error::other("it sent something else than its memory")),
    }
}
