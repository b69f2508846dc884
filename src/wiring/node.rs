//! The ranks that share memory with this one.

use std::fs;
#[cfg(feature = "shm")]
use std::time::{Duration, Instant};

use unisum_algorithms::Topology;
use unisum_link::handshake::Secret;
use unisum_link::{Link, Rank};

use super::Exchange;
use super::report::{Refusal, Report, not_all_share};
#[cfg(feature = "shm")]
use super::starting_failed;
use crate::Error;
use crate::membership::Membership;
use crate::settings::{Settings, TransportChoice};

/// This rank's node as it was found.
pub(super) struct Node {
    /// Ascending, with this rank; only this rank if it shares memory with nobody.
    pub(super) members: Vec<Rank>,
    pub(super) link: Option<Shared>,
    /// The nodes of all ranks.
    pub(super) topology: Topology,
}

/// The link among the ranks of a node.
pub(super) struct Shared {
    pub(super) link: Box<dyn Link>,
    /// Where their registered memory lies.
    #[cfg(feature = "shm")]
    pub(super) heaps: unisum_shm::Heaps,
}

/// The communicator whose ranks look for a node, all of which go through the same exchanges.
pub(super) struct Circle<'a> {
    pub(super) rank: Rank,
    /// The host of each rank, as far as names go.
    pub(super) hosts: &'a [&'a str],
    /// What each rank offers to share memory.
    #[cfg_attr(not(feature = "shm"), expect(dead_code, reason = "nobody offers"))]
    pub(super) cards: Vec<Vec<u8>>,
    /// The communicator's own, so that two never mix.
    #[cfg_attr(not(feature = "shm"), expect(dead_code, reason = "nobody offers"))]
    pub(super) session: [u8; 16],
    pub(super) exchange: &'a Exchange<'a>,
    /// It knows when the job has ended: then nobody is waited for.
    #[cfg_attr(not(feature = "shm"), expect(dead_code, reason = "nobody waits"))]
    pub(super) membership: &'a Membership,
    /// Of a group: the job's numbers of its ranks, and where these have registered memory.
    #[cfg(feature = "shm")]
    pub(super) heaps: Option<(&'a unisum_shm::Heaps, &'a [Rank])>,
}

/// How long the ranks of a node try to share memory before they do without, at most.
#[cfg(feature = "shm")]
const SHARING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long one of them waits for the others: less than all wait for a rank in an exchange, so that
/// who waits takes part in the next one in time, and only who is waited for is missing there.
#[cfg(feature = "shm")]
fn patience(settings: &Settings) -> Duration {
    SHARING_TIMEOUT.min(settings.connect_timeout / 2).min(settings.timeout / 2)
}

/// An offer to share memory, if this rank makes one.
pub(super) struct Offer {
    #[cfg(feature = "shm")]
    shm: Result<unisum_shm::Offer, Refusal>,
}

impl Offer {
    pub(super) fn new(transport: TransportChoice, secret: &Secret) -> Self {
        #[cfg(feature = "shm")]
        {
            let shm = match transport {
                TransportChoice::Tcp | TransportChoice::Verbs => {
                    Err(Refusal::NotWanted(format!("transport {transport} was asked for")))
                }
                _ => unisum_shm::Offer::new(secret).map_err(Refusal::from),
            };
            Self { shm }
        }
        #[cfg(not(feature = "shm"))]
        {
            let _ = (transport, secret);
            Self {}
        }
    }

    /// None, and why.
    #[cfg(feature = "shm")]
    pub(super) fn none(why: &str) -> Self {
        Self { shm: Err(Refusal::NotWanted(why.into())) }
    }

    pub(super) fn card(&self) -> Vec<u8> {
        #[cfg(feature = "shm")]
        if let Ok(offer) = &self.shm {
            return offer.card();
        }
        Vec::new()
    }

    /// Tries to share memory, tells everybody how it went, and connects those who succeeded.
    pub(super) fn join(self, circle: &Circle<'_>, settings: &Settings) -> Result<Node, Error> {
        let rank = circle.rank;
        let candidate = self.candidate(circle, settings);
        let report = match &candidate {
            Ok((leader, _)) => Report::Shares(*leader),
            Err(why) => Report::Alone(why.clone()),
        };
        let reports = (circle.exchange)(report.encode().into())?;
        let reports: Vec<Report> = reports.iter().map(|report| Report::decode(report)).collect();
        let leaders: Vec<Option<Rank>> = reports.iter().map(Report::leader).collect();
        let members = members_of(rank, &leaders);
        if settings.transport == TransportChoice::Shm && members.len() < reports.len() {
            return Err(not_all_share(rank, &leaders, &reports));
        }
        if let Report::Alone(why) = &reports[rank] {
            why.log(rank, &reports);
        }
        let topology = topology(&leaders, circle.hosts);
        match candidate {
            Ok((_, candidate)) if members.len() > 1 => {
                connect(circle, candidate, members, topology, settings)
            }
            _ => Ok(alone(rank, topology)),
        }
    }

