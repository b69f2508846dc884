//! The ranks of a host that one link connects: those that share memory.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_algorithms::Topology;
use unisum_link::{
    Connected, Endpoint, EndpointInfo, Limit, Rank, Refusal, Setup, Site, Transport,
};

use super::report::{Report, log, not_all_share};
use super::{Exchange, builtin, starting_failed};
use crate::Error;
use crate::execution::membership::Membership;
use crate::settings::Settings;

/// This rank's node.
pub(super) struct Node {
    /// Ascending, including this rank; only this rank if it shares memory with nobody.
    pub(super) members: Vec<Rank>,
    /// Among the members.
    pub(super) connected: Option<Connected>,
    /// The nodes of all ranks.
    pub(super) topology: Topology,
}

/// What finding the nodes of a communicator needs; all its ranks go through the same exchanges.
pub(super) struct JoinContext<'a> {
    pub(super) rank: Rank,
    /// The host of each rank, according to its name.
    pub(super) hosts: &'a [&'a str],
    /// What each rank tells of its endpoint.
    pub(super) infos: Vec<Vec<u8>>,
    /// The session of this communicator, so that two never mix.
    pub(super) session: [u8; 16],
    pub(super) exchange: &'a Exchange<'a>,
    /// Knows when the job has ended: waiting then stops.
    pub(super) membership: &'a Membership,
    /// Whether it is a group of a job that has started.
    pub(super) is_group: bool,
}

/// How long the ranks of a node try to share memory, at most, before they do without it.
const SHARING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long one of them waits for the others: less than all wait for a rank in an exchange, so that
/// a waiting rank takes part in the next exchange in time, and only the rank it waits for is
/// missing there.
fn patience(settings: &Settings) -> Duration {
    SHARING_TIMEOUT.min(settings.connect_timeout / 2).min(settings.timeout / 2)
}

/// This rank's end of the link among the ranks of its host, if it has one.
pub(super) struct NodeEndpoint {
    transport: Arc<dyn Transport>,
    is_asked_for: bool,
    endpoint: Result<Box<dyn Endpoint>, Refusal>,
}

impl NodeEndpoint {
    /// Of rank `rank` of a communicator whose ranks have these numbers in the job.
    pub(super) fn new(
        transport: Arc<dyn Transport>,
        settings: &Settings,
        (rank, ranks): (Rank, &[Rank]),
    ) -> Self {
        let is_asked_for = settings.transport.is(transport.name());
        let peers: Vec<Rank> = (0..ranks.len()).filter(|&peer| peer != rank).collect();
        let endpoint = transport.endpoint(&Site { rank, ranks, peers: &peers, is_asked_for });
        Self { transport, is_asked_for, endpoint }
    }

    /// What it is an end of.
    pub(super) fn transport(&self) -> Arc<dyn Transport> {
        self.transport.clone()
    }

    /// What the others have to know; nothing if there is no end.
    pub(super) fn info(&self) -> Vec<u8> {
        match self.endpoint.as_ref().map(|it| it.info()) {
            Ok(EndpointInfo::Same(info)) => info,
            _ => Vec::new(),
        }
    }

    /// Tries to share memory, reports the outcome to all ranks, and connects those that succeeded.
    pub(super) fn join(self, circle: &JoinContext<'_>, settings: &Settings) -> Result<Node, Error> {
        let (rank, name) = (circle.rank, self.transport.name());
        let agreed = self.endpoint.and_then(|mut endpoint| {
            let leader = in_time(circle, settings, |setup| endpoint.agree(&circle.infos, setup))?;
            Ok((leader, endpoint))
        });
        let report = match &agreed {
            Ok((leader, _)) => Report::Shares(*leader),
            Err(why) => Report::Alone(why.clone()),
        };
        let reports = (circle.exchange)(report.encode().into())?;
        let reports: Vec<Report> = reports.iter().map(|report| Report::decode(report)).collect();
        let leaders: Vec<Option<Rank>> = reports.iter().map(Report::leader).collect();
        let members = members_of(rank, &leaders);
        if self.is_asked_for && members.len() < reports.len() {
            return Err(not_all_share(name, rank, &leaders, &reports));
        }
        if let Report::Alone(why) = &reports[rank] {
            log(why, rank, &reports);
        }
        let topology = topology(&leaders, circle.hosts);
        let connected = match agreed {
            Ok((_, endpoint)) if members.len() > 1 => {
                let connected =
                    in_time(circle, settings, |setup| endpoint.connect(&members, setup));
                Some(connected.map_err(|refusal| failed(circle, name, refusal))?)
            }
            _ => return Ok(alone(rank, topology)),
        };
        Ok(Node { members, connected, topology })
    }
}

/// Takes a step for as long as the others wait for this rank.
fn in_time<T>(
    circle: &JoinContext<'_>,
    settings: &Settings,
    step: impl FnOnce(&Setup<'_>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let is_over = || circle.membership.verdict().is_some();
    let limit = Limit::new(Instant::now() + patience(settings), &is_over);
    step(&Setup { session: circle.session, limit, ways: None })
}

/// Tells all ranks that a node's link could not be made; the error for the caller.
fn failed(circle: &JoinContext<'_>, name: &str, refusal: Refusal) -> Error {
    let doing = match name {
        "shm" => "sharing memory".to_owned(),
        name => format!("connecting over {}", builtin::called(name)),
    };
    let membership = circle.membership;
    let judged = match refusal {
        Refusal::Others(ranks, why) => {
            let first = ranks.first().copied().unwrap_or(circle.rank);
            membership.blame(first, format!("ranks {:?} {why}", membership.job_ranks(&ranks)))
        }
        Refusal::Lacks(why) => membership.lacks(&format!("{doing}: {why}")),
        Refusal::Own(why) | Refusal::NotWanted(why) => {
            membership.blame(circle.rank, format!("{doing}: {why}"))
        }
    };
    if circle.is_group { judged } else { starting_failed(&judged, &doing) }
}

fn alone(rank: Rank, topology: Topology) -> Node {
    Node { members: vec![rank], connected: None, topology }
}

pub(super) fn members_of(rank: Rank, leaders: &[Option<Rank>]) -> Vec<Rank> {
    if leaders[rank].is_none() {
        return vec![rank];
    }
    (0..leaders.len()).filter(|&peer| leaders[peer] == leaders[rank]).collect()
}

/// Ranks that share memory are a node; those that share none are grouped by host.
pub(super) fn topology(leaders: &[Option<Rank>], hosts: &[&str]) -> Topology {
    let is_with = |rank: Rank, peer: Rank| match leaders[rank] {
        // Whatever number it says its leader has.
        Some(leader) => leaders[peer] == Some(leader),
        None => leaders[peer].is_none() && hosts[peer] == hosts[rank],
    };
    let node = |rank: Rank| (0..rank).find(|&peer| is_with(rank, peer)).unwrap_or(rank) as u32;
    let sharing = |rank: Rank| leaders[rank].is_some();
    // A rank that shares memory and one that does not are never in one node.
    let node_of: Vec<u32> =
        (0..leaders.len()).map(|rank| node(rank) * 2 + u32::from(sharing(rank))).collect();
    Topology::from_node_of(node_of)
}

/// A name for the host and its network: ranks with the same name may share a host.
pub(super) fn host_name() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let name = rustix::system::uname();
    format!("{}/{}/{}", name.nodename().to_string_lossy(), boot.trim(), network.display())
}

/// The part of a host's name that identifies the process's network namespace.
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
