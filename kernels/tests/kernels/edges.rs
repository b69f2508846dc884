//! Poison around every buffer and at every edge within it: nothing outside is read into a result,
//! or written, whatever the length, the alignment and the instruction set.

use half::{bf16, f16};
use unisum_kernels::{Encoding, Fold, Folded, Isa, copy};
use unisum_kernels::{f8e4m3, f8e5m2};

use crate::harness::folds;
use crate::reference::{Reference, for_each_element, samples};

/// More than two of the longest vectors of bytes.
const COUNT_MAX: usize = if cfg!(miri) { 3 } else { 130 };
/// Poison on either side, more than any vector.
const MARGIN: usize = 128;
const LINE: usize = 64;

/// Infinities, NaNs, denormals, a negative zero and the greatest, of either sign; of integers the
/// least and greatest. There are 16 of them.
fn poison<T: Reference>(at: usize) -> T {
    let (kind, sign) = (at as u64 % 8, at as u64 / 8 % 2);
    // What makes a corner case, and truths whose byte is not 1.
    T::sample(0x7f00 + [6, 5, 0, 1, 7, 2, 4, 3][kind as usize] + (sign << 15))
}

fn bytes_of<T: Reference>(values: &[T]) -> Vec<u8> {
    // SAFETY: an element is plain data without padding, so its bytes may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }.to_vec()
}

/// Elements amid poison, at an offset from a cache line.
#[derive(Clone)]
struct Amid {
    /// In lines, so that a clone lies as this does.
    lines: Vec<[u64; LINE / 8]>,
    start: usize,
}

impl Amid {
    /// With the poison number `turn` right after the elements, and the one before it before them.
    fn new<T: Reference>(values: &[T], offset: usize, turn: usize) -> Self {
        let (size, len) = (size_of::<T>(), size_of_val(values));
        let lines = (2 * MARGIN + len + offset).div_ceil(LINE) + 1;
        let mut amid = Self { lines: vec![[0; LINE / 8]; lines], start: MARGIN + offset };
        let start = amid.start;
        let pattern = bytes_of(&(0..16).map(|at| poison(at + turn)).collect::<Vec<T>>());
        let bytes = amid.bytes();
        for (at, byte) in bytes.iter_mut().enumerate() {
            let from_end = at as isize - (start + len) as isize;
            *byte = pattern[from_end.rem_euclid(16 * size as isize) as usize];
        }
        bytes[start..start + len].copy_from_slice(&bytes_of(values));
        amid
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = size_of_val(&self.lines[..]);
        // SAFETY: the lines are plain numbers, borrowed as long as the bytes are.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    fn pointer(&mut self) -> *mut u8 {
        let start = self.start;
        self.bytes()[start..].as_mut_ptr()
    }

    /// The same with other elements, or at most as many.
    fn with<T: Reference>(&self, values: &[T]) -> Self {
        let (mut other, start) = (self.clone(), self.start);
        other.bytes()[start..][..size_of_val(values)].copy_from_slice(&bytes_of(values));
        other
    }
}

/// Folds the inputs on every instruction set, apart and into the first one.
fn check<T: Reference>(folds: &[Fold], inputs: &[Vec<T>], offset: usize, turn: usize) {
    let count = inputs[0].len();
    let amid = |(i, input): (usize, &Vec<T>)| Amid::new(input, (offset * (i + 1)) % LINE, turn + i);
    let mut sources: Vec<Amid> = inputs.iter().enumerate().map(amid).collect();
    let mut before = sources.clone();
    let apart = Amid::new(&samples::<T>(count, 99), offset, turn + 5);
    for fold in folds {
        let column = |i: usize| inputs.iter().map(|input| input[i]).collect::<Vec<T>>();
        let expected: Vec<T> = (0..count).map(|i| T::fold(fold, &column(i))).collect();
        let found = fold.watch && expected.iter().any(|x| !x.is_finite());
        for isa in Isa::available() {
            for is_apart in [true, false] {
                let mut target = if is_apart { apart.clone() } else { sources[0].clone() };
                let mut right = target.with(&expected);
                let mut pointers: Vec<*const u8> =
                    sources.iter_mut().map(|source| source.pointer().cast_const()).collect();
                let into = target.pointer();
                if !is_apart {
                    pointers[0] = into.cast_const();
                }
                // SAFETY: each buffer has `count` elements; the target is apart or the first one.
                let outcome = unsafe { fold.run_with(isa, into, &pointers, count) };
                let context =
                    || format!("{fold:?} on {isa}: {count} of {inputs:?}, offset {offset}");
                let told = if found { Folded::Nonfinite } else { Folded::Done };
                assert_eq!(outcome, told, "{}, {expected:?}", context());
                assert!(target.bytes() == right.bytes(), "{}, apart: {is_apart}", context());
            }
        }
    }
    for (source, before) in sources.iter_mut().zip(&mut before) {
        assert!(source.bytes() == before.bytes(), "wrote to a source: {inputs:?}");
    }
}

