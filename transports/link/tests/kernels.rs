//! Every kernel against a plain scalar reference, bit by bit.

use std::fmt::{Debug, LowerHex};
use std::num::NonZeroU32;

use half::{bf16, f16};
use proptest::prelude::*;
use unisum_link::kernels::{Fold, Isa};
use unisum_link::{Dtype, Element, ReduceOp};

/// The reference: what `ReduceOp` documents, one element at a time.
trait Reference: Element + Debug {
    type Bits: Copy + Debug + PartialEq + LowerHex;
    /// Corner cases, and some more bits made from `random`.
    fn sample(random: u64) -> Self;
    fn fold(op: ReduceOp, inputs: &[Self], divisor: Option<NonZeroU32>) -> Self;
    fn bits(self) -> Self::Bits;
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
            fn fold(op: ReduceOp, inputs: &[Self], divisor: Option<NonZeroU32>) -> Self {
                let step = match op {
                    ReduceOp::Sum | ReduceOp::Average => Self::wrapping_add,
                    ReduceOp::Product => Self::wrapping_mul,
                    ReduceOp::Min => Ord::min,
                    ReduceOp::Max => Ord::max,
                    other => panic!("no reference for {other}"),
                };
                let folded = inputs.iter().copied().reduce(step).unwrap();
                divisor.map_or(folded, |by| (i128::from(folded) / i128::from(by.get())) as Self)
            }
            fn bits(self) -> Self {
                self
            }
        }
    )*};
}

reference_of_integers!(i8, u8, i16, u16, i32, u32, i64, u64);

macro_rules! reference_of_floats {
    ($(
        $float:ty, $bits:ty, $wide:ty, $widen:expr, $round:expr, $nan:expr, $normal:expr;
    )*) => {$(
        impl Reference for $float {
            type Bits = $bits;

            fn sample(random: u64) -> Self {
                let infinity = Self::INFINITY.to_bits();
                let sign = 1 << (<$bits>::BITS - 1);
                // Zero, the least and greatest subnormal, the least and greatest normal number,
                // infinity, a signalling and a quiet NaN with payloads.
                let corners = [0, 1, $normal - 1, $normal, infinity - 1, infinity,
                    infinity + 1, $nan + 3];
                let bits = match (random % 32) as usize {
                    // Far too rare among random bits for NaN not to hide all else.
                    corner if corner < corners.len() => corners[corner],
                    8..16 => return $round((random >> 16) as u8 as $wide / 8.0 - 16.0),
                    _ => ((random >> 16) as $bits & !sign) % infinity,
                };
                Self::from_bits(if random & 1 << 15 == 0 { bits } else { bits | sign })
            }
            fn fold(op: ReduceOp, inputs: &[Self], divisor: Option<NonZeroU32>) -> Self {
                let wide = inputs.iter().map(|&x| $widen(x));
                let folded = match op {
                    _ if inputs.iter().any(|x| x.is_nan()) => <$wide>::NAN,
                    ReduceOp::Sum | ReduceOp::Average => wide.reduce(|a, b| a + b).unwrap(),
                    ReduceOp::Product => wide.reduce(|a, b| a * b).unwrap(),
                    ReduceOp::Min => wide.min_by(<$wide>::total_cmp).unwrap(),
                    ReduceOp::Max => wide.max_by(<$wide>::total_cmp).unwrap(),
                    other => panic!("no reference for {other}"),
                };
                let result = divisor.map_or(folded, |by| folded / by.get() as $wide);
                if result.is_nan() { Self::from_bits($nan) } else { $round(result) }
            }
            fn bits(self) -> $bits {
                self.to_bits()
            }
        }
    )*};
}

reference_of_floats! {
    f16, u16, f32, f16::to_f32, f16::from_f32, 0x7e00, 0x0400;
    bf16, u16, f32, bf16::to_f32, bf16::from_f32, 0x7fc0, 0x0080;
    f32, u32, f32, f32::from, f32::from, 0x7fc0_0000, 0x0080_0000;
    f64, u64, f64, f64::from, f64::from, 0x7ff8_0000_0000_0000, 0x0010_0000_0000_0000;
}

