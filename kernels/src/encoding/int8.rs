//! Integers with a factor for each block, which makes the greatest magnitude 127.

use super::super::float16::F32_NAN;
use super::loops::{INFINITY, Scheme};

/// Codes from −127 to 127, times an `f32`.
pub(super) struct Int8;

/// 1.5 · 2²³: of what is added to it the integers stand in the last bits.
const ROUNDING: f32 = 12_582_912.0;

/// The quotient was rounded up.
const GREATEST: f32 = (f32::MAX / 127.0).next_down();

impl<const N: usize> Scheme<N, 4, 1> for Int8 {
    /// What codes are multiplied by.
    type Scale = f32;

    const LIMIT: u32 = INFINITY;

    #[inline(always)]
    fn choose(greatest: u32) -> (f32, [u8; 4]) {
        // The least normal number has a finite inverse, and 127 times the greatest scale is finite.
        let finite = (f32::from_bits(greatest) / 127.0).clamp(f32::MIN_POSITIVE, GREATEST);
        let bits = if greatest >= INFINITY { F32_NAN } else { finite.to_bits() };
        (f32::from_bits(bits), bits.to_le_bytes())
    }
    #[inline(always)]
    fn read(head: [u8; 4]) -> f32 {
        f32::from_le_bytes(head)
    }
    #[inline(always)]
    fn code(scale: f32, value: f32) -> [u8; 1] {
        [(value * (1.0 / scale) + ROUNDING).to_bits() as u8]
    }
    #[inline(always)]
    fn value(scale: f32, [code]: [u8; 1]) -> f32 {
        f32::from(code.cast_signed()) * scale
    }
}
