//! Puts a program into a stream.

use unisum_cuda_ipc::{CudaError, Kernels, Stream};
use unisum_engine::device::{
    DeviceCopy, DeviceFold, DeviceProgram, Memory, Operand, Operation, Place,
};
use unisum_kernels::Fold;
use unisum_kernels::cuda::{CopyTask, DIVIDES, FoldTask, SCALES, SOURCES_MAX, WATCHES};
use unisum_link::Rank;

use super::flags::Flags;

/// From here on, the device's copy engines copy. Below, a kernel, which starts faster.
const ENGINE_FROM: u64 = 1 << 20;

/// Where memories of all ranks begin in this process.
#[derive(Debug)]
pub(super) struct Addresses {
    pub(super) rank: Rank,
    /// By rank: input, output and scratch memory. Unused ones are 0.
    pub(super) of: Vec<[u64; 3]>,
}

impl Addresses {
    pub(super) const fn memory(memory: Memory) -> usize {
        match memory {
            Memory::Input => 0,
            Memory::Output => 1,
            Memory::Scratch => 2,
        }
    }

    fn own(&self, place: Place) -> u64 {
        self.operand(Operand { rank: self.rank, place })
    }

    fn operand(&self, Operand { rank, place }: Operand) -> u64 {
        self.of[rank][Self::memory(place.memory)] + place.start as u64
    }
}

/// What a program works with.
#[derive(Debug)]
pub(super) struct Queue<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) stream: &'a Stream,
    pub(super) addresses: Addresses,
    /// How elements are folded; averages divide by the number of ranks.
    pub(super) how: Fold,
    /// The word by which folds tell that they have found an infinite or NaN result.
    pub(super) found: u64,
}

impl Queue<'_> {
    /// Enqueues all operations.
    ///
    /// # Safety
    /// All memories have the bytes that the program uses, until it has ended in the stream.
    pub(super) unsafe fn put(
        &self,
        program: &DeviceProgram,
        flags: &Flags,
    ) -> Result<(), CudaError> {
        for operation in &program.operations {
            match operation {
                Operation::Signal(notes) => flags.signal(self.kernels, self.stream, notes)?,
                Operation::Wait(notes) => flags.wait(self.kernels, self.stream, notes)?,
                Operation::Copy(copies) => {
                    let tasks = copies.iter().map(|&DeviceCopy { from, to, bytes }| CopyTask {
                        from: self.addresses.operand(from),
                        to: self.addresses.own(to),
                        bytes: bytes as u64,
                    });
                    let tasks: Vec<CopyTask> = tasks.collect();
                    // SAFETY: the caller promised it.
                    unsafe { copy(self.kernels, self.stream, &tasks) }?;
                }
                // SAFETY: the caller promised it.
                Operation::Fold(fold) => unsafe { self.fold(fold) }?,
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`Queue::put`].
    unsafe fn fold(&self, fold: &DeviceFold) -> Result<(), CudaError> {
        let how = &self.how;
        let mut task = FoldTask {
            to: self.addresses.own(fold.to),
            from: [0; SOURCES_MAX],
            count: 0,
            divisor: how.divide_by.map_or(1.0, |it| f64::from(it.get())),
            factor: how.factor.unwrap_or(1.0),
            nonfinite: self.found,
            sources: fold.sources.len() as u32,
            flags: 0,
        };
        for (slot, &source) in task.from.iter_mut().zip(&fold.sources) {
            *slot = self.addresses.operand(source);
        }
        if fold.divides && how.divide_by.is_some() {
            task.flags |= DIVIDES;
        }
        if fold.scales && how.factor.is_some() {
            task.flags |= SCALES;
        }
        if fold.watches && how.watch {
            task.flags |= WATCHES;
        }
        // SAFETY: the caller promised it.
        unsafe { self.kernels.fold(self.stream, (how.op, how.dtype), fold.bytes, &task) }
    }
}

/// Enqueues copies, which may run at once.
///
/// # Safety
/// All addresses have so many bytes, until it is done, and no copy writes what another one uses.
pub(super) unsafe fn copy(
    kernels: &Kernels,
    stream: &Stream,
    copies: &[CopyTask],
) -> Result<(), CudaError> {
    let (long, short): (Vec<CopyTask>, Vec<CopyTask>) =
        copies.iter().partition(|copy| copy.bytes >= ENGINE_FROM);
    for CopyTask { to, from, bytes } in long {
        // SAFETY: the caller promised it.
        unsafe { stream.copy(to, from, bytes as usize) }?;
    }
    // SAFETY: the caller promised it.
    unsafe { kernels.copy(stream, &short) }
}
