//! Launches, and how many blocks fit.

use std::sync::Arc;

use super::{In, Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::device::current;
use crate::driver::driver;
use crate::driver::kernels::Kernel;
use crate::driver::stream;
use crate::machine::{RESIDENT_BLOCKS, Shape};

/// Collects the parameters of a kernel: from one pointer for each, or from a buffer that has them
/// as the kernel sees them.
fn collect(kernel: &Kernel, each: In<In<u8>>, extra: In<usize>) -> Done<Vec<u64>> {
    let function = kernel.function();
    let mut bytes = vec![0; function.param_bytes.next_multiple_of(8)];
    if !extra.is_null() {
        let buffer = buffer_of(extra)?;
        let count = buffer.1.min(function.param_bytes);
        if buffer.1 < function.param_bytes {
            return Err(Code::INVALID_VALUE);
        }
        bytes[..count].copy_from_slice(&buffer.0.bytes(count));
    } else if !function.params.is_empty() {
        for (index, param) in function.params.iter().enumerate() {
            let pointer = each.at(index)?;
            if pointer.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            let range = param.offset..param.offset + param.bytes;
            bytes[range].copy_from_slice(&pointer.bytes(param.bytes));
        }
    }
    let words = bytes.chunks_exact(8).map(|chunk| {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    Ok(words.collect())
}

/// The buffer that `CU_LAUNCH_PARAM_BUFFER_POINTER` and `…_SIZE` name.
fn buffer_of(extra: In<usize>) -> Done<(In<u8>, usize)> {
    let (mut pointer, mut bytes) = (In(std::ptr::null()), 0);
    for index in (0..8).step_by(2) {
        match extra.at(index)? {
            0 => return Ok((pointer, bytes)),
            1 => pointer = In(std::ptr::with_exposed_provenance(extra.at(index + 1)?)),
            2 => {
                bytes =
                    In::<usize>(std::ptr::with_exposed_provenance(extra.at(index + 1)?)).get()?
            }
            _ => break,
        }
    }
    Err(Code::INVALID_VALUE)
}

fn launch(kernel: u64, shape: Shape, stream: u64, each: In<In<u8>>, extra: In<usize>) -> Done {
    let kernel: Arc<Kernel> = driver()?.kernels.find(kernel)?;
    let stream = stream::find(stream)?;
    let params = collect(&kernel, each, extra)?;
    kernel.launch(shape, params, &stream)
}

/// `CUlaunchConfig`
#[repr(C)]
#[derive(Clone, Copy)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    stream: u64,
    attributes: usize,
    attribute_count: u32,
}

/// All blocks of a multiprocessor and all multiprocessors: as many as run at once.
const MULTIPROCESSORS: u32 = 4;

entry_points! {
    fn cuLaunchKernel(
        kernel: u64,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        dynamic_shared: u32,
        stream: u64,
        params: In<In<u8>>,
        extra: In<usize>,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        launch(kernel, Shape { grid, block, dynamic_shared }, stream, params, extra)
    }

    fn cuLaunchKernelEx(
        config: In<LaunchConfig>,
        kernel: u64,
        params: In<In<u8>>,
        extra: In<usize>,
    ) {
        let config = config.get()?;
        let LaunchConfig { grid, block, dynamic_shared, stream, .. } = config;
        launch(kernel, Shape { grid, block, dynamic_shared }, stream, params, extra)
    }

    fn cuLaunchCooperativeKernel(
        kernel: u64,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        dynamic_shared: u32,
        stream: u64,
        params: In<In<u8>>,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Shape { grid, block, dynamic_shared };
        if shape.blocks() > u64::from(RESIDENT_BLOCKS) {
            return Err(Code::COOPERATIVE_LAUNCH_TOO_LARGE);
        }
        launch(kernel, shape, stream, params, In(std::ptr::null()))
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<i32>,
        kernel: u64,
        _threads: i32,
        _dynamic_shared: usize,
    ) {
        driver()?.kernels.find(kernel)?;
        blocks.put((RESIDENT_BLOCKS / MULTIPROCESSORS).cast_signed())
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<i32>,
        kernel: u64,
        _threads: i32,
        _dynamic_shared: usize,
        _flags: u32,
    ) {
        driver()?.kernels.find(kernel)?;
        blocks.put((RESIDENT_BLOCKS / MULTIPROCESSORS).cast_signed())
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<i32>,
        block: Out<i32>,
        kernel: u64,
        _shared_of: usize,
        _dynamic_shared: usize,
        limit: i32,
    ) {
        current()?;
        driver()?.kernels.find(kernel)?;
        grid.put(RESIDENT_BLOCKS.cast_signed())?;
        block.put(if limit > 0 { limit.min(256) } else { 256 })
    }
}
