//! Folds that a user's function does.

use unisum_kernels::{Bool, CustomOp, Dtype, Element, ReduceOp};
use unisum_kernels::{Fold, Folded};

use crate::harness::Misaligned;
use crate::reference::{Reference, samples};

fn fold<T: Element>(custom: CustomOp<T>) -> Fold {
    Fold { custom: Some(custom.erased()), ..Fold::new(T::DTYPE, ReduceOp::Sum) }
}

/// Folds `inputs` at an offset from their alignment into the buffer at `target`, or apart.
fn run<T: Element>(
    fold: Fold,
    inputs: &[Vec<T>],
    offset: usize,
    target: usize,
) -> (Folded, Vec<T>) {
    let apart = [vec![inputs[0][0]; inputs[0].len()]];
    let all = inputs.iter().chain(&apart);
    let mut buffers: Vec<_> = all.map(|input| Misaligned::new(input, offset)).collect();
    let pointers: Vec<*mut u8> = buffers.iter_mut().map(Misaligned::pointer).collect();
    let sources: Vec<*const u8> =
        pointers[..inputs.len()].iter().map(|pointer| pointer.cast_const()).collect();
    // SAFETY: the buffers have as many elements, of the type of the function's; the target is
    // apart or exactly a source.
    let outcome = unsafe { fold.run(pointers[target], &sources, inputs[0].len()) };
    (outcome, buffers[target].values())
}

/// Neither associative nor commutative: any other order gives something else.
fn mix(acc: &mut [u32], other: &[u32]) {
    assert_eq!(acc.len(), other.len());
    for (acc, other) in acc.iter_mut().zip(other) {
        *acc = acc.wrapping_mul(31).wrapping_add(*other).rotate_left(5);
    }
}

#[test]
fn sources_are_folded_in_their_order_whichever_the_destination_is() {
    let counts: &[usize] = if cfg!(miri) { &[3] } else { &[1, 7, 1023, 1024, 1025, 5000] };
    for &count in counts {
        for ranks in [1, 2, 3, 5] {
            let inputs: Vec<Vec<u32>> = (0..ranks).map(|rank| samples(count, rank)).collect();
            let mut expected = inputs[0].clone();
            inputs[1..].iter().for_each(|other| mix(&mut expected, other));
            for offset in [0, 1, 4] {
                for target in 0..=inputs.len() {
                    let result = run(fold(CustomOp::ordered(mix)), &inputs, offset, target);
                    assert_eq!(result, (Folded::Done, expected.clone()), "{ranks} into {target}");
                }
            }
        }
    }
}

#[test]
fn order_matters_only_where_it_was_said_to() {
    assert!(!CustomOp::ordered(mix).erased().is_commutative());
    assert!(CustomOp::commutative(mix).erased().is_commutative());
}

#[test]
fn a_panic_of_the_function_is_an_outcome() {
    fn fails_late(acc: &mut [u64], other: &[u64]) {
        assert!(!other.contains(&7), "this panic is part of a test");
        acc.copy_from_slice(other);
    }
    let mut inputs = vec![vec![1_u64; 2000]; 3];
    assert_eq!(run(fold(CustomOp::ordered(fails_late)), &inputs, 0, 1).0, Folded::Done);
    inputs[2][1999] = 7;
    assert_eq!(run(fold(CustomOp::ordered(fails_late)), &inputs, 0, 1).0, Folded::Panicked);
}

#[test]
fn results_are_canonical_and_watched() {
    fn take(acc: &mut [f32], other: &[f32]) {
        acc.copy_from_slice(other);
    }
    let watched = Fold { watch: true, ..fold(CustomOp::ordered(take)) };
    let mut inputs = vec![vec![0.0; 3000]; 2];
    inputs[0][0] = f32::NAN;
    assert_eq!(run(watched, &inputs, 0, 2), (Folded::Done, vec![0.0; 3000]));
    inputs[1][10] = f32::from_bits(0xffc0_1234);
    let (outcome, result) = run(watched, &inputs, 0, 2);
    assert_eq!((outcome, result[10].to_bits()), (Folded::Nonfinite, 0x7fc0_0000));

    fn keep(_: &mut [Bool], _: &[Bool]) {}
    let inputs = vec![vec![Bool::from_byte(4)]; 2];
    let (_, result) = run(fold(CustomOp::ordered(keep)), &inputs, 0, 0);
    assert_eq!(result[0].to_byte(), 1);
}

#[test]
fn a_function_may_fold_any_type() {
    fn second<T: Element>(acc: &mut [T], other: &[T]) {
        acc.copy_from_slice(other);
    }
    fn check<T: Reference>() {
        let last = samples::<T>(9, 5);
        let (outcome, result) =
            run(fold(CustomOp::ordered(second::<T>)), &[samples(9, 4), last.clone()], 1, 0);
        let copied = Fold::new(T::DTYPE, ReduceOp::Sum);
        assert_eq!(outcome, Folded::Done);
        for (is, from) in result.iter().zip(last) {
            assert_eq!(is.bits(), T::fold(&copied, &[from]).bits(), "{}", T::DTYPE);
        }
    }
    crate::reference::for_each_element!(check());
    assert_eq!(Dtype::ALL.len(), 15, "every type is checked");
}
