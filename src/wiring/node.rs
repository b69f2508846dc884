//! The ranks that share memory with this one.

use std::fs;
#[cfg(feature = "shm")]
use std::time::{Duration, Instant};

use unisum_algorithms::Topology;
use unisum_link::handshake::Secret;
use unisum_link::{Link, Rank};

use super::Exchange;
use crate::settings::{Settings, TransportChoice};
use crate::{Error, ErrorKind};

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
    /// Of a group: the job's numbers of its ranks, and where these have registered memory.
    #[cfg(feature = "shm")]
    pub(super) heaps: Option<(&'a unisum_shm::Heaps, &'a [Rank])>,
}

/// How long the ranks of a node try to share memory before they do without.
#[cfg(feature = "shm")]
const SHARING_TIMEOUT: Duration = Duration::from_secs(20);

/// An offer to share memory, if this rank makes one.
pub(super) struct Offer {
    #[cfg(feature = "shm")]
    shm: Result<unisum_shm::Offer, String>,
}

impl Offer {
    pub(super) fn new(transport: TransportChoice, secret: &Secret) -> Self {
        #[cfg(feature = "shm")]
        {
            let shm = match transport {
                TransportChoice::Tcp | TransportChoice::Verbs => {
                    Err(format!("transport {transport} was asked for"))
                }
                _ => unisum_shm::Offer::new(secret).map_err(|error| error.to_string()),
            };
            Self { shm }
        }
        #[cfg(not(feature = "shm"))]
        {
            let _ = (transport, secret);
            Self {}
        }
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
            Ok((leader, _)) => format!("+{leader}"),
            Err(why) => format!("-{why}"),
        };
        let reports = (circle.exchange)(report.into_bytes().into())?;
        let reports: Vec<_> =
            reports.iter().map(|report| String::from_utf8_lossy(report)).collect();
        let leaders: Vec<Option<Rank>> =
            reports.iter().map(|report| report.strip_prefix('+')?.parse().ok()).collect();
        let members = members_of(rank, &leaders);
        if settings.transport == TransportChoice::Shm && members.len() < reports.len() {
            return Err(not_all_share(rank, &members, &reports));
        }
        let topology = topology(&leaders, circle.hosts);
        connect(circle, candidate, members, topology)
    }

    #[cfg(feature = "shm")]
    fn candidate(
        self,
        circle: &Circle<'_>,
        settings: &Settings,
    ) -> Result<(Rank, unisum_shm::Candidate), String> {
        let until = Instant::now() + SHARING_TIMEOUT.min(settings.connect_timeout);
        // A group needs no heaps of its own.
        let heap = if circle.heaps.is_some() { Some(0) } else { settings.shm_heap };
        let candidate = self
            .shm?
            .join(circle.rank, &circle.cards, circle.session, heap, until)
            .map_err(|error| error.to_string())?;
        let private_reads = settings.cross_memory;
        let candidate = if private_reads { candidate } else { candidate.without_private_reads() };
        Ok((candidate.leader(), candidate))
    }

    #[cfg(not(feature = "shm"))]
    fn candidate(
        self,
        _circle: &Circle<'_>,
        _settings: &Settings,
    ) -> Result<(Rank, std::convert::Infallible), String> {
        Err("this build has no shared-memory transport".into())
    }
}

#[cfg(feature = "shm")]
fn connect(
    circle: &Circle<'_>,
    candidate: Result<(Rank, unisum_shm::Candidate), String>,
    members: Vec<Rank>,
    topology: Topology,
) -> Result<Node, Error> {
    let rank = circle.rank;
    match candidate {
        Ok((_, candidate)) if members.len() > 1 => {
            let until = Instant::now() + SHARING_TIMEOUT;
            let link = match circle.heaps {
                None => candidate.connect(&members, until),
                Some((heaps, ranks)) => heaps
                    .renamed(&members, ranks)
                    .and_then(|heaps| candidate.connect_beside(&members, heaps, until)),
            };
            let link = link.map_err(|error| {
                let text = format!("sharing memory with ranks {members:?}: {error}");
                Error::new(ErrorKind::Rendezvous, text).on(rank)
            })?;
            let heaps = link.heaps();
            Ok(Node { members, link: Some(Shared { link: Box::new(link), heaps }), topology })
        }
        Err(why) => {
            tracing::info!("rank {rank} shares no memory: {why}");
            Ok(alone(rank, topology))
        }
        Ok(_) => Ok(alone(rank, topology)),
    }
}

#[cfg(not(feature = "shm"))]
fn connect(
    circle: &Circle<'_>,
    _candidate: Result<(Rank, std::convert::Infallible), String>,
    _members: Vec<Rank>,
    topology: Topology,
) -> Result<Node, Error> {
    Ok(alone(circle.rank, topology))
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

fn not_all_share(rank: Rank, members: &[Rank], reports: &[impl AsRef<str>]) -> Error {
    let others: Vec<Rank> = (0..reports.len()).filter(|peer| !members.contains(peer)).collect();
    let reasons: Vec<String> = reports
        .iter()
        .enumerate()
        .filter_map(|(peer, report)| {
            let why = report.as_ref().strip_prefix('-')?;
            Some(format!("rank {peer}: {why}"))
        })
        .collect();
    let text = format!(
        "transport shm was asked for, but ranks {others:?} share no memory with rank {rank} ({})",
        if reasons.is_empty() { "they are on other hosts".into() } else { reasons.join("; ") }
    );
    Error::new(ErrorKind::Configuration, text).on(rank).caused_by(others)
}

/// Names the host and its network as far as names go: ranks with the same name may share a host.
pub(super) fn host_name() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let name = rustix::system::uname();
    format!("{}/{}/{}", name.nodename().to_string_lossy(), boot.trim(), network.display())
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
