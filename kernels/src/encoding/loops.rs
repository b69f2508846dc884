//! The loops of every encoding: whole blocks of fixed size, which the compiler unrolls and
//! vectorises, and the last one by way of a block that is filled up with zeros.

use std::marker::PhantomData;

use super::super::isa::{Isa, Work};

/// The bits of infinity; those of NaN, without the sign, are greater.
pub(super) const INFINITY: u32 = 0x7f80_0000;

/// How a block of `N` values is written: `HEAD` bytes for its scale, `WIDTH` bytes for each value.
pub(super) trait Scheme<const N: usize, const HEAD: usize, const WIDTH: usize> {
    /// What values are divided and multiplied by.
    type Scale: Copy;

    /// The least magnitude, as bits, that is infinite or NaN when it is decoded.
    const LIMIT: u32;

    /// The scale of a block whose greatest magnitude has the given bits, and the scale's bytes.
    /// From the limit on, a scale makes NaN of all codes.
    fn choose(greatest: u32) -> (Self::Scale, [u8; HEAD]);
    /// The scale with the given bytes, which may be any.
    fn read(head: [u8; HEAD]) -> Self::Scale;
    /// The code of a value; its magnitude is below the limit if there is a scale.
    fn code(scale: Self::Scale, value: f32) -> [u8; WIDTH];
    fn value(scale: Self::Scale, code: [u8; WIDTH]) -> f32;
}

/// The greater of two magnitudes, as bits. That of NaN is the greatest.
#[inline(always)]
fn greater(magnitude: i32, value: f32) -> i32 {
    // Signed, as the baseline of x86-64 compares signed integers only.
    magnitude.max(value.to_bits().cast_signed() & i32::MAX)
}

