//! Floats of 64, 32 and 16 bits, and comparisons.

use half::{bf16, f16};

use crate::{B16, B32, B64, Case, F32, F64, Kind, Pred, case};

fn single(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn double(bits: u64) -> f64 {
    f64::from_bits(bits)
}

/// NaN of the hardware for all NaN.
fn of_single(value: f32) -> u64 {
    if value.is_nan() { 0x7FFF_FFFF } else { u64::from(value.to_bits()) }
}

fn of_double(value: f64) -> u64 {
    if value.is_nan() { 0xFFF8_0000_0000_0000 } else { value.to_bits() }
}

fn in_single(opcode: &str, expected: fn(f32, f32) -> f32) -> Case {
    case(opcode, F32, &[F32; 2], move |a, b, _| of_single(expected(single(a), single(b))))
}

fn in_double(opcode: &str, expected: fn(f64, f64) -> f64) -> Case {
    case(opcode, F64, &[F64; 2], move |a, b, _| of_double(expected(double(a), double(b))))
}

/// A number wins against NaN, and −0 is less than +0.
fn lesser(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ => [a, b].into_iter().min_by(f64::total_cmp).unwrap_or(a),
    }
}

fn greater(a: f64, b: f64) -> f64 {
    -lesser(-a, -b)
}

/// Exact, since both are floats of 32 bits.
fn narrow(function: fn(f64, f64) -> f64) -> impl Fn(u64, u64, u64) -> u64 {
    move |a, b, _| of_single(function(f64::from(single(a)), f64::from(single(b))) as f32)
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        in_single("add.f32", |a, b| a + b),
        in_single("add.rn.f32", |a, b| a + b),
        in_single("sub.rn.f32", |a, b| a - b),
        in_single("mul.rn.f32", |a, b| a * b),
        in_single("div.rn.f32", |a, b| a / b),
        in_double("add.rn.f64", |a, b| a + b),
        in_double("sub.f64", |a, b| a - b),
        in_double("mul.rn.f64", |a, b| a * b),
        in_double("div.rn.f64", |a, b| a / b),
        in_double("min.f64", lesser),
        in_double("max.f64", greater),
        case("min.f32", F32, &[F32; 2], narrow(lesser)),
        case("max.f32", F32, &[F32; 2], narrow(greater)),
        case("fma.rn.f32", F32, &[F32; 3], |a, b, c| {
            of_single(single(a).mul_add(single(b), single(c)))
        }),
        case("fma.rn.f64", F64, &[F64; 3], |a, b, c| {
            of_double(double(a).mul_add(double(b), double(c)))
        }),
        case("sqrt.rn.f32", F32, &[F32], |a, _, _| of_single(single(a).sqrt())),
        case("sqrt.rn.f64", F64, &[F64], |a, _, _| of_double(double(a).sqrt())),
        case("rcp.rn.f32", F32, &[F32], |a, _, _| of_single(1.0 / single(a))),
        case("abs.f32", F32, &[F32], |a, _, _| a & 0x7FFF_FFFF),
        case("abs.f64", F64, &[F64], |a, _, _| a & (u64::MAX >> 1)),
        case("neg.f32", F32, &[F32], |a, _, _| a ^ 0x8000_0000),
        case("neg.f64", F64, &[F64], |a, _, _| a ^ 1 << 63),
        case("copysign.f32", F32, &[F32; 2], |a, b, _| a & 0x8000_0000 | b & 0x7FFF_FFFF),
        case("testp.finite.f32", Pred, &[F32], |a, _, _| u64::from(single(a).is_finite())),
        case("testp.subnormal.f64", Pred, &[F64], |a, _, _| u64::from(double(a).is_subnormal())),
    ]
}

