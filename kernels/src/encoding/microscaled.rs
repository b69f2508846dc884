//! 8-bit floats with a power of two for each block, whose exponent is a byte.
//!
//! Source: OCP Microscaling Formats (MX) specification, version 1.0, sections 5 and 6.3.

use super::super::float8::{e4m3_to_f32, e5m2_to_f32, f32_to_e4m3, f32_to_e5m2};
use super::super::float16::F32_NAN;
use super::loops::{INFINITY, Scheme};

/// The byte of a scale that is NaN.
const NAN: u8 = 0xff;

/// What makes a mantissa above that of the greatest codes, which is 1.75, carry into the exponent.
const CARRY: u32 = 0x1f_ffff;

/// Magnitudes from here on are taken for infinite: their block would have the scale after the
/// greatest one, and they could be rounded up to infinity.
const LIMIT: u32 = INFINITY - CARRY;

/// 2 to the power of `exponent` less 127; NaN for the last one.
#[inline(always)]
fn power(exponent: u8) -> f32 {
    // The exponent 0 means 2⁻¹²⁷, which is a subnormal number.
    let bits = (u32::from(exponent) << 23).max(1 << 22);
    f32::from_bits(if exponent == NAN { F32_NAN } else { bits })
}

/// The scale of a block whose greatest magnitude has the given bits, for codes up to 1.75 times 2
/// to the power of `reach`.
#[inline(always)]
fn exponent(greatest: u32, reach: u32) -> u8 {
    let exponent = ((greatest + CARRY) >> 23).saturating_sub(reach).max(1);
    if greatest >= LIMIT { NAN } else { exponent as u8 }
}

macro_rules! microscaled {
    ($(#[$doc:meta])* $name:ident, $widen:ident, $narrow:ident, $reach:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl<const N: usize> Scheme<N, 1, 1> for $name {
            /// The exponent's byte.
            type Scale = u8;

            const LIMIT: u32 = LIMIT;

            #[inline(always)]
            fn choose(greatest: u32) -> (u8, [u8; 1]) {
                let exponent = exponent(greatest, $reach);
                (exponent, [exponent])
            }
            #[inline(always)]
            fn read([exponent]: [u8; 1]) -> u8 {
                exponent
            }
            #[inline(always)]
            fn code(exponent: u8, value: f32) -> [u8; 1] {
                // The inverse is one of the powers, too: the scale is far below the greatest.
                [$narrow(value * power(254 - exponent))]
            }
            #[inline(always)]
            fn value(exponent: u8, [code]: [u8; 1]) -> f32 {
                $widen(code) * power(exponent)
            }
        }
    };
}

microscaled!(
    /// Codes up to 448.
    MxE4M3, e4m3_to_f32, f32_to_e4m3, 8
);
microscaled!(
    /// Codes up to 57344.
    MxE5M2, e5m2_to_f32, f32_to_e5m2, 15
);
