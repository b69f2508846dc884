//! Conversions between 8-bit floats and `f32`, in operations that vectorise everywhere.

use super::float16::{F32_NAN, f16_to_f32, nearest};

/// The value of the `f8e5m2` with the given bits: the upper half of an `f16`. A NaN stays one.
#[inline(always)]
pub(crate) fn e5m2_to_f32(bits: u8) -> f32 {
    f16_to_f32(u16::from(bits) << 8)
}

/// The bits of the `f8e5m2` nearest to `value`, ties to even. Every NaN becomes the same one.
#[inline(always)]
pub(crate) fn f32_to_e5m2(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    let result = nearest::<15, 2>(magnitude).min(0x7c) as u8;
    if value.is_nan() { 0x7e } else { result | sign }
}

/// The value of the `f8e4m3` with the given bits. A NaN stays one.
#[inline(always)]
pub(crate) fn e4m3_to_f32(bits: u8) -> f32 {
    let sign = u32::from(bits & 0x80) << 24;
    let magnitude = u32::from(bits & 0x7f);
    // Subnormal: an integer of units of 2⁻⁹.
    let tiny = (magnitude as i32 as f32 * f32::from_bits((127 - 9) << 23)).to_bits();
    let finite = if magnitude < 0x08 { tiny } else { (magnitude << 20) + ((127 - 7) << 23) };
    let value = if magnitude == 0x7f { F32_NAN } else { finite };
    f32::from_bits(value | sign)
}

/// The bits of the `f8e4m3` nearest to `value`, ties to even. NaN, and what rounds to more than
/// the greatest number, becomes the same NaN.
#[inline(always)]
pub(crate) fn f32_to_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    // Infinity and NaN have the greatest magnitudes.
    let result = nearest::<7, 3>(bits & 0x7fff_ffff).min(0x7f) as u8;
    if result == 0x7f { result } else { result | sign }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the specification's formula.
    fn value(bits: u8, bias: i32, mantissa_bits: i32) -> f64 {
        let (exponent, mantissa) =
            (i32::from(bits & 0x7f) >> mantissa_bits, i32::from(bits) & ((1 << mantissa_bits) - 1));
        let unit = f64::from(exponent.max(1) - bias - mantissa_bits).exp2();
        let hidden = i32::from(exponent > 0) << mantissa_bits;
        let sign = if bits >= 0x80 { -1.0 } else { 1.0 };
        sign * f64::from(hidden + mantissa) * unit
    }

    #[test]
    fn every_8_bit_float_has_the_value_of_its_specification() {
        for bits in 0..=u8::MAX {
            let (e4m3, e5m2) = (e4m3_to_f32(bits), e5m2_to_f32(bits));
            match bits & 0x7f {
                0x7f => assert!(e4m3.is_nan()),
                _ => assert_eq!(f64::from(e4m3).to_bits(), value(bits, 7, 3).to_bits()),
            }
            match bits & 0x7f {
                0x7d.. => assert!(e5m2.is_nan()),
                0x7c => assert_eq!(e5m2.abs(), f32::INFINITY),
                _ => assert_eq!(f64::from(e5m2).to_bits(), value(bits, 15, 2).to_bits()),
            }
        }
        assert_eq!([e4m3_to_f32(0x7e), e5m2_to_f32(0x7b)], [448.0, 57344.0]);
    }

    /// Between all neighbours, and beyond the greatest, where the next one would be.
    #[test]
    fn narrowing_rounds_to_nearest_even() {
        fn check(narrow: fn(f32) -> u8, beyond: u8, overflow: u8, bias: i32, mantissa_bits: i32) {
            for low in 0..beyond {
                let bounds = [low, low + 1].map(|bits| value(bits, bias, mantissa_bits) as f32);
                let middle = bounds[0] / 2.0 + bounds[1] / 2.0;
                let high = if low + 1 == beyond { overflow } else { low + 1 };
                let even = if low % 2 == 0 { low } else { high };
                let expected = [
                    (bounds[0], low),
                    (middle.next_down(), low),
                    (middle, even),
                    (middle.next_up(), high),
                    (bounds[1], high),
                ];
                for (from, to) in expected {
                    assert_eq!(narrow(from), to, "{from:e}");
                    let negative = if to == 0x7f { to } else { to | 0x80 };
                    assert_eq!(narrow(-from), negative, "-{from:e}");
                }
            }
        }
        check(f32_to_e4m3, 0x7f, 0x7f, 7, 3);
        check(f32_to_e5m2, 0x7c, 0x7c, 15, 2);
    }

    #[test]
    fn what_is_no_number_of_the_type_becomes_nan_or_infinity() {
        for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -1e9] {
            assert_eq!(f32_to_e4m3(value), 0x7f);
        }
        assert_eq!([f32::NAN, -f32::NAN].map(f32_to_e5m2), [0x7e; 2]);
        assert_eq!([f32::INFINITY, f32::MAX].map(f32_to_e5m2), [0x7c; 2]);
        assert_eq!([f32::NEG_INFINITY, f32::MIN].map(f32_to_e5m2), [0xfc; 2]);
        assert_eq!([1e-30, f32::from_bits(1)].map(f32_to_e4m3), [0; 2]);
    }
}
