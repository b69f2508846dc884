//! How a thread waits for what another thread or process does.

use std::time::Duration;

/// Waits longer and longer: first it yields, then it sleeps.
#[derive(Debug)]
pub(crate) struct Backoff {
    rounds: u32,
}

/// Rounds that yield.
const YIELDS: u32 = 64;

/// The longest sleep.
const LONGEST: Duration = Duration::from_micros(200);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { rounds: 0 }
    }

    /// Starts anew: what the thread waited for has come.
    pub(crate) fn reset(&mut self) {
        self.rounds = 0;
    }

    pub(crate) fn wait(&mut self) {
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds <= YIELDS {
            std::thread::yield_now();
            return;
        }
        let sleep = Duration::from_micros(u64::from(self.rounds - YIELDS));
        std::thread::sleep(sleep.min(LONGEST));
    }
}
