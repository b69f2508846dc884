//! A member's side: it asks the leader for the memory, and proves that it mapped it.

use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, socket_with,
};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{mac, random, verify};
use unisum_link::{Limit, Passed, Rank};

use super::host::nonce_words;
use super::{CHALLENGE_BYTES, GRANT_BYTES, Mapped, Proof, SEEN};
use crate::ShmError;
use crate::card::Card;
use crate::layout::{Layout, MAGIC, NONCE};
use crate::mapping::Mapping;

/// Why a member is not given the memory.
#[derive(Debug)]
pub(super) enum Failure {
    /// The leader ended the connection: it may be full, or have given up.
    Closed,
    /// Trying again is of no use.
    For(ShmError),
}

impl From<ShmError> for Failure {
    fn from(error: ShmError) -> Self {
        Self::For(error)
    }
}

fn refused(leader: Rank, reason: impl Into<String>) -> ShmError {
    ShmError::Refused { leader, reason: reason.into() }
}

/// Whether a wait for the leader may go on.
fn check(limit: Limit<'_>, leader: Rank) -> Result<(), ShmError> {
    limit.check().map_err(|passed| match passed {
        Passed::Late => ShmError::Late(vec![leader]),
        Passed::Over => ShmError::Over,
    })
}

/// Gets the memory from the leader (the first of `candidates`) and takes this rank's place in it.
pub(super) fn join(
    proof: &Proof,
    candidates: &[Rank],
    me: Rank,
    card: &Card,
    limit: Limit<'_>,
) -> Result<Mapped, ShmError> {
    let leader = candidates[0];
    let (mut stream, grant) = fetch(proof, (leader, me), card, limit)?;
    let layout = Layout::new(candidates.len(), grant.heap_bytes)
        .ok_or_else(|| refused(leader, "it describes impossible memory"))?;
    let mapping = Mapping::new(grant.memory, layout)?;
    // Relaxed: written before the message that brought us the memory.
    let found = [NONCE, NONCE + 8].map(|offset| mapping.wide(offset).load(Ordering::Relaxed));
    let magic = mapping.wide(0).load(Ordering::Relaxed);
    if magic != MAGIC || found != nonce_words(&grant.nonce) {
        return Err(refused(leader, "the memory is not what it says"));
    }
    let local_index = candidates.binary_search(&me).expect("this rank is a candidate") as u64;
    let control = mapping.layout().control(local_index);
    let words = nonce_words(&grant.identity);
    for (offset, word) in [control.identity(), control.identity() + 8].into_iter().zip(words) {
        mapping.wide(offset).store(word, Ordering::Relaxed);
    }
    let mapped = Mapped::new(mapping, local_index)?;
    stream.write_all(&[SEEN]).map_err(|error| refused(leader, error.to_string()))?;
    match read_within(&mut stream, leader, limit) {
        Ok([SEEN]) => Ok(mapped),
        Ok(_) => Err(refused(leader, "it doesn't see what we wrote")),
        Err(Failure::Closed) => Err(refused(leader, "it closed the connection")),
        Err(Failure::For(error)) => Err(error),
    }
}

/// What the leader hands over.
#[derive(Debug)]
pub(super) struct Grant {
    memory: OwnedFd,
    heap_bytes: u64,
    nonce: [u8; 16],
    identity: [u8; 16],
}

/// Dials the leader until it grants the memory or refuses for good.
fn fetch(
    proof: &Proof,
    (leader, me): (Rank, Rank),
    card: &Card,
    limit: Limit<'_>,
) -> Result<(ParentOnly<UnixStream>, Grant), ShmError> {
    let mut was_closed = false;
    loop {
        check(limit, leader).map_err(|error| match (error, was_closed) {
            (ShmError::Late(_), true) => refused(leader, "it closed each connection"),
            (error, _) => error,
        })?;
        let mut stream = dial(&card.socket, leader, limit).map(ParentOnly::new)?;
        match ask(&mut stream, proof, (leader, me), limit) {
            Ok(grant) => return Ok((stream, grant)),
            Err(Failure::For(error)) => return Err(error),
            Err(Failure::Closed) => was_closed = true,
        }
        drop(stream);
        thread::sleep(REST);
    }
}

