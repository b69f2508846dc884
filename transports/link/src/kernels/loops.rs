//! The loops of every kernel.
//!
//! They walk in chunks of `W` elements: one, which the compiler vectorises, or a line, where the
//! level converts one at once. A loop vectorises only if what it writes is nothing that it has yet
//! to read. The compiler has this checked at run time, which fails where the destination is a
//! source, unless both are visibly one pointer: hence the case distinctions here. With three
//! sources or more it is plain: the loops that read sources write accumulators.

use std::mem::MaybeUninit;

use super::buffers::{Source, Target};
use super::isa::{LINE, Level, Task};
use super::number::Number;
use super::operator::Operator;

/// How many sources are folded at once into accumulators in memory.
const GROUP: usize = 4;

/// Folds as [`Fold::run`](super::Fold::run) says. With three sources or more the accumulators are
/// a block of `N` elements, small enough for the first-level cache.
///
/// # Safety
/// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
#[inline(always)]
pub(super) unsafe fn fold<L: Level, T: Number, O: Operator, const N: usize>(
    level: L,
    task: &Task<'_>,
) {
    let last = O::last::<T>(task.divisor);
    if T::IS_HALF && O::WIDENS && L::CONVERTS_LINES {
        let lines = Loops::<L, T, O, LINE> { level, last };
        // SAFETY: the lines are within the count.
        unsafe { lines.run::<LINE>(task, task.count / LINE) };
        if !task.count.is_multiple_of(LINE) {
            // SAFETY: what follows the lines is within the count, and less than a line.
            unsafe { lines.rest(task, task.count / LINE, task.count % LINE) };
        }
    } else {
        // SAFETY: the elements are those of the count.
        unsafe { Loops::<L, T, O, 1> { level, last }.run::<N>(task, task.count) };
    }
}

struct Loops<L, T: Number, O: Operator, const W: usize> {
    level: L,
    last: O::Last<T>,
}

/// The accumulators of one chunk.
type Wide<L, T, O, const W: usize> = <O as Operator>::Wide<L, T, W>;

impl<L: Level, T: Number, O: Operator, const W: usize> Loops<L, T, O, W> {
    /// Folds the first `chunks` chunks; three sources or more by blocks of `N` chunks.
    ///
    /// # Safety
    /// As [`fold`], and the chunks are within the count.
    #[inline(always)]
    unsafe fn run<const N: usize>(&self, task: &Task<'_>, chunks: usize) {
        let source = |pointer: *const u8| {
            // SAFETY: the chunks are within the count, for which every source is readable.
            unsafe { Source::<T, W>::new(pointer, chunks) }
        };
        // SAFETY: the chunks are within the count, for which `dst` is writable.
        let dst = unsafe { Target::<T, W>::new(task.dst, chunks) };
        let (first, others) = match *task.sources {
            [] => return,
            [a] => return self.one(dst, source(a)),
            [a, b] => return self.two(dst, source(a), source(b)),
            // A line is read from all sources before it is written: nothing to tell apart.
            [a, b, c] if W > 1 => return self.all(dst, [a, b, c].map(source)),
            [a, b, c, d] if W > 1 => return self.all(dst, [a, b, c, d].map(source)),
            ref many => many.split_at((many.len() - 1) % GROUP + 1),
        };
        let mut block = [const { MaybeUninit::uninit() }; N];
        for at in (0..chunks).step_by(N) {
            let len = N.min(chunks - at);
            let block = &mut block[..len];
            let slice = |pointer| source(pointer).slice(at, len);
            let acc = match *first {
                [a] => self.start(block, [a].map(slice)),
                [a, b] => self.start(block, [a, b].map(slice)),
                [a, b, c] => self.start(block, [a, b, c].map(slice)),
                [a, b, c, d] => self.start(block, [a, b, c, d].map(slice)),
                _ => unreachable!("a group or less"),
            };
            for group in others.as_chunks::<GROUP>().0 {
                self.walk(acc, group.map(slice));
            }
            self.store(dst.slice(at, len), |i| acc[i]);
        }
    }

