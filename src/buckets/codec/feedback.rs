//! Error feedback: what an encoding loses in one step is added to the gradient of the next.
//!
//! Source: Seide et al., "1-bit stochastic gradient descent and its application to data-parallel
//! distributed training of speech DNNs", Interspeech 2014; Karimireddy et al., "Error feedback
//! fixes SignSGD and other gradient compression schemes", ICML 2019, arXiv:1901.09847.

use std::collections::TryReserveError;
use std::sync::Arc;

use unisum_kernels::Encoding;

use super::Kept;
use crate::memory::zeroed;

/// Elements of a parameter, and where they lie in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The parameter's name.
    pub(crate) parameter: Arc<str>,
    /// The first element of the parameter.
    pub(crate) start: usize,
    /// Where that element is in the bucket.
    pub(crate) at: usize,
    /// How many elements.
    pub(crate) count: usize,
}

/// What the encodings of one bucket have lost on this rank and not yet made up for.
///
/// A step has two halves, since whether it counts is known only when all ranks have spoken:
/// [`encode`](Self::encode), then [`settle`](Self::settle). Until then both the old and the new
/// residual are there: 8 bytes a value. A residual is of the rank's own gradients, and all ranks'
/// together are what the mean still lacks, times the world; ranks that join begin with none.
#[derive(Debug)]
pub(crate) struct ErrorFeedback {
    pieces: Vec<Piece>,
    residual: Vec<f32>,
    /// The residual after the step that is under way.
    next: Vec<f32>,
    /// Whether there is such a step, and all its values are finite.
    is_pending: bool,
}

/// How many values are encoded at a time: all that is touched stays in the first-level cache.
const PIECE: usize = 1024;

impl ErrorFeedback {
    /// Nothing lost yet, in a bucket of `count` values that holds `pieces`.
    ///
    /// # Errors
    /// If there is no memory for the residuals.
    ///
    /// # Panics
    /// If a piece does not lie in the bucket.
    pub(crate) fn new(count: usize, pieces: Vec<Piece>) -> Result<Self, TryReserveError> {
        let fits = |piece: &Piece| piece.at <= count && piece.count <= count - piece.at;
        assert!(pieces.iter().all(fits), "a piece lies outside its bucket of {count} values");
        let (residual, next) = (zeroed(count)?, zeroed(count)?);
        Ok(Self { pieces, residual, next, is_pending: false })
    }

    /// Encodes `gradients` and what was lost before. Whether a value is infinite or NaN: then the
    /// step leaves the residual as it was, however it is settled.
    ///
    /// One pass: gradients and residual are read once, the new residual and `to` written once. A
    /// step that was begun and not settled is forgotten.
    ///
    /// # Panics
    /// If `gradients` or `to` are not as long as the bucket and its encoding, or if the
    /// encoding's blocks do not divide 1024.
    pub(crate) fn encode(&mut self, codec: Encoding, gradients: &[f32], to: &mut [u8]) -> bool {
        assert_eq!(gradients.len(), self.residual.len(), "gradients of another bucket");
        assert_eq!(to.len(), codec.bytes(gradients.len()), "bytes of the encoding");
        assert!(PIECE.is_multiple_of(codec.block()), "blocks of {} values", codec.block());
        let mut found = false;
        let mut sums = [0.0; PIECE];
        let before = gradients.chunks(PIECE).zip(self.residual.chunks(PIECE));
        let after = self.next.chunks_mut(PIECE).zip(to.chunks_mut(codec.bytes(PIECE)));
        for ((gradients, residual), (next, to)) in before.zip(after) {
            let sums = &mut sums[..gradients.len()];
            for ((sum, gradient), residual) in sums.iter_mut().zip(gradients).zip(residual) {
                *sum = gradient + residual;
            }
            found |= codec.encode(sums, to);
            found |= codec.decode(to, next);
            for (next, sum) in next.iter_mut().zip(sums) {
                *next = *sum - *next;
            }
        }
        self.is_pending = !found;
        found
    }

    /// Ends a step: what it lost is the new residual if all ranks `apply` it, else everything is as
    /// before the step.
    pub(crate) fn settle(&mut self, apply: bool) {
        if apply && self.is_pending {
            std::mem::swap(&mut self.residual, &mut self.next);
        }
        self.is_pending = false;
    }

    /// Multiplies the residual: gradients come with another loss scale from now on.
    pub(crate) fn rescale(&mut self, factor: f32) {
        self.residual.iter_mut().for_each(|value| *value *= factor);
    }

    /// Puts the residual of every parameter into `kept`.
    pub(crate) fn keep(&self, kept: &mut Kept) {
        for Piece { parameter, start, at, count } in &self.pieces {
            kept.put(parameter, *start, &self.residual[*at..at + count]);
        }
    }

