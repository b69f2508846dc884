//! PowerSGD: matrices of gradients as products of two narrow ones, with error feedback.
//!
//! A matrix M of n × m that a rank has, with what is still due, is projected to P = M·Q (n × r);
//! the mean of P over all ranks is made orthogonal; Q = Mᵀ·P (m × r), and with the mean of that
//! P·Qᵀ is the best guess for the mean of M. What a rank's M has beyond it is due in the next step,
//! which begins with the last Q. So (n + m)·r values travel in place of n·m.
//!
//! Source: Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient compression for
//! distributed optimization", NeurIPS 2019, arXiv:1905.13727, algorithms 1 and 2. As in PyTorch's
//! hook a tensor is a matrix of its first dimension by all others, Q is made orthogonal as well,
//! and the first steps compress nothing.

mod matrix;
mod random;
#[cfg(test)]
mod tests;

use std::collections::TryReserveError;
use std::ops::Range;
use std::sync::Arc;

use super::codec::{Kept, UnreadableState, take, take_u64};
use crate::memory::zeroed;
use random::Random;

/// What is compressed, and how far. The same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    /// r: how many columns stand for a matrix.
    pub(crate) rank: usize,
    /// The first step that compresses, counted from 0: gradients of the first steps change fast.
    pub(crate) start_step: u64,
    /// By how much less must travel for a tensor to be compressed.
    pub(crate) min_compression: f64,
    /// What the first Q follow from.
    pub(crate) seed: u64,
}

impl Default for Settings {
    /// Rank 1 from step 1000 on, where it halves what travels at least.
    fn default() -> Self {
        Self { rank: 1, start_step: 1000, min_compression: 2.0, seed: 0 }
    }
}

impl Settings {
    /// The rows and columns of a tensor that is compressed.
    fn matrix_of(&self, shape: &[usize]) -> Option<(usize, usize)> {
        let (rows, others) = shape.split_first()?;
        let columns = others.iter().product::<usize>();
        let travels = (rows + columns) as f64 * self.rank as f64;
        let compresses = travels * self.min_compression < (rows * columns) as f64;
        (compresses && self.rank > 0 && !others.is_empty()).then_some((*rows, columns))
    }
}

/// A tensor of a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    /// The parameter's name.
    pub(crate) parameter: Arc<str>,
    pub(crate) shape: Vec<usize>,
    /// Where its first value is in the bucket.
    pub(crate) at: usize,
}

/// The state of one bucket's compression on one rank.
///
/// A step goes by stages, with an all-reduce (average) by the caller after each of the first two:
/// [`project`](Self::project), [`refine`](Self::refine), [`finish`](Self::finish), and
/// [`settle`](Self::settle) when it is known whether the step counts. In the first all-reduce the
/// values of tensors that are not compressed travel with the projections.
#[derive(Debug)]
pub(crate) struct PowerSgd {
    settings: Settings,
    matrices: Vec<Matrix>,
    /// What is not compressed of the bucket.
    plain: Vec<Range<usize>>,
    count: usize,
    step: u64,
    /// Whether a step is under way whose result is finite.
    is_pending: bool,
}

#[derive(Debug)]
struct Matrix {
    parameter: Arc<str>,
    /// Where it is in the bucket.
    elements: Range<usize>,
    rows: usize,
    columns: usize,
    /// The columns of the projection and of Q.
    rank: usize,
    /// What this rank still owes.
    error: Vec<f32>,
    /// The gradient with what is due, then what this rank owes after the step.
    next_error: Vec<f32>,
    /// Q of the last step; zeros before the first.
    factor: Vec<f32>,
    /// Q of this step.
    next_factor: Vec<f32>,
}

impl PowerSgd {
    /// Nothing owed, for a bucket of `count` values that holds `tensors`; what lies between them
    /// travels as it is. Memory: 8 bytes for each value that is compressed.
    ///
    /// # Errors
    /// If there is no memory for that.
    ///
    /// # Panics
    /// If a tensor does not lie in the bucket, or behind the one before.
    pub(crate) fn new(
        settings: Settings,
        count: usize,
        tensors: &[Tensor],
    ) -> Result<Self, TryReserveError> {
        let (mut matrices, mut plain, mut end) = (Vec::new(), Vec::new(), 0);
        for Tensor { parameter, shape, at } in tensors {
            let Some((rows, columns)) = settings.matrix_of(shape) else { continue };
            let elements = *at..at + rows * columns;
            assert!(end <= *at && elements.end <= count, "{parameter} lies outside its room");
            plain.push(end..*at);
            end = elements.end;
            let rank = settings.rank.min(rows).min(columns);
            let (size, factor) = (rows * columns, columns * rank);
            matrices.push(Matrix {
                parameter: Arc::clone(parameter),
                elements,
                rows,
                columns,
                rank,
                error: zeroed(size)?,
                next_error: zeroed(size)?,
                factor: zeroed(factor)?,
                next_factor: zeroed(factor)?,
            });
        }
        plain.push(end..count);
        plain.retain(|range| !range.is_empty());
        Ok(Self { settings, matrices, plain, count, step: 0, is_pending: false })
    }

