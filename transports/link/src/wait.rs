//! How to wait without burning a core: spin, yield, then park.

use std::hint;
use std::time::{Duration, Instant};

/// What the waiter should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It paused the processor: check again.
    Again,
    /// It yielded the core to another thread, if one was ready: check again.
    Yielded,
    /// Enough: sleep until woken.
    Park,
}

/// How often a waiting thread checks again before it parks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Checks with a processor pause before each: they catch a peer that runs on another core.
    pub pauses: u32,
    /// Checks after yielding: they let a peer that shares this core run.
    pub yields: u32,
    /// After that many yields, more follow until this much time has passed.
    pub spell: Duration,
}

impl Patience {
    /// Longer than it takes to wake a sleeper (up to 70 us where the core was idle). With less, two
    /// ranks that once fell asleep keep sleeping in every operation: the one that is woken comes
    /// later than the other is willing to wait. Measured on 2 cores: 2 ranks over shared memory,
    /// 256 KiB 59 to 5.3 us; 4 ranks over TCP, 32 KiB 54 to 30 us.
    pub const SPELL: Duration = Duration::from_micros(100);
    /// Parking that ends earlier was not a sleep: the awaited event had already happened.
    const SLEEP_MIN: Duration = Duration::from_micros(5);
    /// The longest, where waking was found to take longer: guests of busy hosts need 300 us.
    pub const SPELL_MAX: Duration = Duration::from_millis(1);

    /// For checks that are a load from memory.
    ///
    /// Measured on 2 cores: about 40 pauses catch a peer that runs on another core; 2 to 8 yields
    /// are cheaper than two futex calls where cores are shared.
    pub const MEMORY: Self = Self { pauses: 40, yields: 8, spell: Self::SPELL };

    /// For checks that are a load from memory where ranks share cores: a pause would keep the core
    /// from the rank that is waited for.
    ///
    /// Measured on 2 cores, without the 40 pauses: 16 ranks 78 to 51 us, 4 ranks 15 to 8.7.
    pub const CROWDED: Self = Self { pauses: 0, yields: 16, spell: Self::SPELL };

    /// For checks that are a system call of about 0.4 us. It takes longer than a pause, and where
    /// ranks share cores it takes the core from those that have work (see [`Patience::min`]).
    ///
    /// Measured with 2 ranks on 2 cores over TCP, without the pauses: the 99th percentile of 8 B
    /// 25 to 13 us, sleeps in 10,000 operations 54 to 6, the median the same.
    pub const SYSTEM_CALL: Self = Self { pauses: 24, yields: 8, spell: Self::SPELL };

    /// The shorter of two, for waiting on both at once.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            pauses: self.pauses.min(other.pauses),
            yields: self.yields.min(other.yields),
            spell: self.spell.min(other.spell),
        }
    }

    /// The spin time after a wait that `slept` for this long after its own: twice as long if the
    /// maximum would have been enough, or else the default. If it did not sleep, it stays the same.
    #[must_use]
    pub fn spell_after(spell: Duration, slept: Duration) -> Duration {
        match spell + slept < Self::SPELL_MAX {
            _ if slept < Self::SLEEP_MIN => spell,
            true => (spell * 2).min(Self::SPELL_MAX),
            false => Self::SPELL,
        }
    }
}

/// The pauses between two checks of a condition, for one wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    looks: u32,
    /// Since when it yields more often than that.
    since: Option<Instant>,
}

impl Backoff {
    /// A new wait.
    pub const fn new() -> Self {
        Self { looks: 0, since: None }
    }

    /// Starts over: something happened.
    pub const fn reset(&mut self) {
        *self = Self::new();
    }

    /// Pauses or yields once, or says that it is time to park.
    pub fn pause(&mut self, patience: Patience) -> Pause {
        self.looks += 1;
        if self.looks <= patience.pauses {
            hint::spin_loop();
            return Pause::Again;
        }
        if self.looks - patience.pauses > patience.yields
            && self.since.get_or_insert_with(Instant::now).elapsed() >= patience.spell
        {
            return Pause::Park;
        }
        std::thread::yield_now();
        Pause::Yielded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_parks_after_bounded_looks_and_starts_over_on_reset() {
        let mut backoff = Backoff::new();
        let start = Instant::now();
        let mut looks = 0;
        while backoff.pause(Patience::MEMORY) != Pause::Park {
            looks += 1;
        }
        assert!(looks >= 48 && start.elapsed() >= Patience::SPELL, "{looks} looks");
        backoff.reset();
        assert_eq!(backoff.pause(Patience::MEMORY), Pause::Again);
    }

    #[test]
    fn spells_grow_while_that_can_save_a_sleep() {
        let (short, long) = (Duration::from_micros(300), Duration::from_secs(2));
        let mut spell = Patience::SPELL;
        for _ in 0..3 {
            let grown = Patience::spell_after(spell, short);
            assert!(grown > spell);
            spell = grown;
        }
        assert!(
            spell > 2 * short && spell <= Patience::SPELL_MAX,
            "who is woken late is waited for"
        );
        let (shorter, none) = (Duration::from_micros(50), Duration::from_micros(1));
        assert_eq!(Patience::spell_after(spell, shorter), Patience::SPELL_MAX);
        assert_eq!(Patience::spell_after(spell, none), spell, "it did not sleep");
        let more_than_the_longest = Patience::spell_after(spell, short);
        assert_eq!(more_than_the_longest, Patience::SPELL, "such a wait has to sleep anyway");
        assert_eq!(Patience::spell_after(Patience::SPELL, long), Patience::SPELL);
    }
}
