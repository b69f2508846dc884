//! What joining a job leaves behind for the groups that are made of its ranks later.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU16;

use unisum_link::Rank;
use unisum_link::handshake::{Secret, job_hash};

use super::card::Card;
use super::cores::Cores;
use super::node::Shared;
use crate::memory::Arena;
use crate::settings::Settings;
use crate::{Error, ErrorKind};

/// The job as all its communicators know it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) settings: Settings,
    pub(super) secret: Secret,
    /// Fingerprint of its name.
    #[cfg_attr(not(feature = "tcp"), expect(dead_code, reason = "for connections"))]
    pub(super) name: [u8; 16],
    /// By rank of the job.
    pub(super) places: Vec<Place>,
    pub(crate) arena: Arena,
    /// The lowest number that no communicator of this rank had yet.
    pub(crate) next_communicator: AtomicU16,
    /// Where the registered memory of the ranks that share memory with this one lies.
    #[cfg(feature = "shm")]
    pub(super) heaps: Option<unisum_shm::Heaps>,
}

/// Where a rank of the job is.
#[derive(Clone, Debug)]
pub(super) struct Place {
    #[cfg_attr(not(feature = "tcp"), expect(dead_code, reason = "for connections"))]
    pub(super) address: SocketAddr,
    /// Which host it is on, as far as names go.
    pub(super) host: String,
    cores: Cores,
}

impl Job {
    pub(super) fn new(
        settings: &Settings,
        secret: &Secret,
        name: &str,
        cards: &[Card],
        shared: Option<&Shared>,
    ) -> Result<Self, Error> {
        #[cfg(feature = "shm")]
        let heaps = shared.map(|shared| shared.heaps.clone());
        #[cfg(feature = "shm")]
        let arena = heaps.as_ref().map_or_else(Arena::default, |it| Arena::shared(it.own()));
        #[cfg(not(feature = "shm"))]
        let (arena, _) = (Arena::default(), shared);
        let place = |(rank, card): (usize, &Card)| {
            let told_none = || {
                let text = format!("rank {rank} told no address");
                Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank])
            };
            let address = card.address.ok_or_else(told_none)?;
            Ok(Place { address, host: card.host.clone(), cores: card.cores.clone() })
        };
        Ok(Self {
            settings: settings.clone(),
            secret: secret.clone(),
            name: job_hash(name),
            places: cards.iter().enumerate().map(place).collect::<Result<_, _>>()?,
            arena,
            next_communicator: AtomicU16::new(1),
            #[cfg(feature = "shm")]
            heaps,
        })
    }

    /// Whether the job's own communicator uses RDMA: the same on all ranks.
    pub(super) const fn uses_rdma(&self) -> bool {
        #[cfg(feature = "verbs")]
        return self.arena.registry().is_some();
        #[cfg(not(feature = "verbs"))]
        false
    }

    /// How many of the job's ranks are on the host of these, which share memory, and how many cores
    /// they have together. Each of these ranks gets the same answer.
    pub(super) fn ranks_and_cores(&self, sharing: &[Rank]) -> (usize, usize) {
        // Names are only names: ranks that share memory are on one host, whatever it is called.
        let host = &self.places[sharing[0]].host;
        let is_there = |&rank: &Rank| self.places[rank].host == *host || sharing.contains(&rank);
        let there = (0..self.places.len()).filter(is_there);
        (there.clone().count(), Cores::of_host(there.map(|rank| &self.places[rank].cores)))
    }

    /// The hosts of some of its ranks.
    pub(super) fn hosts(&self, ranks: &[usize]) -> Vec<&str> {
        ranks.iter().map(|&rank| self.places[rank].host.as_str()).collect()
    }
}
