//! Whether borrowed memory is better registered for a collective or copied through slots, as
//! measured with this rank's devices.

use std::fmt;
use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::{Access, Domain};
use crate::error::VerbsError;
use crate::memory::Pinned;

/// What registering and copying take here, and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Profile {
    /// Borrowed memory from this size on is registered for a collective that needs to.
    pub(crate) register_from: usize,
    /// Nothing where the devices register no memory.
    costs: Option<Costs>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Costs {
    /// To register memory with all devices and to end that: at all, and for each byte.
    register_s: f64,
    register_s_per_byte: f64,
    copy_s_per_byte: f64,
}

/// Sizes that are registered; half a copy's memory.
const FEW: usize = 64 << 10;
const MANY: usize = 1 << 20;
/// No new round begins after this long. The first two always end, as the first one warms up:
/// devices made by software under emulation take longer.
const BUDGET: Duration = Duration::from_millis(2);
const ROUNDS: usize = 4;
/// How often a byte of a region is copied in a collective that passes slots: an all-reduce among n
/// ranks copies 3(n-1)/n times the region (all that is sent, and the half that is stored), other
/// collectives as much or less.
const COPIES: f64 = 2.0;
/// Whatever was measured: registering less than this is never worth its system calls, and more
/// than this is not copied, as that would take the processor from the collective and drive
/// everything out of its caches.
const LEAST: usize = 64 << 10;
const MOST: usize = 16 << 20;
/// Where nothing could be measured.
const UNMEASURED: usize = 1 << 20;

impl Profile {
    /// Registers and copies memory for 2 ms or so; the fastest of a few rounds counts.
    pub(crate) fn measure(domains: &[Arc<Domain>]) -> Self {
        let mut memory = vec![1_u8; 2 * MANY];
        let until = Instant::now() + BUDGET;
        let [mut few, mut many, mut copy] = [f64::INFINITY; 3];
        for round in 0..ROUNDS {
            if round > 1 && Instant::now() >= until {
                break;
            }
            let registered = register_s(domains, &mut memory[..FEW])
                .and_then(|few| Ok((few, register_s(domains, &mut memory[..MANY])?)));
            let Ok((few_now, many_now)) = registered else {
                return Self { register_from: UNMEASURED, costs: None };
            };
            (few, many) = (few.min(few_now), many.min(many_now));
            copy = copy.min(copy_s(&mut memory));
        }
        Self::of(few, many, copy)
    }

    /// What follows from the seconds that it takes to register [`FEW`] and [`MANY`] bytes, and to
    /// copy [`MANY`].
    fn of(few_s: f64, many_s: f64, copy_s: f64) -> Self {
        let register_s_per_byte = ((many_s - few_s) / (MANY - FEW) as f64).max(0.0);
        let costs = Costs {
            register_s: (few_s - FEW as f64 * register_s_per_byte).max(0.0),
            register_s_per_byte,
            copy_s_per_byte: copy_s / MANY as f64,
        };
        Self { register_from: costs.register_from(), costs: Some(costs) }
    }
}

impl Costs {
    /// The size where registering once takes as long as copying.
    fn register_from(&self) -> usize {
        let saved_s_per_byte = COPIES * self.copy_s_per_byte - self.register_s_per_byte;
        let bytes = self.register_s / saved_s_per_byte;
        // Also where something is no number.
        if !(saved_s_per_byte > 0.0 && bytes.is_finite()) {
            return MOST;
        }
        (bytes as usize).clamp(LEAST, MOST)
    }
}

fn register_s(domains: &[Arc<Domain>], memory: &mut [u8]) -> Result<f64, VerbsError> {
    let (start, bytes) = (NonNull::from(&mut *memory).cast(), memory.len());
    let before = Instant::now();
    // SAFETY: the memory is borrowed for longer than it is registered, and nobody gets its keys.
    drop(unsafe { Pinned::new(domains, start, bytes, Access::Write) }?);
    Ok(before.elapsed().as_secs_f64())
}

fn copy_s(memory: &mut [u8]) -> f64 {
    let (from, to) = memory.split_at_mut(MANY);
    let before = Instant::now();
    to.copy_from_slice(black_box(from));
    black_box(to);
    before.elapsed().as_secs_f64()
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "borrowed memory is registered from {} KiB on", self.register_from >> 10)?;
        match &self.costs {
            Some(Costs { register_s, register_s_per_byte, copy_s_per_byte }) => write!(
                f,
                " (registering {:.1} us + {:.3} ns/B, copying {:.3} ns/B)",
                register_s * 1e6,
                register_s_per_byte * 1e9,
                copy_s_per_byte * 1e9
            ),
            None => f.write_str(" (not measured)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: f64 = 1024.0;

    /// The size from which registering pays, in KiB, for a cost of registering at all, and for
    /// costs of registering and copying a byte.
    fn register_from(register_s: f64, register_s_per_byte: f64, copy_s_per_byte: f64) -> f64 {
        let register = |bytes: usize| register_s + bytes as f64 * register_s_per_byte;
        let profile = Profile::of(register(FEW), register(MANY), MANY as f64 * copy_s_per_byte);
        profile.register_from as f64 / KIB
    }

    #[test]
    fn registering_pays_from_where_two_copies_take_as_long() {
        // 50 us once and 0.05 ns a byte, against 2 x 0.1 ns: 50 us / 0.15 ns = 326 KiB.
        assert!((register_from(50e-6, 0.05e-9, 0.1e-9) - 326.0).abs() < 1.0);
        assert_eq!(register_from(0.1e-6, 0.0, 0.1e-9), LEAST as f64 / KIB);
        assert_eq!(register_from(50e-6, 0.3e-9, 0.1e-9), MOST as f64 / KIB);
    }

    #[test]
    fn nonsense_gives_a_size_within_bounds() {
        let values = [0.0, -1.0, 1e-30, 1e30, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        for few in values {
            for many in values {
                for copy in values {
                    let profile = Profile::of(few, many, copy);
                    let is_sane = (LEAST..=MOST).contains(&profile.register_from);
                    assert!(is_sane, "{few} {many} {copy}: {profile}");
                }
            }
        }
    }

    #[test]
    fn it_is_measured_in_time_and_says_so() {
        let before = Instant::now();
        // Without a device registering takes nothing.
        let profile = Profile::measure(&[]);
        assert!(before.elapsed() < Duration::from_secs(1));
        assert!(profile.to_string().starts_with("borrowed memory is registered from 64 KiB on ("));
    }
}
