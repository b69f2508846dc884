//! What joining a job leaves behind for the groups that are made of its ranks later.

use std::net::SocketAddr;
#[cfg(feature = "tcp")]
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use unisum_link::Rank;
use unisum_link::handshake::{Secret, job_hash};

use super::card::Card;
use super::cores::Cores;
use super::node::{self, Shared};
use crate::memory::Arena;
use crate::settings::Settings;
use crate::{Error, ErrorKind};
use unisum_control::Control;
use unisum_control::interface::Paths;
use unisum_control::launcher::Detected;

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
    pub(crate) next_communicator: AtomicU32,
    /// Where the registered memory of the ranks that share memory with this one lies.
    #[cfg(feature = "shm")]
    pub(super) heaps: Option<unisum_shm::Heaps>,
}

/// Where a rank of the job is.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// As they are dialled from here.
    pub(super) addresses: Vec<SocketAddr>,
    #[cfg(feature = "tcp")]
    pub(super) route: Arc<unisum_tcp::Route>,
    /// Which host it is on, as far as names go.
    pub(super) host: String,
    cores: Cores,
}

impl Place {
    fn new(addresses: Vec<SocketAddr>, card: &Card) -> Self {
        Self {
            #[cfg(feature = "tcp")]
            route: Arc::new(unisum_tcp::Route::new(addresses.clone())),
            addresses,
            host: card.host.clone(),
            cores: card.cores.clone(),
        }
    }
}

impl Job {
    pub(super) fn new(
        settings: &Settings,
        secret: &Secret,
        detected: &Detected,
        cards: &[Card],
        (control, shared): (&Control, Option<&Shared>),
    ) -> Result<Self, Error> {
        #[cfg(feature = "shm")]
        let heaps = shared.map(|shared| shared.heaps.clone());
        #[cfg(feature = "shm")]
        let arena = heaps.as_ref().map_or_else(Arena::default, |it| Arena::shared(it.own()));
        #[cfg(not(feature = "shm"))]
        let (arena, _) = (Arena::default(), shared);
        let paths = Paths::new(settings.interface.as_ref()).map_err(|error| {
            let text = format!("listing the network interfaces: {error}");
            Error::new(ErrorKind::Rendezvous, text).on(detected.rank)
        })?;
        let here = node::network_of(&cards[detected.rank].host);
        let place = |(rank, card): (usize, &Card)| {
            if card.addresses.is_empty() && cards.len() > 1 {
                let text = format!("rank {rank} told no address");
                return Err(Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank]));
            }
            let addresses = paths.to(&card.addresses, node::network_of(&card.host) == here);
            Ok(Place::new(addresses, card))
        };
        let places: Vec<Place> = cards.iter().enumerate().map(place).collect::<Result<_, _>>()?;
        #[cfg(not(feature = "tcp"))]
        let _ = control;
        #[cfg(feature = "tcp")]
        if let Some(address) = control.coordinator() {
            places[0].route.worked_at(address);
        }
        Ok(Self {
            settings: settings.clone(),
            secret: secret.clone(),
            name: job_hash(&detected.job),
            places,
            arena,
            next_communicator: AtomicU32::new(1),
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
    pub(crate) fn hosts(&self, ranks: &[usize]) -> Vec<&str> {
        ranks.iter().map(|&rank| self.places[rank].host.as_str()).collect()
    }
}
