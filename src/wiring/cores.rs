//! The cores that the ranks of a host share.
//!
//! Launchers bind each rank to cores of its own, so a single rank's view says little: two ranks on
//! separate cores share none, two ranks on the same core share it.

use std::thread;

use bytes::{Buf, BufMut};
use rustix::thread::{CpuSet, sched_getaffinity};

/// The cores a rank may run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cores {
    /// The maximum number at once; less than the number of bits if a quota says so.
    at_once: u32,
    /// A bit for each core, the lowest first; empty if the system does not report them.
    set: Vec<u8>,
}

impl Cores {
    /// The calling thread's.
    pub(super) fn own() -> Self {
        let at_once = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let mut set = Vec::new();
        // Fails where there are more cores than a set has room for.
        if let Ok(cores) = sched_getaffinity(None) {
            for core in (0..CpuSet::MAX_CPU).filter(|&core| cores.is_set(core)) {
                set.resize(core / 8 + 1, 0);
                set[core / 8] |= 1 << (core % 8);
            }
        }
        Self { at_once, set }
    }

    /// The number of cores that the ranks of one host have, given what each of them sent.
    pub(super) fn of_host<'a>(ranks: impl Iterator<Item = &'a Self> + Clone) -> usize {
        let mut union = Vec::new();
        for Self { set, .. } in ranks.clone() {
            union.resize(union.len().max(set.len()), 0);
            union.iter_mut().zip(set).for_each(|(all, one)| *all |= one);
        }
        let is_limited = |it: &&Self| it.at_once < it.count() || it.set.is_empty();
        let limit = ranks.filter(is_limited).map(|it| it.at_once as usize).min();
        let count: u32 = union.iter().map(|byte| byte.count_ones()).sum();
        // Where nobody knows a set, the limit is all that is known.
        let count = if count == 0 { usize::MAX } else { count as usize };
        limit.map_or(count, |limit| limit.min(count)).max(1)
    }

    fn count(&self) -> u32 {
        self.set.iter().map(|byte| byte.count_ones()).sum()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u32_le(self.at_once);
        bytes.put_slice(&self.set);
        bytes
    }

    /// `None` if that means nothing.
    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let at_once = bytes.try_get_u32_le().ok()?;
        Some(Self { at_once, set: bytes.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores(at_once: u32, set: &[u8]) -> Cores {
        Cores { at_once, set: set.to_vec() }
    }

    fn of_host(ranks: &[Cores]) -> usize {
        Cores::of_host(ranks.iter())
    }

    #[test]
    fn ranks_that_are_bound_apart_have_the_cores_of_all() {
        assert_eq!(of_host(&[cores(1, &[1]), cores(1, &[2]), cores(1, &[0, 4])]), 3);
        assert_eq!(of_host(&[cores(1, &[2]), cores(1, &[2])]), 1);
        assert_eq!(of_host(&[cores(4, &[15]), cores(4, &[15])]), 4);
    }

    #[test]
    fn a_quota_limits_all() {
        assert_eq!(of_host(&[cores(2, &[255]), cores(2, &[255])]), 2);
        assert_eq!(of_host(&[cores(3, &[]), cores(3, &[])]), 3);
    }

    #[test]
    fn a_process_has_at_least_the_core_it_runs_on() {
        let own = Cores::own();
        assert!(own.at_once > 0 && own.count() > 0, "{own:?}");
        assert_eq!(of_host(std::slice::from_ref(&own)), own.at_once.min(own.count()) as usize);
        assert_eq!(Cores::decode(&own.encode()), Some(own));
        assert_eq!(Cores::decode(&[1, 2]), None);
    }
}
