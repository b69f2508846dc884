//! What travels of gradients: fewer bytes than `f32`, and what becomes of the difference.
//!
//! Gradients are summed in `f32`; only what travels is encoded. A [`Codec`] is a pure function;
//! [`ErrorFeedback`](feedback::ErrorFeedback) remembers what it lost, and [`Kept`] is how such
//! state outlives its buckets.

pub(crate) mod feedback;
mod kept;

pub(crate) use kept::{Kept, UnreadableState, take, take_u64};
use unisum_link::kernels::Encoding;

/// A way to write `f32` in fewer bytes, and to read them.
///
/// The same values give the same bytes on every rank. A value that is infinite or NaN never becomes
/// a number: encoding it tells so, and whoever decodes the bytes is told the same.
pub(crate) trait Codec: Send + Sync {
    /// How many values are encoded together. The encoding of values that begin at a multiple of
    /// this is a range of the bytes of the whole, so pieces may be encoded and sent one by one.
    fn granule(&self) -> usize;

    /// How many bytes `count` values take.
    fn encoded_bytes(&self, count: usize) -> usize;

    /// Writes `from` to `to`, which has the encoded bytes of as many values. Whether decoding will
    /// tell of a value that is infinite or NaN: one of `from` is, or is too large.
    fn encode(&self, from: &[f32], to: &mut [u8]) -> bool;

    /// Writes the values of `from` to `to`. Whether one is infinite or NaN.
    fn decode(&self, from: &[u8], to: &mut [f32]) -> bool;

    /// Adds the values of `from` to those of `to`. Whether one of `from` is infinite or NaN.
    fn add(&self, from: &[u8], to: &mut [f32]) -> bool;
}

impl Codec for Encoding {
    fn granule(&self) -> usize {
        self.block()
    }

    fn encoded_bytes(&self, count: usize) -> usize {
        self.bytes(count)
    }

    fn encode(&self, from: &[f32], to: &mut [u8]) -> bool {
        (*self).encode(from, to)
    }

    fn decode(&self, from: &[u8], to: &mut [f32]) -> bool {
        (*self).decode(from, to)
    }

    fn add(&self, from: &[u8], to: &mut [f32]) -> bool {
        (*self).add(from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the sum of encoded gradients relies on, of any codec: a piece at a multiple of the
    /// granule is a range of bytes, and adding is decoding and adding.
    #[test]
    fn sums_may_be_made_piece_by_piece_out_of_what_travels() {
        let codecs: [&dyn Codec; 5] = Encoding::ALL.each_ref().map(|codec| codec as &dyn Codec);
        for codec in codecs {
            let at = 3 * codec.granule();
            let values: Vec<f32> = (0..at + 77).map(|i| (i as f32).sin()).collect();
            let mut bytes = vec![0; codec.encoded_bytes(values.len())];
            assert!(!codec.encode(&values, &mut bytes));
            let mut decoded = vec![0.0; values.len()];
            assert!(!codec.decode(&bytes, &mut decoded));
            let mut sums = vec![0.5; 77];
            assert!(!codec.add(&bytes[codec.encoded_bytes(at)..], &mut sums));
            let expected: Vec<f32> = decoded[at..].iter().map(|value| 0.5 + value).collect();
            assert_eq!(sums, expected);
        }
    }
}
