//! Data with a known result.

use unisum::ReduceOp;

use crate::value::Value;

/// What this rank puts in and what must come out, for the positions 0 to [`PERIOD`] - 1; both
/// repeat after that, so that no buffer-sized expectation is held.
///
/// The period is a prime, so that chunks and slices exchanged by mistake do not fall on equal
/// data.
#[derive(Debug)]
pub(crate) struct Pattern<T> {
    mine: Vec<T>,
    expected: Vec<T>,
}

const PERIOD: usize = 1021;

impl<T: Value> Pattern<T> {
    /// The pattern that all ranks derive from a seed for buffers of `count` elements.
    pub(crate) fn new(op: ReduceOp, world: usize, rank: usize, seed: u64, count: usize) -> Self {
        let period = PERIOD.min(count.max(1));
        let mut pattern = Self { mine: Vec::new(), expected: Vec::new() };
        let mut all = Vec::with_capacity(world);
        for position in 0..period {
            all.clear();
            all.extend((0..world).map(|rank| {
                T::contribution(op, world, rank, position, noise(seed, rank, position))
            }));
            pattern.mine.push(all[rank]);
            pattern.expected.push(T::expected(op, &all));
        }
        pattern
    }

    /// Writes this rank's contribution.
    pub(crate) fn fill(&self, data: &mut [T]) {
        for chunk in data.chunks_mut(self.mine.len()) {
            chunk.copy_from_slice(&self.mine[..chunk.len()]);
        }
    }

    /// How many elements do not have the expected bits.
    pub(crate) fn wrong(&self, data: &[T]) -> u64 {
        let pairs = data.chunks(self.expected.len()).map(|chunk| chunk.iter().zip(&self.expected));
        pairs.map(|pairs| pairs.filter(|(is, want)| is.bits() != want.bits()).count() as u64).sum()
    }
}

/// A 64-bit hash of the data's bits and their order; not for adversaries.
pub(crate) fn hash<T: Value>(data: &[T]) -> u64 {
    const LANES: usize = 4;
    let mut lanes = [data.len() as u64; LANES];
    for chunk in data.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane ^ value.bits()).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
    }
    lanes.iter().fold(0, |hash, lane| mix(hash ^ lane))
}

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
            let all: Vec<_> =
                (0..world).map(|rank| Pattern::<T>::new(op, world, rank, 5, 40)).collect();
            let ascending: Vec<_> = (0..world).collect();
            let descending: Vec<_> = (0..world).rev().collect();
            let evens = (0..world).step_by(2).chain((1..world).step_by(2)).collect();
            for order in [ascending, descending, evens] {
                let result: Vec<T> = (0..40)
                    .map(|at| order.iter().map(|rank| all[*rank].mine[at]).reduce(&fold).unwrap())
                    .collect();
                assert_eq!(all[0].wrong(&result), 0, "{op}, world {world}");
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
    fn wrong_elements_are_counted_and_change_the_hash() {
        let pattern = Pattern::<f32>::new(ReduceOp::Max, 1, 0, 9, 5000);
        let mut data = vec![0.0; 5000];
        pattern.fill(&mut data);
        assert_eq!(pattern.wrong(&data), 0);
        let before = hash(&data);
        data[4999] += 1.0;
        data[0] = -data[0];
        assert_eq!(pattern.wrong(&data), 2);
        assert_ne!(hash(&data), before);
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