    /// Takes what `kept` has for the parameters of this bucket, which other buckets may have put
    /// there. Where it has nothing, nothing was lost.
    pub(crate) fn recall(&mut self, kept: &Kept) {
        self.residual.fill(0.0);
        self.is_pending = false;
        for Piece { parameter, start, at, count } in &self.pieces {
            kept.copy_to(parameter, *start, &mut self.residual[*at..at + count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    fn piece(parameter: &str, start: usize, at: usize, count: usize) -> Piece {
        Piece { parameter: parameter.into(), start, at, count }
    }

    fn bucket(count: usize) -> ErrorFeedback {
        ErrorFeedback::new(count, vec![piece("w", 0, 0, count)]).unwrap()
    }

    fn residual(feedback: &ErrorFeedback) -> Vec<f32> {
        let mut kept = Kept::default();
        feedback.keep(&mut kept);
        let mut values = vec![0.0; feedback.residual.len()];
        kept.copy_to("w", 0, &mut values);
        values
    }

    /// Encodes, decodes and settles.
    fn step(feedback: &mut ErrorFeedback, codec: Encoding, gradients: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0; codec.bytes(gradients.len())];
        let found = feedback.encode(codec, gradients, &mut bytes);
        let mut decoded = vec![0.0; gradients.len()];
        assert_eq!(codec.decode(&bytes, &mut decoded), found);
        feedback.settle(!found);
        decoded
    }

    proptest! {
        /// Of everything that was given only the last residual has not arrived.
        #[test]
        fn what_arrived_and_the_residual_are_what_was_given(
            encoding in prop::sample::select(&Encoding::ALL[..]),
            gradients in prop::collection::vec(-1.0_f32..1.0, 0..2500),
        ) {
            let mut feedback = bucket(gradients.len());
            let mut arrived = vec![0.0_f64; gradients.len()];
            for _ in 0..20 {
                let decoded = step(&mut feedback, encoding, &gradients);
                arrived.iter_mut().zip(decoded).for_each(|(sum, x)| *sum += f64::from(x));
            }
            for ((arrived, residual), gradient) in
                arrived.iter().zip(residual(&feedback)).zip(&gradients)
            {
                let given = 20.0 * f64::from(*gradient);
                prop_assert!((arrived + f64::from(residual) - given).abs() < 1e-5);
                prop_assert!(residual.abs() < 0.2, "{} is more than one step loses", residual);
            }
        }
    }

    #[test]
    fn a_value_too_small_to_be_encoded_arrives_after_some_steps() {
        let mut feedback = bucket(2);
        let arrived: f32 =
            (0..200).map(|_| step(&mut feedback, Encoding::Int8, &[1.0, 0.001])[1]).sum();
        assert!((arrived - 0.2).abs() < 0.01, "{arrived} of 0.2");
    }

    #[test]
    fn a_step_that_does_not_count_leaves_the_residual_as_it_was() {
        let mut feedback = bucket(1500);
        let gradients: Vec<f32> = (0..1500).map(|i| 1.0 / (i + 1) as f32).collect();
        step(&mut feedback, Encoding::Int8, &gradients);
        let before = residual(&feedback);
        assert!(before.iter().any(|&value| value != 0.0));
        let mut bytes = vec![0; Encoding::Int8.bytes(1500)];
        // Another rank found something.
        assert!(!feedback.encode(Encoding::Int8, &gradients, &mut bytes));
        feedback.settle(false);
        assert_eq!(residual(&feedback), before);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut gradients = gradients.clone();
            gradients[1400] = bad;
            assert!(feedback.encode(Encoding::Int8, &gradients, &mut bytes));
            feedback.settle(true);
            assert_eq!(residual(&feedback), before);
        }
        feedback.settle(true);
        assert_eq!(residual(&feedback), before);
    }

    #[test]
    fn residuals_survive_another_layout_and_a_checkpoint() {
        let mut old = [
            ErrorFeedback::new(7, vec![piece("a", 0, 0, 3), piece("b", 0, 4, 3)]).unwrap(),
            ErrorFeedback::new(2, vec![piece("b", 3, 0, 2)]).unwrap(),
        ];
        let mut kept = Kept::default();
        for (values, feedback) in
            [&[1., 2., 3., 0., 4., 5., 6.][..], &[7., 8.]].iter().zip(&mut old)
        {
            feedback.residual.copy_from_slice(values);
            feedback.keep(&mut kept);
        }
        let kept = Kept::from_bytes(&kept.to_bytes()).unwrap();
        let pieces = vec![piece("b", 1, 0, 4), piece("new", 0, 4, 1), piece("a", 1, 5, 2)];
        let mut new = ErrorFeedback::new(7, pieces).unwrap();
        new.residual.fill(9.0);
        new.recall(&kept);
        assert_eq!(new.residual, [5., 6., 7., 8., 0., 2., 3.]);
    }

    #[test]
    fn residuals_follow_the_loss_scale() {
        let mut feedback = bucket(3);
        step(&mut feedback, Encoding::Int8, &[1.0, 0.3, 0.1]);
        let before = residual(&feedback);
        feedback.rescale(0.5);
        assert_eq!(residual(&feedback), before.iter().map(|x| x * 0.5).collect::<Vec<_>>());
    }
}