/// Encodes; whether something is infinite or NaN.
pub(super) fn encoded<S, const N: usize, const HEAD: usize, const WIDTH: usize>(
    isa: Isa,
    from: &[f32],
    to: &mut [u8],
) -> bool
where
    S: Scheme<N, HEAD, WIDTH>,
{
    isa.run(Encode::<'_, S, N, HEAD, WIDTH> { from, to, scheme: PhantomData })
}

/// Decodes; whether something is infinite or NaN.
pub(super) fn decoded<S, const N: usize, const HEAD: usize, const WIDTH: usize>(
    isa: Isa,
    from: &[u8],
    to: &mut [f32],
) -> bool
where
    S: Scheme<N, HEAD, WIDTH>,
{
    isa.run(Decode::<'_, S, N, HEAD, WIDTH, false> { from, to, scheme: PhantomData })
}

/// Decodes and adds; whether something that is added is infinite or NaN.
pub(super) fn added<S, const N: usize, const HEAD: usize, const WIDTH: usize>(
    isa: Isa,
    from: &[u8],
    to: &mut [f32],
) -> bool
where
    S: Scheme<N, HEAD, WIDTH>,
{
    isa.run(Decode::<'_, S, N, HEAD, WIDTH, true> { from, to, scheme: PhantomData })
}

struct Encode<'a, S, const N: usize, const HEAD: usize, const WIDTH: usize> {
    from: &'a [f32],
    to: &'a mut [u8],
    scheme: PhantomData<S>,
}

impl<S, const N: usize, const HEAD: usize, const WIDTH: usize> Work
    for Encode<'_, S, N, HEAD, WIDTH>
where
    S: Scheme<N, HEAD, WIDTH>,
{
    type Output = bool;
    const GAINS_BY_AVX512: bool = true;

    #[inline(always)]
    fn run(self) -> bool {
        let (blocks, rest) = self.from.as_chunks::<N>();
        let (whole, last) = self.to.split_at_mut(blocks.len() * (HEAD + N * WIDTH));
        let mut found = false;
        for (block, to) in blocks.iter().zip(whole.chunks_exact_mut(HEAD + N * WIDTH)) {
            let (head, codes) = parts_mut::<N, HEAD, WIDTH>(to);
            found |= encode_block::<S, N, HEAD, WIDTH>(block, head, codes);
        }
        if !rest.is_empty() {
            let mut block = [0.0; N];
            block[..rest.len()].copy_from_slice(rest);
            let (mut head, mut codes) = ([0; HEAD], [[0; WIDTH]; N]);
            found |= encode_block::<S, N, HEAD, WIDTH>(&block, &mut head, &mut codes);
            let (to_head, to_codes) = last.split_at_mut(HEAD);
            to_head.copy_from_slice(&head);
            to_codes.copy_from_slice(codes[..rest.len()].as_flattened());
        }
        found
    }
}

#[inline(always)]
fn encode_block<S, const N: usize, const HEAD: usize, const WIDTH: usize>(
    block: &[f32; N],
    head: &mut [u8; HEAD],
    codes: &mut [[u8; WIDTH]; N],
) -> bool
where
    S: Scheme<N, HEAD, WIDTH>,
{
    let greatest = block.iter().fold(0, |greatest, value| greater(greatest, *value));
    let greatest = greatest.cast_unsigned();
    let scale;
    (scale, *head) = S::choose(greatest);
    if HEAD > 0 && greatest >= S::LIMIT {
        *codes = [[0; WIDTH]; N];
        return true;
    }
    for (code, value) in codes.iter_mut().zip(block) {
        *code = S::code(scale, *value);
    }
    greatest >= S::LIMIT
}

struct Decode<'a, S, const N: usize, const HEAD: usize, const WIDTH: usize, const ADD: bool> {
    from: &'a [u8],
    to: &'a mut [f32],
    scheme: PhantomData<S>,
}

impl<S, const N: usize, const HEAD: usize, const WIDTH: usize, const ADD: bool> Work
    for Decode<'_, S, N, HEAD, WIDTH, ADD>
where
    S: Scheme<N, HEAD, WIDTH>,
{
    type Output = bool;
    const GAINS_BY_AVX512: bool = true;

    #[inline(always)]
    fn run(self) -> bool {
        let (blocks, rest) = self.to.as_chunks_mut::<N>();
        let (whole, last) = self.from.split_at(blocks.len() * (HEAD + N * WIDTH));
        let mut found = false;
        for (block, from) in blocks.iter_mut().zip(whole.chunks_exact(HEAD + N * WIDTH)) {
            let (head, codes) = parts::<N, HEAD, WIDTH>(from);
            found |= decode_block::<S, N, HEAD, WIDTH, ADD>(*head, codes, block);
        }
        if !rest.is_empty() {
            let (from_head, from_codes) = last.split_at(HEAD);
            let mut head = [0; HEAD];
            head.copy_from_slice(from_head);
            let mut codes = [[0; WIDTH]; N];
            codes[..rest.len()].as_flattened_mut().copy_from_slice(from_codes);
            let mut block = [0.0; N];
            block[..rest.len()].copy_from_slice(rest);
            found |= decode_block::<S, N, HEAD, WIDTH, ADD>(head, &codes, &mut block);
            rest.copy_from_slice(&block[..rest.len()]);
        }
        found
    }
}

#[inline(always)]
fn decode_block<S, const N: usize, const HEAD: usize, const WIDTH: usize, const ADD: bool>(
    head: [u8; HEAD],
    codes: &[[u8; WIDTH]; N],
    block: &mut [f32; N],
) -> bool
where
    S: Scheme<N, HEAD, WIDTH>,
{
    let scale = S::read(head);
    let mut greatest = 0;
    for (to, code) in block.iter_mut().zip(codes) {
        let value = S::value(scale, *code);
        greatest = greater(greatest, value);
        *to = if ADD { *to + value } else { value };
    }
    greatest.cast_unsigned() >= INFINITY
}

/// The scale and the codes of a whole block.
#[inline(always)]
fn parts<const N: usize, const HEAD: usize, const WIDTH: usize>(
    block: &[u8],
) -> (&[u8; HEAD], &[[u8; WIDTH]; N]) {
    let (head, codes) = block.split_first_chunk().expect("a block has a head");
    (head, codes.as_chunks().0.try_into().expect("a block has this many codes"))
}

/// As [`parts`], to be written.
#[inline(always)]
fn parts_mut<const N: usize, const HEAD: usize, const WIDTH: usize>(
    block: &mut [u8],
) -> (&mut [u8; HEAD], &mut [[u8; WIDTH]; N]) {
    let (head, codes) = block.split_first_chunk_mut().expect("a block has a head");
    (head, codes.as_chunks_mut().0.try_into().expect("a block has this many codes"))
}
