//! RDMA as a [`Transport`]: all ranks that share no memory, or none.
//!
//! Agreeing connects the queue pairs, and connecting proves that packets come through: packets to a
//! queue pair that is not connected yet would be lost, and their retransmission takes a while.

use std::sync::Arc;

use unisum_link::{
    Connected, Endpoint, EndpointInfo, Rank, Reach, Refusal, Setup, Site, Transport,
};

use crate::{Offer, Registry, VerbsConfig, VerbsError, VerbsLink};

/// The transport of ranks with RDMA devices.
#[derive(Debug)]
pub struct VerbsTransport {
    config: VerbsConfig,
    /// For groups: the devices that the job has opened.
    registry: Option<Arc<Registry>>,
}

impl VerbsTransport {
    /// For the ranks of a job.
    pub const fn new(config: VerbsConfig) -> Self {
        Self { config, registry: None }
    }
}

impl Transport for VerbsTransport {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn reach(&self) -> Reach {
        Reach::Unanimous
    }

    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal> {
        let (rank, world, peers) = (site.rank, site.ranks.len(), site.peers);
        let config = VerbsConfig {
            software: self.config.software || site.is_asked_for,
            ..self.config.clone()
        };
        let offer = match &self.registry {
            None => Offer::new(rank, world, peers, config),
            Some(devices) => Offer::beside(devices, rank, world, peers, config),
        };
        let offer = offer.map_err(|error| match error {
            VerbsError::Absent(why) => Refusal::NotWanted(why),
            error => refusal(&error, site.ranks),
        })?;
        Ok(Box::new(VerbsEndpoint {
            ranks: site.ranks.to_vec(),
            config: self.config.clone(),
            is_group: self.registry.is_some(),
            infos: offer.cards(),
            stage: Stage::Offered(Box::new(offer)),
        }))
    }
}

#[derive(Debug)]
struct VerbsEndpoint {
    /// The job's number of each rank.
    ranks: Vec<Rank>,
    config: VerbsConfig,
    is_group: bool,
    infos: Vec<Vec<u8>>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Offered(Box<Offer>),
    Connected(Box<VerbsLink>),
    GivenUp,
}

impl Endpoint for VerbsEndpoint {
    fn info(&self) -> EndpointInfo {
        EndpointInfo::Each(self.infos.clone())
    }

    fn agree(&mut self, infos: &[Vec<u8>], setup: &Setup<'_>) -> Result<Rank, Refusal> {
        let Stage::Offered(offer) = std::mem::replace(&mut self.stage, Stage::GivenUp) else {
            return Err(Refusal::Own("it was asked twice".into()));
        };
        let offer = match setup.ways {
            Some(ways) => offer.with_ways(ways.clone(), setup.session),
            None => *offer,
        };
        let link = offer.connect(infos).map_err(|error| refusal(&error, &self.ranks))?;
        self.stage = Stage::Connected(Box::new(link));
        Ok(0)
    }

    fn connect(self: Box<Self>, _: &[Rank], setup: &Setup<'_>) -> Result<Connected, Refusal> {
        let Self { ranks, config, is_group, stage, .. } = *self;
        let Stage::Connected(mut link) = stage else {
            return Err(Refusal::Own("nothing was agreed on".into()));
        };
        link.prove(setup.limit).map_err(|mut error| {
            error.peer = ranks.get(error.peer).copied().unwrap_or(error.peer);
            Refusal::Own(error.to_string())
        })?;
        let registry = link.registry();
        let beside: Arc<dyn Transport> =
            Arc::new(VerbsTransport { config, registry: Some(registry.clone()) });
        Ok(Connected {
            registrar: Some(registry as _).filter(|_| !is_group),
            for_groups: Some(beside).filter(|_| !is_group),
            inbox: link.inbox().map(|inbox| {
                let deliver = move |peer, socket, connection| {
                    inbox.deliver(peer, socket, connection);
                };
                Arc::new(deliver) as _
            }),
            ..Connected::new(link)
        })
    }
}

/// What an error means to this rank, with the job's number of the rank it blames.
fn refusal(error: &VerbsError, ranks: &[Rank]) -> Refusal {
    let why = match error {
        VerbsError::Card(rank, why) => VerbsError::Card(ranks[*rank], why.clone()).to_string(),
        VerbsError::Path(rank, why) => VerbsError::Path(ranks[*rank], why.clone()).to_string(),
        error => error.to_string(),
    };
    if error.is_lack() { Refusal::Lacks(why) } else { Refusal::Own(why) }
}
