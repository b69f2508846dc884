//! Shared memory as a [`Transport`]: a node's ranks, by offer, candidate and link.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use unisum_link::handshake::Secret;
use unisum_link::{
    Allocation, Connected, Endpoint, EndpointInfo, Heap as LinkHeap, Rank, Reach, Refusal, Setup,
    Site, Transport,
};

use crate::{Candidate, Heap, Heaps, Offer, ShmError, apart};

/// What a job sets for sharing memory.
#[derive(Clone, Debug)]
pub struct ShmConfig {
    /// The job's secret, which strangers lack.
    pub secret: Secret,
    /// Most bytes of registered memory of each rank; `None` is as much as the machine has.
    pub heap_bytes: Option<u64>,
    /// Whether ranks may read each other's private memory (`process_vm_readv`).
    pub reads_private: bool,
}

/// The transport of ranks that share a host's memory.
#[derive(Debug)]
pub struct ShmTransport {
    config: ShmConfig,
    /// For groups: where the job's ranks have registered memory.
    heaps: Option<Heaps>,
}

impl ShmTransport {
    /// For the ranks of a job.
    pub const fn new(config: ShmConfig) -> Self {
        Self { config, heaps: None }
    }
}

impl Transport for ShmTransport {
    fn name(&self) -> &'static str {
        "shm"
    }

    fn reach(&self) -> Reach {
        Reach::Host
    }

    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal> {
        let offer = Offer::new(&self.config.secret)?;
        Ok(Box::new(ShmEndpoint {
            rank: site.rank,
            ranks: site.ranks.to_vec(),
            config: self.config.clone(),
            heaps: self.heaps.clone(),
            info: offer.card(),
            offer: Some(offer),
            candidate: None,
        }))
    }
}

#[derive(Debug)]
struct ShmEndpoint {
    rank: Rank,
    /// The job's number of each rank.
    ranks: Vec<Rank>,
    config: ShmConfig,
    heaps: Option<Heaps>,
    info: Vec<u8>,
    offer: Option<Offer>,
    candidate: Option<Candidate>,
}

impl Endpoint for ShmEndpoint {
    fn info(&self) -> EndpointInfo {
        EndpointInfo::Same(self.info.clone())
    }

    fn agree(&mut self, infos: &[Vec<u8>], setup: &Setup<'_>) -> Result<Rank, Refusal> {
        self.tell_who_is_apart(infos);
        // A group needs no heaps of its own.
        let heap_bytes = if self.heaps.is_some() { Some(0) } else { self.config.heap_bytes };
        let offer = self.offer.take().ok_or_else(|| Refusal::Own("it was asked twice".into()))?;
        let candidate = offer.join(self.rank, infos, setup.session, heap_bytes, setup.limit)?;
        let leader = candidate.leader();
        self.candidate = Some(match self.config.reads_private {
            true => candidate,
            false => candidate.without_private_reads(),
        });
        Ok(leader)
    }

    fn connect(self: Box<Self>, members: &[Rank], setup: &Setup<'_>) -> Result<Connected, Refusal> {
        let Self { ranks, config, heaps, candidate, .. } = *self;
        let candidate = candidate.ok_or_else(|| Refusal::Own("nothing was agreed on".into()))?;
        let is_group = heaps.is_some();
        let link = match heaps {
            None => candidate.connect(members, setup.limit),
            Some(heaps) => heaps
                .renamed(members, &ranks)
                .and_then(|heaps| candidate.connect_beside(members, heaps, setup.limit)),
        };
        let link = link.map_err(|error| match error {
            ShmError::Late(late) => {
                Refusal::Others(late, "did not take part in sharing memory in time".into())
            }
            error => error.into(),
        })?;
        let heaps = link.heaps();
        let heap: Arc<dyn LinkHeap> = Arc::new(heaps.own());
        let beside = Self::beside(config, heaps);
        Ok(Connected {
            heap: Some(heap).filter(|_| !is_group),
            for_groups: Some(beside).filter(|_| !is_group),
            ..Connected::new(Box::new(link))
        })
    }
}

impl ShmEndpoint {
    fn beside(config: ShmConfig, heaps: Heaps) -> Arc<dyn Transport> {
        Arc::new(ShmTransport { config, heaps: Some(heaps) })
    }

    /// Logs, in one line of one rank, that ranks of one host have separate networks.
    fn tell_who_is_apart(&self, infos: &[Vec<u8>]) {
        let (rank, apart) = (self.rank, apart(self.rank, infos));
        // In a group the same would be said once more.
        if self.heaps.is_none() && !apart.is_empty() {
            unisum_link::warning!(
                "ranks {apart:?} are on the host of rank {rank}, but in other network namespaces: \
                 there is no shared memory between those"
            );
        }
    }
}

impl LinkHeap for Heap {
    fn addresses(&self) -> Range<usize> {
        self.range()
    }

    fn allocate(&self, bytes: usize) -> Result<Allocation, String> {
        let block = Self::allocate(self, bytes).map_err(|error| error.to_string())?;
        let start = block.address();
        let owner: Box<dyn Any + Send + Sync> = Box::new(block);
        Ok(Allocation { start, owner })
    }
}

impl From<ShmError> for Refusal {
    fn from(error: ShmError) -> Self {
        let (failed_ranks, why) = (error.failed_ranks(), error.to_string());
        match error {
            ShmError::Alone => Self::NotWanted(why),
            _ if error.is_lack() => Self::Lacks(why),
            _ if failed_ranks.is_empty() => Self::Own(why),
            _ => Self::Others(failed_ranks, why),
        }
    }
}
