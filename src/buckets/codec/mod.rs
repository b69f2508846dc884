//! What travels of gradients: fewer bytes than `f32`, and what becomes of the difference.
//!
//! Gradients are summed in `f32`; only what travels is encoded, by the kernels' `Encoding`.
//! [`ErrorFeedback`](feedback::ErrorFeedback) remembers what that lost, and [`Kept`] is how such
//! state outlives its buckets.

pub(crate) mod feedback;
mod kept;

pub(crate) use kept::{Kept, UnreadableState, take, take_u64};

#[cfg(test)]
mod tests {
    use unisum_kernels::Encoding;

    /// What the sum of encoded gradients relies on, of any encoding: a piece at a multiple of the
    /// block is a range of bytes, and adding is decoding and adding.
    #[test]
    fn sums_may_be_made_piece_by_piece_out_of_what_travels() {
        for codec in Encoding::ALL {
            let at = 3 * codec.block();
            let values: Vec<f32> = (0..at + 77).map(|i| (i as f32).sin()).collect();
            let mut bytes = vec![0; codec.bytes(values.len())];
            assert!(!codec.encode(&values, &mut bytes));
            let mut decoded = vec![0.0; values.len()];
            assert!(!codec.decode(&bytes, &mut decoded));
            let mut sums = vec![0.5; 77];
            assert!(!codec.add(&bytes[codec.bytes(at)..], &mut sums));
            let expected: Vec<f32> = decoded[at..].iter().map(|value| 0.5 + value).collect();
            assert_eq!(sums, expected);
        }
    }
}
