//! Watching for what is not finite.

use half::{bf16, f16};
use unisum_kernels::Fold;
use unisum_kernels::{ReduceOp, f8e4m3, f8e5m2};

use crate::harness::{Destination, check};
use crate::reference::Reference;

/// One element that is infinite or NaN, wherever it lies, and the greatest finite one.
#[test]
fn one_element_that_is_not_finite_is_found_wherever_it_lies() {
    fn all<T: Reference>(zero: T, specials: &[T]) {
        let count = if cfg!(miri) { 35 } else { 2111 };
        for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max] {
            let fold = Fold { watch: true, ..Fold::new(T::DTYPE, op) };
            for at in (0..70.min(count)).chain((70..count).step_by(61)).chain([count - 1]) {
                for &special in specials {
                    let mut values = vec![zero; count];
                    values[at] = special;
                    check(fold, &[values.clone(), values], &[0], &[Destination::Source(0)]);
                }
            }
        }
    }
    all(f8e4m3::from_bits(0), &[f8e4m3::NAN, f8e4m3::from_bits(0xff), f8e4m3::from_bits(0x76)]);
    all(f8e5m2::from_bits(0), &[f8e5m2::INFINITY, f8e5m2::NAN, f8e5m2::from_bits(0xfb)]);
    all(f16::ZERO, &[f16::NEG_INFINITY, f16::NAN, f16::from_bits(0xfbff)]);
    all(bf16::ZERO, &[bf16::INFINITY, bf16::NAN, bf16::MIN]);
    all(0.0_f32, &[f32::INFINITY, -f32::NAN, f32::MAX]);
    all(0.0_f64, &[f64::NEG_INFINITY, f64::NAN, f64::MIN]);
}
