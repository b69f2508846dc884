//! What a communicator has done and is doing, as data.

use std::sync::Arc;
use std::time::Duration;

use unisum_link::{LinkCounters, Rank};

use crate::execution::runner::Runner;

/// What a communicator has done so far on this rank, and what it is doing, see
/// [`Communicator::stats`](crate::Communicator::stats).
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Collectives that have ended well, those included that try algorithms.
    pub calls: u64,
    /// How often a thread went to sleep in a collective because a peer was not there yet.
    pub sleeps: u64,
    /// For how long in all.
    pub slept: Duration,
    /// By rank, what moved between the two in transfers. Within a group of ranks that share
    /// memory, ranks read each other's memory without transfers, which is not
    /// counted. Transfers count when all of their run have ended.
    pub peers: Vec<PeerStats>,
    /// What those of the links that count have counted, by transport. They also count what no
    /// collective does: connecting, measuring, trying algorithms.
    pub links: Vec<LinkStats>,
    /// The collective that is under way.
    pub running: Option<RunningCall>,
}

/// What a link has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkStats {
    /// The transport's name, such as "verbs".
    pub transport: &'static str,
    /// By name. What is counted is the transport's choice.
    pub counters: Vec<(&'static str, u64)>,
}

/// What moved between this rank and a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Payload bytes sent to it.
    pub sent: u64,
    /// Payload bytes received from it.
    pub received: u64,
}

/// A collective that is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunningCall {
    /// The call in words, as in errors.
    pub call: String,
    /// Steps of its plan that were done when it last waited.
    pub step: u32,
    /// All its steps; 0 until it waits.
    pub steps: u32,
    /// Payload bytes that had been transferred then.
    pub bytes: u64,
}

impl Runner {
    /// From any thread; never waits.
    pub(crate) fn stats(&self, world: usize) -> Stats {
        let (sleeps, slept) = self.counters.sleeps();
        let peer = |rank: Rank| {
            let (sent, received) = self.counters.with(rank);
            PeerStats { sent, received }
        };
        let now = self.membership.status().snapshot();
        let running = now.call.filter(|_| now.inside).map(|call| RunningCall {
            call: self.membership.describe(&call),
            step: now.step,
            steps: now.steps,
            bytes: now.bytes,
        });
        let peers = (0..world).map(peer).collect();
        let link = |link: &Arc<LinkCounters>| LinkStats {
            transport: link.transport(),
            counters: link.read(),
        };
        let links = self.counters.links().iter().map(link).collect();
        Stats { calls: self.counters.calls(), sleeps, slept, peers, links, running }
    }
}