/// A 16-bit float type: its name, how bits are read, and how a value is rounded to bits.
type Half = (&'static str, fn(u16) -> f64, fn(f64) -> u16);

const HALVES: [Half; 2] = [
    ("f16", |bits| f16::from_bits(bits).to_f64(), |value| f16::from_f64(value).to_bits()),
    ("bf16", |bits| bf16::from_bits(bits).to_f64(), |value| bf16::from_f64(value).to_bits()),
];

fn half(
    (name, read, round): Half,
    operation: &str,
    sources: usize,
    expected: fn(f64, f64, f64) -> f64,
) -> [Case; 2] {
    let one = move |a: u64, b: u64, c: u64| {
        let value = expected(read(a as u16), read(b as u16), read(c as u16));
        u64::from(if value.is_nan() { 0x7FFF } else { round(value) })
    };
    let two = move |a: u64, b: u64, c: u64| one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
    [
        case(format!("{operation}.{name}"), B16, &vec![B16; sources], one),
        case(format!("{operation}.{name}x2"), B32, &vec![B32; sources], two),
    ]
}

pub(crate) fn halves() -> Vec<Case> {
    let mut cases = Vec::new();
    for of in HALVES {
        // Sums and products of two 16-bit floats are exact in f64 but for sums of numbers that are
        // far apart, where only the greater one matters.
        cases.extend(half(of, "add", 2, |a, b, _| a + b));
        cases.extend(half(of, "sub.rn", 2, |a, b, _| a - b));
        cases.extend(half(of, "mul", 2, |a, b, _| a * b));
        cases.extend(half(of, "fma.rn", 3, |a, b, c| a * b + c));
        cases.extend(half(of, "min", 2, |a, b, _| lesser(a, b)));
        cases.extend(half(of, "max", 2, |a, b, _| greater(a, b)));
        cases.extend(half(of, "max.NaN", 2, |a, b, _| {
            if a.is_nan() || b.is_nan() { f64::NAN } else { greater(a, b) }
        }));
        let (name, ..) = of;
        cases.push(case(format!("neg.{name}"), B16, &[B16], |a, _, _| a ^ 0x8000));
        cases.push(case(format!("abs.{name}x2"), B32, &[B32], |a, _, _| a & 0x7FFF_7FFF));
    }
    cases
}

fn compared(opcode: &str, kind: Kind, expected: fn(u64, u64) -> bool) -> Case {
    case(opcode, Pred, &[kind; 2], move |a, b, _| u64::from(expected(a, b)))
}

pub(crate) fn comparisons() -> Vec<Case> {
    let unordered = |a: u64, b: u64| single(a).is_nan() || single(b).is_nan();
    let mut cases = vec![
        compared("setp.eq.f32", F32, |a, b| single(a) == single(b)),
        compared("setp.ne.f32", F32, |a, b| single(a) < single(b) || single(a) > single(b)),
        compared("setp.lt.f32", F32, |a, b| single(a) < single(b)),
        compared("setp.le.f64", F64, |a, b| double(a) <= double(b)),
        compared("setp.gt.f64", F64, |a, b| double(a) > double(b)),
        compared("setp.ge.f32", F32, |a, b| single(a) >= single(b)),
        compared("setp.nan.f64", F64, |a, b| double(a).is_nan() || double(b).is_nan()),
        compared("setp.num.f64", F64, |a, b| !double(a).is_nan() && !double(b).is_nan()),
        compared("setp.neu.f64", F64, |a, b| double(a) != double(b)),
        compared("setp.lt.s16", B16, |a, b| (a as i16) < b as i16),
        compared("setp.lt.u16", B16, |a, b| (a as u16) < b as u16),
        compared("setp.lo.u32", B32, |a, b| (a as u32) < b as u32),
        compared("setp.hs.u32", B32, |a, b| a as u32 >= b as u32),
        compared("setp.gt.s32", B32, |a, b| a as i32 > b as i32),
        compared("setp.le.s64", B64, |a, b| a.cast_signed() <= b.cast_signed()),
        compared("setp.gt.u64", B64, |a, b| a > b),
        compared("setp.ne.b64", B64, |a, b| a != b),
    ];
    type Relation = fn(f32, f32) -> bool;
    let unordered_or: [(&str, Relation); 5] = [
        ("equ", |a, b| a == b),
        ("ltu", |a, b| a < b),
        ("leu", |a, b| a <= b),
        ("gtu", |a, b| a > b),
        ("geu", |a, b| a >= b),
    ];
    for (name, expected) in unordered_or {
        cases.push(case(format!("setp.{name}.f32"), Pred, &[F32; 2], move |a, b, _| {
            u64::from(unordered(a, b) || expected(single(a), single(b)))
        }));
    }
    cases.extend([
        case("setp.lt.and.s32", Pred, &[B32, B32, Pred], |a, b, c| {
            u64::from((a as i32) < b as i32) & c
        }),
        case("setp.eq.xor.b32", Pred, &[B32, B32, Pred], |a, b, c| {
            u64::from(a as u32 == b as u32) ^ c
        }),
        case(
            "set.lt.u32.f32",
            B32,
            &[F32; 2],
            |a, b, _| {
                if single(a) < single(b) { u64::MAX } else { 0 }
            },
        ),
        case("set.ge.f32.s32", F32, &[B32; 2], |a, b, _| {
            if a as i32 >= b as i32 { u64::from(1.0_f32.to_bits()) } else { 0 }
        }),
        case("slct.f32.s32", F32, &[F32, F32, B32], |a, b, c| if c as i32 >= 0 { a } else { b }),
    ]);
    cases
}
