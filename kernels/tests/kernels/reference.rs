//! What every kernel has to give, one element at a time.

use std::fmt::{Debug, LowerHex};
use std::num::NonZeroU32;

use half::{bf16, f16};
use unisum_kernels::Fold;
use unisum_kernels::{Bool, Element, ReduceOp, f8e4m3, f8e5m2};

/// The reference: what `ReduceOp` documents, one element at a time.
pub(crate) trait Reference: Element + Debug {
    type Bits: Copy + Debug + PartialEq + LowerHex;
    /// Corner cases, and some more bits made from `random`.
    fn sample(random: u64) -> Self;
    fn fold(fold: &Fold, inputs: &[Self]) -> Self;
    fn bits(self) -> Self::Bits;
    fn is_finite(self) -> bool;
}

macro_rules! reference_of_integers {
    ($($int:ty),*) => {$(
        impl Reference for $int {
            type Bits = Self;

            fn sample(random: u64) -> Self {
                let corners = [0, 1, Self::MAX, Self::MIN, Self::MAX - 1, Self::MIN + 1];
                let corner = corners.get((random % 12) as usize).copied();
                corner.unwrap_or((random >> 8) as Self)
            }
            fn fold(fold: &Fold, inputs: &[Self]) -> Self {
                let step = match fold.op {
                    ReduceOp::Sum | ReduceOp::Average => Self::wrapping_add,
                    ReduceOp::Product => Self::wrapping_mul,
                    ReduceOp::Min => Ord::min,
                    ReduceOp::Max => Ord::max,
                    ReduceOp::BitAnd => |a, b| a & b,
                    ReduceOp::BitOr => |a, b| a | b,
                    ReduceOp::BitXor => |a, b| a ^ b,
                    other => panic!("no reference for {other}"),
                };
                let folded = inputs.iter().copied().reduce(step).unwrap();
                let over = |by: NonZeroU32| (i128::from(folded) / i128::from(by.get())) as Self;
                fold.divide_by.map_or(folded, over)
            }
            fn bits(self) -> Self {
                self
            }
            fn is_finite(self) -> bool {
                true
            }
        }
    )*};
}

reference_of_integers!(i8, u8, i16, u16, i32, u32, i64, u64);

macro_rules! reference_of_floats {
    ($(
        $float:ty, $bits:ty, $wide:ty, $widen:expr, $round:expr, $infinite:expr, $nan:expr,
        $normal:expr;
    )*) => {$(
        impl Reference for $float {
            type Bits = $bits;

            fn sample(random: u64) -> Self {
                let infinity: $bits = $infinite;
                let sign = 1 << (<$bits>::BITS - 1);
                // Zero, the least and greatest subnormal, the least and greatest normal number,
                // infinity, a signalling and a quiet NaN with payloads.
                let corners = [0, 1, $normal - 1, $normal, infinity - 1, infinity,
                    infinity | 1, $nan | 3];
                let bits = match (random % 32) as usize {
                    // Far too rare among random bits for NaN not to hide all else.
                    corner if corner < corners.len() => corners[corner],
                    8..16 => return $round((random >> 16) as u8 as $wide / 8.0 - 16.0),
                    _ => ((random >> 16) as $bits & !sign) % infinity,
                };
                Self::from_bits(if random & 1 << 15 == 0 { bits } else { bits | sign })
            }
            fn fold(fold: &Fold, inputs: &[Self]) -> Self {
                let factor = fold.factor.map(|factor| factor as $wide);
                let wide = inputs.iter().map(|&x| $widen(x));
                let wide = wide.map(|x| factor.map_or(x, |factor| x * factor));
                let folded = match fold.op {
                    _ if inputs.iter().any(|x| x.is_nan()) => <$wide>::NAN,
                    ReduceOp::Sum | ReduceOp::Average => wide.reduce(|a, b| a + b).unwrap(),
                    ReduceOp::Product => wide.reduce(|a, b| a * b).unwrap(),
                    ReduceOp::Min => wide.min_by(<$wide>::total_cmp).unwrap(),
                    ReduceOp::Max => wide.max_by(<$wide>::total_cmp).unwrap(),
                    other => panic!("no reference for {other}"),
                };
                let result = fold.divide_by.map_or(folded, |by| folded / by.get() as $wide);
                if result.is_nan() { Self::from_bits($nan) } else { $round(result) }
            }
            fn bits(self) -> $bits {
                self.to_bits()
            }
            fn is_finite(self) -> bool {
                self.is_finite()
            }
        }
    )*};
}

reference_of_floats! {
    f8e4m3, u8, f32, f8e4m3::to_f32, f8e4m3::from_f32, 0x7f, 0x7f, 0x08;
    f8e5m2, u8, f32, f8e5m2::to_f32, f8e5m2::from_f32, 0x7c, 0x7e, 0x04;
    f16, u16, f32, f16::to_f32, f16::from_f32, 0x7c00, 0x7e00, 0x0400;
    bf16, u16, f32, bf16::to_f32, bf16::from_f32, 0x7f80, 0x7fc0, 0x0080;
    f32, u32, f32, f32::from, f32::from, 0x7f80_0000, 0x7fc0_0000, 0x0080_0000;
    f64, u64, f64, f64::from, f64::from, 0x7ff0 << 48, 0x7ff8 << 48, 0x0010 << 48;
}

impl Reference for Bool {
    type Bits = u8;

    fn sample(random: u64) -> Self {
        Self::from_byte(if random & 1 == 0 { 0 } else { (random >> 8) as u8 })
    }
    fn fold(fold: &Fold, inputs: &[Self]) -> Self {
        let mut truths = inputs.iter().map(|x| x.get());
        Self::new(match fold.op {
            ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr => truths.any(|x| x),
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => truths.all(|x| x),
            ReduceOp::BitXor => truths.filter(|x| *x).count() % 2 == 1,
            other => panic!("no reference for {other}"),
        })
    }
    fn bits(self) -> u8 {
        self.to_byte()
    }
    fn is_finite(self) -> bool {
        true
    }
}

/// Calls the generic function for every element type.
macro_rules! for_each_element {
    ($check:ident($($argument:expr),*)) => {
        $check::<unisum_kernels::f8e4m3>($($argument),*);
        $check::<unisum_kernels::f8e5m2>($($argument),*);
        $check::<unisum_kernels::Bool>($($argument),*);
        $check::<half::f16>($($argument),*);
        $check::<half::bf16>($($argument),*);
        $check::<f32>($($argument),*);
        $check::<f64>($($argument),*);
        $check::<i8>($($argument),*);
        $check::<u8>($($argument),*);
        $check::<i16>($($argument),*);
        $check::<u16>($($argument),*);
        $check::<i32>($($argument),*);
        $check::<u32>($($argument),*);
        $check::<i64>($($argument),*);
        $check::<u64>($($argument),*);
    };
}
pub(crate) use for_each_element;

/// Elements that are the same in each run for the same `seed` (SplitMix64).
pub(crate) fn samples<T: Reference>(count: usize, mut seed: u64) -> Vec<T> {
    let next = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        T::sample(mixed ^ (mixed >> 31))
    };
    std::iter::repeat_with(next).take(count).collect()
}
