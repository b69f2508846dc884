//! The device memory that a rank exports when it joins: flags and words that streams share, and
//! staging memory for all-reduces in one launch. All ranks lay it out alike.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use unisum_cuda_ipc::{Allocation, CudaError, Device, Pinned};
use unisum_engine::device::{Flag, STAGING_MEMORIES};
use unisum_kernels::cuda::RANKS_MAX;
use unisum_link::{Rank, Wake};

/// Flags lie so far apart that no two share a line of a cache.
const FLAG_BYTES: usize = 64;
/// Most blocks of an all-reduce in one launch: by 256 threads of 16 bytes, more than enough to keep
/// links busy.
pub(super) const BLOCKS_MAX: usize = 32;
/// Most bytes of an all-reduce in one launch: of each of the staging memories.
pub(super) const ONE_LAUNCH_BYTES: usize = 1 << 20;

/// The words of a page behind the flags.
#[derive(Clone, Copy, Debug)]
enum Word {
    /// Set by waits that end early, so that signals know.
    Stopped,
    /// Set by this rank's folds of a call that watches for infinite and NaN results.
    Found,
    /// Always 0.
    Zero,
    /// Whether a result of this rank was infinite or NaN, since it was last asked.
    Total,
}

const WORDS: usize = 4;

/// A rank's page.
#[derive(Debug)]
pub(super) struct Page {
    memory: Allocation,
    world: usize,
}

/// Where things are in the page of any rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    base: u64,
    world: usize,
}

/// Whether so many ranks do all-reduces in one launch.
pub(super) fn has_staging(world: usize) -> bool {
    (2..=RANKS_MAX).contains(&world)
}

impl Page {
    pub(super) fn new(device: &Arc<Device>, world: usize) -> Result<Self, CudaError> {
        let places = Places { base: 0, world };
        let staging = if has_staging(world) { STAGING_MEMORIES * ONE_LAUNCH_BYTES } else { 0 };
        let memory = Allocation::zeroed(device, places.staging(0) as usize + staging)?;
        Ok(Self { memory, world })
    }

    pub(super) const fn address(&self) -> u64 {
        self.memory.address()
    }

    pub(super) const fn places(&self) -> Places {
        Places { base: self.memory.address(), world: self.world }
    }

    /// Whether a wait ended early, so that what came after it is not to be trusted.
    pub(super) fn has_stopped(&self) -> Result<bool, CudaError> {
        self.word(self.places().stopped()).map(|word| word != 0)
    }

    /// How far a flag is.
    pub(super) fn flag(&self, flag: Flag, from: Rank) -> Result<u32, CudaError> {
        self.word(self.places().flag(flag, from))
    }

    /// Up to which all-reduce in one launch the first block of a rank is.
    pub(super) fn block_flag(&self, from: Rank) -> Result<u64, CudaError> {
        self.long_word(self.places().block_flags(from))
    }

    /// Up to which meeting of all-reduces in the switch the first block of a rank is.
    pub(super) fn multimem_flag(&self, from: Rank) -> Result<u64, CudaError> {
        self.long_word(self.places().multimem_flags(from))
    }

