//! The loops of every kernel.
//!
//! They walk in chunks of `W` elements: one, which the compiler vectorises, or a line of floats
//! that the level converts. A loop vectorises only if what it writes is nothing that it has yet
//! to read. The compiler has this checked at run time, which fails where the destination is a
//! source, unless both are visibly one pointer: hence the case distinctions here. With three
//! sources or more it is plain: the loops that read sources write accumulators.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::buffers::{Source, Target};
use super::isa::{LINE, Level, Task};
use super::number::{Float, Number};
use super::operator::Operator;
use super::watch::Watch;

/// Folds as [`Fold::run`](super::Fold::run) says, and returns whether `V` found something. With
/// three sources or more the accumulators are a block of `N` elements, small enough for the
/// first-level cache.
///
/// # Safety
/// The contract of [`Fold::run`](super::Fold::run) holds for `task` and elements `T`.
#[inline(always)]
pub(super) unsafe fn fold<L: Level, T: Number, O: Operator<T>, V: Watch<T>, const N: usize>(
    level: L,
    task: &Task<'_>,
) -> bool {
    let known = O::known(task);
    if Loops::<L, T, O, V, LINE>::BY_LINE {
        let lines = Loops::<L, T, O, V, LINE> { level, known, watch: PhantomData };
        // SAFETY: the lines are within the count.
        let found = unsafe { lines.by_line(task, task.count / LINE) };
        if task.count.is_multiple_of(LINE) {
            return found;
        }
        // SAFETY: what follows the lines is within the count, and less than a line.
        found | unsafe { lines.rest(task, task.count / LINE, task.count % LINE) }
    } else {
        let elements = Loops::<L, T, O, V, 1> { level, known, watch: PhantomData };
        // SAFETY: the caller keeps the same contract.
        unsafe { elements.by_element::<N>(task) }
    }
}

struct Loops<L, T: Number, O: Operator<T>, V, const W: usize> {
    level: L,
    known: O::Known,
    watch: PhantomData<V>,
}

/// The accumulators of one chunk.
type Wide<L, T, O, const W: usize> = <O as Operator<T>>::Wide<L, W>;

/// How many sources are folded at once into accumulators in memory.
const GROUP: usize = 4;

impl<L: Level, T: Number, O: Operator<T>, V: Watch<T>, const W: usize> Loops<L, T, O, V, W> {
    /// Whether elements are converted by the line. One constant, so that of the loops by the line
    /// and by the element only those are compiled that are used.
    const BY_LINE: bool = T::IS_NARROW && O::WIDENS;

    /// Folds chunks of one element.
    ///
    /// # Safety
    /// As [`fold`].
    #[inline(always)]
    unsafe fn by_element<const N: usize>(&self, task: &Task<'_>) -> bool {
        // SAFETY: the elements are those of the count.
        let (dst, source) = unsafe { buffers::<T, W>(task, task.count) };
        match *task.sources {
            [a] => self.one(dst, source(a)),
            [a, b] => self.two(dst, source(a), source(b)),
            ref many => self.blocks::<N>(dst, many, source),
        }
    }

    /// Folds the first `count` lines. A line is read from all sources before it is written: there
    /// is nothing to tell apart.
    ///
    /// # Safety
    /// As [`fold`], and the lines are within the count.
    #[inline(always)]
    unsafe fn by_line(&self, task: &Task<'_>, count: usize) -> bool {
        // SAFETY: the lines are within the count.
        let (dst, source) = unsafe { buffers::<T, W>(task, count) };
        match *task.sources {
            [a] => self.all(dst, [a].map(source)),
            [a, b] => self.all(dst, [a, b].map(source)),
            [a, b, c] => self.all(dst, [a, b, c].map(source)),
            [a, b, c, d] => self.all(dst, [a, b, c, d].map(source)),
            ref many => self.blocks::<LINE>(dst, many, source),
        }
    }

    /// Folds the `count` elements after the first `chunks` chunks, filled up to a chunk.
    ///
    /// # Safety
    /// As [`fold`], and the elements are within the count.
    #[inline(always)]
    unsafe fn rest(&self, task: &Task<'_>, chunks: usize, count: usize) -> bool {
        let load = |pointer: *const u8| {
            let start = pointer.wrapping_add(task.skip);
            // SAFETY: the elements are within the count, for which every source is readable.
            let chunk = unsafe { Source::<T, W>::part(start, chunks, count) };
            O::lift(self.level, chunk, self.known)
        };
        let [first, others @ ..] = task.sources else { return false };
        let mut wide = load(*first);
        for &source in others {
            wide = O::combine::<L, W>(self.level, wide, load(source));
        }
        let chunk = O::lower(self.level, wide, self.known);
        // SAFETY: the elements are within the count, for which `dst` is writable.
        unsafe { Target::set_part(task.dst.wrapping_add(task.skip), chunks, count, chunk) };
        // The zeros that fill a chunk up stay finite unless a factor makes every element nonfinite.
        V::found(V::see(V::nothing(), chunk))
    }

