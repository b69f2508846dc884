//! Measures the α and β of a link between two ranks, for the cost model, and collectives of a
//! group.

use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_algorithms::LinkCost;
use unisum_kernels::Dtype;
use unisum_kernels::Fold;
use unisum_link::{
    Backoff, Call, Cause, Landing, Link, LinkError, LinkErrorKind, Pause, Rank, Region, Regions,
    Ticket,
};

use crate::execution::membership::Membership;
use crate::memory::Arena;
use unisum_engine::{Advance, Engine, Program};

const SMALL: usize = 8;
const CACHED: usize = LinkCost::CACHED_BYTES / 4;
const LARGE: usize = 1 << 20;
const ROUNDS: usize = 12;
/// The time for round trips of one message size, after the first one, however slow the link is.
const SPELL: Duration = Duration::from_millis(10);

/// If a message of [`CACHED`] bytes takes longer one way, the link is so slow that the time of
/// [`LARGE`] bytes is extrapolated: at 8 Mbit/s, a dozen of them would take as many seconds.
const SLOW: Duration = Duration::from_millis(20);
/// No processor moves bytes faster: where a measurement says so, others had the processors while
/// the smaller message was measured.
pub(super) const S_PER_BYTE_MIN: f64 = 1e-12;
/// In a message's first byte: the last message of this size; the last message.
const LAST: u8 = 1;
const END: u8 = 2;

/// How long a measurement waits for the others.
#[derive(Clone, Copy)]
pub(crate) struct Limit<'a> {
    pub(crate) until: Instant,
    /// Wakes the measurement when the job ends.
    pub(crate) membership: &'a Membership,
}

impl Limit<'_> {
    /// An error if the job has ended or the time is up; `doing` says what had no answer.
    fn check(self, peer: Rank, doing: impl FnOnce() -> String) -> Result<(), LinkError> {
        let text = if self.membership.verdict().is_some() {
            "the job ended meanwhile".to_owned()
        } else if Instant::now() >= self.until {
            format!("no answer while measuring{}", doing())
        } else {
            return Ok(());
        };
        Err(LinkError { peer, kind: LinkErrorKind::Unreachable(text) })
    }
}

/// Exchanges messages with `peer`, which calls this at the same time, and returns what this rank
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
    let memory = arena.allocate_anywhere(LARGE).map_err(|error| {
        LinkError::lacking(peer, "allocating memory to measure with", Cause::other(error))
    })?;
    // SAFETY: `memory` outlives the measurement, and nothing else touches it; on an error the
    // link drops its posts before `memory` is freed.
    let region = unsafe { arena.region_at(memory.start(), LARGE) };
    let mut pair = Pair { link, peer, first, limit, went: None };
    let times = pair.run(region);
    if times.is_err() {
        pair.link.abort();
    }
    times.map(cost)
}

/// What a link costs on which messages of the three sizes took so many seconds.
fn cost([small, cached, large]: [f64; 3]) -> LinkCost {
    // Where others had the processors, a small message may have taken longer than a large one: the
    // time of the large one bounds what is the link's.
    let cached = cached.min(large);
    let small = small.min(cached);
    let s_per_byte =
        |seconds: f64, bytes: usize| ((seconds - small) / bytes as f64).max(S_PER_BYTE_MIN);
    LinkCost {
        alpha_s: small,
        beta_s_per_byte: s_per_byte(large, LARGE),
        beta_cached_s_per_byte: s_per_byte(cached, CACHED),
    }
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
                limit.check(engine.waiting_for().first().copied().unwrap_or(0), String::new)?;
                engine.park(limit.until)?;
                backoff.reset();
            }
            Advance::Waiting => {}
        }
    }
}

/// The times, with that of the largest messages extrapolated from the others if not measured.
fn with_large([small, cached, large]: [f64; 3]) -> [f64; 3] {
    let reckoned = small + (cached - small).max(0.0) * (LARGE as f64 / CACHED as f64);
    [small, cached, if large.is_finite() { large } else { reckoned }]
}

/// Describes a message that had no answer.
fn unanswered(went: Option<usize>, bytes: usize) -> String {
    match went {
        Some(went) if went < bytes => format!(
            ": messages of {went} B went through, one of {bytes} B did not; does a part of the \
             network drop large packets (MTU)?"
        ),
        _ => String::new(),
    }
}

struct Pair<'a> {
    link: &'a mut dyn Link,
    peer: Rank,
    first: bool,
    limit: Limit<'a>,
    /// The bytes of the last message that went there and back.
    went: Option<usize>,
}

