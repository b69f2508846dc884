//! The kernels of a device: the image that was made for it, and launches.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Mutex;

use cudarc::driver::sys;
use unisum_kernels::cuda::{
    self as images, COPIES_MAX, CopiesTask, CopyTask, FLAGS_MAX, FoldKernel, FoldTask,
    MultimemTask, SCALES, SignalTask, StagedTask, WaitTask,
};
use unisum_kernels::{Dtype, ReduceOp};

use crate::device::{Device, lock};
use crate::error::{CudaError, cuda};
use crate::stream::Stream;

/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes that one thread moves in one go.
const VECTOR_BYTES: usize = 16;
/// Blocks on each multiprocessor at most: more gain nothing where memory is what limits.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;

/// The kernels, loaded on one device.
pub struct Kernels {
    module: sys::CUmodule,
    functions: Mutex<HashMap<CString, Function>>,
    blocks_max: u32,
}

/// A kernel's argument.
///
/// # Safety
/// Its layout is that of the kernel's parameter.
unsafe trait Argument {}

// SAFETY: laid out as in `kernels/cuda/abi.h`, which the tests there compare.
unsafe impl Argument for FoldTask {}
// SAFETY: as above.
unsafe impl Argument for CopyTask {}
// SAFETY: as above.
unsafe impl Argument for CopiesTask {}
// SAFETY: as above.
unsafe impl Argument for SignalTask {}
// SAFETY: as above.
unsafe impl Argument for WaitTask {}
// SAFETY: as above.
unsafe impl Argument for StagedTask {}
// SAFETY: as above.
unsafe impl Argument for MultimemTask {}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's modules and functions may be used by any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above, by several at once.
unsafe impl Sync for Kernels {}

impl Kernels {
    pub(crate) fn load(device: &Device) -> Result<Self, CudaError> {
        let (major, minor) = device.capability();
        Self::load_images(device, images::binary(major, minor), images::TEXT)
    }

    /// The kernels for which the switch adds.
    pub(crate) fn load_multimem(device: &Device) -> Result<Self, CudaError> {
        let (major, minor) = device.capability();
        Self::load_images(device, images::multimem_binary(major, minor), images::MULTIMEM_TEXT)
    }

    fn load_images(device: &Device, binary: Option<&[u8]>, text: &str) -> Result<Self, CudaError> {
        let _entered = device.enter()?;
        let mut module = std::ptr::null_mut();
        let mut load = |image: &[u8]| {
            let image = image.as_ptr().cast();
            let (options, values) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: the image is a cubin, or text that ends in zero; the driver writes one
            // pointer. `unload` gives the module back.
            cuda!(
                Some(device.ordinal()),
                cuModuleLoadDataEx(&raw mut module, image, 0, options, values)
            )
        };
        // Binaries for another minor version run where the major one is the same, if it is later;
        // what the driver does not take it makes from the text.
        if binary.map(&mut load).is_none_or(|loaded| loaded.is_err()) {
            load(text.as_bytes())?;
        }
        let blocks_max = device.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR;
        Ok(Self { module, functions: Mutex::default(), blocks_max })
    }

    pub(crate) fn unload(&mut self, device: &Device) {
        let Ok(_entered) = device.enter() else { return };
        // SAFETY: loaded once, and nobody launches its kernels any more.
        let unloaded = cuda!(Some(device.ordinal()), cuModuleUnload(self.module));
        if let Err(error) = unloaded {
            tracing::debug!("{error}");
        }
    }

    /// Enqueues a fold of `bytes` bytes of elements of each source; sets the task's count.
    ///
    /// # Safety
    /// All addresses have so many bytes, until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the operation is not defined for the type.
    pub unsafe fn fold(
        &self,
        stream: &Stream,
        (op, dtype): (ReduceOp, Dtype),
        bytes: usize,
        task: &FoldTask,
    ) -> Result<(), CudaError> {
        let kernel = images::fold_kernel(op, dtype);
        let FoldKernel { name, unit_bytes } = kernel.expect("undefined folds are refused before");
        let task = FoldTask { count: (bytes / unit_bytes) as u64, ..*task };
        // SAFETY: the caller promised it.
        unsafe { self.launch(stream, &name, self.blocks(bytes), THREADS, &task) }
    }

    /// Enqueues this rank's part of an all-reduce in one launch of `blocks` blocks, as many on all
    /// ranks; the device must be able to run them all at once.
    ///
    /// # Safety
    /// All addresses have as many bytes as the task says, until it is done; flags and staging
    /// memories are used as [`StagedTask`] says.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If there is no such kernel ([`images::staged_kernel`]).
    pub unsafe fn all_reduce(
        &self,
        stream: &Stream,
        (op, dtype): (ReduceOp, Dtype),
        blocks: u32,
        task: &StagedTask,
    ) -> Result<(), CudaError> {
        let kernel = images::staged_kernel(op, dtype);
        let FoldKernel { name, .. } = kernel.expect("whoever calls has asked for it");
        // SAFETY: the caller promised it.
        unsafe { self.launch(stream, &name, blocks, THREADS, task) }
    }

