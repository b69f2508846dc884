//! Connections that stand while nothing is heard of the other host, though it was sent something.
//!
//! Where packets are lost, TCP sends again after pauses that double: a network that was away for
//! ten seconds is missed for seconds after it is back. The keeper therefore looks now and then at
//! what the kernel knows, and dials another connection beside one that is silent, with an attempt
//! every 50 ms. The flow goes on in whichever is heard of first. The kernel of a process that is
//! stopped, or reads nothing, acknowledges what comes: that is no silence.

use std::time::{Duration, Instant};

use crate::silence::Told;

/// Between two looks: where nothing awaits an answer, and where something does.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_SOON: Duration = Duration::from_millis(50);
/// How much longer than a round trip an answer may take: a kernel holds acknowledgements back for
/// some 40 ms, and sends again after 200 ms.
const QUIET: Duration = Duration::from_millis(150);
/// The kernel counts its times in ticks.
const TICKS: Duration = Duration::from_millis(10);

/// Since when a connection has been silent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hush {
    since: Option<Instant>,
    look_at: Option<Instant>,
}

impl Hush {
    /// Whether it is time to look.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.look_at.is_none_or(|at| at <= now)
    }

    /// When to look next.
    pub(super) fn look_at(&self, now: Instant) -> Instant {
        self.look_at.unwrap_or(now)
    }

    /// Takes in what the kernel says `now`; for how long the connection has been silent, if that is
    /// longer than an answer takes.
    pub(super) fn look(&mut self, told: Told, now: Instant) -> Option<Duration> {
        let is_silent = |since: &Instant| told.heard + TICKS >= now - *since;
        let since = self.since.filter(is_silent).unwrap_or(now);
        self.since = told.awaits.then_some(since);
        self.look_at = Some(now + if told.awaits { LOOK_SOON } else { LOOK });
        let silent = now - self.since?;
        (silent >= QUIET + told.round_trip).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Looks whenever that is due at a connection on which something awaits an answer, and was
    /// heard so many milliseconds ago; the millisecond at which it is silent.
    fn silent_at(heard: impl Fn(u32) -> u32, round_trip: u32) -> Option<u32> {
        let (start, mut hush) = (Instant::now(), Hush::default());
        (0..2000).find(|&ms| {
            let now = start + MS * ms;
            let told = Told {
                awaits: true,
                heard: MS * heard(ms),
                round_trip: MS * round_trip,
                ..Told::NOTHING
            };
            hush.is_due(now) && hush.look(told, now).is_some()
        })
    }

    #[test]
    fn who_does_not_answer_within_a_round_trip_and_some_is_silent() {
        assert_eq!(silent_at(|ms| ms, 0), Some(150));
        assert_eq!(silent_at(|ms| ms + 5000, 30), Some(200));
        assert_eq!(silent_at(|ms| ms, 300), Some(450));
    }

    #[test]
    fn who_answers_anything_is_not() {
        assert_eq!(silent_at(|ms| ms % 100, 0), None);
        assert_eq!(silent_at(|_| 0, 0), None);
        // The last answer came after 400 ms.
        let heard = |ms| if ms < 400 { ms % 40 } else { ms - 400 };
        assert!((550..=650).contains(&silent_at(heard, 0).unwrap()));
    }

    #[test]
    fn where_nothing_awaits_an_answer_nobody_is() {
        let (start, mut hush) = (Instant::now(), Hush::default());
        let told = |awaits| Told { awaits, heard: 5000 * MS, ..Told::NOTHING };
        assert_eq!(hush.look(told(true), start), None);
        assert_eq!(hush.look(told(false), start + 100 * MS), None);
        assert_eq!(hush.look(told(true), start + 200 * MS), None);
        assert!(!hush.is_due(start + 249 * MS) && hush.is_due(start + 250 * MS));
        assert_eq!(hush.look(told(true), start + 350 * MS), Some(150 * MS));
    }
}