    /// How many values travel in the first all-reduce of this step.
    pub(crate) fn first_count(&self) -> usize {
        if !self.compresses() {
            return self.count;
        }
        let plain: usize = self.plain.iter().map(Range::len).sum();
        self.matrices.iter().map(Matrix::projected).sum::<usize>() + plain
    }

    /// How many values travel in the second; if 0, there is none.
    pub(crate) fn second_count(&self) -> usize {
        if !self.compresses() {
            return 0;
        }
        self.matrices.iter().map(|matrix| matrix.factor.len()).sum()
    }

    fn compresses(&self) -> bool {
        self.step >= self.settings.start_step
    }

    /// Writes to `first` what this rank gives to the first all-reduce.
    ///
    /// # Panics
    /// If the slices have not the bucket's and [`first_count`](Self::first_count) values.
    pub(crate) fn project(&mut self, gradients: &[f32], first: &mut [f32]) {
        assert_eq!([gradients.len(), first.len()], [self.count, self.first_count()]);
        self.is_pending = false;
        if !self.compresses() {
            return first.copy_from_slice(gradients);
        }
        let mut rest = first;
        for matrix in &mut self.matrices {
            let projection = split_off(&mut rest, matrix.projected());
            matrix.start(self.settings.seed, self.step);
            let due = matrix.next_error.iter_mut().zip(&matrix.error);
            for ((sum, error), gradient) in due.zip(&gradients[matrix.elements.clone()]) {
                *sum = gradient + error;
            }
            let Matrix { columns, next_error, next_factor, .. } = &*matrix;
            matrix::times(next_error, *columns, next_factor, projection);
        }
        for range in &self.plain {
            split_off(&mut rest, range.len()).copy_from_slice(&gradients[range.clone()]);
        }
    }

    /// Takes the mean of `first` over all ranks and makes its projections orthogonal; writes to
    /// `second` what this rank gives to the second all-reduce.
    ///
    /// # Panics
    /// If the slices have not [`first_count`](Self::first_count) and
    /// [`second_count`](Self::second_count) values.
    pub(crate) fn refine(&self, first: &mut [f32], second: &mut [f32]) {
        assert_eq!([first.len(), second.len()], [self.first_count(), self.second_count()]);
        if !self.compresses() {
            return;
        }
        let (mut first, mut second) = (first, second);
        for matrix in &self.matrices {
            let projection = split_off(&mut first, matrix.projected());
            let factor = split_off(&mut second, matrix.factor.len());
            matrix::orthogonalise(projection, matrix.rows, |_, _| false);
            matrix::transposed_times(&matrix.next_error, matrix.columns, projection, factor);
        }
    }

    /// Writes to `gradients` what stands for the mean of all ranks' gradients, with the same bits
    /// on all: `first` is what [`refine`](Self::refine) left there, `second` the mean of what it
    /// wrote. Whether a value is infinite or NaN.
    ///
    /// # Panics
    /// If the slices have not the lengths of the stages before.
    pub(crate) fn finish(&mut self, first: &[f32], second: &[f32], gradients: &mut [f32]) -> bool {
        let lengths = [first.len(), second.len(), gradients.len()];
        assert_eq!(lengths, [self.first_count(), self.second_count(), self.count]);
        let mut finite = true;
        if !self.compresses() {
            gradients.copy_from_slice(first);
            finite = first.iter().all(|value| value.is_finite());
            self.is_pending = finite;
            return !finite;
        }
        let (mut first, mut second) = (first, second);
        for matrix in &mut self.matrices {
            let projection = split_first(&mut first, matrix.projected());
            let factor = split_first(&mut second, matrix.factor.len());
            matrix.next_factor.copy_from_slice(factor);
            let to = &mut gradients[matrix.elements.clone()];
            finite &= matrix::outer(projection, factor, matrix.columns, to, &mut matrix.next_error);
        }
        for range in &self.plain {
            let mean = split_first(&mut first, range.len());
            finite &= mean.iter().all(|value| value.is_finite());
            gradients[range.clone()].copy_from_slice(mean);
        }
        self.is_pending = finite;
        !finite
    }

