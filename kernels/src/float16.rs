//! Conversions between 16-bit floats and `f32`, in operations that vectorise everywhere.
//!
//! Source: Fabian Giesen, "half to float done quick" and the comments there (public domain).

/// The quiet NaN that every NaN result becomes.
pub(super) const F32_NAN: u32 = 0x7fc0_0000;

const F32_INFINITY: u32 = 0x7f80_0000;
/// The distance between the exponent biases of `f32` and `f16`, in place.
const REBIAS: u32 = (127 - 15) << 23;

/// The value of the `f16` with the given bits. A NaN stays a NaN, not always the same one.
#[inline(always)]
pub(super) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let shifted = magnitude << 13;
    // Subnormal: an integer of units of 2⁻²⁴, exact, and no subnormal `f32` on the way.
    let tiny = (magnitude as i32 as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    let finite = if magnitude < 0x0400 { tiny } else { shifted + REBIAS };
    let value = if magnitude >= 0x7c00 { shifted | F32_INFINITY } else { finite };
    f32::from_bits(value | sign)
}

/// The bits of the `f16` nearest to `value`, ties to even. Every NaN becomes the same one.
#[inline(always)]
pub(super) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let result = nearest::<15, 10>(magnitude).min(0x7c00);
    if magnitude > F32_INFINITY { 0x7e00 } else { (result | sign) as u16 }
}

/// The bits of the nearest float with the given bias and mantissa, ties to even, to the `f32` with
/// the bits `magnitude`, which is not negative. As if exponents had no end: the caller sees to
/// what is too large.
#[inline(always)]
pub(super) fn nearest<const BIAS: u32, const MANTISSA_BITS: u32>(magnitude: u32) -> u32 {
    let dropped = 23 - MANTISSA_BITS;
    // Half the last place that is dropped, less one if the last place that stays is even. A
    // carry into the exponent is right.
    let odd = (magnitude >> dropped) & 1;
    let half = (1 << (dropped - 1)) - 1 + odd;
    let normal = magnitude.wrapping_sub((127 - BIAS) << 23).wrapping_add(half) >> dropped;
    // The last place of this is that of a subnormal result: the addition rounds to it.
    let unit = f32::from_bits((127 + 24 - BIAS - MANTISSA_BITS) << 23);
    let tiny = (f32::from_bits(magnitude) + unit).to_bits().wrapping_sub(unit.to_bits());
    if magnitude < (128 - BIAS) << 23 { tiny } else { normal }
}

/// The value of the `bf16` with the given bits.
#[inline(always)]
pub(super) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bits of the `bf16` nearest to `value`, ties to even. Every NaN becomes the same one.
#[inline(always)]
pub(super) fn f32_to_bf16(value: f32) -> u16 {
    // The canonical NaN rounds like a number, to the upper half of its bits.
    let bits = if value.is_nan() { F32_NAN } else { value.to_bits() };
    let odd = (bits >> 16) & 1;
    ((bits + 0x7fff + odd) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_f16_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_around_every_16_bit_float() {
        let check = |value: f32| {
            assert_eq!(f32_to_f16(value), f16::from_f32(value).to_bits(), "f16 of {value:e}");
            assert_eq!(f32_to_bf16(value), bf16::from_f32(value).to_bits(), "bf16 of {value:e}");
        };
        let step = if cfg!(miri) { 997 } else { 1 };
        for bits in (0..=u16::MAX).step_by(step) {
            // The value, the half way to its neighbour, and what lies next to both.
            let bases = [f16_to_f32(bits), bf16_to_f32(bits)];
            for base in bases.into_iter().filter(|base| !base.is_nan()) {
                for offset in [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff] {
                    let value = f32::from_bits(base.to_bits() + offset);
                    check(if value.is_nan() { f32::from_bits(F32_NAN) } else { value });
                }
            }
        }
    }
}