    /// Enqueues this rank's part of an all-reduce in the switch, in `blocks` blocks, as many on all
    /// ranks; the device must be able to run them all at once.
    ///
    /// # Safety
    /// All addresses have as many bytes as the task says, until it is done; flags and bound memory
    /// are used as [`MultimemTask`] says.
    ///
    /// # Errors
    /// If the driver fails, or these are other kernels than [`Device::multimem_kernels`].
    ///
    /// # Panics
    /// If there is no such kernel ([`images::multimem_kernel`]).
    pub unsafe fn multimem(
        &self,
        stream: &Stream,
        (op, dtype): (ReduceOp, Dtype),
        blocks: u32,
        task: &MultimemTask,
    ) -> Result<(), CudaError> {
        let kernel = images::multimem_kernel(op, dtype, task.flags & SCALES != 0);
        let FoldKernel { name, .. } = kernel.expect("whoever calls has asked for it");
        // SAFETY: the caller promised it.
        unsafe { self.launch(stream, &name, blocks, THREADS, task) }
    }

    /// Enqueues copies by a kernel; they may run at once.
    ///
    /// # Safety
    /// All addresses have so many bytes, until it is done. No copy writes what another one reads or
    /// writes.
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn copy(&self, stream: &Stream, copies: &[CopyTask]) -> Result<(), CudaError> {
        if let [copy] = copies {
            let blocks = self.blocks(copy.bytes as usize);
            // SAFETY: the caller promised it.
            return unsafe { self.launch(stream, "unisum_copy", blocks, THREADS, copy) };
        }
        for some in copies.chunks(COPIES_MAX) {
            let none = CopyTask { to: 0, from: 0, bytes: 0 };
            let mut task = CopiesTask { copy: [none; COPIES_MAX], count: some.len() as u32 };
            task.copy[..some.len()].copy_from_slice(some);
            let blocks = self.blocks(some.iter().map(|copy| copy.bytes as usize).sum());
            // SAFETY: the caller promised it.
            unsafe { self.launch(stream, "unisum_copies", blocks, THREADS, &task) }?;
        }
        Ok(())
    }

    /// Enqueues a signal.
    ///
    /// # Safety
    /// The flags are there until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn signal(&self, stream: &Stream, task: &SignalTask) -> Result<(), CudaError> {
        // SAFETY: the caller promised it.
        unsafe { self.launch(stream, "unisum_signal", 1, FLAGS_MAX as u32, task) }
    }

    /// Enqueues a wait.
    ///
    /// # Safety
    /// The flags and the abort word are there until it is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub unsafe fn wait(&self, stream: &Stream, task: &WaitTask) -> Result<(), CudaError> {
        // SAFETY: the caller promised it.
        unsafe { self.launch(stream, "unisum_wait", 1, FLAGS_MAX as u32, task) }
    }

    /// How many blocks suit so many bytes.
    fn blocks(&self, bytes: usize) -> u32 {
        let each = THREADS as usize * VECTOR_BYTES;
        let blocks = u32::try_from(bytes.div_ceil(each)).unwrap_or(u32::MAX);
        blocks.clamp(1, self.blocks_max)
    }

    /// # Safety
    /// The kernel takes an `A`, and all that its addresses stand for is there until it is done.
    unsafe fn launch<A: Argument>(
        &self,
        stream: &Stream,
        name: &str,
        blocks: u32,
        threads: u32,
        argument: &A,
    ) -> Result<(), CudaError> {
        let (device, on) = (stream.device(), Some(stream.device().ordinal()));
        let _entered = device.enter()?;
        let Function(function) = self.function(on, name)?;
        let argument: *const A = argument;
        let mut parameters: [*mut c_void; 1] = [argument.cast_mut().cast()];
        let parameters = parameters.as_mut_ptr();
        // SAFETY: the driver reads the argument before it returns, and does not write it; it is
        // laid out as the kernel's parameter; the caller promised the rest.
        cuda!(
            on,
            cuLaunchKernel(
                function,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream.handle(),
                parameters,
                std::ptr::null_mut()
            )
        )
    }

    fn function(&self, on: Option<usize>, name: &str) -> Result<Function, CudaError> {
        let name = CString::new(name).expect("names of kernels have no zeros");
        let mut functions = lock(&self.functions);
        if let Some(&known) = functions.get(&name) {
            return Ok(known);
        }
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the driver writes one pointer.
        cuda!(on, cuModuleGetFunction(&raw mut function, self.module, name.as_ptr()))?;
        functions.insert(name, Function(function));
        Ok(Function(function))
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernels in at most {} blocks", self.blocks_max)
    }
}