    /// `dst = a`
    #[inline(always)]
    fn one(&self, dst: Target<T, W>, a: Source<T, W>) -> bool {
        match dst.as_source(a) {
            Some(a) => self.store(dst, |i| self.lift(a, i)),
            None => self.store(dst, |i| self.lift(a, i)),
        }
    }

    /// `dst = a ∘ b`. With two operands the order does not matter: every operation commutes.
    #[inline(always)]
    fn two(&self, dst: Target<T, W>, a: Source<T, W>, b: Source<T, W>) -> bool {
        let (a, b) = if dst.as_source(b).is_some() { (b, a) } else { (a, b) };
        match dst.as_source(a) {
            Some(a) => self.store(dst, |i| self.join(self.lift(a, i), [b], i)),
            None => self.store(dst, |i| self.join(self.lift(a, i), [b], i)),
        }
    }

    /// `dst = a ∘ b ∘ …`
    #[inline(always)]
    fn all<const K: usize>(&self, dst: Target<T, W>, sources: [Source<T, W>; K]) -> bool {
        self.store(dst, |i| self.fold(sources, i))
    }

    /// `dst = a ∘ b ∘ …`, by blocks of `N` chunks and groups of sources after the first one.
    #[inline(always)]
    fn blocks<const N: usize>(
        &self,
        dst: Target<T, W>,
        sources: &[*const u8],
        source: impl Fn(*const u8) -> Source<T, W>,
    ) -> bool {
        let [first, others @ ..] = sources else { return false };
        let (singles, groups) = others.split_at(others.len() % GROUP);
        let mut block = [const { MaybeUninit::uninit() }; N];
        let mut found = false;
        for at in (0..dst.len()).step_by(N) {
            let len = N.min(dst.len() - at);
            let slice = |pointer| source(pointer).slice(at, len);
            let block = &mut block[..len];
            let acc = match *singles {
                // The bound of these loops is memory: the fewer passes, the better.
                [b] if !T::IS_NARROW => self.start(block, [*first, b].map(slice)),
                [b, c] if !T::IS_NARROW => self.start(block, [*first, b, c].map(slice)),
                [b, c, d] if !T::IS_NARROW => self.start(block, [*first, b, c, d].map(slice)),
                _ => {
                    let acc = self.start(block, [slice(*first)]);
                    singles.iter().for_each(|&single| self.walk(acc, [slice(single)]));
                    acc
                }
            };
            for group in groups.as_chunks::<GROUP>().0 {
                self.walk(acc, group.map(slice));
            }
            found |= self.store(dst.slice(at, len), |i| acc[i]);
        }
        found
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
            wide = O::combine::<L, W>(self.level, wide, self.lift(source, i));
        }
        wide
    }

    #[inline(always)]
    fn lift(&self, source: Source<T, W>, i: usize) -> Wide<L, T, O, W> {
        O::lift(self.level, source.get(i), self.known)
    }

    #[inline(always)]
    fn store(&self, dst: Target<T, W>, wide: impl Fn(usize) -> Wide<L, T, O, W>) -> bool {
        let mut seen = V::nothing();
        for i in 0..dst.len() {
            let chunk = O::lower(self.level, wide(i), self.known);
            seen = V::see(seen, chunk);
            dst.set(i, chunk);
        }
        V::found(seen)
    }
}

/// What a task reads and writes: its first `count` chunks.
///
/// # Safety
/// As [`fold`], and the chunks are within the count.
#[inline(always)]
unsafe fn buffers<T: Number, const W: usize>(
    task: &Task<'_>,
    count: usize,
) -> (Target<T, W>, impl Fn(*const u8) -> Source<T, W> + Copy) {
    let skip = task.skip;
    let source = move |pointer: *const u8| {
        // SAFETY: the chunks are within the count, for which every source is readable.
        unsafe { Source::<T, W>::new(pointer.wrapping_add(skip), count) }
    };
    // SAFETY: the chunks are within the count, for which `dst` is writable.
    (unsafe { Target::<T, W>::new(task.dst.wrapping_add(skip), count) }, source)
}

/// Whether any of the `count` elements at `start` is infinite or NaN.
///
/// # Safety
/// The elements hold values that nobody writes during the call.
#[inline(always)]
pub(super) unsafe fn any_nonfinite<T: Float>(start: *const u8, count: usize) -> bool {
    // SAFETY: the caller vouches for the elements.
    let elements = unsafe { Source::<T, 1>::new(start, count) };
    let mut greatest = T::Magnitude::default();
    for i in 0..count {
        greatest = greatest.max(elements.get(i)[0].magnitude());
    }
    greatest >= T::INFINITE
}
