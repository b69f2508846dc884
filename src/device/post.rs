//! Descriptors of memory that programs have mapped themselves, between the ranks of a host.
//!
//! Every two ranks have a Unix socket between them, made when they join: one listens under a name
//! of its own, the other connects and proves that it knows the token from the first one's card. Who
//! exports memory puts its descriptors into the sockets *before* it tells of the memory in the card
//! of a call. So they are there when a peer has the card, and nobody ever waits here. Strangers can
//! use up places to connect while ranks join; then this rank's memory is copied instead.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recvmsg, send, sendmsg, socket_with,
};
use unisum_cuda_ipc::{CudaError, Device, Imported};
use unisum_link::Rank;

/// Most descriptors of one export: with eight ranks that export at once, no more are on their way
/// than a process may have by the usual limit.
pub(super) const FILES_MAX: usize = 64;
/// Number of the message, of the allocation, and of descriptors.
const HEAD_BYTES: usize = 24;
const MESSAGE_BYTES: usize = HEAD_BYTES + 8 * FILES_MAX;
/// The longest queue of those who connect; the system may have a lower limit.
const BACKLOG: i32 = 4096;

/// Where a rank listens, and what whoever connects has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) name: [u8; 16],
    pub(super) token: [u8; 16],
}

/// The socket at which peers connect.
#[derive(Debug)]
pub(super) struct Door {
    socket: OwnedFd,
    pub(super) address: Address,
}

/// The sockets to all peers.
#[derive(Debug)]
pub(super) struct Post {
    /// `None` for this rank itself, and for peers that were not reached.
    peers: Vec<Option<OwnedFd>>,
    sent: u64,
    /// The number of the last message from each peer.
    received: Vec<u64>,
    /// What has come and was not opened, by rank and number of the allocation.
    pending: HashMap<(Rank, u64), Vec<Imported>>,
}

/// Why what a peer has exported can't be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum OpenError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error("device {device}: the descriptors of rank {rank}'s memory have not come: {why}")]
    Lost { device: usize, rank: Rank, why: String },
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

impl Door {
    /// `None` if the system has no such sockets for this process: its memory is copied then.
    pub(super) fn open() -> Option<Self> {
        let made = || {
            let (mut name, mut token) = ([0; 16], [0; 16]);
            getrandom::fill(&mut name).and_then(|()| getrandom::fill(&mut token)).ok()?;
            let (socket, address) = (socket().ok()?, SocketAddrUnix::new_abstract_name(&name));
            bind(&socket, &address.ok()?).ok()?;
            listen(&socket, BACKLOG).ok()?;
            Some(Self { socket, address: Address { name, token } })
        };
        made().or_else(|| {
            tracing::debug!("no socket for the descriptors of mapped memory");
            None
        })
    }
}

/// Connects to a peer, and proves to it that this is rank `own`.
fn call(peer: &Address, own: Rank) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    connect(&socket, &SocketAddrUnix::new_abstract_name(&peer.name)?)?;
    let proof = [&peer.token[..], &(own as u64).to_le_bytes()].concat();
    send(&socket, &proof, SendFlags::NOSIGNAL)?;
    Ok(socket)
}

/// Who has connected, if it knows the token.
fn caller(socket: &OwnedFd, token: &[u8; 16]) -> Option<Rank> {
    let mut proof = [0; 25];
    let flags = RecvFlags::DONTWAIT;
    let (got, _) = rustix::net::recv(socket, &mut proof[..], flags).ok()?;
    let (known, rank) = proof.get(..got).filter(|_| got == 24)?.split_at(16);
    // All bytes are compared, so that nobody learns how many are right.
    let differs = known.iter().zip(token).fold(0, |differs, (a, b)| differs | (a ^ b));
    let rank = u64::from_le_bytes(rank.try_into().ok()?);
    usize::try_from(rank).ok().filter(|_| differs == 0)
}

impl Post {
    /// Connects to the ranks before `own`. Those behind it have done that when all ranks have heard
    /// from all once more: then [`Post::let_in`].
    pub(super) fn connect(own: Rank, peers: &[Option<Address>]) -> Self {
        let reach = |(rank, address): (Rank, &Option<Address>)| {
            let address = address.as_ref().filter(|_| rank < own)?;
            let called = call(address, own);
            called.inspect_err(|error| tracing::debug!("the door of rank {rank}: {error}")).ok()
        };
        let (sent, received, pending) = (0, vec![0; peers.len()], HashMap::new());
        let peers = peers.iter().enumerate().map(reach).collect();
        Self { peers, sent, received, pending }
    }