/// Values that no sum of a few makes infinite.
fn quiet<T: Reference>(count: usize, seed: u64) -> Vec<T> {
    (0..count as u64).map(|i| T::sample(8 + (seed + i) % 8 + ((37 * i + seed) << 16))).collect()
}

#[test]
fn nothing_around_a_buffer_is_folded_or_written() {
    fn all<T: Reference>() {
        let folds: Vec<Fold> = folds(T::DTYPE).collect();
        for count in 0..=COUNT_MAX {
            for sources in [1, 2, 3, 5] {
                let (offset, seed) = (7 * count + sources, (131 * sources + count) as u64);
                let any: Vec<Vec<T>> =
                    (0..sources).map(|i| samples(count, seed + i as u64)).collect();
                check(&folds, &any, offset % LINE, count);
                let calm: Vec<Vec<T>> =
                    (0..sources).map(|i| quiet(count, seed + i as u64)).collect();
                check(&folds, &calm, (offset * 3) % LINE, count + 1);
                check(&folds, &calm, 0, count + 2);
            }
        }
    }
    for_each_element!(all());
}

/// The first and the last elements, and those around vectors of 16 and more bytes.
fn edges(count: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |at| at % 16 == 0 || at % 16 == 15 || at + 2 >= count)
}

#[test]
fn what_is_not_finite_is_told_at_every_edge_of_every_length() {
    fn all<T: Reference>() {
        let folds: Vec<Fold> = folds(T::DTYPE).filter(|fold| fold.watch).collect();
        for count in 1..=COUNT_MAX {
            for (at, kind) in edges(count).flat_map(|at| [(at, at), (at, at + 5)]) {
                let mut inputs = vec![quiet::<T>(count, 3), quiet(count, 4)];
                inputs[at % 2][at] = poison(kind + count);
                check(&folds, &inputs, (count + at) % LINE, at);
            }
        }
    }
    all::<f8e4m3>();
    all::<f8e5m2>();
    all::<f16>();
    all::<bf16>();
    all::<f32>();
    all::<f64>();
}

#[test]
fn nothing_around_what_is_copied_is_touched() {
    for count in (0..=COUNT_MAX).chain(1022..=1024 + COUNT_MAX) {
        for (from, to) in [(0, 0), (1, 0), (0, 1), (17, 3), (count % LINE, 63), (63, 33)] {
            let values: Vec<u8> = samples(count, count as u64);
            let mut source = Amid::new(&values, from, count);
            let mut target = Amid::new(&vec![0_u8; count], to, count + 3);
            let mut right = target.with(&values);
            // SAFETY: both have `count` bytes and lie apart.
            unsafe { copy(source.pointer(), target.pointer(), count) };
            assert!(target.bytes() == right.bytes(), "{count} bytes from {from} to {to}");
            assert!(source.bytes() == Amid::new(&values, from, count).bytes());
        }
    }
}

/// What the bytes of an encoding stand for, one value at a time.
fn decoded(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let half = |from: fn([u8; 2]) -> f32| bytes.as_chunks().0.iter().map(|it| from(*it)).collect();
    let blocks = |codes: usize, value: fn(&[u8], u8) -> f32, head: usize| {
        let of_block = |block: &[u8]| -> Vec<f32> {
            let (scale, codes) = block.split_at(head);
            codes.iter().map(|code| value(scale, *code)).collect()
        };
        bytes.chunks(head + codes).flat_map(of_block).collect()
    };
    // A power of two is exact in f64, and so is its product with a code.
    fn scaled(scale: &[u8], code: f32) -> f32 {
        let power = 2_f64.powi(i32::from(scale[0]) - 127);
        (f64::from(code) * if scale[0] == 0xff { f64::NAN } else { power }) as f32
    }
    match encoding {
        Encoding::F16 => half(|it| f16::from_le_bytes(it).to_f32()),
        Encoding::Bf16 => half(|it| bf16::from_le_bytes(it).to_f32()),
        Encoding::F8E4M3 => {
            blocks(32, |scale, code| scaled(scale, f8e4m3::from_bits(code).to_f32()), 1)
        }
        Encoding::F8E5M2 => {
            blocks(32, |scale, code| scaled(scale, f8e5m2::from_bits(code).to_f32()), 1)
        }
        Encoding::Int8 => blocks(
            256,
            |scale, code| {
                let factor = f32::from_le_bytes(scale.try_into().unwrap_or_default());
                f32::from(code.cast_signed()) * factor
            },
            4,
        ),
    }
}

