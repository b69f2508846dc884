//! Every kernel against a plain scalar reference, bit by bit; the encodings against their bounds.

mod custom;
mod edges;
mod encodings;
mod floats;
mod harness;
mod reference;
mod watch;

use std::num::NonZeroU32;

use proptest::prelude::*;
use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Isa};

use crate::harness::{Destination, check, folds, inputs, run};
use crate::reference::{Reference, for_each_element, samples};

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

#[test]
fn integers_wrap_and_their_average_is_truncated_toward_zero() {
    let sum = Fold::new(Dtype::I8, ReduceOp::Sum);
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
    let fold = Fold::new(Dtype::U8, ReduceOp::Sum);
    // SAFETY: no element is touched.
    let _ = unsafe { fold.run(std::ptr::null_mut(), &[], 0) };
}

#[test]
#[should_panic(expected = "cannot be averaged")]
fn dividing_what_is_not_a_sum_panics() {
    let divide_by = NonZeroU32::new(2);
    let fold = Fold { divide_by, ..Fold::new(Dtype::U8, ReduceOp::Max) };
    // SAFETY: no element is touched.
    let _ = unsafe { fold.run(std::ptr::null_mut(), &[std::ptr::null()], 0) };
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
