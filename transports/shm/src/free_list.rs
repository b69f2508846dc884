//! First-fit allocation of ranges (pure).

use std::collections::BTreeMap;
use std::ops::Range;

/// The free ranges of a heap, by start. Neighbours are always merged.
#[derive(Debug)]
pub(crate) struct FreeList(BTreeMap<u64, u64>);

impl FreeList {
    /// All of `0..bytes` is free.
    pub(crate) fn new(bytes: u64) -> Self {
        Self((bytes > 0).then_some((0, bytes)).into_iter().collect())
    }

    /// Takes the first free range of `bytes` bytes that starts at a multiple of `align`.
    pub(crate) fn take(&mut self, bytes: u64, align: u64) -> Option<Range<u64>> {
        let (hole, start) = self.0.iter().find_map(|(&from, &to)| {
            let start = from.checked_next_multiple_of(align)?;
            (start.checked_add(bytes)? <= to).then_some((from..to, start))
        })?;
        self.0.remove(&hole.start);
        let taken = start..start + bytes;
        for rest in [hole.start..taken.start, taken.end..hole.end] {
            if !rest.is_empty() {
                self.0.insert(rest.start, rest.end);
            }
        }
        Some(taken)
    }

    /// Gives a taken range back.
    pub(crate) fn give(&mut self, mut range: Range<u64>) {
        if let Some((&from, &to)) = self.0.range(..range.start).next_back() {
            assert!(to <= range.start, "{range:?} is given back twice");
            if to == range.start {
                range.start = from;
            }
        }
        if let Some(to) = self.0.remove(&range.end) {
            range.end = to;
        }
        self.0.insert(range.start, range.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same by brute force: one flag per unit.
    struct Model(Vec<bool>);

    impl Model {
        fn take(&mut self, bytes: usize, align: usize) -> Option<usize> {
            let starts = (0..self.0.len()).step_by(align);
            let start = starts
                .filter(|start| start + bytes <= self.0.len())
                .find(|&start| self.0[start..start + bytes].iter().all(|taken| !taken))?;
            self.0[start..start + bytes].fill(true);
            Some(start)
        }
    }

    #[test]
    fn random_histories_agree_with_the_model() {
        for seed in 1..200u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut random = |below: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % below
            };
            let (mut list, mut model) = (FreeList::new(200), Model(vec![false; 200]));
            let mut held: Vec<Range<u64>> = Vec::new();
            for step in 0..300 {
                if random(2) == 0 || held.is_empty() {
                    let (bytes, align) = (1 + random(40), 1 << random(4));
                    let taken = list.take(bytes, align);
                    let expected = model.take(bytes as usize, align as usize);
                    let start = taken.as_ref().map(|range| range.start as usize);
                    assert_eq!(start, expected, "seed {seed}, step {step}");
                    held.extend(taken);
                } else {
                    let range = held.swap_remove(random(held.len() as u64) as usize);
                    model.0[range.start as usize..range.end as usize].fill(false);
                    list.give(range);
                }
            }
            held.into_iter().for_each(|range| list.give(range));
            assert_eq!(list.take(200, 1), Some(0..200), "seed {seed}: all merged again");
        }
    }
}
