//! Floats: rounding, NaN, and every value of the small ones.

use std::num::NonZeroU32;

use half::{bf16, f16};
use unisum_kernels::{Dtype, ReduceOp, f8e4m3, f8e5m2};
use unisum_kernels::{Fold, Folded, Isa};

use crate::harness::{Destination, check, folds, run};
use crate::reference::Reference;

/// Sums and products of 16-bit floats whose exact results lie on, or next to, the middle between
/// two neighbours, or among the subnormal numbers, in lines that also hold NaN and infinities.
#[test]
fn halves_round_to_nearest_even_wherever_their_neighbours_lie() {
    fn all<T: Reference>(from_bits: fn(u16) -> T, mantissa_bits: u16) {
        let step = if cfg!(miri) { 991 } else { 1 };
        let spread = |factor: u16| {
            let bits = (0..=u16::MAX).step_by(step).map(move |i| i.wrapping_mul(factor));
            bits.collect::<Vec<u16>>()
        };
        // In order, most lines hold nothing special; spread, most of them do.
        for first in [spread(1), spread(0x9e37)] {
            let smaller = |places: u16, low: u16| {
                let exponent = move |bits: u16| (bits & 0x7fff) >> mantissa_bits;
                let bits = first
                    .iter()
                    .map(move |&bits| exponent(bits).saturating_sub(places) << mantissa_bits | low);
                bits.map(from_bits).collect::<Vec<T>>()
            };
            let last_place = (1 << mantissa_bits) - 1;
            let mut others: Vec<Vec<T>> = Vec::new();
            for places in [mantissa_bits, mantissa_bits + 1, mantissa_bits + 2] {
                others.extend([0, 1, last_place].map(|low| smaller(places, low)));
            }
            // Subnormal numbers of both signs, and what shrinks a product to one.
            others.push(first.iter().map(|bits| from_bits(bits % (last_place + 1))).collect());
            others.push(first.iter().map(|bits| from_bits(bits & 0x80ff)).collect());
            let first: Vec<T> = first.iter().copied().map(from_bits).collect();
            for other in others {
                for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max] {
                    let fold = Fold::new(T::DTYPE, op);
                    check(fold, &[first.clone(), other.clone()], &[0], &[Destination::Apart]);
                }
            }
        }
    }
    all(f16::from_bits, 10);
    all(bf16::from_bits, 7);
}

#[test]
fn every_16_bit_float_survives_a_fold_of_one_source() {
    fn all<T: Reference>(from_bits: fn(u16) -> T) {
        let step = if cfg!(miri) { 991 } else { 1 };
        let values: Vec<T> = (0..=u16::MAX).step_by(step).map(from_bits).collect();
        for fold in folds(T::DTYPE) {
            check(fold, std::slice::from_ref(&values), &[0], &[Destination::Apart]);
        }
    }
    all(f16::from_bits);
    all(bf16::from_bits);
}

#[test]
fn floats_follow_the_documented_table() {
    let fold = |op, inputs: &[f32]| {
        let mut result = 0_f32;
        let sources: Vec<*const u8> =
            inputs.iter().map(|input| (&raw const *input).cast()).collect();
        let fold = Fold::new(Dtype::F32, op);
        // SAFETY: every pointer is to one `f32`.
        let outcome = unsafe { fold.run((&raw mut result).cast(), &sources, 1) };
        assert_eq!(outcome, Folded::Done);
        result.to_bits()
    };
    let payload = f32::from_bits(0xffc0_1234);
    assert_eq!(fold(ReduceOp::Sum, &[1.0, payload]), 0x7fc0_0000);
    assert_eq!(fold(ReduceOp::Sum, &[f32::INFINITY, f32::NEG_INFINITY]), 0x7fc0_0000);
    assert_eq!(fold(ReduceOp::Sum, &[f32::MAX, f32::MAX]), f32::INFINITY.to_bits());
    assert_eq!(fold(ReduceOp::Sum, &[-0.0, -0.0]), (-0.0_f32).to_bits());
    assert_eq!(fold(ReduceOp::Sum, &[f32::from_bits(1), f32::from_bits(2)]), 3);
    assert_eq!(fold(ReduceOp::Min, &[0.0, -0.0]), (-0.0_f32).to_bits());
    assert_eq!(fold(ReduceOp::Max, &[-0.0, 0.0]), 0);
    assert_eq!(fold(ReduceOp::Min, &[f32::NEG_INFINITY, payload]), 0x7fc0_0000);
    assert_eq!(fold(ReduceOp::Max, &[f32::INFINITY, payload]), 0x7fc0_0000);
}