    /// Folds the `count` elements after the first `chunks` chunks, filled up to a chunk.
    ///
    /// # Safety
    /// As [`fold`], and the elements are within the count.
    #[inline(always)]
    unsafe fn rest(&self, task: &Task<'_>, chunks: usize, count: usize) {
        let load = |pointer: *const u8| {
            // SAFETY: the elements are within the count, for which every source is readable.
            let chunk = unsafe { Source::<T, W>::part(pointer, chunks, count) };
            O::lift::<L, T, W>(self.level, chunk)
        };
        let [first, others @ ..] = task.sources else { return };
        let mut wide = load(*first);
        for &source in others {
            wide = O::combine::<L, T, W>(self.level, wide, load(source));
        }
        let chunk = O::lower::<L, T, W>(self.level, wide, self.last);
        // SAFETY: the elements are within the count, for which `dst` is writable.
        unsafe { Target::set_part(task.dst, chunks, count, chunk) };
    }

    /// `dst = a`
    #[inline(always)]
    fn one(&self, dst: Target<T, W>, a: Source<T, W>) {
        match dst.as_source(a) {
            Some(a) => self.store(dst, |i| self.lift(a, i)),
            None => self.store(dst, |i| self.lift(a, i)),
        }
    }

    /// `dst = a ∘ b`. With two operands the order does not matter: every operation commutes.
    #[inline(always)]
    fn two(&self, dst: Target<T, W>, a: Source<T, W>, b: Source<T, W>) {
        let (a, b) = if dst.as_source(b).is_some() { (b, a) } else { (a, b) };
        match dst.as_source(a) {
            Some(a) => self.store(dst, |i| self.join(self.lift(a, i), [b], i)),
            None => self.store(dst, |i| self.join(self.lift(a, i), [b], i)),
        }
    }

    /// `dst = a ∘ b ∘ …`
    #[inline(always)]
    fn all<const K: usize>(&self, dst: Target<T, W>, sources: [Source<T, W>; K]) {
        self.store(dst, |i| self.fold(sources, i));
    }

    /// `block = a ∘ b ∘ …`
    #[inline(always)]
    fn start<'a, const K: usize>(
        &self,
        block: &'a mut [MaybeUninit<Wide<L, T, O, W>>],
        sources: [Source<T, W>; K],
    ) -> &'a mut [Wide<L, T, O, W>] {
        for (i, acc) in block.iter_mut().enumerate() {
            acc.write(self.fold(sources, i));
        }
        let written: *mut [MaybeUninit<Wide<L, T, O, W>>] = block;
        // SAFETY: the loop wrote every element; the borrow goes on.
        unsafe { &mut *(written as *mut [Wide<L, T, O, W>]) }
    }

    /// `acc = acc ∘ a ∘ b ∘ …`
    #[inline(always)]
    fn walk<const K: usize>(&self, acc: &mut [Wide<L, T, O, W>], sources: [Source<T, W>; K]) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = self.join(*acc, sources, i);
        }
    }

    /// `a ∘ b ∘ …`, for the chunks `i` of the sources.
    #[inline(always)]
    fn fold<const K: usize>(&self, sources: [Source<T, W>; K], i: usize) -> Wide<L, T, O, W> {
        let mut wide = self.lift(sources[0], i);
        for &source in &sources[1..] {
            wide = self.join(wide, [source], i);
        }
        wide
    }

    /// `wide ∘ a ∘ b ∘ …`, for the chunks `i` of the sources.
    #[inline(always)]
    fn join<const K: usize>(
        &self,
        mut wide: Wide<L, T, O, W>,
        sources: [Source<T, W>; K],
        i: usize,
    ) -> Wide<L, T, O, W> {
        for source in sources {
            wide = O::combine::<L, T, W>(self.level, wide, self.lift(source, i));
        }
        wide
    }

    #[inline(always)]
    fn lift(&self, source: Source<T, W>, i: usize) -> Wide<L, T, O, W> {
        O::lift(self.level, source.get(i))
    }

    #[inline(always)]
    fn store(&self, dst: Target<T, W>, wide: impl Fn(usize) -> Wide<L, T, O, W>) {
        for i in 0..dst.len() {
            dst.set(i, O::lower::<L, T, W>(self.level, wide(i), self.last));
        }
    }
}