    /// Ends a step. What this rank owes and Q become those of the step if all ranks `apply` it and
    /// it was finite, else they are as before it.
    pub(crate) fn settle(&mut self, apply: bool) {
        if apply && self.is_pending && self.compresses() {
            for matrix in &mut self.matrices {
                std::mem::swap(&mut matrix.error, &mut matrix.next_error);
                std::mem::swap(&mut matrix.factor, &mut matrix.next_factor);
            }
        }
        self.is_pending = false;
        self.step += 1;
    }

    /// Multiplies what this rank owes: gradients come with another loss scale from now on.
    pub(crate) fn rescale(&mut self, factor: f32) {
        for matrix in &mut self.matrices {
            matrix.error.iter_mut().for_each(|value| *value *= factor);
        }
    }

    /// Puts what this rank owes and the factors into `state`.
    pub(crate) fn keep(&self, state: &mut State) {
        state.step = self.step;
        for matrix in &self.matrices {
            state.errors.put(&matrix.parameter, 0, &matrix.error);
            state.factors.put(&matrix.parameter, 0, &matrix.factor);
        }
    }

    /// Goes on with what `state` has of this bucket's parameters, which other buckets may have put
    /// there. A rank that joins has no errors to recall, but needs the factors of the others.
    pub(crate) fn recall(&mut self, state: &State) {
        self.step = state.step;
        self.is_pending = false;
        for matrix in &mut self.matrices {
            matrix.error.fill(0.0);
            matrix.factor.fill(0.0);
            state.errors.copy_to(&matrix.parameter, 0, &mut matrix.error);
            state.factors.copy_to(&matrix.parameter, 0, &mut matrix.factor);
        }
    }
}

impl Matrix {
    /// How many values its projection has.
    fn projected(&self) -> usize {
        self.rows * self.rank
    }

    /// Begins a step with orthogonal columns: the last Q, and random ones where it has none.
    fn start(&mut self, seed: u64, step: u64) {
        self.next_factor.copy_from_slice(&self.factor);
        let mut tries = 0;
        matrix::orthogonalise(&mut self.next_factor, self.columns, |column, values| {
            tries += 1;
            let stream = (column as u64) << 32 | tries;
            let mut random = Random::of(seed, &self.parameter, step, stream);
            values.fill_with(|| random.normal());
            // There are no more columns than dimensions: only a miracle makes one dependent.
            tries <= 2 * self.rank as u64
        });
    }
}

/// What the compression of all buckets has to remember, apart from their layout.
///
/// The factors and the step are the same on all ranks; the errors are the rank's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    step: u64,
    errors: Kept,
    factors: Kept,
}

impl State {
    /// What is the same on all ranks.
    pub(crate) fn without_errors(&self) -> Self {
        Self { errors: Kept::default(), ..self.clone() }
    }

    /// Multiplies what ranks owe: gradients come with another loss scale from now on.
    pub(crate) fn rescale(&mut self, factor: f32) {
        self.errors.scale(factor);
    }

    /// The bytes of a checkpoint: the step, and both sorts of values with their lengths before.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.step.to_le_bytes().to_vec();
        for kept in [&self.errors, &self.factors] {
            let kept = kept.to_bytes();
            bytes.extend((kept.len() as u64).to_le_bytes());
            bytes.extend(kept);
        }
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// Says why the bytes are no such thing.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, UnreadableState> {
        let mut rest = bytes;
        let step = take_u64(&mut rest)?;
        let mut kept = || {
            let length = take_u64(&mut rest)?;
            let length = usize::try_from(length).map_err(|_| UnreadableState("it is cut off"))?;
            Kept::from_bytes(take(&mut rest, length)?)
        };
        let state = Self { step, errors: kept()?, factors: kept()? };
        if rest.is_empty() { Ok(state) } else { Err(UnreadableState("more bytes than it says")) }
    }
}

/// Takes the first `count` values off `rest`.
fn split_off<'a>(rest: &mut &'a mut [f32], count: usize) -> &'a mut [f32] {
    rest.split_off_mut(..count).expect("the caller's lengths were checked")
}

/// Takes the first `count` values off `rest`.
fn split_first<'a>(rest: &mut &'a [f32], count: usize) -> &'a [f32] {
    rest.split_off(..count).expect("the caller's lengths were checked")
}
