//! Data with a known result.

use std::marker::PhantomData;

use unisum::ReduceOp;

use crate::collective::Source;
use crate::value::Value;

/// The data of one operation, which all ranks derive from a seed: what each puts in at each
/// position, and what must come out. It repeats after [`PERIOD`] positions, so that no
/// buffer-sized expectation is held.
///
/// The period is a prime, so that chunks and slices exchanged by mistake do not fall on equal
/// data.
#[derive(Debug)]
pub(crate) struct Pattern<T> {
    op: Option<ReduceOp>,
    ranks: usize,
    seed: u64,
    value: PhantomData<T>,
}

const PERIOD: usize = 1021;

impl<T: Value> Pattern<T> {
    /// The data of an operation that reduces by `op`, or reduces nothing.
    pub(crate) const fn new(op: Option<ReduceOp>, ranks: usize, seed: u64) -> Self {
        Self { op, ranks, seed, value: PhantomData }
    }

    /// Writes what a source has, from its first element on.
    pub(crate) fn fill(&self, data: &mut [T], from: Source) {
        let period = self.period(from, 0, data.len());
        for chunk in data.chunks_mut(PERIOD) {
            chunk.copy_from_slice(&period[..chunk.len()]);
        }
    }

    /// How many elements do not have the bits that a source has from element `start` on.
    pub(crate) fn wrong(&self, data: &[T], from: Source, start: usize) -> u64 {
        let period = self.period(from, start, data.len());
        let pairs = data.chunks(PERIOD).map(|chunk| chunk.iter().zip(&period));
        pairs.map(|pairs| pairs.filter(|(is, want)| is.bits() != want.bits()).count() as u64).sum()
    }

    /// The first of `count` values of a source, until they repeat.
    fn period(&self, from: Source, start: usize, count: usize) -> Vec<T> {
        let positions = (start..start + count.min(PERIOD)).map(|position| position % PERIOD);
        match from {
            Source::Rank(rank) => positions.map(|position| self.put_in(rank, position)).collect(),
            Source::All => {
                let all = |position| (0..self.ranks).map(move |rank| self.put_in(rank, position));
                let op = self.op.unwrap_or(ANY);
                positions.map(|at| T::expected(op, &all(at).collect::<Vec<_>>())).collect()
            }
        }
    }

    fn put_in(&self, rank: usize, position: usize) -> T {
        let noise = noise(self.seed, rank, position);
        T::contribution(self.op.unwrap_or(ANY), self.ranks, rank, position, noise)
    }
}

/// An operation for which values need no property.
const ANY: ReduceOp = ReduceOp::BitXor;

fn noise(seed: u64, rank: usize, position: usize) -> u64 {
    mix(mix(mix(seed) ^ rank as u64) ^ position as u64)
}

/// Source: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    const WORLDS: [usize; 7] = [1, 2, 3, 7, 16, 128, 300];

    /// Folds all ranks' contributions in ascending, descending and even-ranks-first order.
    fn folds<T: Value>(op: ReduceOp, fold: impl Fn(T, T) -> T) {
        for world in WORLDS {
            let pattern = Pattern::<T>::new(Some(op), world, 5);
            let ascending: Vec<_> = (0..world).collect();
            let descending: Vec<_> = (0..world).rev().collect();
            let evens = (0..world).step_by(2).chain((1..world).step_by(2)).collect();
            for order in [ascending, descending, evens] {
                let result: Vec<T> = (0..40)
                    .map(|at| {
                        order.iter().map(|rank| pattern.put_in(*rank, at)).reduce(&fold).unwrap()
                    })
                    .collect();
                assert_eq!(pattern.wrong(&result, Source::All, 0), 0, "{op}, world {world}");
            }
        }
    }

    #[test]
    fn float_expectations_do_not_depend_on_the_order() {
        folds::<f16>(ReduceOp::Sum, |a, b| a + b);
        folds::<bf16>(ReduceOp::Sum, |a, b| a + b);
        folds::<f32>(ReduceOp::Sum, |a, b| a + b);
        folds::<f64>(ReduceOp::Sum, |a, b| a + b);
        folds::<f16>(ReduceOp::Product, |a, b| a * b);
        folds::<bf16>(ReduceOp::Product, |a, b| a * b);
        folds::<f64>(ReduceOp::Product, |a, b| a * b);
        folds::<bf16>(ReduceOp::Min, |a, b| a.min(b));
    }

    #[test]
    fn integers_wrap() {
        folds::<u8>(ReduceOp::Sum, u8::wrapping_add);
        folds::<i16>(ReduceOp::Product, i16::wrapping_mul);
        folds::<u64>(ReduceOp::Product, u64::wrapping_mul);
        folds::<u64>(ReduceOp::Max, u64::max);
        folds::<i64>(ReduceOp::Min, i64::min);
    }

    #[test]
    fn wrong_elements_are_counted() {
        let pattern = Pattern::<f32>::new(None, 3, 9);
        let mut data = vec![0.0; 5000];
        pattern.fill(&mut data, Source::Rank(1));
        assert_eq!(pattern.wrong(&data, Source::Rank(1), 0), 0);
        assert_eq!(pattern.wrong(&data[1500..], Source::Rank(1), 1500), 0);
        data[4999] += 1.0;
        data[0] += 1.0;
        assert_eq!(pattern.wrong(&data, Source::Rank(1), 0), 2);
    }

    #[test]
    fn blocks_that_are_mistaken_for_others_are_wrong() {
        let pattern = Pattern::<f32>::new(None, 3, 9);
        let mut data = vec![0.0; 5000];
        pattern.fill(&mut data, Source::Rank(1));
        for (from, start) in [(Source::Rank(0), 0), (Source::Rank(1), 1000), (Source::All, 0)] {
            assert!(pattern.wrong(&data, from, start) > 4000, "{from:?} from {start} on");
        }
    }

    #[test]
    fn every_rank_matters_somewhere() {
        for world in WORLDS {
            let zero = |rank, at| {
                let noise = noise(1, rank, at);
                bf16::contribution(ReduceOp::Sum, world, rank, at, noise).to_f32() == 0.0
            };
            assert!((0..world).all(|rank| (0..PERIOD).any(|at| !zero(rank, at))));
        }
    }
}