    fn long_word(&self, at: u64) -> Result<u64, CudaError> {
        let mut bytes = [0; 8];
        let at = at - self.address();
        self.memory.read(at as usize, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Whether a rank has said that its streams use nothing of others any more.
    pub(super) fn is_quiet(&self, rank: Rank) -> Result<bool, CudaError> {
        self.word(self.places().quiet(rank)).map(|word| word != 0)
    }

    /// Whether a result was infinite or NaN since the last time; nothing may be under way.
    pub(super) fn take_total(&self) -> Result<bool, CudaError> {
        let total = self.places().total();
        let found = self.word(total)? != 0;
        if found {
            self.memory.write((total - self.address()) as usize, &0_u32.to_ne_bytes())?;
        }
        Ok(found)
    }

    fn word(&self, at: u64) -> Result<u32, CudaError> {
        let mut bytes = [0; 4];
        self.memory.read((at - self.address()) as usize, &mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }
}

impl Places {
    /// Of the page that begins at `base`.
    pub(super) const fn new(base: u64, world: usize) -> Self {
        Self { base, world }
    }

    /// The flag of a kind that rank `from` sets.
    pub(super) const fn flag(self, flag: Flag, from: Rank) -> u64 {
        self.base + ((flag as usize + 2 * from) * FLAG_BYTES) as u64
    }

    pub(super) const fn stopped(self) -> u64 {
        self.at(Word::Stopped)
    }

    pub(super) const fn found(self) -> u64 {
        self.at(Word::Found)
    }

    pub(super) const fn zero(self) -> u64 {
        self.at(Word::Zero)
    }

    pub(super) const fn total(self) -> u64 {
        self.at(Word::Total)
    }

    const fn at(self, word: Word) -> u64 {
        self.base + ((2 * self.world + word as usize) * FLAG_BYTES) as u64
    }

    /// The word by which rank `from` says, after a failure, that its streams use nothing of others
    /// any more.
    pub(super) const fn quiet(self, from: Rank) -> u64 {
        self.base + ((2 * self.world + WORDS + from) * FLAG_BYTES) as u64
    }

    /// The flags of rank `from` for all-reduces in one launch, one for each block.
    pub(super) const fn block_flags(self, from: Rank) -> u64 {
        let begin = (3 * self.world + WORDS) * FLAG_BYTES;
        self.base + (begin + from * BLOCKS_MAX * size_of::<u64>()) as u64
    }

    /// The same for all-reduces in the switch.
    pub(super) const fn multimem_flags(self, from: Rank) -> u64 {
        self.block_flags(self.world + from)
    }

    /// One of the staging memories.
    pub(super) const fn staging(self, number: usize) -> u64 {
        let begin = (self.multimem_flags(self.world) - self.base).next_multiple_of(256);
        self.base + begin + (number * ONE_LAUNCH_BYTES) as u64
    }
}

/// A word in pinned memory that ends all waits of the device once it is set: the job has a verdict.
pub(super) struct AbortWord {
    pinned: Pinned,
}

impl AbortWord {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { pinned: Pinned::zeroed(device, size_of::<u32>())? })
    }

    pub(super) const fn address(&self) -> u64 {
        self.pinned.address()
    }

    pub(super) fn set(&self) {
        let word = self.pinned.host().cast();
        // SAFETY: four bytes that lie on a page of their own and live as long as `self`; the device
        // only reads them.
        let word = unsafe { AtomicU32::from_ptr(word.as_ptr()) };
        // Release: nothing hangs on what was written before, but a device that sees it should not
        // see it late.
        word.store(1, Ordering::Release);
    }
}

impl Wake for AbortWord {
    fn wake(&self) {
        self.set();
    }
}

impl fmt::Debug for AbortWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "abort word: {:?}", self.pinned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_page_overlaps() {
        for world in [1, 2, 3, 8, RANKS_MAX] {
            let places = Places::new(1 << 40, world);
            let mut all = vec![
                (places.stopped(), 4),
                (places.found(), 4),
                (places.zero(), 4),
                (places.total(), 4),
            ];
            for from in 0..world {
                all.push((places.flag(Flag::Ready, from), 4));
                all.push((places.flag(Flag::Taken, from), 4));
                all.push((places.quiet(from), 4));
                all.push((places.block_flags(from), 8 * BLOCKS_MAX));
                all.push((places.multimem_flags(from), 8 * BLOCKS_MAX));
            }
            for number in 0..STAGING_MEMORIES {
                assert_eq!(places.staging(number) % 16, 0);
                all.push((places.staging(number), ONE_LAUNCH_BYTES));
            }
            all.sort_unstable();
            let is_apart = |pair: &[(u64, usize)]| pair[0].0 + pair[0].1 as u64 <= pair[1].0;
            assert!(all.windows(2).all(is_apart), "{world} ranks: {all:x?}");
        }
    }
}
