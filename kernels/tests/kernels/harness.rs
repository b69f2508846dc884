//! Runs a kernel on every instruction set and compares it with the reference.

use std::num::NonZeroU32;

use unisum_kernels::{Dtype, Element, ReduceOp};
use unisum_kernels::{Fold, Folded, Isa};

use crate::reference::{Reference, samples};

/// Bytes at an offset from the alignment of every element, with a guard on both sides.
pub(crate) struct Misaligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Misaligned {
    const GUARD: u8 = 0xa5;

    pub(crate) fn new<T: Element>(values: &[T], offset: usize) -> Self {
        let len = size_of_val(values);
        let mut bytes = vec![Self::GUARD; len + 32];
        let start = bytes.as_ptr().align_offset(16) + offset;
        // SAFETY: an element is plain data without padding, so its bytes may be read.
        let raw = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), len) };
        bytes[start..start + len].copy_from_slice(raw);
        Self { bytes, start, len }
    }

    pub(crate) fn pointer(&mut self) -> *mut u8 {
        self.bytes[self.start..].as_mut_ptr()
    }

    pub(crate) fn values<T: Element>(&self) -> Vec<T> {
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
pub(crate) enum Destination {
    Apart,
    Source(usize),
}

pub(crate) fn run<T: Reference>(
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
    let outcome = unsafe { fold.run_with(isa, pointers[target], &sources, count) };
    let result = buffers[target].values::<T>();
    let nonfinite = fold.watch && result.iter().any(|x| !x.is_finite());
    assert_eq!(outcome, if nonfinite { Folded::Nonfinite } else { Folded::Done }, "{fold:?}");
    for (i, (buffer, input)) in buffers.iter().zip(inputs).enumerate() {
        let kept = buffer.values::<T>().iter().map(|x| x.bits()).eq(input.iter().map(|x| x.bits()));
        assert!(kept || i == target, "wrote to source {i}");
    }
    result
}

/// All the ways to fold that are allowed.
pub(crate) fn folds(dtype: Dtype) -> impl Iterator<Item = Fold> {
    let ops = ReduceOp::ALL.into_iter().filter(move |op| op.is_defined_for(dtype));
    let whole = ops.map(move |op| Fold::new(dtype, op));
    let divided = [1, 2, 3, 7, 128, 255, 1000, 65536, 1 << 31, u32::MAX].map(|divisor| Fold {
        divide_by: NonZeroU32::new(divisor),
        ..Fold::new(dtype, ReduceOp::Average)
    });
    let factors = if dtype.is_float() { &[0.5, -3.0, 1.0 / 3.0, 1e-30, 1e6][..] } else { &[] };
    let weighted = factors
        .iter()
        .map(move |&factor| Fold { factor: Some(factor), ..Fold::new(dtype, ReduceOp::Sum) });
    let divided = divided.into_iter().filter(|fold| fold.op.is_defined_for(fold.dtype));
    let folds = whole.chain(divided).chain(weighted);
    folds.flat_map(|fold| [fold, Fold { watch: true, ..fold }])
}

#[track_caller]
pub(crate) fn check<T: Reference>(
    fold: Fold,
    inputs: &[Vec<T>],
    offsets: &[usize],
    destinations: &[Destination],
) {
    let column = |i: usize| inputs.iter().map(|input| input[i]).collect::<Vec<T>>();
    let expected: Vec<T> = (0..inputs[0].len()).map(|i| T::fold(&fold, &column(i))).collect();
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

pub(crate) fn inputs<T: Reference>(sources: usize, count: usize) -> Vec<Vec<T>> {
    (0..sources).map(|source| samples(count, (source * 7919 + count) as u64)).collect()
}