/// Calls the generic function for every element type.
macro_rules! for_each_element {
    ($check:ident($($argument:expr),*)) => {
        $check::<f16>($($argument),*);
        $check::<bf16>($($argument),*);
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

/// Elements that are the same in each run for the same `seed` (SplitMix64).
fn samples<T: Reference>(count: usize, mut seed: u64) -> Vec<T> {
    let next = || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        T::sample(mixed ^ (mixed >> 31))
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Bytes at an offset from the alignment of every element, with a guard on both sides.
struct Misaligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Misaligned {
    const GUARD: u8 = 0xa5;

    fn new<T: Element>(values: &[T], offset: usize) -> Self {
        let len = size_of_val(values);
        let mut bytes = vec![Self::GUARD; len + 32];
        let start = bytes.as_ptr().align_offset(16) + offset;
        // SAFETY: an element is plain data without padding, so its bytes may be read.
        let raw = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), len) };
        bytes[start..start + len].copy_from_slice(raw);
        Self { bytes, start, len }
    }

    fn pointer(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }

    fn values<T: Element>(&self) -> Vec<T> {
        let inside = self.start..self.start + self.len;
        let guards = self.bytes[..inside.start].iter().chain(&self.bytes[inside.end..]);
        assert!(guards.copied().all(|byte| byte == Self::GUARD), "wrote outside the buffer");
        let (elements, _) = self.bytes[inside].as_chunks::<1>();
        let element = |chunk: &[[u8; 1]]| {
            // SAFETY: the chunk has the size of an element, and any bytes are one.
            unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }
        };
        elements.chunks_exact(size_of::<T>()).map(element).collect()
    }
}

/// Where a fold writes.
#[derive(Clone, Copy, Debug)]
enum Destination {
    Apart,
    Source(usize),
}

fn run<T: Reference>(
    fold: Fold,
    isa: Isa,
    inputs: &[Vec<T>],
    offset: usize,
    destination: Destination,
) -> Vec<T> {
    let count = inputs[0].len();
    let mut buffers: Vec<_> = (0..)
        .zip(inputs)
        .map(|(i, input)| Misaligned::new(input, (offset * (i + 1)) % 16))
        .collect();
    buffers.push(Misaligned::new(&samples::<T>(count, 99), offset));
    let pointers: Vec<*mut u8> = buffers.iter_mut().map(Misaligned::pointer).collect();
    let sources: Vec<*const u8> =
        pointers[..inputs.len()].iter().map(|pointer| pointer.cast_const()).collect();
    let target = match destination {
        Destination::Apart => inputs.len(),
        Destination::Source(source) => source,
    };
    // SAFETY: every buffer has `count` elements; the target is apart or exactly a source.
    unsafe { fold.run_with(isa, pointers[target], &sources, count) };
    for (i, (buffer, input)) in buffers.iter().zip(inputs).enumerate() {
        let kept = buffer.values::<T>().iter().map(|x| x.bits()).eq(input.iter().map(|x| x.bits()));
        assert!(kept || i == target, "wrote to source {i}");
    }
    buffers[target].values()
}

/// All the ways to fold that are allowed.
fn folds(dtype: Dtype) -> impl Iterator<Item = Fold> {
    let whole = ReduceOp::ALL.map(|op| Fold { dtype, op, divide_by: None });
    let divided = [1, 2, 3, 7, 128, 255, 1000, 65536, 1 << 31, u32::MAX].map(|divisor| Fold {
        dtype,
        op: ReduceOp::Average,
        divide_by: NonZeroU32::new(divisor),
    });
    whole.into_iter().chain(divided)
}

#[track_caller]
fn check<T: Reference>(
    fold: Fold,
    inputs: &[Vec<T>],
    offsets: &[usize],
    destinations: &[Destination],
) {
    let column = |i: usize| inputs.iter().map(|input| input[i]).collect::<Vec<T>>();
    let expected: Vec<T> =
        (0..inputs[0].len()).map(|i| T::fold(fold.op, &column(i), fold.divide_by)).collect();
    for isa in Isa::available() {
        for &offset in offsets {
            for &destination in destinations {
                let got = run(fold, isa, inputs, offset, destination);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert!(
                        got.bits() == expected.bits(),
                        "{fold:?} on {isa}, {} sources, element {i} of {}, offset {offset}, \
                         {destination:?}: {:?} gave {got:?} ({:x}), expected {expected:?} ({:x})",
                        inputs.len(),
                        inputs[0].len(),
                        column(i),
                        got.bits(),
                        expected.bits(),
                    );
                }
            }
        }
    }
}

fn inputs<T: Reference>(sources: usize, count: usize) -> Vec<Vec<T>> {
    (0..sources).map(|source| samples(count, (source * 7919 + count) as u64)).collect()
}

#[test]
fn every_kernel_gives_the_bits_of_the_reference() {
    fn grid<T: Reference>() {
        let counts: &[usize] = if cfg!(miri) {
            &[0, 1, 9]
        } else {
            &[0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 257, 1000]
        };
        let offsets: &[usize] = if cfg!(miri) { &[1] } else { &[0, 1, 4] };
        for fold in folds(T::DTYPE) {
            for sources in [1, 2, 3, 4, 5, 6, 16] {
                for &count in counts {
                    check(fold, &inputs::<T>(sources, count), offsets, &[Destination::Apart]);
                }
            }
        }
    }
    for_each_element!(grid());
}

#[test]
fn buffers_larger_than_the_accumulator_give_the_bits_of_the_reference() {
    fn large<T: Reference>() {
        for fold in folds(T::DTYPE) {
            check(fold, &inputs::<T>(4, 4107), &[1], &[Destination::Apart]);
            check(fold, &inputs::<T>(9, 4107), &[0], &[Destination::Source(3)]);
        }
    }
    if !cfg!(miri) {
        for_each_element!(large());
    }
}

