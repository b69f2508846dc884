//! Spreads the ranks of a host over all the cores that they may use.
//!
//! Ranks that wait for each other are never off a core for long, so the scheduler considers their
//! data hot and leaves them where they woke up: two on one core next to an idle one, or three and
//! one. A rank that shares its core with more members than another core has moves there. Its set of
//! allowed cores stays the same; only its current core changes. Cores are counted from 1, because 0
//! means unknown.
//!
//! Only the link with all ranks of the job on this host does this: what is even for the members of
//! one group may be uneven for those of another.

use std::io;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A look at where the members are, once in so many yields: soon after something had to be changed,
/// ever less often while nothing has to.
const YIELDS_MIN: u32 = 16;
const YIELDS_MAX: u32 = 512;
/// At least so long between two moves of a rank.
const PAUSE: Duration = Duration::from_millis(5);

/// Where a rank and the other members are, and when it moved last.
#[derive(Debug, Default)]
pub(crate) struct Spread {
    /// The core on which this rank waited last, as it told the others.
    pub(crate) core: u32,
    /// Where each member waited last; 0 where nobody knows.
    pub(crate) cores: Vec<u32>,
    /// Until the next look, and from that to the one after it.
    yields: u32,
    interval: u32,
    moved: Option<Instant>,
    /// Whether this rank moves at all.
    pub(crate) is_on: bool,
}

impl Spread {
    /// Counts a yield; whether it is time for a look.
    pub(crate) fn is_due(&mut self) -> bool {
        let is_due = self.yields == 0;
        if is_due {
            self.interval = (2 * self.interval).clamp(YIELDS_MIN, YIELDS_MAX);
        }
        self.yields = if is_due { self.interval } else { self.yields - 1 };
        is_due && self.is_on
    }

    /// Goes to another core if that spreads the members more evenly; this one is the one at `own`.
    pub(crate) fn look(&mut self, own: usize) {
        let Some(here) = crowded_core(&self.cores, own) else { return };
        if self.moved.is_some_and(|moved| moved.elapsed() < PAUSE) {
            return;
        }
        match go(|allowed| emptier_core(&self.cores, here, allowed)) {
            Ok(true) => {
                (self.yields, self.interval) = (YIELDS_MIN, YIELDS_MIN);
                self.moved = Some(Instant::now());
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!("this thread can't choose its core: {error}");
                self.is_on = false;
            }
        }
    }
}

/// The core of the member at `own`, if others are there and it is the one that would have to go.
fn crowded_core(cores: &[u32], own: usize) -> Option<usize> {
    let is_here = |core: &u32| *core == cores[own];
    let is_last = !cores[own + 1..].iter().any(is_here);
    let is_alone = !cores[..own].iter().any(is_here);
    (is_last && !is_alone).then(|| (cores[own] as usize).checked_sub(1)).flatten()
}

/// Of the allowed cores on which at least two members fewer are than `here`, the emptiest, and of
/// such the nearest.
fn emptier_core(cores: &[u32], here: usize, allowed: &CpuSet) -> Option<usize> {
    let members = |core: usize| cores.iter().filter(|&&it| it as usize == core + 1).count();
    (0..CpuSet::MAX_CPU)
        .filter(|&core| allowed.is_set(core) && members(core) + 2 <= members(here))
        .min_by_key(|&core| (members(core), core.abs_diff(here)))
}

/// Moves this thread to the core that `choose` takes of those it may use, which stay the same;
/// `false` if it takes none.
fn go(choose: impl Fn(&CpuSet) -> Option<usize>) -> io::Result<bool> {
    let allowed = sched_getaffinity(None)?;
    let Some(core) = choose(&allowed) else { return Ok(false) };
    let mut only = CpuSet::new();
    only.set(core);
    sched_setaffinity(None, &only)?;
    if sched_setaffinity(None, &allowed).is_err() {
        // The process was given other cores meanwhile: those, whichever they are.
        let mut all = CpuSet::new();
        (0..CpuSet::MAX_CPU).for_each(|core| all.set(core));
        sched_setaffinity(None, &all).inspect_err(|error| {
            unisum_link::warning!("this thread stays bound to core {core}: {error}");
        })?;
    }
    tracing::debug!("moved to core {core}, away from other ranks");
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(cores: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        cores.iter().for_each(|&core| set.set(core));
        set
    }

    #[test]
    fn the_last_of_a_core_goes_where_two_fewer_are() {
        // Three members on core 0, one on core 1.
        let cores = [1, 1, 2, 1];
        assert_eq!([0, 1, 2, 3].map(|own| crowded_core(&cores, own)), [None, None, None, Some(0)]);
        assert_eq!(emptier_core(&cores, 0, &allowed(&[0, 1])), Some(1));
        // The emptiest, then the nearest; only those allowed.
        assert_eq!(emptier_core(&cores, 0, &allowed(&[0, 1, 2, 3])), Some(2));
        assert_eq!(emptier_core(&cores, 0, &allowed(&[0, 3])), Some(3));
        assert_eq!(emptier_core(&cores, 0, &allowed(&[0])), None);
    }

    #[test]
    fn an_even_spread_stays() {
        assert_eq!(emptier_core(&[1, 2, 1, 2, 1], 0, &allowed(&[0, 1])), None);
        assert_eq!(crowded_core(&[1, 0, 2], 0), None);
        assert_eq!(crowded_core(&[0, 0], 1), None);
    }

    #[test]
    fn a_move_leaves_the_choice_as_it_was() {
        let before = sched_getaffinity(None).unwrap();
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| before.is_set(core)).collect();
        for &core in &cores {
            assert!(go(|_| Some(core)).unwrap());
            assert_eq!(sched_getaffinity(None).unwrap(), before);
        }
        assert!(!go(|_| None).unwrap());
    }
}
