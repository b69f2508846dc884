//! `f32` in fewer bytes, for sending gradients, and back.
//!
//! Every encoding is a sequence of *blocks*: the scale of the block, if there is one, then a code
//! for each value. The last block may be shorter. The encoding of values that begin at a multiple
//! of [`Encoding::block`] is therefore a range of bytes of the whole.

mod int8;
mod loops;
mod microscaled;
mod plain;

use self::int8::Int8;
use self::loops::{added, decoded, encoded};
use self::microscaled::{MxE4M3, MxE5M2};
use self::plain::{Bf16, F16};
use super::Isa;

/// A way to write `f32` in fewer bytes.
///
/// Encoding rounds to nearest, and the same values give the same bytes on every instruction set.
/// Infinities and NaNs never become finite numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE 754 binary16. Magnitudes from 65520 on become infinite.
    F16,
    /// The upper half of an `f32`.
    Bf16,
    /// [`f8e4m3`](crate::f8e4m3) with a power of two for each 32 values: 33 bytes.
    ///
    /// Block, scale and codes are those of MXFP8 in the OCP Microscaling Formats specification,
    /// version 1.0; but where its conversion would saturate, the scale is twice as large. The
    /// error of a value is at most 2⁻⁴ of it, or 2⁻¹⁷ of the block's greatest, if that is more.
    F8E4M3,
    /// [`f8e5m2`](crate::f8e5m2) with a power of two for each 32 values, as
    /// [`F8E4M3`](Self::F8E4M3). The error of a value is at most 2⁻³ of it, or 2⁻³¹ of the block's
    /// greatest, if that is more.
    F8E5M2,
    /// Integers from −127 to 127 with a factor for each 256 values, an `f32`: 260 bytes. The error
    /// of a value is at most 1/254 of the block's greatest, and a little for rounding.
    Int8,
}

/// Calls a function of `loops` with the scheme of an encoding and its sizes.
macro_rules! by_scheme {
    ($encoding:expr, $function:ident($($argument:expr),*)) => {
        match $encoding {
            Encoding::F16 => $function::<F16, 64, 0, 2>($($argument),*),
            Encoding::Bf16 => $function::<Bf16, 64, 0, 2>($($argument),*),
            Encoding::F8E4M3 => $function::<MxE4M3, 32, 1, 1>($($argument),*),
            Encoding::F8E5M2 => $function::<MxE5M2, 32, 1, 1>($($argument),*),
            Encoding::Int8 => $function::<Int8, 256, 4, 1>($($argument),*),
        }
    };
}

impl Encoding {
    /// Every encoding.
    pub const ALL: [Self; 5] = [Self::F16, Self::Bf16, Self::F8E4M3, Self::F8E5M2, Self::Int8];

    /// How many values share a scale; 1 if there is no scale.
    pub const fn block(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 1,
            Self::F8E4M3 | Self::F8E5M2 => 32,
            Self::Int8 => 256,
        }
    }

    /// How many bytes `count` values take.
    pub const fn bytes(self, count: usize) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2 * count,
            Self::F8E4M3 | Self::F8E5M2 => count + count.div_ceil(32),
            Self::Int8 => count + 4 * count.div_ceil(256),
        }
    }

    /// Writes `from` to `to`. Returns whether decoding will give an infinity or NaN, because a
    /// value of `from` is one or is too large for the encoding.
    ///
    /// # Panics
    /// If `to` is not as long as the [bytes](Self::bytes) of that many values.
    pub fn encode(self, from: &[f32], to: &mut [u8]) -> bool {
        self.encode_with(Isa::best(), from, to)
    }

    /// Writes the values that `from` encodes to `to`. Returns whether one is infinite or NaN.
    ///
    /// Any bytes are valid.
    ///
    /// # Panics
    /// If `from` is not as long as the [bytes](Self::bytes) of `to`'s number of values.
    pub fn decode(self, from: &[u8], to: &mut [f32]) -> bool {
        self.decode_with(Isa::best(), from, to)
    }

    /// Adds the values that `from` encodes to `to`. Returns whether one of `from` is infinite or
    /// NaN.
    ///
    /// # Panics
    /// As [`decode`](Self::decode).
    pub fn add(self, from: &[u8], to: &mut [f32]) -> bool {
        self.add_with(Isa::best(), from, to)
    }

    /// Like [`encode`](Self::encode), on the instruction set `isa`: for tests and measurements.
    ///
    /// # Panics
    /// As [`encode`](Self::encode).
    pub fn encode_with(self, isa: Isa, from: &[f32], to: &mut [u8]) -> bool {
        self.assert_fits(from.len(), to.len());
        by_scheme!(self, encoded(isa, from, to))
    }

    /// Like [`decode`](Self::decode), on the instruction set `isa`.
    ///
    /// # Panics
    /// As [`decode`](Self::decode).
    pub fn decode_with(self, isa: Isa, from: &[u8], to: &mut [f32]) -> bool {
        self.assert_fits(to.len(), from.len());
        by_scheme!(self, decoded(isa, from, to))
    }

    /// Like [`add`](Self::add), on the instruction set `isa`.
    ///
    /// # Panics
    /// As [`decode`](Self::decode).
    pub fn add_with(self, isa: Isa, from: &[u8], to: &mut [f32]) -> bool {
        self.assert_fits(to.len(), from.len());
        by_scheme!(self, added(isa, from, to))
    }

    fn assert_fits(self, count: usize, bytes: usize) {
        assert_eq!(bytes, self.bytes(count), "bytes of {count} values as {self:?}");
    }
}
