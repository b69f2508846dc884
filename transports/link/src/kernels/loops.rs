//! The loops of every kernel.
//!
//! A loop vectorises only if what it writes is nothing that it has yet to read. The compiler has
//! this checked at run time, which fails where the destination is a source, unless both are
//! visibly one pointer: hence the case distinctions here.

use std::array::from_fn;
use std::marker::PhantomData;
use std::num::NonZeroU32;

use super::buffers::{Source, Target};
use super::isa::{Level, Task};
use super::number::Number;
use super::operator::Operator;

/// Folds as [`Fold::run`](super::Fold::run) says. With three sources or more the accumulator is a
/// block of `N` elements, small enough for the first-level cache.
///
/// # Safety
/// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
#[inline(always)]
pub(super) unsafe fn fold<L: Level, T: Number, O: Operator, const N: usize>(
    level: L,
    task: &Task<'_>,
) {
    let mut done = 0;
    if T::IS_F16 && O::WIDENS && L::CONVERTS_F16 {
        done = task.count / 8 * 8;
        // SAFETY: the elements `0..done` are within the count.
        unsafe { Loops::<L, T, O, 8>::new(level, task).run::<N>(task, 0, done / 8) };
    }
    // SAFETY: the elements `done..count` are within the count.
    unsafe { Loops::<L, T, O, 1>::new(level, task).run::<N>(task, done, task.count - done) };
}

/// Loops over chunks of `W` elements: one, which the compiler vectorises, or as many as the level
/// converts at once.
struct Loops<L, T, O, const W: usize> {
    level: L,
    divisor: NonZeroU32,
    kinds: PhantomData<(T, O)>,
}

/// The accumulators of one chunk.
type Wide<T, O, const W: usize> = [<O as Operator>::Wide<T>; W];

impl<L: Level, T: Number, O: Operator, const W: usize> Loops<L, T, O, W> {
    #[inline(always)]
    fn new(level: L, task: &Task<'_>) -> Self {
        Self { level, divisor: task.divisor, kinds: PhantomData }
    }

    /// Folds `chunks` chunks from the element `start` on.
    ///
    /// # Safety
    /// As [`fold`], and the chunks lie within the count.
    #[inline(always)]
    unsafe fn run<const N: usize>(&self, task: &Task<'_>, start: usize, chunks: usize) {
        let source = |pointer: *const u8| {
            // SAFETY: the chunks are within the count, for which every source is readable.
            unsafe { Source::<T, W>::new(pointer.wrapping_add(start * size_of::<T>()), chunks) }
        };
        // SAFETY: the chunks are within the count, for which `dst` is writable.
        let dst =
            unsafe { Target::<T, W>::new(task.dst.wrapping_add(start * size_of::<T>()), chunks) };
        match *task.sources {
            [] => {}
            [a] => self.one(dst, source(a)),
            [a, b] => self.two(dst, source(a), source(b)),
            [a, b, ref middle @ .., last] => {
                let mut block = [O::Wide::<T>::default(); N];
                let block = block.as_chunks_mut().0;
                for at in (0..chunks).step_by(block.len()) {
                    let len = block.len().min(chunks - at);
                    let acc = &mut block[..len];
                    let slice = |pointer| source(pointer).slice(at, len);
                    self.start(acc, slice(a), slice(b));
                    let (pairs, odd) = middle.as_chunks();
                    for &[a, b] in pairs {
                        self.walk_two(acc, slice(a), slice(b));
                    }
                    for &a in odd {
                        self.walk(acc, slice(a));
                    }
                    self.finish(dst.slice(at, len), acc, slice(last));
                }
            }
        }
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
            Some(a) => self.store(dst, |i| self.combine(self.lift(a, i), self.lift(b, i))),
            None => self.store(dst, |i| self.combine(self.lift(a, i), self.lift(b, i))),
        }
    }

    /// `acc = a ∘ b`
    #[inline(always)]
    fn start(&self, acc: &mut [Wide<T, O, W>], a: Source<T, W>, b: Source<T, W>) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = self.combine(self.lift(a, i), self.lift(b, i));
        }
    }

    /// `acc = acc ∘ a`
    #[inline(always)]
    fn walk(&self, acc: &mut [Wide<T, O, W>], a: Source<T, W>) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = self.combine(*acc, self.lift(a, i));
        }
    }

    /// `acc = acc ∘ a ∘ b`: half as many visits to the accumulator.
    #[inline(always)]
    fn walk_two(&self, acc: &mut [Wide<T, O, W>], a: Source<T, W>, b: Source<T, W>) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = self.combine(self.combine(*acc, self.lift(a, i)), self.lift(b, i));
        }
    }

    /// `dst = acc ∘ a`
    #[inline(always)]
    fn finish(&self, dst: Target<T, W>, acc: &[Wide<T, O, W>], a: Source<T, W>) {
        match dst.as_source(a) {
            Some(a) => self.store(dst, |i| self.combine(acc[i], self.lift(a, i))),
            None => self.store(dst, |i| self.combine(acc[i], self.lift(a, i))),
        }
    }

    #[inline(always)]
    fn lift(&self, source: Source<T, W>, i: usize) -> Wide<T, O, W> {
        O::lift(self.level, source.get(i))
    }

    #[inline(always)]
    fn combine(&self, left: Wide<T, O, W>, right: Wide<T, O, W>) -> Wide<T, O, W> {
        from_fn(|lane| O::combine::<T>(left[lane], right[lane]))
    }

    #[inline(always)]
    fn store(&self, dst: Target<T, W>, wide: impl Fn(usize) -> Wide<T, O, W>) {
        for i in 0..dst.len() {
            dst.set(i, O::lower(self.level, wide(i), self.divisor));
        }
    }
}
