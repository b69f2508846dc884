//! How the ranks of a host join one shared memory.
//!
//! Every rank binds a socket with a random name in the abstract namespace and states the name on
//! its card. The lowest candidate leads: it creates the memory and passes it to the others.
//!
//! ```text
//! leader   challenge [32]                                    to whoever connects as our user
//! member   rank u32, nonce [32], mac("shm member", ..)       68 bytes
//! leader   heap u64, memory's nonce [16], mac("shm leader")  56 bytes, and the memfd
//! member   1 byte, after it found the nonce in the memory and wrote its own there
//! leader   1 byte, after it found the member's nonce: both see the same memory
//! ```
//!
//! No rank waits for one that has given up. A member that gives up closes its connection; before it
//! has proven itself, it lacks nothing that could make it give up, because the descriptors for
//! joining are reserved with the offer. A leader that gives up closes its socket: a connected
//! member is cut off and dials again, and a dialing member is refused. A member that is cut off
//! while the leader still listens, because there were too many strangers, therefore only tries once
//! more.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod host;
mod member;
mod pending;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Secret, random};
use unisum_link::{Group, Limit, Passed, Rank};

use crate::card::{Card, candidates};
use crate::doorbell::Doorbell;
use crate::ffi::read_process;
use crate::group::Team;
use crate::heap::Heap;
use crate::heaps::Heaps;
use crate::inbox::Peer;
use crate::layout::GROUP_STAGING_BYTES;
use crate::mapping::Mapping;
use crate::{ShmError, ShmLink};

/// This rank's offer to share memory with ranks on the same host.
#[derive(Debug)]
pub struct Offer {
    secret: Secret,
    listener: ParentOnly<UnixListener>,
    /// Descriptors reserved for joining, so that a rank that is short of them makes no offer.
    reserve: Vec<UnixDatagram>,
    card: Card,
}

/// What joining opens besides the listener: the memory, the doorbell, and one connection.
const RESERVE: usize = 3;

impl Offer {
    /// Binds this rank's socket. `secret` is the job's secret, which strangers lack.
    ///
    /// # Errors
    /// If the system refuses, or does not identify itself sufficiently.
    pub fn new(secret: &Secret) -> Result<Self, ShmError> {
        let name: [u8; 32] = random().map_err(ShmError::os("drawing a name"))?;
        let address =
            SocketAddr::from_abstract_name(name).map_err(ShmError::os("naming a socket"))?;
        let listener = UnixListener::bind_addr(&address)
            .map(ParentOnly::new)
            .map_err(ShmError::os("binding a Unix socket"))?;
        listener.set_nonblocking(true).map_err(ShmError::os("setting up a Unix socket"))?;
        let reserve = (0..RESERVE)
            .map(|_| UnixDatagram::unbound())
            .collect::<Result<_, _>>()
            .map_err(ShmError::os("setting descriptors aside for shared memory"))?;
        Ok(Self { secret: secret.clone(), listener, reserve, card: Card::here(name)? })
    }

    /// What all ranks must know about this offer, as opaque bytes.
    pub fn card(&self) -> Vec<u8> {
        self.card.encode()
    }

    /// Shares memory with the other ranks of this host. Every rank with a card calls this, with the
    /// same `cards` (by rank; empty where a rank made no offer) and the same `session` (that of the
    /// job, so that two jobs never mix).
    ///
    /// `heap_bytes` is the maximum registered memory of each rank, by default as much as the
    /// machine has; nothing is committed before it is allocated. The value of the host's lowest
    /// rank applies. Blocks until all ranks have joined or given up, for at most `limit`.
    ///
    /// # Errors
    /// [`ShmError::Alone`] if no other rank is on this host, and any obstacle to sharing: this rank
    /// must then use another transport, and tell the others. [`ShmError::Over`] if the job ends
    /// meanwhile.
    pub fn join<'a>(
        self,
        me: Rank,
        cards: &[Vec<u8>],
        session: [u8; 16],
        heap_bytes: Option<u64>,
        limit: impl Into<Limit<'a>>,
    ) -> Result<Candidate, ShmError> {
        let (found, limit) = (candidates(me, cards)?, limit.into());
        let ranks: Vec<Rank> = found.iter().map(|(rank, _)| *rank).collect();
        let proof = Proof { secret: self.secret, session };
        drop(self.reserve);
        let mapped = if ranks[0] == me {
            let room = found.iter().map(|(_, card)| card.room).min().unwrap_or(0);
            host::serve(&self.listener, &proof, &ranks, heap_bytes, room, limit)?
        } else {
            drop(self.listener);
            member::join(&proof, &ranks, me, &found[0].1, limit)?
        };
        Ok(mapped.local_index(me, ranks))
    }
}

