//! Conversions.

use half::{bf16, f16};

use crate::{B16, B32, B64, Case, F32, F64, Kind, case};

/// An integer type: its name, the register that it is in, and its bits.
type Integer = (&'static str, Kind, u32);

const INTEGERS: [Integer; 8] = [
    ("u8", B16, 8),
    ("s8", B16, 8),
    ("u16", B16, 16),
    ("s16", B16, 16),
    ("u32", B32, 32),
    ("s32", B32, 32),
    ("u64", B64, 64),
    ("s64", B64, 64),
];

fn number((name, _, bits): Integer, value: u64) -> i128 {
    let shift = 128 - bits;
    match name.starts_with('s') {
        true => (i128::from(value) << shift) >> shift,
        false => (u128::from(value) << shift >> shift).cast_signed(),
    }
}

fn range((name, _, bits): Integer) -> (i128, i128) {
    match name.starts_with('s') {
        true => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        false => (0, (1 << bits) - 1),
    }
}

fn saturated(to: Integer, value: f64) -> u64 {
    let (least, greatest) = range(to);
    // NaN becomes 0, and infinities the ends of i128.
    (value as i128).clamp(least, greatest) as u64
}

fn between_integers() -> Vec<Case> {
    let mut cases = Vec::new();
    for to in INTEGERS {
        for from in INTEGERS {
            // A register of 16 bits that gets 8 is filled with zeros or the sign.
            let opcode = format!("cvt.{}.{}", to.0, from.0);
            cases.push(case(opcode, to.1, &[from.1], move |a, _, _| {
                number(to, number(from, a) as u64) as u64
            }));
            let (least, greatest) = range(to);
            let opcode = format!("cvt.sat.{}.{}", to.0, from.0);
            cases.push(case(opcode, to.1, &[from.1], move |a, _, _| {
                number(from, a).clamp(least, greatest) as u64
            }));
        }
    }
    cases
}

/// How a value becomes whole.
type Rounding = (&'static str, fn(f64) -> f64);

const ROUNDINGS: [Rounding; 4] =
    [("rni", f64::round_ties_even), ("rzi", f64::trunc), ("rmi", f64::floor), ("rpi", f64::ceil)];

fn with_integers() -> Vec<Case> {
    let mut cases = Vec::new();
    for of in INTEGERS.into_iter().filter(|(_, _, bits)| *bits > 8) {
        for (rounding, round) in ROUNDINGS {
            let opcode = format!("cvt.{rounding}.{}.f32", of.0);
            cases.push(case(opcode, of.1, &[F32], move |a, _, _| {
                saturated(of, round(f64::from(f32::from_bits(a as u32))))
            }));
            let opcode = format!("cvt.{rounding}.{}.f64", of.0);
            cases.push(case(opcode, of.1, &[F64], move |a, _, _| {
                saturated(of, round(f64::from_bits(a)))
            }));
        }
        cases.push(case(format!("cvt.rn.f32.{}", of.0), F32, &[of.1], move |a, _, _| {
            u64::from((number(of, a) as f32).to_bits())
        }));
        cases.push(case(format!("cvt.rn.f64.{}", of.0), F64, &[of.1], move |a, _, _| {
            (number(of, a) as f64).to_bits()
        }));
    }
    cases
}

fn canonical(value: f32) -> u64 {
    if value.is_nan() { 0x7FFF_FFFF } else { u64::from(value.to_bits()) }
}

fn nan_or(value: f64, bits: u16) -> u64 {
    u64::from(if value.is_nan() { 0x7FFF } else { bits })
}

fn single(bits: u64) -> f64 {
    f64::from(f32::from_bits(bits as u32))
}

fn between_floats() -> Vec<Case> {
    let not_nan = |a: u64, _, _| f64::from_bits(a).is_nan() || single(a).is_nan();
    let half_nan =
        |a: u64, _, _| f16::from_bits(a as u16).is_nan() || bf16::from_bits(a as u16).is_nan();
    let mut cases = vec![
        case("cvt.rn.f32.f64", F32, &[F64], |a, _, _| canonical(f64::from_bits(a) as f32)),
        case("cvt.f64.f32", F64, &[F32], |a, _, _| single(a).to_bits()).skipping(not_nan),
        case("cvt.sat.f32.f32", F32, &[F32], |a, _, _| {
            let a = f32::from_bits(a as u32);
            u64::from(if a.is_nan() { 0.0 } else { a.clamp(0.0, 1.0) }.to_bits())
        }),
        case("cvt.f32.f16", F32, &[B16], |a, _, _| {
            u64::from(f16::from_bits(a as u16).to_f32().to_bits())
        })
        .skipping(half_nan),
        case("cvt.f32.bf16", F32, &[B16], |a, _, _| a << 16).skipping(half_nan),
        case("cvt.rn.f16.f32", B16, &[F32], |a, _, _| {
            nan_or(single(a), f16::from_f64(single(a)).to_bits())
        }),
        case("cvt.rn.bf16.f32", B16, &[F32], |a, _, _| {
            nan_or(single(a), bf16::from_f64(single(a)).to_bits())
        }),
        case("cvt.rn.f16.f64", B16, &[F64], |a, _, _| {
            let a = f64::from_bits(a);
            nan_or(a, f16::from_f64(a).to_bits())
        }),
        // The first operand is in the upper half.
        case("cvt.rn.f16x2.f32", B32, &[F32; 2], |a, b, _| {
            let half = |bits| nan_or(single(bits), f16::from_f64(single(bits)).to_bits());
            half(a) << 16 | half(b)
        }),
    ];
    for (rounding, round) in ROUNDINGS {
        cases.push(
            case(format!("cvt.{rounding}.f64.f64"), F64, &[F64], move |a, _, _| {
                round(f64::from_bits(a)).to_bits()
            })
            .skipping(not_nan),
        );
        cases.push(
            case(format!("cvt.{rounding}.f32.f32"), F32, &[F32], move |a, _, _| {
                u64::from((round(single(a)) as f32).to_bits())
            })
            .skipping(not_nan),
        );
    }
    cases.push(case("cvt.rz.f32.f64", F32, &[F64], |a, _, _| {
        let a = f64::from_bits(a);
        let near = a as f32;
        let beyond = f64::from(near).abs() > a.abs() && a.is_finite();
        canonical(if beyond { f32::from_bits(near.to_bits() - 1) } else { near })
    }));
    cases
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = between_integers();
    cases.extend(with_integers());
    cases.extend(between_floats());
    cases
}