#[test]
fn the_destination_may_be_any_source() {
    fn in_place<T: Reference>() {
        let count = if cfg!(miri) { 9 } else { 777 };
        for fold in folds(T::DTYPE) {
            for sources in [1, 2, 3, 4, 5] {
                let destinations: Vec<_> = (0..sources).map(Destination::Source).collect();
                check(fold, &inputs::<T>(sources, count), &[0, 3], &destinations);
            }
        }
    }
    for_each_element!(in_place());
}

#[test]
fn every_count_up_to_three_lines_gives_the_bits_of_the_reference() {
    fn counts<T: Reference>() {
        let destinations = [Destination::Apart, Destination::Source(0), Destination::Source(1)];
        for fold in folds(T::DTYPE) {
            for count in 0..=3 * 64 / size_of::<T>() + 1 {
                for sources in [2, 3] {
                    check(fold, &inputs::<T>(sources, count), &[0, 3], &destinations);
                }
            }
        }
    }
    if !cfg!(miri) {
        for_each_element!(counts());
    }
}

#[test]
fn every_small_integer_is_divided_exactly() {
    fn all<T: Reference>(from_bits: fn(u16) -> T) {
        let step = if cfg!(miri) { 991 } else { 1 };
        let values: Vec<T> = (0..=u16::MAX).step_by(step).map(from_bits).collect();
        for fold in folds(T::DTYPE).filter(|fold| fold.divide_by.is_some()) {
            check(fold, std::slice::from_ref(&values), &[0], &[Destination::Apart]);
        }
    }
    all(|bits| bits as i8);
    all(|bits| bits as u8);
    all(|bits| bits as i16);
    all(|bits| bits);
}

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
                    let fold = Fold { dtype: T::DTYPE, op, divide_by: None };
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
        let fold = Fold { dtype: Dtype::F32, op, divide_by: None };
        // SAFETY: every pointer is to one `f32`.
        unsafe { fold.run((&raw mut result).cast(), &sources, 1) };
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
    let fold = Fold { dtype: Dtype::F16, op: ReduceOp::Sum, divide_by: None };
    let got = run(fold, Isa::best(), &inputs, 0, Destination::Apart);
    assert_eq!(got, [f16::from_f32(2050.0)]);
    // The sum of these is beyond f16, their average is not.
    let inputs = [60000.0, 60000.0].map(|value| vec![f16::from_f32(value)]);
    let fold = Fold { op: ReduceOp::Average, divide_by: NonZeroU32::new(2), ..fold };
    let got = run(fold, Isa::best(), &inputs, 0, Destination::Apart);
    assert_eq!(got, [f16::from_f32(60000.0)]);
}

#[test]
fn integers_wrap_and_their_average_is_truncated_toward_zero() {
    let sum = Fold { dtype: Dtype::I8, op: ReduceOp::Sum, divide_by: None };
    let average = Fold { op: ReduceOp::Average, divide_by: NonZeroU32::new(2), ..sum };
    let got = |fold, inputs: [i8; 2]| {
        run(fold, Isa::best(), &inputs.map(|x| vec![x]), 0, Destination::Apart)[0]
    };
    assert_eq!(got(sum, [127, 1]), -128);
    assert_eq!(got(average, [-3, 0]), -1);
    assert_eq!(got(average, [127, 1]), -64);
}

#[test]
#[should_panic(expected = "a fold needs a source")]
fn a_fold_without_sources_panics() {
    let fold = Fold { dtype: Dtype::U8, op: ReduceOp::Sum, divide_by: None };
    // SAFETY: no element is touched.
    unsafe { fold.run(std::ptr::null_mut(), &[], 0) };
}

#[test]
#[should_panic(expected = "max cannot be averaged")]
fn dividing_what_is_not_a_sum_panics() {
    let fold = Fold { dtype: Dtype::U8, op: ReduceOp::Max, divide_by: NonZeroU32::new(2) };
    // SAFETY: no element is touched.
    unsafe { fold.run(std::ptr::null_mut(), &[std::ptr::null()], 0) };
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 64 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_shape_gives_the_bits_of_the_reference(
        sources in 1..20_usize, count in 0..200_usize, offset in 0..16_usize,
        target in 0..20_usize, seed: u64,
    ) {
        fn shape<T: Reference>(
            sources: usize, count: usize, offset: usize, target: Destination, seed: u64,
        ) {
            let inputs: Vec<Vec<T>> =
                (0..sources as u64).map(|i| samples(count, seed.wrapping_add(i << 32))).collect();
            for fold in folds(T::DTYPE) {
                check(fold, &inputs, &[offset], &[target]);
            }
        }
        let target =
            if target < sources { Destination::Source(target) } else { Destination::Apart };
        for_each_element!(shape(sources, count, offset, target, seed));
    }
}
