//! What joining a job keeps for the groups that are made of its ranks later.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use unisum_link::secure::Credentials;
use unisum_link::{Connected, Rank, Reach, Refusal, Transport};

use super::builtin::Barred;
use super::card::Card;
use super::cores::Cores;
use super::{node, transports};
use crate::memory::Arena;
use crate::settings::Settings;
use crate::{Error, ErrorKind};
use unisum_control::Control;
use unisum_control::interface::Paths;
use unisum_control::launcher::Detected;

/// The job, shared by all its communicators.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) settings: Settings,
    /// By rank of the job.
    places: Vec<Place>,
    pub(crate) arena: Arena,
    /// The lowest number that no communicator of this rank has used.
    pub(crate) next_communicator: AtomicU32,
    /// For the ranks of a host.
    pub(super) within_hosts: Arc<dyn Transport>,
    /// For all others, if all ranks of the job have it: the same on all ranks.
    pub(super) unanimous: Option<Arc<dyn Transport>>,
    /// For all others otherwise.
    pub(super) to_any: Arc<dyn Transport>,
}

/// Where a rank of the job is.
#[derive(Clone, Debug)]
struct Place {
    /// The host it is on, according to its name: one text for all its ranks.
    host: Arc<str>,
    cores: Arc<Cores>,
}

impl Job {
    pub(super) fn new(
        settings: &Settings,
        credentials: &Credentials,
        detected: &Detected,
        cards: &[Card],
        control: &Control,
    ) -> Result<Self, Error> {
        let paths = Paths::new(settings.interface.as_ref()).map_err(|error| {
            let text = format!("listing the network interfaces: {error}");
            Error::new(ErrorKind::Rendezvous, text).on(detected.rank)
        })?;
        let here = node::network_of(&cards[detected.rank].host);
        let addresses = |(rank, card): (usize, &Card)| {
            if card.addresses.is_empty() && cards.len() > 1 {
                let text = format!("rank {rank} told no address");
                return Err(Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank]));
            }
            Ok(paths.to(&card.addresses, node::network_of(&card.host) == here))
        };
        let addresses: Vec<_> =
            cards.iter().enumerate().map(addresses).collect::<Result<_, _>>()?;
        control.set_addresses(addresses.clone());
        let addresses = (addresses, control.coordinator());
        let to_any = transports::to_any(settings, credentials, addresses, &detected.job);
        Ok(Self {
            settings: settings.clone(),
            places: Place::of(cards),
            arena: Arena::default(),
            next_communicator: AtomicU32::new(1),
            within_hosts: no_sharing(),
            unanimous: None,
            to_any,
        })
    }

    /// Groups are connected beside the node's link, where this rank has one.
    pub(super) fn within_hosts(&mut self, transport: Arc<dyn Transport>, connected: &Connected) {
        self.within_hosts = connected.for_groups.clone().unwrap_or(transport);
        self.arena.learn(connected);
    }

    /// Groups are connected beside the link that all ranks have.
    pub(super) fn unanimous(&mut self, transport: &Arc<dyn Transport>, connected: &Connected) {
        let for_groups = connected.for_groups.as_ref().unwrap_or(transport);
        self.unanimous = Some(for_groups.clone());
        self.arena.learn(connected);
    }

    /// The number of the job's ranks on the host of these ranks, which share memory, and the number
    /// of their cores together. Each of these ranks gets the same answer.
    pub(super) fn ranks_and_cores(&self, sharing: &[Rank]) -> (usize, usize) {
        // Names are only names: ranks that share memory are on one host, whatever it is called.
        let host = &self.places[sharing[0]].host;
        let is_there = |&rank: &Rank| self.places[rank].host == *host || sharing.contains(&rank);
        let there = (0..self.places.len()).filter(is_there);
        (there.clone().count(), Cores::of_host(there.map(|rank| &*self.places[rank].cores)))
    }

    /// The hosts of some of its ranks.
    pub(crate) fn hosts(&self, ranks: &[usize]) -> Vec<&str> {
        ranks.iter().map(|&rank| &*self.places[rank].host).collect()
    }
}

/// Only a rank whose registered memory the others of its node map can share a group's memory.
fn no_sharing() -> Arc<dyn Transport> {
    let why = Refusal::NotWanted("it shares none in the job".into());
    Barred::new("shm", Reach::Host, why)
}

impl Place {
    /// Ranks of a host have its name in common, and mostly their cores.
    fn of(cards: &[Card]) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::with_capacity(cards.len());
        let mut hosts: HashMap<&str, Self> = HashMap::new();
        for card in cards {
            let known = hosts.entry(&card.host).or_insert_with(|| Self {
                host: card.host.as_str().into(),
                cores: Arc::new(card.cores.clone()),
            });
            let mut place = known.clone();
            if *place.cores != card.cores {
                place.cores = Arc::new(card.cores.clone());
            }
            all.push(place);
        }
        all
    }
}