#[test]
fn halves_are_rounded_once() {
    // 2048 + 1 is 2048 in f16, twice; in f32 the two ones arrive.
    let inputs = [2048.0, 1.0, 1.0].map(|value| vec![f16::from_f32(value)]);
    let fold = Fold::new(Dtype::F16, ReduceOp::Sum);
    let got = run(fold, Isa::best(), &inputs, 0, Destination::Apart);
    assert_eq!(got, [f16::from_f32(2050.0)]);
    // The sum of these is beyond f16, their average is not.
    let inputs = [60000.0, 60000.0].map(|value| vec![f16::from_f32(value)]);
    let fold = Fold { op: ReduceOp::Average, divide_by: NonZeroU32::new(2), ..fold };
    let got = run(fold, Isa::best(), &inputs, 0, Destination::Apart);
    assert_eq!(got, [f16::from_f32(60000.0)]);
}

/// All elements, and all with one that is added to, multiplied with, and compared to them.
#[test]
fn every_pair_of_8_bit_floats_gives_the_bits_of_the_reference() {
    fn all<T: Reference>(from_bits: fn(u8) -> T) {
        let step = if cfg!(miri) { 97 } else { 1 };
        let bytes: Vec<u8> = (0..=u8::MAX).step_by(step).collect();
        let pairs = || bytes.iter().flat_map(|&a| bytes.iter().map(move |&b| (a, b)));
        let first: Vec<T> = pairs().map(|(a, _)| from_bits(a)).collect();
        let second: Vec<T> = pairs().map(|(_, b)| from_bits(b)).collect();
        for fold in folds(T::DTYPE) {
            check(fold, &[first.clone(), second.clone()], &[0], &[Destination::Apart]);
        }
    }
    all(f8e4m3::from_bits);
    all(f8e5m2::from_bits);
}

/// With a factor any `f32` is rounded to the type: those around every middle between two
/// neighbours, on both sides of zero, and the extremes.
#[test]
fn any_f32_is_rounded_to_the_nearest_narrow_float() {
    fn all<T: Reference>(from_bits: fn(u16) -> T, to_f32: fn(T) -> f32, magnitudes: u16) {
        let step = if magnitudes > 0x80 { 31 } else { 1 } * if cfg!(miri) { 61 } else { 1 };
        let mut factors = vec![f32::MIN_POSITIVE, f32::from_bits(1), f32::INFINITY, f32::NAN];
        factors.extend((0..128).map(|power| 2_f32.powi(power) * 1.99));
        let values = |bits| to_f32(from_bits(bits));
        for bits in (0..magnitudes - 1).step_by(step) {
            let middle = values(bits) / 2.0 + values(bits + 1) / 2.0;
            factors.extend([middle.next_down(), middle, middle.next_up(), values(bits)]);
        }
        let greatest = values(magnitudes - 1);
        let beyond = greatest + (greatest - values(magnitudes - 2)) / 2.0;
        factors.extend([beyond.next_down(), beyond, beyond.next_up()]);
        let ones = [1.0, -1.0, 0.0, 2.0].map(|value| {
            let found = (0..=u16::MAX).map(from_bits).find(|&x| to_f32(x) == value);
            found.expect("small powers of two are exact")
        });
        let source: Vec<T> = ones.iter().copied().cycle().take(67).collect();
        for factor in factors {
            let fold = Fold { factor: Some(factor.into()), ..Fold::new(T::DTYPE, ReduceOp::Sum) };
            check(fold, std::slice::from_ref(&source), &[0], &[Destination::Apart]);
        }
    }
    all(|bits| f8e4m3::from_bits(bits as u8), f8e4m3::to_f32, 0x7f);
    all(|bits| f8e5m2::from_bits(bits as u8), f8e5m2::to_f32, 0x7c);
    all(f16::from_bits, f16::to_f32, 0x7c00);
    all(bf16::from_bits, bf16::to_f32, 0x7f80);
}

#[test]
fn small_floats_that_overflow_become_nan_or_infinity() {
    fn doubled<T: Reference>(greatest: T) -> T::Bits {
        let fold = Fold::new(T::DTYPE, ReduceOp::Sum);
        let inputs = [vec![greatest; 33], vec![greatest; 33]];
        run(fold, Isa::best(), &inputs, 0, Destination::Apart)[32].bits()
    }
    assert_eq!(doubled(f8e4m3::MAX), 0x7f);
    assert_eq!(doubled(f8e4m3::MIN), 0x7f);
    assert_eq!(doubled(f8e5m2::MAX), 0x7c);
    assert_eq!(doubled(f8e5m2::MIN), 0xfc);
}
