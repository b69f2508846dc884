//! A clock that takes a few instructions to read, and what its ticks are in time.

use std::time::{Duration, Instant};

/// Ticks of this processor's steady counter.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn now() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Ticks of this processor's steady counter.
#[cfg(target_arch = "aarch64")]
#[inline]
pub(crate) fn now() -> u64 {
    let ticks: u64;
    // SAFETY: Linux lets programs read the virtual counter, which has no other effect.
    unsafe { std::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
    ticks
}

/// Nanoseconds, where there is no counter that is known to be steady.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn now() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// How ticks become times: by two readings of both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    from: (Instant, u64),
    s_per_tick: f64,
}

impl Rate {
    /// From the readings `from` until now.
    pub(crate) fn since(from: (Instant, u64)) -> Self {
        let (ticks, elapsed) = (now().saturating_sub(from.1), from.0.elapsed());
        Self { from, s_per_tick: elapsed.as_secs_f64() / ticks.max(1) as f64 }
    }

    /// When the counter stood there.
    pub(crate) fn instant(&self, ticks: u64) -> Instant {
        let (start, first) = self.from;
        // What was recorded while the first readings were taken counts as recorded then.
        start + Duration::from_secs_f64(ticks.saturating_sub(first) as f64 * self.s_per_tick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_times() {
        let from = (Instant::now(), now());
        std::thread::sleep(Duration::from_millis(20));
        let (before, ticks, after) = (Instant::now(), now(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let at = Rate::since(from).instant(ticks);
        let slack = Duration::from_millis(2);
        assert!(at + slack >= before && at <= after + slack, "{:?}", at.duration_since(from.0));
        assert_eq!(Rate::since(from).instant(0), from.0);
    }
}
