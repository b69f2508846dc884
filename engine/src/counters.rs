//! What an engine has done so far: added to by the thread that drives it, read by any.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use unisum_link::{Link, LinkCounters, Rank};

use super::segment::Traffic;

/// Counters of one communicator's collectives.
#[derive(Debug)]
pub struct Counters {
    calls: AtomicU64,
    sleeps: AtomicU64,
    slept_ns: AtomicU64,
    /// By peer: bytes sent and bytes received.
    peers: Box<[[AtomicU64; 2]]>,
    links: Vec<Arc<LinkCounters>>,
}

/// Relaxed, twice: only the thread whose turn it is adds; others read figures for people.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed) // as in `add`
}

impl Counters {
    pub(crate) fn new(world: usize, links: &[Box<dyn Link>]) -> Self {
        Self {
            calls: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            slept_ns: AtomicU64::new(0),
            peers: (0..world).map(|_| Default::default()).collect(),
            links: links.iter().filter_map(|link| link.counters()).collect(),
        }
    }

    /// A collective has ended well.
    pub(crate) fn completed(&self) {
        add(&self.calls, 1);
    }

    /// The thread slept.
    pub(crate) fn slept(&self, time: Duration) {
        add(&self.sleeps, 1);
        add(&self.slept_ns, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// A run of transfers has ended well.
    pub(crate) fn moved(&self, traffic: &[Traffic]) {
        for &Traffic { peer, sent, received } in traffic {
            let [all_sent, all_received] = &self.peers[peer];
            add(all_sent, sent);
            add(all_received, received);
        }
    }

    /// Collectives that have ended well, those included that tried algorithms.
    pub fn calls(&self) -> u64 {
        read(&self.calls)
    }

    /// How often the thread slept in a collective, and for how long in all.
    pub fn sleeps(&self) -> (u64, Duration) {
        (read(&self.sleeps), Duration::from_nanos(read(&self.slept_ns)))
    }

    /// What those of the links that count have counted.
    pub fn links(&self) -> &[Arc<LinkCounters>] {
        &self.links
    }

    /// Payload bytes sent to a peer and received from it in transfers between the two.
    pub fn with(&self, peer: Rank) -> (u64, u64) {
        (read(&self.peers[peer][0]), read(&self.peers[peer][1]))
    }
}
