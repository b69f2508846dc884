//! Folds, compared with those of the host.

use std::num::NonZeroU32;

use unisum_kernels::cuda::{DIVIDES, FoldTask, SCALES, SOURCES_MAX, WATCHES, fold_kernel};
use unisum_kernels::{Dtype, Fold, Folded, ReduceOp};

use super::device::{Device, Grid, devices};
use crate::harness::{Destination, Misaligned, folds};
use crate::inputs;

/// How the memories of a fold lie towards multiples of 16 bytes: by how many elements behind them.
#[derive(Clone, Copy, Debug)]
enum Alignment {
    /// All by as many.
    Alike(usize),
    /// One source, or where the result goes, if there is no such source, by one more.
    Unlike(usize),
}

const GRIDS: [Grid; 4] = [Grid(1, 1), Grid(1, 32), Grid(3, 7), Grid(2, 256)];

/// Where a fold finds its sources, in bytes, and writes its result.
struct Shape<'a> {
    inputs: &'a [Vec<u8>],
    grid: Grid,
    alignment: Alignment,
    destination: Destination,
}

impl Shape<'_> {
    fn of(inputs: &[Vec<u8>]) -> Shape<'_> {
        let alignment = Alignment::Alike(0);
        Shape { inputs, grid: Grid(1, 64), alignment, destination: Destination::Apart }
    }

    /// The sources, and one more memory.
    fn memories(&self, dtype: Dtype) -> Vec<Misaligned> {
        let elements = |i: usize| match self.alignment {
            Alignment::Alike(elements) => elements,
            Alignment::Unlike(at) => usize::from(at.min(self.inputs.len()) == i),
        };
        let apart = self.inputs[0].iter().rev().copied().collect();
        let all = self.inputs.iter().chain([&apart]).enumerate();
        all.map(|(i, bytes)| Misaligned::new(bytes, elements(i) * dtype.bytes())).collect()
    }

    fn target(&self) -> usize {
        match self.destination {
            Destination::Apart => self.inputs.len(),
            Destination::Source(source) => source,
        }
    }

    /// All memories after a fold on the host, and whether a result is not finite.
    fn on_host(&self, fold: &Fold) -> (Vec<Vec<u8>>, bool) {
        let mut memories = self.memories(fold.dtype);
        let pointers: Vec<*mut u8> = memories.iter_mut().map(Misaligned::pointer).collect();
        let sources: Vec<*const u8> = pointers.iter().map(|it| it.cast_const()).collect();
        let (sources, target) = (&sources[..self.inputs.len()], pointers[self.target()]);
        let count = self.inputs[0].len() / fold.dtype.bytes();
        // SAFETY: every memory has `count` elements; the target is apart or exactly a source.
        let folded = unsafe { fold.run(target, sources, count) };
        (memories.iter().map(Misaligned::values).collect(), folded == Folded::Nonfinite)
    }

    /// The same on a device.
    fn on_device(&self, fold: &Fold, device: &dyn Device) -> (Vec<Vec<u8>>, bool) {
        let kernel = fold_kernel(fold.op, fold.dtype).unwrap();
        let mut memories = self.memories(fold.dtype);
        // The last one is the word that is set.
        memories.push(Misaligned::new(&[0_u8; 4], 0));
        let addresses: Vec<u64> = memories.iter_mut().map(|it| device.lend(it)).collect();
        let mut task = FoldTask {
            to: addresses[self.target()],
            from: [0; SOURCES_MAX],
            count: (self.inputs[0].len() / kernel.unit_bytes) as u64,
            // Without their flags they mean nothing.
            divisor: fold.divide_by.map_or(f64::NAN, |by| by.get().into()),
            factor: fold.factor.unwrap_or(f64::NAN),
            nonfinite: if fold.watch { addresses[self.inputs.len() + 1] } else { 0 },
            sources: self.inputs.len() as u32,
            flags: flags_of(fold),
        };
        let sources = &addresses[..self.inputs.len()];
        task.from[..sources.len()].copy_from_slice(sources);
        // SAFETY: every memory has as many elements as the task says.
        unsafe { device.fold(&kernel.name, self.grid, &task) };
        memories.iter_mut().zip(addresses).for_each(|(it, at)| device.take_back(it, at));
        let word: Vec<u8> = memories.pop().unwrap().values();
        let found = u32::from_ne_bytes(word.try_into().unwrap());
        assert!(found <= 1, "{found}");
        (memories.iter().map(Misaligned::values).collect(), found == 1)
    }

    /// Runs a fold on the host and on all devices, and compares all that they wrote.
    fn compare(&self, fold: &Fold) {
        let expected = self.on_host(fold);
        devices().for_each(|device| self.check(fold, &expected, self.on_device(fold, device)));
    }

    fn check(&self, fold: &Fold, expected: &(Vec<Vec<u8>>, bool), got: (Vec<Vec<u8>>, bool)) {
        if *expected == got {
            return;
        }
        let what = || format!("{fold:?}, {} sources, {:?}", self.inputs.len(), self.alignment);
        for (memory, (expected, got)) in expected.0.iter().zip(&got.0).enumerate() {
            let [expected, got] = [expected, got].map(|bytes| bytes.chunks(fold.dtype.bytes()));
            for (at, (expected, got)) in expected.zip(got).enumerate() {
                let range = at * got.len()..(at + 1) * got.len();
                let sources: Vec<&[u8]> = self.inputs.iter().map(|it| &it[range.clone()]).collect();
                assert!(
                    expected == got,
                    "{}: element {at} of memory {memory} for {sources:x?}: {got:x?}, expected \
                     {expected:x?}",
                    what()
                );
            }
        }
        panic!("{}: a result is not finite: {}, expected {}", what(), got.1, expected.1);
    }
}