/// What both ends prove to each other.
#[derive(Debug)]
struct Proof {
    secret: Secret,
    session: [u8; 16],
}

/// This rank's part of a mapping, before it is known which other ranks take part.
struct Mapped {
    mapping: Arc<Mapping>,
    doorbell: Doorbell,
    probe: Arc<AtomicU64>,
}

impl Mapped {
    /// Publishes which rank is at `local_index`: all that peers need to know.
    fn new(mapping: Mapping, local_index: u64) -> Result<Self, ShmError> {
        // Now, and not when it is first written: then there would be no way to say that memory
        // ran out.
        let staging = mapping.layout().group_staging(local_index);
        mapping
            .reserve(staging..staging + GROUP_STAGING_BYTES as u64)
            .map_err(ShmError::os("allocating shared memory for private buffers"))?;
        let mapping = Arc::new(mapping);
        let doorbell = Doorbell::new(Arc::clone(&mapping), local_index)?;
        let drawn = random().map_err(ShmError::os("drawing a probe"))?;
        let probe = Arc::new(AtomicU64::new(u64::from_le_bytes(drawn)));
        let control = mapping.layout().control(local_index);
        // Relaxed: read after the socket's messages that follow.
        mapping.word(control.pid()).store(std::process::id(), Ordering::Relaxed);
        mapping.wide(control.probe_address()).store(probe.as_ptr() as u64, Ordering::Relaxed);
        mapping.wide(control.probe_value()).store(u64::from_le_bytes(drawn), Ordering::Relaxed);
        Ok(Self { mapping, doorbell, probe })
    }

    fn local_index(self, me: Rank, candidates: Vec<Rank>) -> Candidate {
        let Self { mapping, doorbell, probe } = self;
        Candidate {
            mapping,
            doorbell: Arc::new(doorbell),
            probe,
            me,
            candidates,
            private_reads: true,
        }
    }
}

/// A rank that shares the memory of its host, before all ranks know who else does.
#[derive(Debug)]
pub struct Candidate {
    mapping: Arc<Mapping>,
    doorbell: Arc<Doorbell>,
    probe: Arc<AtomicU64>,
    me: Rank,
    candidates: Vec<Rank>,
    private_reads: bool,
}

impl Candidate {
    /// The rank that created the memory. Ranks share memory if and only if they name the same rank.
    pub fn leader(&self) -> Rank {
        self.candidates[0]
    }

    /// Makes the link work without `process_vm_readv`, as if the kernel forbade it.
    #[must_use]
    pub fn without_private_reads(mut self) -> Self {
        self.private_reads = false;
        self
    }

