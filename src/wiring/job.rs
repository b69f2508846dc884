//! What joining a job keeps for the groups that are made of its ranks later.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use unisum_link::handshake::job_hash;
use unisum_link::inbox::Ways;
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
    places: Arc<[Place]>,
    /// Of a group that has a control of its own: by rank there, the number in the job.
    numbers: Option<Arc<[Rank]>>,
    pub(crate) arena: Arena,
    /// The lowest number that no communicator of this rank has used.
    pub(crate) next_communicator: Arc<AtomicU32>,
    /// For the ranks of a host.
    pub(super) within_hosts: Arc<dyn Transport>,
    /// For all others, if all ranks of the job have it: the same on all ranks.
    pub(super) unanimous: Option<Arc<dyn Transport>>,
    /// For all others otherwise.
    pub(super) to_any: Arc<dyn Transport>,
    /// Whether that knows ranks by the numbers here, and not by the job's.
    has_own: bool,
    /// How its ranks are reached, by the numbers here, if connections are to be made anew.
    ways: Option<Ways>,
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
        let listening: Vec<_> =
            cards.iter().map(|card| (&card.host[..], &card.addresses[..])).collect();
        let (to_any, ways) =
            to_any((settings, credentials), detected.rank, &listening, (control, &detected.job))?;
        Ok(Self {
            settings: settings.clone(),
            places: Place::of(cards).into(),
            numbers: None,
            arena: Arena::default(),
            next_communicator: Arc::new(AtomicU32::new(1)),
            within_hosts: no_sharing(),
            unanimous: None,
            to_any,
            has_own: true,
            ways,
        })
    }

    /// The same job for a group of its ranks that has a `control` of its own, whose numbers are
    /// the group's: this rank is number `rank`. `told` is where each listens for the group.
    pub(super) fn of_group(
        &self,
        (rank, ranks): (Rank, &[Rank]),
        told: &[Vec<SocketAddr>],
        credentials: &Credentials,
        (control, name): (&Control, &str),
    ) -> Result<Self, Error> {
        let hosts = self.hosts(ranks);
        let listening: Vec<_> = hosts.into_iter().zip(told.iter().map(|it| &it[..])).collect();
        let (to_any, ways) =
            to_any((&self.settings, credentials), rank, &listening, (control, name))?;
        // One that the program gave is the job's.
        let has_own = !Arc::ptr_eq(&to_any, &self.to_any);
        Ok(Self {
            settings: self.settings.clone(),
            places: self.places.clone(),
            numbers: Some(self.known_as(ranks).into()),
            arena: self.arena.clone(),
            next_communicator: self.next_communicator.clone(),
            within_hosts: self.within_hosts.clone(),
            unanimous: self.unanimous.clone(),
            to_any,
            has_own,
            ways,
        })
    }

    /// The numbers by which the links that the job has know these ranks.
    pub(super) fn known_as(&self, ranks: &[Rank]) -> Vec<Rank> {
        ranks.iter().map(|&rank| self.known(rank)).collect()
    }

    /// The numbers by which the link that reaches any rank knows these ranks.
    pub(super) fn known_to_any(&self, ranks: &[Rank]) -> Vec<Rank> {
        if self.has_own { ranks.to_vec() } else { self.known_as(ranks) }
    }

    /// How some of its ranks, by their numbers here, are reached after the start.
    pub(super) fn ways(&self, ranks: &[Rank]) -> Option<Ways> {
        self.ways.as_ref().map(|ways| ways.of(ranks))
    }

    fn known(&self, rank: Rank) -> Rank {
        self.numbers.as_ref().map_or(rank, |numbers| numbers[rank])
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
        let sharing = self.known_as(sharing);
        // Names are only names: ranks that share memory are on one host, whatever it is called.
        let host = &self.places[sharing[0]].host;
        let is_there = |&rank: &Rank| self.places[rank].host == *host || sharing.contains(&rank);
        let there = (0..self.places.len()).filter(is_there);
        (there.clone().count(), Cores::of_host(there.map(|rank| &*self.places[rank].cores)))
    }

    /// The hosts of some of its ranks.
    pub(crate) fn hosts(&self, ranks: &[usize]) -> Vec<&str> {
        ranks.iter().map(|&rank| &*self.places[self.known(rank)].host).collect()
    }
}

/// What reaches any rank of a job or of a group, of which this one is number `rank`: for each its
/// host, and where it listens. The control is told as well.
fn to_any(
    (settings, credentials): (&Settings, &Credentials),
    rank: Rank,
    listening: &[(&str, &[SocketAddr])],
    (control, name): (&Control, &str),
) -> Result<(Arc<dyn Transport>, Option<Ways>), Error> {
    let paths = Paths::new(settings.interface.as_ref()).map_err(|error| {
        let text = format!("listing the network interfaces: {error}");
        Error::new(ErrorKind::Rendezvous, text).on(rank)
    })?;
    let here = node::network_of(listening[rank].0);
    let addresses = |(rank, (host, told)): (usize, &(&str, &[SocketAddr]))| {
        if told.is_empty() && listening.len() > 1 {
            let text = format!("rank {rank} told no address");
            return Err(Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank]));
        }
        Ok(paths.to(told, node::network_of(host) == here))
    };
    let addresses: Vec<_> =
        listening.iter().enumerate().map(addresses).collect::<Result<_, _>>()?;
    control.set_addresses(addresses.clone());
    let limit = settings.reconnect_timeout;
    let new = || Ways::new(addresses.clone(), job_hash(name), credentials.clone(), limit);
    let ways = (!limit.is_zero()).then(new);
    let addresses = (addresses, control.coordinator());
    Ok((transports::to_any(settings, credentials, addresses, name), ways))
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