pub(crate) fn flags_of(fold: &Fold) -> u32 {
    fold.divide_by.map_or(0, |_| DIVIDES)
        | fold.factor.map_or(0, |_| SCALES)
        | if fold.watch { WATCHES } else { 0 }
}

#[test]
fn every_kernel_gives_the_bits_of_the_host() {
    for dtype in Dtype::ALL {
        let sources = [1, 2, 3, 4, 5, 9, 32].into_iter();
        for (sources, count) in sources.flat_map(|it| [0, 1, 15, 17, 257].map(|n| (it, n))) {
            let inputs = inputs(dtype, sources, count);
            for (case, fold) in folds(dtype).enumerate() {
                // Both that watch and that do not, in turns.
                if fold.watch != (count + sources).is_multiple_of(2) {
                    continue;
                }
                let grid = GRIDS[(case + sources + count) % GRIDS.len()];
                Shape { grid, ..Shape::of(&inputs) }.compare(&fold);
            }
        }
    }
}

#[test]
fn memory_may_be_aligned_to_the_element_alone() {
    for dtype in Dtype::ALL {
        let alike = (0..16 / dtype.bytes()).map(Alignment::Alike);
        let alignments: Vec<_> = alike.chain([0, 1, 2, 9].map(Alignment::Unlike)).collect();
        for count in [1, 3, 14, 16, 47, 100] {
            let inputs = inputs(dtype, 3, count);
            for fold in folds(dtype).filter(|fold| fold.watch) {
                for (i, &alignment) in alignments.iter().enumerate() {
                    let grid = GRIDS[(count + i) % GRIDS.len()];
                    Shape { grid, alignment, ..Shape::of(&inputs) }.compare(&fold);
                }
            }
        }
    }
}

#[test]
fn the_destination_may_be_any_source_of_a_device() {
    for dtype in Dtype::ALL {
        for sources in [1, 2, 5] {
            let inputs = inputs(dtype, sources, 77);
            for fold in folds(dtype).filter(|fold| fold.watch) {
                for destination in (0..sources).map(Destination::Source) {
                    for alignment in [Alignment::Alike(1), Alignment::Unlike(0)] {
                        let grid = Grid(2, 16);
                        let shape = Shape { inputs: &inputs, grid, alignment, destination };
                        shape.compare(&fold);
                    }
                }
            }
        }
    }
}

/// Alone, so that it is canonical or divided, and with values that tell apart how it is rounded.
#[test]
fn every_value_of_16_bits_gives_the_bits_of_the_host() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    // Zeros, the least, the greatest, odd ones, infinities and NaN.
    let halves = &[0x0000, 0x8000, 0x0001, 0x7bff, 0x1555, 0x3c01, 0x7c00, 0xfe01][..];
    let upper_halves = &[0x0000, 0x8000, 0x0001, 0x7f7f, 0x3f81, 0x7f80, 0xff81][..];
    let integers = &[0, 1, 0x7fff, 0x8000, 0xffff][..];
    for (dtype, partners) in [
        (Dtype::F16, halves),
        (Dtype::Bf16, upper_halves),
        (Dtype::I16, integers),
        (Dtype::U16, integers),
    ] {
        for fold in folds(dtype).filter(|fold| fold.watch) {
            Shape::of(std::slice::from_ref(&all)).compare(&fold);
            for partner in partners {
                let partners = u16::to_ne_bytes(*partner).repeat(all.len() / 2);
                Shape::of(&[all.clone(), partners]).compare(&fold);
            }
        }
    }
}

#[test]
fn every_pair_of_8_bits_gives_the_bits_of_the_host() {
    let pairs = 0..=u16::MAX;
    let inputs: [Vec<u8>; 2] = [
        pairs.clone().map(|pair| pair as u8).collect(),
        pairs.map(|pair| (pair >> 8) as u8).collect(),
    ];
    for dtype in [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::Bool, Dtype::U8, Dtype::I8] {
        for fold in folds(dtype).filter(|fold| fold.watch) {
            Shape::of(&inputs).compare(&fold);
        }
    }
}

/// Subnormal results, and quotients that lie between two numbers.
#[test]
fn quotients_next_to_the_limits_give_the_bits_of_the_host() {
    let next = |bits: u32| [bits, bits | 1 << 31, bits + 1, bits + 2, bits + 3];
    let bits = [0, 1, 0x0080_0000, 0x00ff_fff0, 0x3f80_0000, 0x7f7f_fff0];
    let values: Vec<f32> = bits.into_iter().flat_map(next).map(f32::from_bits).collect();
    let half: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    let scaled = values.iter().map(|&value| f64::from(value) * f64::MIN_POSITIVE);
    let whole: Vec<u8> = scaled.flat_map(f64::to_ne_bytes).collect();
    for divisor in [1, 2, 3, 5, 7, 16, 10_000_019, 1 << 24, (1 << 24) + 1, u32::MAX] {
        for (dtype, bytes) in [(Dtype::F32, &half), (Dtype::F64, &whole)] {
            let divide_by = NonZeroU32::new(divisor);
            let fold = Fold { divide_by, ..Fold::new(dtype, ReduceOp::Average) };
            Shape::of(std::slice::from_ref(bytes)).compare(&fold);
        }
    }
}