impl Pair<'_> {
    /// Seconds that a message of each size takes one way.
    fn run(&mut self, region: Region) -> Result<[f64; 3], LinkError> {
        let call = Call::all_reduce(Call::NUMBER_MAX, Dtype::U8, 0);
        self.link.begin(&call, &Regions::in_place(region));
        let mut seconds = [f64::INFINITY; 3];
        // Twice, because the disturbance of starting processes may be over the second time.
        for _ in 0..2 {
            for (at, bytes) in [SMALL, CACHED, LARGE].into_iter().enumerate() {
                let part = region.part(&(0..bytes));
                let (trip, is_end) = self.fastest_half_trip(part)?;
                seconds[at] = seconds[at].min(trip.as_secs_f64());
                if is_end {
                    return Ok(with_large(seconds));
                }
            }
        }
        Ok(seconds)
    }

    /// Also returns whether nothing more must be measured.
    fn fastest_half_trip(&mut self, memory: Region) -> Result<(Duration, bool), LinkError> {
        let (mut fastest, begun) = (Duration::MAX, Instant::now());
        let bytes = memory.bytes();
        for round in 1.. {
            let start = Instant::now();
            if self.first {
                let is_last = round == ROUNDS || begun.elapsed() > SPELL;
                let is_slow = round > 1 && bytes == CACHED && fastest > SLOW;
                let told = match (is_last, is_slow) {
                    (false, _) => 0,
                    (true, false) => LAST,
                    (true, true) => LAST | END,
                };
                // SAFETY: the region has more bytes, and no transfer is under way.
                unsafe { memory.base().write(told) };
                self.link.send(self.peer, memory, Ticket(0))?;
                self.finish(bytes)?;
            }
            self.link.receive(self.peer, memory, Landing::Place, Ticket(0))?;
            self.finish(bytes)?;
            if !self.first {
                self.link.send(self.peer, memory, Ticket(0))?;
                self.finish(bytes)?;
            }
            self.went = Some(bytes);
            fastest = fastest.min(start.elapsed() / 2);
            // SAFETY: as above; what the first wrote has gone there and back.
            let told = unsafe { memory.base().read() };
            if told & LAST != 0 {
                return Ok((fastest, told & END != 0));
            }
        }
        unreachable!("rounds are counted without end")
    }

    fn finish(&mut self, bytes: usize) -> Result<(), LinkError> {
        let mut done = Vec::new();
        let mut backoff = Backoff::new();
        loop {
            self.link.progress(&mut done)?;
            if !done.is_empty() {
                return Ok(());
            }
            if backoff.pause(self.link.patience()) == Pause::Park {
                self.limit.check(self.peer, || unanswered(self.went, bytes))?;
                self.link.park(self.limit.until, 1)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_large_messages_take_on_a_slow_link_is_reckoned() {
        let [_, _, large] = with_large([0.001, 0.066, f64::INFINITY]);
        let expected = 0.001 + 0.065 * (LARGE / CACHED) as f64;
        assert!((large - expected).abs() < 1e-9, "{large}");
        assert_eq!(with_large([0.001, 0.066, 0.5])[2], 0.5);
    }

    #[test]
    fn a_disturbed_measurement_gives_no_rate_that_no_machine_has() {
        let quiet = cost([1e-5, 1e-4, 1e-3]);
        assert_eq!(quiet.alpha_s, 1e-5);
        assert!((quiet.beta_s_per_byte - 9.9e-4 / LARGE as f64).abs() < 1e-15);
        let disturbed = cost([3e-3, 1e-4, 1e-3]);
        assert_eq!((disturbed.alpha_s, disturbed.beta_cached_s_per_byte), (1e-4, S_PER_BYTE_MIN));
        assert!(disturbed.beta_s_per_byte > S_PER_BYTE_MIN);
        let worse = cost([3e-3, 3e-3, 1e-3]);
        assert_eq!((worse.alpha_s, worse.beta_s_per_byte), (1e-3, S_PER_BYTE_MIN));
    }

    #[test]
    fn a_network_that_drops_large_packets_is_suspected_only_where_small_ones_went() {
        let text = unanswered(Some(SMALL), LARGE);
        assert!(text.contains("8 B went") && text.contains("1048576 B did not"), "{text}");
        assert_eq!(unanswered(None, SMALL), "");
        assert_eq!(unanswered(Some(LARGE), SMALL), "");
    }
}
