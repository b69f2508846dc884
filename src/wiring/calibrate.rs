//! Measures a link between two ranks, the α and β of the cost model, and collectives of a group.

use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_algorithms::LinkCost;
use unisum_link::kernels::Fold;
use unisum_link::{
    Backoff, Call, Dtype, Landing, Link, LinkError, LinkErrorKind, Pause, Rank, Region, Regions,
    Ticket,
};

use crate::engine::program::Program;
use crate::engine::{Advance, Engine};
use crate::membership::Membership;
use crate::memory::Arena;

const SMALL: usize = 8;
const CACHED: usize = LinkCost::CACHED_BYTES / 4;
const LARGE: usize = 1 << 20;
const ROUNDS: usize = 12;
/// Messages of one size go there and back for no longer, once the first has, however slow the link.
const SPELL: Duration = Duration::from_millis(10);

/// How long a measurement waits for the others.
#[derive(Clone, Copy)]
pub(crate) struct Limit<'a> {
    pub(crate) until: Instant,
    /// Its links wake the measurement when the job ends.
    pub(crate) membership: &'a Membership,
}

impl Limit<'_> {
    fn check(self, peer: Rank) -> Result<(), LinkError> {
        let text = if self.membership.verdict().is_some() {
            "the job ended meanwhile"
        } else if Instant::now() >= self.until {
            "no answer while measuring"
        } else {
            return Ok(());
        };
        Err(LinkError { peer, kind: LinkErrorKind::Unreachable(text.into()) })
    }
}

/// Exchanges messages with `peer`, which calls this at the same time, and gives what this rank
/// measured: the fastest of several round trips, halved.
///
/// # Errors
/// If the link fails, the job ends, or the peer does not answer within the limit.
pub(crate) fn measure(
    link: &mut dyn Link,
    peer: Rank,
    first: bool,
    arena: &Arena,
    limit: Limit<'_>,
) -> Result<LinkCost, LinkError> {
    let memory = arena
        .allocate_anywhere(LARGE)
        .map_err(|error| LinkError::os(peer, "allocating memory to measure with", error))?;
    // SAFETY: `memory` outlives the measurement, and nothing else touches it; on an error the
    // link drops its posts before `memory` is freed.
    let region = unsafe { arena.region_at(memory.start(), LARGE) };
    let mut pair = Pair { link, peer, first, limit };
    let times = pair.run(region);
    if times.is_err() {
        pair.link.abort();
    }
    let [small, cached, large] = times?;
    let s_per_byte = |seconds: f64, bytes: usize| (seconds - small).max(1e-12) / bytes as f64;
    Ok(LinkCost {
        alpha_s: small,
        beta_s_per_byte: s_per_byte(large, LARGE),
        beta_cached_s_per_byte: s_per_byte(cached, CACHED),
    })
}

/// Seconds that `program` takes the group's members, who run it at once, as they will later, among
/// ranks that compete for the cores: the lower quartile of several runs, since starting processes
/// disturb.
///
/// # Errors
/// If a member fails, the job ends, or a member does not come within the limit.
pub(crate) fn collective_s(
    engine: &mut Engine,
    call: Call,
    regions: Regions,
    program: &Arc<Program>,
    limit: Limit<'_>,
) -> Result<f64, LinkError> {
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS {
        let call = Call { number: call.number - round as u64, ..call };
        let start = Instant::now();
        let fold = Fold::new(call.dtype, call.op);
        engine.start(&call, fold, &regions, program);
        finish(engine, limit)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 4])
}

fn finish(engine: &mut Engine, limit: Limit<'_>) -> Result<(), LinkError> {
    let mut backoff = Backoff::new();
    loop {
        match engine.advance()? {
            Advance::Done => return Ok(()),
            Advance::Moved => backoff.reset(),
            Advance::Waiting if backoff.pause(engine.patience()) == Pause::Park => {
                limit.check(engine.waiting_for().first().copied().unwrap_or(0))?;
                engine.park(limit.until)?;
                backoff.reset();
            }
            Advance::Waiting => {}
        }
    }
}

struct Pair<'a> {
    link: &'a mut dyn Link,
    peer: Rank,
    first: bool,
    limit: Limit<'a>,
}

impl Pair<'_> {
    /// Seconds that a message of each size takes one way.
    fn run(&mut self, region: Region) -> Result<[f64; 3], LinkError> {
        let call = Call::all_reduce(u64::MAX, Dtype::U8, 0);
        self.link.begin(&call, &Regions::in_place(region));
        let mut seconds = [f64::INFINITY; 3];
        // Twice, as what starting processes disturbs may be over the second time.
        for _ in 0..2 {
            for (seconds, bytes) in seconds.iter_mut().zip([SMALL, CACHED, LARGE]) {
                let part = region.part(&(0..bytes));
                *seconds = seconds.min(self.fastest_half_trip(part)?.as_secs_f64());
            }
        }
        Ok(seconds)
    }

    fn fastest_half_trip(&mut self, memory: Region) -> Result<Duration, LinkError> {
        let (mut fastest, begun) = (Duration::MAX, Instant::now());
        for round in 1.. {
            let start = Instant::now();
            if self.first {
                let is_last = round == ROUNDS || begun.elapsed() > SPELL;
                // SAFETY: the region has more bytes, and no transfer is under way.
                unsafe { memory.base().write(u8::from(is_last)) };
                self.link.send(self.peer, memory, Ticket(0))?;
                self.finish()?;
            }
            self.link.receive(self.peer, memory, Landing::Place, Ticket(0))?;
            self.finish()?;
            if !self.first {
                self.link.send(self.peer, memory, Ticket(0))?;
                self.finish()?;
            }
            fastest = fastest.min(start.elapsed() / 2);
            // SAFETY: as above; what the first wrote has gone there and back.
            if unsafe { memory.base().read() } != 0 {
                break;
            }
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
                self.limit.check(self.peer)?;
                self.link.park(self.limit.until, 1)?;
            }
        }
    }
}
