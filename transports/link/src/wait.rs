//! How to wait without burning a core: a few pauses, a few yields, then park.

use std::hint;

/// What the waiter should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It was a pause or a yield: look again.
    Again,
    /// Enough: sleep until woken.
    Park,
}

/// The pauses between two looks at a condition, for one wait.
///
/// Measured on 2 cores: about 40 pauses catch a peer that runs on another core; 2 to 8 yields let
/// a peer that shares this core run, which is cheaper than two futex calls; after that the peer
/// is late and sleeping is free.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    looks: u32,
}

impl Backoff {
    const PAUSES: u32 = 40;
    const YIELDS: u32 = 8;

    /// A fresh wait.
    pub const fn new() -> Self {
        Self { looks: 0 }
    }

    /// Starts over: something happened.
    pub const fn reset(&mut self) {
        self.looks = 0;
    }

    /// Pauses or yields once, or says that it is time to park.
    pub fn pause(&mut self) -> Pause {
        self.looks += 1;
        if self.looks <= Self::PAUSES {
            hint::spin_loop();
        } else if self.looks <= Self::PAUSES + Self::YIELDS {
            std::thread::yield_now();
        } else {
            return Pause::Park;
        }
        Pause::Again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_parks_after_bounded_looks_and_starts_over_on_reset() {
        let mut backoff = Backoff::new();
        let looks = (0..1000).take_while(|_| backoff.pause() == Pause::Again).count();
        assert_eq!(looks, (Backoff::PAUSES + Backoff::YIELDS) as usize);
        backoff.reset();
        assert_eq!(backoff.pause(), Pause::Again);
    }
}