/// As bits, with one NaN.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|it| if it.is_nan() { f32::NAN } else { *it }.to_bits()).collect()
}

/// A piece of a larger buffer full of poison; what is around it has to stay.
fn amid<T: Reference>(
    values: &[T],
    before: usize,
    turn: usize,
) -> (Vec<T>, std::ops::Range<usize>) {
    let around = |from: usize, count: usize| (0..count).map(move |at| poison(from + at + turn));
    let all = around(0, before).chain(values.iter().copied()).chain(around(before, 70));
    (all.collect(), before..before + values.len())
}

/// Encodes, decodes and adds amid poison; whether something was told to be infinite or NaN.
fn check_encoding(encoding: Encoding, values: &[f32], before: usize) -> bool {
    let len = encoding.bytes(values.len());
    let mut alone = vec![0; len];
    let found = encoding.encode(values, &mut alone);
    let right = decoded(encoding, &alone);
    let base = quiet::<f32>(values.len(), 5);
    let sums: Vec<f32> = base.iter().zip(&right).map(|(base, value)| base + value).collect();
    for isa in Isa::available() {
        let context = || format!("{encoding:?} on {isa}, {before} before {values:?}");
        let (from, inside) = amid(values, before, 0);
        let (mut to, place) = amid(&vec![0_u8; len], 3 * before + 1, 1);
        let untouched = to.clone();
        assert_eq!(encoding.encode_with(isa, &from[inside], &mut to[place.clone()]), found);
        assert_eq!(to[place.clone()], alone, "{}", context());
        assert_eq!(to[..place.start], untouched[..place.start], "{}", context());
        assert_eq!(to[place.end..], untouched[place.end..], "{}", context());
        for adds in [false, true] {
            let (mut back, inside) = amid(&base, before + 1, 2);
            let untouched = back.clone();
            let (from, into) = (&to[place.clone()], &mut back[inside.clone()]);
            let told = match adds {
                true => encoding.add_with(isa, from, into),
                false => encoding.decode_with(isa, from, into),
            };
            assert_eq!(told, found, "{}", context());
            assert_eq!(told, right.iter().any(|value| !value.is_finite()), "{}", context());
            let expected = if adds { &sums } else { &right };
            assert_eq!(bits(&back[inside.clone()]), bits(expected), "{}, adds: {adds}", context());
            assert_eq!(bits(&back[..inside.start]), bits(&untouched[..inside.start]));
            assert_eq!(bits(&back[inside.end..]), bits(&untouched[inside.end..]));
        }
    }
    found
}

#[test]
fn nothing_around_what_is_encoded_is_read_or_written() {
    let counts = || (0..=COUNT_MAX).chain(if cfg!(miri) { 0..0 } else { 254..260 });
    for encoding in Encoding::ALL {
        for count in counts() {
            let mut values: Vec<f32> = quiet(count, 1);
            assert!(!check_encoding(encoding, &values, count % 17), "{encoding:?}, {count}");
            // Denormals and zeros of either sign.
            values
                .iter_mut()
                .step_by(3)
                .zip([1, 1 << 31, 0x8000_0001, 0x007f_ffff].iter().cycle())
                .for_each(|(value, bits)| *value = f32::from_bits(*bits));
            assert!(!check_encoding(encoding, &values, count % 5), "{encoding:?}, {count}");
            for at in edges(count) {
                let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(at + count) % 3];
                let usual = std::mem::replace(&mut values[at], special);
                assert!(check_encoding(encoding, &values, at % 9), "{encoding:?}, {at} of {count}");
                values[at] = usual;
            }
        }
    }
}