    /// Connects `members`, all of which joined: ascending, and the same on all of them.
    ///
    /// Tests whether the members can read each other's private memory, and therefore waits for all
    /// of them, for at most `limit`.
    ///
    /// # Errors
    /// [`ShmError::Late`] if a member does not connect, [`ShmError::Over`] if the job ends
    /// meanwhile.
    ///
    /// # Panics
    /// If `members` names a rank that is not a candidate, or lacks this one.
    pub fn connect<'a>(
        self,
        members: &[Rank],
        limit: impl Into<Limit<'a>>,
    ) -> Result<ShmLink, ShmError> {
        let own = Heap::new(Arc::clone(&self.mapping), self.local_index(self.me));
        let local_ranks = members.iter().map(|&rank| (rank, self.local_index(rank))).collect();
        let heaps = Heaps::new(own, Arc::clone(&self.mapping), local_ranks);
        let mut link = self.connect_beside(members, heaps, limit)?;
        link.spread();
        Ok(link)
    }

    /// The same for a link that uses the registered memory of another link, `heaps`, indexed by the
    /// ranks' numbers here.
    ///
    /// # Errors
    /// As [`Candidate::connect`].
    ///
    /// # Panics
    /// As [`Candidate::connect`], and if a member has none of the heaps.
    pub fn connect_beside<'a>(
        self,
        members: &[Rank],
        heaps: Heaps,
        limit: impl Into<Limit<'a>>,
    ) -> Result<ShmLink, ShmError> {
        let limit = limit.into();
        let peers =
            members.iter().map(|&rank| Peer { rank, local_index: self.local_index(rank), pid: 0 });
        let own = members.binary_search(&self.me).expect("this rank is a member");
        let (mapping, doorbell) = (Arc::clone(&self.mapping), Arc::clone(&self.doorbell));
        let mut team = Team::new(mapping, doorbell, peers.collect(), &heaps, own);
        meet(&mut team, limit)?;
        team.look_up_processes();
        let can_read = self.private_reads && team.peers().iter().all(|peer| self.can_read(peer));
        let verdict = |peer: &Peer| {
            self.mapping.word(self.mapping.layout().control(peer.local_index).verdict())
        };
        // Relaxed, here and below: ordered by the arrival between them.
        verdict(&team.peers()[own]).store(u32::from(can_read), Ordering::Relaxed);
        meet(&mut team, limit)?;
        let reads_private =
            team.peers().iter().all(|peer| verdict(peer).load(Ordering::Relaxed) == 1);
        tracing::debug!(?members, reads_private, "shared memory connected");
        let (mapping, me) = (Arc::clone(&self.mapping), team.peers()[own]);
        Ok(ShmLink::new(mapping, self.doorbell, team, me, heaps, self.probe, reads_private))
    }

    fn local_index(&self, rank: Rank) -> u64 {
        self.candidates.binary_search(&rank).expect("members are candidates") as u64
    }

    /// Whether the kernel lets us read the peer's memory; a process id of another namespace would
    /// name another process, so the content is compared.
    fn can_read(&self, peer: &Peer) -> bool {
        let control = self.mapping.layout().control(peer.local_index);
        let address = self.mapping.wide(control.probe_address()).load(Ordering::Relaxed);
        let expected = self.mapping.wide(control.probe_value()).load(Ordering::Relaxed);
        let mut found = 0u64;
        let into = (&raw mut found).cast();
        // SAFETY: `found` has 8 bytes.
        let read = unsafe { read_process(peer.pid, address, into, 8) };
        if let Err(error) = &read {
            tracing::info!(rank = peer.rank, %error, "private memory of a peer can't be read");
        }
        read.is_ok() && found == expected
    }
}

/// Waits until all members of a new team are there.
fn meet(team: &mut Team, limit: Limit<'_>) -> Result<(), ShmError> {
    let arrival = team.arrive();
    let os = |error: unisum_link::LinkError| std::io::Error::other(error.to_string());
    while !team.complete(arrival).map_err(os).map_err(ShmError::os("meeting the members"))? {
        limit.check().map_err(|passed| match passed {
            Passed::Late => ShmError::Late(team.missing(arrival)),
            Passed::Over => ShmError::Over,
        })?;
        let until = Instant::now() + limit.nap();
        team.park(arrival, until).map_err(os).map_err(ShmError::os("meeting the members"))?;
    }
    Ok(())
}

/// Bytes of each message of the exchange.
const CHALLENGE_BYTES: usize = 32;
const REQUEST_BYTES: usize = 4 + 32 + 32;
const GRANT_BYTES: usize = 8 + 16 + 32;
/// Says that the memory is mapped, or seen to be.
const SEEN: u8 = 1;

#[cfg(test)]
mod tests;