    #[cfg(feature = "shm")]
    fn candidate(
        self,
        circle: &Circle<'_>,
        settings: &Settings,
    ) -> Result<(Rank, unisum_shm::Candidate), Refusal> {
        let offer = self.shm?;
        tell_who_is_apart(circle);
        let is_over = || circle.membership.verdict().is_some();
        let limit = unisum_shm::Limit::new(Instant::now() + patience(settings), &is_over);
        // A group needs no heaps of its own.
        let heap = if circle.heaps.is_some() { Some(0) } else { settings.shm_heap };
        let candidate = offer.join(circle.rank, &circle.cards, circle.session, heap, limit)?;
        let private_reads = settings.cross_memory;
        let candidate = if private_reads { candidate } else { candidate.without_private_reads() };
        Ok((candidate.leader(), candidate))
    }

    #[cfg(not(feature = "shm"))]
    fn candidate(
        self,
        _circle: &Circle<'_>,
        _settings: &Settings,
    ) -> Result<(Rank, std::convert::Infallible), Refusal> {
        Err(Refusal::NotWanted("this build has no shared-memory transport".into()))
    }
}

/// Says, in one line of one rank, that ranks of one host have networks of their own.
#[cfg(feature = "shm")]
fn tell_who_is_apart(circle: &Circle<'_>) {
    let (rank, apart) = (circle.rank, unisum_shm::apart(circle.rank, &circle.cards));
    // In a group the same would be said once more.
    if circle.heaps.is_none() && !apart.is_empty() {
        tracing::warn!(
            "ranks {apart:?} are on the host of rank {rank}, but in other network namespaces: \
             there is no shared memory between those"
        );
    }
}

#[cfg(feature = "shm")]
fn connect(
    circle: &Circle<'_>,
    candidate: unisum_shm::Candidate,
    members: Vec<Rank>,
    topology: Topology,
    settings: &Settings,
) -> Result<Node, Error> {
    let is_over = || circle.membership.verdict().is_some();
    let limit = unisum_shm::Limit::new(Instant::now() + patience(settings), &is_over);
    let link = match circle.heaps {
        None => candidate.connect(&members, limit),
        Some((heaps, ranks)) => heaps
            .renamed(&members, ranks)
            .and_then(|heaps| candidate.connect_beside(&members, heaps, limit)),
    };
    let link = link.map_err(|error| {
        let culprit = error.culprits().first().copied().unwrap_or(circle.rank);
        let text = match &error {
            unisum_shm::ShmError::Late(late) => {
                let late = circle.membership.job_ranks(late);
                format!("ranks {late:?} did not take part in sharing memory in time")
            }
            error => format!("sharing memory: {error}"),
        };
        let judged = circle.membership.blame(culprit, text);
        match circle.heaps {
            None => starting_failed(&judged, "sharing memory"),
            Some(_) => judged,
        }
    })?;
    let heaps = link.heaps();
    Ok(Node { members, link: Some(Shared { link: Box::new(link), heaps }), topology })
}

#[cfg(not(feature = "shm"))]
fn connect(
    _circle: &Circle<'_>,
    candidate: std::convert::Infallible,
    _members: Vec<Rank>,
    _topology: Topology,
    _settings: &Settings,
) -> Result<Node, Error> {
    match candidate {}
}

fn alone(rank: Rank, topology: Topology) -> Node {
    Node { members: vec![rank], link: None, topology }
}

fn members_of(rank: Rank, leaders: &[Option<Rank>]) -> Vec<Rank> {
    if leaders[rank].is_none() {
        return vec![rank];
    }
    (0..leaders.len()).filter(|&peer| leaders[peer] == leaders[rank]).collect()
}

/// Ranks that share memory are a node; those that share none are grouped by host.
fn topology(leaders: &[Option<Rank>], hosts: &[&str]) -> Topology {
    let first_on_host =
        |rank: Rank| (0..rank).find(|&peer| leaders[peer].is_none() && hosts[peer] == hosts[rank]);
    let node = |rank: Rank| leaders[rank].or_else(|| first_on_host(rank)).unwrap_or(rank) as u32;
    let sharing = |rank: Rank| leaders[rank].is_some();
    // A rank that shares memory and one that does not are never in one node.
    let node_of: Vec<u32> =
        (0..leaders.len()).map(|rank| node(rank) * 2 + u32::from(sharing(rank))).collect();
    Topology::from_node_of(node_of)
}

/// Names the host and its network as far as names go: ranks with the same name may share a host.
pub(super) fn host_name() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let name = rustix::system::uname();
    format!("{}/{}/{}", name.nodename().to_string_lossy(), boot.trim(), network.display())
}

/// The part of a host's name that says in which network namespace the process is.
pub(super) fn network_of(host: &str) -> &str {
    host.split_once('/').map_or("", |(_, network)| network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_memory_are_a_node_and_the_others_go_by_host() {
        let leaders = [Some(0), None, Some(0), None, None];
        let topology = topology(&leaders, &["a", "a", "a", "a", "b"]);
        let nodes: Vec<u32> = (0..5).map(|rank| topology.node_of(rank)).collect();
        assert_eq!(nodes, [0, 1, 0, 1, 2]);
        assert_eq!(members_of(2, &leaders), [0, 2]);
        assert_eq!(members_of(3, &leaders), [3]);
    }
}