    /// Takes those in that have connected to `door`; nobody else can from here on.
    pub(super) fn let_in(&mut self, own: Rank, door: Door) {
        // Each of them is in the queue, which is no longer than this.
        for _ in 0..BACKLOG {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Ok(socket) = accept_with(&door.socket, flags) else { break };
            let Some(rank) = caller(&socket, &door.address.token) else { continue };
            if let Some(peer) = self.peers.get_mut(rank).filter(|_| rank > own) {
                *peer = Some(socket);
            }
        }
    }

    /// Sends the descriptors of an allocation to all peers; the number of the message.
    ///
    /// # Errors
    /// Why one of them has not got them.
    pub(super) fn send(
        &mut self,
        own: Rank,
        id: u64,
        files: &[(OwnedFd, usize)],
    ) -> Result<u64, String> {
        self.sent += 1;
        let lengths = files.iter().map(|(_, bytes)| *bytes as u64);
        let words = [self.sent, id, files.len() as u64].into_iter().chain(lengths);
        let message: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(|(file, _)| file.as_fd()).collect();
        for (rank, peer) in self.peers.iter().enumerate().filter(|(rank, _)| *rank != own) {
            let Some(peer) = peer else {
                return Err(format!("no descriptor reaches rank {rank} from rank {own}"));
            };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            sendmsg(peer, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)
                .map_err(|error| format!("sending descriptors to rank {rank}: {error}"))?;
        }
        Ok(self.sent)
    }

    /// Takes what has come from a peer, up to message number `until`.
    pub(super) fn receive(
        &mut self,
        device: &Arc<Device>,
        rank: Rank,
        until: u64,
    ) -> Result<(), OpenError> {
        let ordinal = device.ordinal();
        let lost = |why: String| OpenError::Lost { device: ordinal, rank, why };
        while self.received[rank] < until {
            let Some(peer) = &self.peers[rank] else { return Err(lost("there is no way".into())) };
            let (mut message, mut space) = (
                [0; MESSAGE_BYTES],
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))],
            );
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut message)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let got = match recvmsg(peer, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => continue,
                got => got.map_err(|error| lost(error.to_string()))?,
            };
            let files: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(files) => Some(files),
                    _ => None,
                })
                .flatten()
                .collect();
            if got.flags.contains(ReturnFlags::CTRUNC) {
                return Err(lost("this process has too few left (ulimit -n)".into()));
            }
            let words: Vec<u64> = message[..got.bytes]
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes each")))
                .collect();
            let [number, id, count, lengths @ ..] = &words[..] else {
                return Err(lost("what came is cut short".into()));
            };
            if *count != files.len() as u64 || lengths.len() != files.len() {
                return Err(lost("what came is not what was sent".into()));
            }
            self.received[rank] = *number;
            let import = |(file, &bytes): (&OwnedFd, &u64)| {
                device.import_file(file.as_fd(), usize::try_from(bytes).unwrap_or(usize::MAX))
            };
            let imported = files.iter().zip(lengths).map(import).collect::<Result<_, _>>()?;
            self.pending.insert((rank, *id), imported);
        }
        Ok(())
    }

    /// What a peer has sent of an allocation.
    pub(super) fn take(&mut self, rank: Rank, id: u64) -> Option<Vec<Imported>> {
        self.pending.remove(&(rank, id))
    }

    /// Forgets what was sent of an allocation that goes, and was not opened.
    pub(super) fn forget(&mut self, device: &Arc<Device>, rank: Rank, id: u64) {
        // Whatever has come: the peer need not have told of it.
        if let Err(error) = self.receive(device, rank, u64::MAX) {
            tracing::trace!("{error}");
        }
        self.pending.remove(&(rank, id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_knows_the_token_is_let_in() {
        let door = Door::open().unwrap();
        let right = door.address;
        let wrong = Address { token: [0; 16], ..right };
        // Ranks before it do not call, nor do strangers, nor does anybody who says nothing.
        let silent = socket().unwrap();
        connect(&silent, &SocketAddrUnix::new_abstract_name(&right.name).unwrap()).unwrap();
        let callers = [(&right, 2), (&wrong, 3), (&right, 0), (&right, 9)];
        let called: Vec<_> = callers.map(|(address, rank)| call(address, rank).unwrap()).into();
        let mut post = Post::connect(1, &[None; 4]);
        post.let_in(1, door);
        let is_there: Vec<bool> = post.peers.iter().map(Option::is_some).collect();
        assert_eq!(is_there, [false, false, true, false]);
        assert!(call(&right, 3).is_err(), "nobody listens any more");
        drop(called);
    }

    #[test]
    fn what_cannot_be_sent_to_all_says_to_whom() {
        let mut post = Post::connect(0, &[None; 2]);
        let refused = post.send(0, 1, &[]).unwrap_err();
        assert_eq!(refused, "no descriptor reaches rank 1 from rank 0");
        assert_eq!(Post::connect(0, &[None; 1]).send(0, 1, &[]), Ok(1), "nobody else is there");
    }
}
