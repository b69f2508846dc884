//! How long setting up a link may wait for other ranks.

use std::fmt;
use std::time::{Duration, Instant};

/// When to stop waiting: at a time, or as soon as the job is known to have ended.
#[derive(Clone, Copy)]
pub struct Limit<'a> {
    until: Instant,
    is_over: &'a dyn Fn() -> bool,
}

/// The longest sleep between two looks at whether the job has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Why a wait ends without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// The time is up.
    Late,
    /// The job has ended.
    Over,
}

impl<'a> Limit<'a> {
    /// Waits until `until`, but no longer once `is_over` holds: it is asked about fifty times a
    /// second.
    pub const fn new(until: Instant, is_over: &'a dyn Fn() -> bool) -> Self {
        Self { until, is_over }
    }

    /// Whether there is time left.
    ///
    /// # Errors
    /// Why there is none.
    pub fn check(self) -> Result<(), Passed> {
        if (self.is_over)() {
            Err(Passed::Over)
        } else if Instant::now() >= self.until {
            Err(Passed::Late)
        } else {
            Ok(())
        }
    }

    /// How long to sleep at most before the next check; not zero.
    pub fn nap(self) -> Duration {
        let left = self.until.saturating_duration_since(Instant::now());
        left.clamp(Duration::from_micros(1), LOOK)
    }
}

impl From<Instant> for Limit<'_> {
    fn from(until: Instant) -> Self {
        const fn never() -> bool {
            false
        }
        Self::new(until, &never)
    }
}

impl fmt::Debug for Limit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").field("until", &self.until).finish_non_exhaustive()
    }
}
