//! The machine that executes decoded PTX: grids of blocks of threads, on one thread of the CPU.

mod block;
mod code;
mod fault;
mod grid;
mod place;
mod thread;

pub(crate) use code::{
    CallSite, Flow, Function, Handler, Instruction, LaneMask, Param, Special, tag,
};
pub(crate) use fault::FaultKind;
pub(crate) use grid::{Launch, Order, RESIDENT_BLOCKS, Shape, run};
pub(crate) use place::{Place, Scalar, Word};
pub(crate) use thread::{Rendezvous, Thread};

/// The memory of a device, as a kernel on it sees it.
pub(crate) trait DeviceMemory {
    /// Where the `bytes` at `address` lie, or why a kernel must not access them. They stay mapped
    /// as long as the kernel runs.
    fn place(&self, address: u64, bytes: usize, writes: bool) -> Result<*mut u8, String>;

    /// Where all the memories lie that a multicast address stands for, in any order, or why a
    /// kernel must not access them.
    fn places(&self, address: u64, bytes: usize) -> Result<Vec<*mut u8>, String>;

    /// Whether the kernel should end early, because the device has failed or the process exits.
    fn is_stopped(&self) -> bool;
}

/// Threads of a warp.
pub(crate) const WARP: u32 = 32;
