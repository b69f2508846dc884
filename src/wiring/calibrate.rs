//! Measures a link between two ranks: the α and β of the cost model.

use std::time::{Duration, Instant};

use unisum_link::{
    Backoff, Call, Collective, Dtype, Group, Landing, Link, LinkError, LinkErrorKind, Patience,
    Pause, Profile, Rank, ReduceOp, Region, Ticket,
};

use crate::memory::Arena;

const SMALL: usize = 8;
const LARGE: usize = 1 << 20;
const ROUNDS: usize = 12;

/// Exchanges messages with `peer`, which calls this at the same time, and gives what this rank
/// measured: the fastest of several round trips, halved.
///
/// # Errors
/// If the link fails or the peer does not answer until `until`.
pub(crate) fn measure(
    link: &mut dyn Link,
    peer: Rank,
    first: bool,
    arena: &Arena,
    until: Instant,
) -> Result<Profile, LinkError> {
    let memory = arena
        .allocate(LARGE)
        .map_err(|error| LinkError::os(peer, "allocating memory to measure with", error))?;
    // SAFETY: `memory` outlives the measurement, and nothing else touches it; on an error the
    // link drops its posts before `memory` is freed.
    let region = unsafe { arena.region_at(memory.start(), LARGE) };
    let mut pair = Pair { link, peer, first, until };
    let times = pair.run(region);
    if times.is_err() {
        pair.link.abort();
    }
    let (small, large) = times?;
    let alpha_s = small.as_secs_f64();
    let beta_s_per_byte = (large.as_secs_f64() - alpha_s).max(1e-12) / (LARGE - SMALL) as f64;
    Ok(Profile { alpha_s, beta_s_per_byte })
}

/// The time that all members of the group take to arrive: the median of several rounds that all
/// members make at once, among ranks that compete for the cores as they will later.
///
/// # Errors
/// If a member does not arrive until `until`.
pub(crate) fn arrival_s(group: &mut dyn Group, until: Instant) -> Result<f64, LinkError> {
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let arrival = group.arrive();
        let mut backoff = Backoff::new();
        while !group.complete(arrival)? {
            if backoff.pause(Patience::MEMORY) == Pause::Park {
                if Instant::now() >= until {
                    let peer = group.missing(arrival).first().copied().unwrap_or_default();
                    return Err(no_answer(peer));
                }
                group.park(arrival, until)?;
            }
        }
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

fn no_answer(peer: Rank) -> LinkError {
    let kind = LinkErrorKind::Unreachable("no answer while measuring".into());
    LinkError { peer, kind }
}

struct Pair<'a> {
    link: &'a mut dyn Link,
    peer: Rank,
    first: bool,
    until: Instant,
}

impl Pair<'_> {
    fn run(&mut self, region: Region) -> Result<(Duration, Duration), LinkError> {
        let (collective, dtype, op) = (Collective::AllReduce, Dtype::U8, ReduceOp::Sum);
        let call = Call { number: u64::MAX, collective, dtype, op, count: 0, algorithm: 0 };
        self.link.begin(call, region);
        let small = self.fastest_half_trip(SMALL)?;
        let large = self.fastest_half_trip(LARGE)?;
        Ok((small, large))
    }

    fn fastest_half_trip(&mut self, bytes: usize) -> Result<Duration, LinkError> {
        let mut fastest = Duration::MAX;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            if self.first {
                self.link.send(self.peer, 0..bytes, Ticket(0))?;
                self.finish()?;
            }
            self.link.receive(self.peer, 0..bytes, Landing::Place, Ticket(0))?;
            self.finish()?;
            if !self.first {
                self.link.send(self.peer, 0..bytes, Ticket(0))?;
                self.finish()?;
            }
            fastest = fastest.min(start.elapsed() / 2);
        }
        Ok(fastest)
    }

    fn finish(&mut self) -> Result<(), LinkError> {
        let mut done = Vec::new();
        let mut backoff = Backoff::new();
        loop {
            self.link.progress(&mut done)?;
            if !done.is_empty() {
                return Ok(());
            }
            if backoff.pause(self.link.patience()) == Pause::Park {
                if Instant::now() >= self.until {
                    return Err(no_answer(self.peer));
                }
                self.link.park(self.until, 1)?;
            }
        }
    }
}