/// Proves that we belong to the job, and checks that the leader does.
pub(super) fn ask(
    stream: &mut UnixStream,
    proof: &Proof,
    (leader, me): (Rank, Rank),
    limit: Limit<'_>,
) -> Result<Grant, Failure> {
    let challenge: [u8; CHALLENGE_BYTES] = read_within(stream, leader, limit)?;
    let nonce: [u8; 32] = random().map_err(ShmError::os("drawing a nonce"))?;
    let rank = u32::try_from(me).expect("ranks have 32 bits");
    let who = [&rank.to_le_bytes()[..], &nonce].concat();
    let parts = [&proof.session[..], &who, &challenge];
    let request = [&who[..], &mac(&proof.secret, "shm member", &parts)].concat();
    stream.write_all(&request).map_err(|error| failed(leader, error))?;

    let (memory, answer) = receive_memory(stream, leader, limit)?;
    let (heap, rest) = answer.split_first_chunk().expect("8 of 56 bytes");
    let (memory_nonce, answer_proof) = rest.split_first_chunk().expect("16 of 48 bytes");
    let parts = [&proof.session[..], &who, &challenge, heap, memory_nonce];
    if !verify(&proof.secret, "shm leader", &parts, answer_proof) {
        return Err(refused(leader, "it does not know the job's secret").into());
    }
    let mut identity = [0; 16];
    identity.copy_from_slice(&nonce[..16]);
    Ok(Grant { memory, heap_bytes: u64::from_le_bytes(*heap), nonce: *memory_nonce, identity })
}

/// Connects to a leader whose backlog may be full; a Unix socket has no event for that.
fn dial(name: &[u8; 32], leader: Rank, limit: Limit<'_>) -> Result<UnixStream, ShmError> {
    let os = |what| move |error: Errno| ShmError::os(what)(error);
    let address =
        SocketAddrUnix::new_abstract_name(name).map_err(os("naming the leader's socket"))?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(os("opening a Unix socket"))?;
        match connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false).map_err(ShmError::os("setting up a Unix socket"))?;
                return Ok(stream);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::CONNREFUSED) => return Err(refused(leader, "it has given up")),
            Err(error) => return Err(refused(leader, error.to_string())),
        }
        check(limit, leader)?;
        thread::sleep(REST);
    }
}

/// Between two attempts to reach the leader.
const REST: Duration = Duration::from_millis(2);

/// What a failed operation on the connection means.
fn failed(leader: Rank, error: io::Error) -> Failure {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Failure::Closed,
        _ => Failure::For(refused(leader, error.to_string())),
    }
}

fn read_within<const BYTES: usize>(
    stream: &mut UnixStream,
    leader: Rank,
    limit: Limit<'_>,
) -> Result<[u8; BYTES], Failure> {
    let mut bytes = [0; BYTES];
    let mut got = 0;
    while got < BYTES {
        look_soon(stream, leader, limit)?;
        match stream.read(&mut bytes[got..]) {
            Ok(0) => return Err(Failure::Closed),
            Ok(read) => got += read,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(failed(leader, error)),
        }
    }
    Ok(bytes)
}

/// Makes the next read end when it is time to look at the limit again.
fn look_soon(stream: &UnixStream, leader: Rank, limit: Limit<'_>) -> Result<(), ShmError> {
    check(limit, leader)?;
    stream.set_read_timeout(Some(limit.nap())).map_err(ShmError::os("setting up a Unix socket"))
}

/// The leader's answer, which arrives as one piece, and the memory that comes with it.
fn receive_memory(
    stream: &UnixStream,
    leader: Rank,
    limit: Limit<'_>,
) -> Result<(OwnedFd, [u8; GRANT_BYTES]), Failure> {
    let mut answer = [0; GRANT_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        look_soon(stream, leader, limit)?;
        let mut parts = [IoSliceMut::new(&mut answer)];
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(failed(leader, error.into())),
            Ok(received) => break received,
        }
    };
    let memory = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match memory {
        Some(memory) if received.bytes == GRANT_BYTES => Ok((memory, answer)),
        _ if received.bytes == 0 => Err(Failure::Closed),
        None if received.flags.contains(ReturnFlags::CTRUNC) => {
            let why = "no descriptor could be had for it, or the system forbids it";
            let source = io::Error::other(why);
            Err(ShmError::Os { context: "taking the shared memory", source }.into())
        }
        _ => Err(refused(leader, "it sent something else than its memory").into()),
    }
}
