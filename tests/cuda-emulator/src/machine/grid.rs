//! A kernel launch: blocks one after another, several at once where they wait for each other.

use super::DeviceMemory;
use super::block::{Block, Outcome};
use super::fault::Fault;
use super::thread::coordinates;
use crate::backoff::Backoff;
use crate::ptx::Module;

/// How many blocks may run at once. Blocks beyond it start when others have ended, as on a device
/// that is full: kernels whose blocks wait for each other must not have more.
pub(crate) const RESIDENT_BLOCKS: u32 = 64;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory, in bytes.
    pub dynamic_shared: u32,
}

impl Shape {
    /// Threads of a block.
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Blocks of the grid.
    pub(crate) fn blocks(&self) -> u64 {
        self.grid.iter().map(|extent| u64::from(*extent)).product()
    }
}

/// In which order the blocks of a grid begin; a device promises none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// The first block, modulo their number.
    pub first: u64,
    pub is_reversed: bool,
}

impl Order {
    /// The block that begins as number `index` of `total`.
    fn block(self, index: u64, total: u64) -> u64 {
        let index = if self.is_reversed { total - 1 - index } else { index };
        (index + self.first % total) % total
    }
}

/// A kernel launch.
pub(crate) struct Launch<'l> {
    pub module: &'l Module,
    pub kernel: usize,
    pub shape: Shape,
    pub order: Order,
    pub params: &'l [u64],
    /// The thread of each block that waits for nobody.
    pub hasty: Option<u32>,
    pub memory: &'l dyn DeviceMemory,
}

impl Launch<'_> {
    /// Static shared memory of a block, in bytes; dynamic shared memory follows it.
    pub(super) fn static_shared(&self) -> usize {
        self.module.functions[self.kernel].shared_bytes.next_multiple_of(16)
    }
}

/// Runs a kernel to its end.
///
/// # Errors
///
/// What went wrong, with the kernel, block, thread and instruction.
pub(crate) fn run(launch: &Launch<'_>) -> Result<(), (String, Fault)> {
    let total = launch.shape.blocks();
    let mut next = 0;
    let mut running: Vec<Block<'_>> = Vec::new();
    let mut storage = Vec::new();
    let mut backoff = Backoff::new();
    let mut is_stuck = false;
    while next < total || !running.is_empty() {
        let has_room = running.is_empty() || is_stuck && running.len() < RESIDENT_BLOCKS as usize;
        let starts = next < total && has_room;
        if starts {
            let number = launch.order.block(next, total);
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            running.push(Block::new(launch, coordinates(number, launch.shape.grid)));
            next += 1;
        }
        is_stuck = true;
        let mut index = 0;
        while index < running.len() {
            match running[index].run(&mut storage) {
                Outcome::Ended => {
                    running.swap_remove(index);
                    is_stuck = false;
                    continue;
                }
                Outcome::Progress => is_stuck = false,
                Outcome::Waiting => {}
                Outcome::Failed(place, fault) => return Err((place, fault)),
            }
            index += 1;
        }
        if !is_stuck {
            backoff.reset();
        } else if next == total || running.len() >= RESIDENT_BLOCKS as usize {
            backoff.wait();
        }
        if launch.memory.is_stopped() {
            return Ok(());
        }
    }
    Ok(())
}
