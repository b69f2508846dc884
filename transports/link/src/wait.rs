//! How to wait without burning a core: spin, yield, then park.

use std::cell::Cell;
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

    /// Whether ranks share cores. Then a rank that yields may have given its core to another one,
    /// which reduces for a while.
    const fn is_crowded(self) -> bool {
        self.pauses == 0
    }

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
        if patience.is_crowded() {
            std::thread::yield_now();
            return Pause::Yielded;
        }
        NEIGHBORS.with(Neighbors::give_way)
    }
}

thread_local! {
    static NEIGHBORS: Neighbors = const { Neighbors::new() };
}

/// Who runs on this thread's core while it yields, where every rank could have a core. Programs
/// that compute, such as those that load a training's data, run for a whole slice of some
/// milliseconds. Beside those it is better to sleep, for whoever is woken runs soon: of 2 ranks on
/// 2 cores beside two such programs, 8 B to 8 KiB took 2 to 3 ms in the mean, and 0.02 to 1.4 ms
/// with this.
#[derive(Debug)]
struct Neighbors {
    /// How often this thread has yielded.
    yields: Cell<u32>,
    /// How many of the yields that were timed last took that long, one after the other.
    long: Cell<u32>,
    /// Until when the thread parks instead.
    parks_until: Cell<Option<Instant>>,
    /// For how long it did the last time.
    parks_for: Cell<Duration>,
}

impl Neighbors {
    /// Every so many yields are timed.
    const TIMED: u32 = 8;
    /// Others' slices: the kernel's are 3 to 4 ms with its usual settings.
    const SLICE: Duration = Duration::from_millis(2);
    /// After so many slices in a row this thread parks,
    const LONG_MAX: u32 = 2;
    /// for so long the first time, and twice as long each time that the others are still there.
    const PARKS_MIN: Duration = Duration::from_millis(250);
    const PARKS_MAX: Duration = Duration::from_secs(4);

    const fn new() -> Self {
        Self {
            yields: Cell::new(0),
            long: Cell::new(0),
            parks_until: Cell::new(None),
            parks_for: Cell::new(Duration::ZERO),
        }
    }

    /// Yields, or says that it is better to park.
    fn give_way(&self) -> Pause {
        if let Some(until) = self.parks_until.get() {
            if Instant::now() < until {
                return Pause::Park;
            }
            self.parks_until.set(None);
        }
        let yields = self.yields.get().wrapping_add(1);
        self.yields.set(yields);
        // Whether others are still there is soon found out.
        if !yields.is_multiple_of(Self::TIMED) && self.long.get() == 0 {
            std::thread::yield_now();
            return Pause::Yielded;
        }
        let start = Instant::now();
        std::thread::yield_now();
        let now = Instant::now();
        self.took(now - start, now);
        Pause::Yielded
    }

    /// A yield took so long.
    fn took(&self, time: Duration, now: Instant) {
        if time < Self::SLICE {
            self.long.set(0);
            self.parks_for.set(Duration::ZERO);
            return;
        }
        self.long.set(self.long.get() + 1);
        if self.long.get() >= Self::LONG_MAX {
            let parks_for = (self.parks_for.get() * 2).clamp(Self::PARKS_MIN, Self::PARKS_MAX);
            self.parks_for.set(parks_for);
            self.parks_until.set(Some(now + parks_for));
            // The next long one will do.
            self.long.set(Self::LONG_MAX - 1);
        }
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
    fn beside_others_that_keep_the_core_for_slices_a_thread_parks_for_a_while() {
        let (neighbors, start) = (Neighbors::new(), Instant::now());
        let (slice, short) = (Neighbors::SLICE, Duration::from_micros(30));
        let parks_for = |time, now| {
            neighbors.took(time, now);
            neighbors.parks_until.take().map(|until| until - now)
        };
        // One may be chance, and so may several that are not in a row.
        for _ in 0..3 {
            assert_eq!(parks_for(slice, start), None);
            assert_eq!(parks_for(short, start), None);
        }
        assert_eq!(parks_for(slice, start), None);
        assert_eq!(parks_for(slice, start), Some(Neighbors::PARKS_MIN));
        // Still there, when it has yielded once more.
        assert_eq!(parks_for(slice, start), Some(2 * Neighbors::PARKS_MIN));
        for _ in 0..9 {
            parks_for(slice, start);
        }
        assert_eq!(parks_for(slice, start), Some(Neighbors::PARKS_MAX));
        // Gone, and there again.
        assert_eq!(parks_for(short, start), None);
        assert_eq!(parks_for(slice, start), None);
        assert_eq!(parks_for(slice, start), Some(Neighbors::PARKS_MIN));
    }

    #[test]
    fn where_ranks_share_cores_a_thread_yields_whoever_runs() {
        NEIGHBORS.with(|it| it.parks_until.set(Some(Instant::now() + Duration::from_secs(3600))));
        let mut backoff = Backoff::new();
        for _ in 0..Patience::CROWDED.yields {
            assert_eq!(backoff.pause(Patience::CROWDED), Pause::Yielded);
        }
        let mut alone = Backoff::new();
        let first = (0..=Patience::MEMORY.pauses).map(|_| alone.pause(Patience::MEMORY)).last();
        assert_eq!(first, Some(Pause::Park));
    }

    #[test]
    fn a_thread_that_parks_yields_again_when_the_time_is_over() {
        let neighbors = Neighbors::new();
        neighbors.parks_until.set(Some(Instant::now() + Duration::from_secs(3600)));
        assert_eq!(neighbors.give_way(), Pause::Park);
        neighbors.parks_until.set(Some(Instant::now()));
        assert_eq!(neighbors.give_way(), Pause::Yielded);
        assert_eq!(neighbors.parks_until.get(), None);
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
