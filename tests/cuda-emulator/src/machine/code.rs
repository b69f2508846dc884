//! Decoded functions: what the decoder makes and a thread executes.

use super::thread::Thread;

/// Executes one instruction.
pub(crate) type Handler = fn(&mut Thread<'_>, &Instruction) -> Flow;

/// What a thread does after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Executes the next instruction.
    Next,
    /// Goes on at the program counter that the instruction has set.
    Jump,
    /// Lets other threads run, because it waits for something.
    Yield,
    /// Waits for the other threads of its block or warp; `Thread::rendezvous` says for which.
    Rendezvous,
    /// Has ended.
    Exit,
    /// Has failed; `Thread::fault` says why.
    Fault,
}

/// An instruction. Its operands are slots of the register file, where constants and special
/// registers have slots, too.
#[derive(Clone, Copy)]
pub(crate) struct Instruction {
    pub run: Handler,
    /// The destination, or an index of [`Function::lanes`].
    pub d: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    /// An offset, a branch target or an index, as the handler needs it.
    pub extra: i64,
}

/// A special register whose value is set when a thread starts or enters a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(u8),
    Threads(u8),
    Block(u8),
    Blocks(u8),
    Lane,
    Warp,
    Warps,
    LaneMask(LaneMask),
    /// Where the frame of the function begins in the thread's local memory.
    LocalBase,
    /// Where dynamic shared memory begins.
    DynamicShared,
    DynamicSharedBytes,
}

/// The lanes of a warp, compared with the thread's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LaneMask {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A parameter of a function: offset and size in its parameter memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Param {
    pub offset: usize,
    pub bytes: usize,
}

/// Where a call finds its arguments in the caller's local memory, relative to the caller's frame.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallSite {
    /// The function called, unless a register holds its address.
    pub callee: Option<usize>,
    pub arguments: Vec<Param>,
    pub results: Vec<Param>,
}

/// A decoded function.
#[derive(Default)]
pub(crate) struct Function {
    pub name: String,
    pub is_entry: bool,
    pub params: Vec<Param>,
    pub results: Vec<Param>,
    /// Parameters and results together.
    pub param_bytes: usize,
    /// The register file as it is before the function runs.
    pub registers: Vec<u64>,
    pub specials: Vec<(Special, u32)>,
    pub code: Vec<Instruction>,
    /// The line of the PTX text that each instruction comes from.
    pub lines: Vec<u32>,
    /// Registers of vectors.
    pub lanes: Vec<[u32; 4]>,
    /// Targets of indexed branches.
    pub targets: Vec<Vec<u32>>,
    pub calls: Vec<CallSite>,
    pub local_bytes: usize,
    /// Static shared memory.
    pub shared_bytes: usize,
}

/// Tags of generic addresses. An address without one is a host address.
pub(crate) mod tag {
    /// The bits that hold a tag.
    pub(crate) const MASK: u64 = 0xF << 60;
    pub(crate) const LOCAL: u64 = 1 << 60;
    pub(crate) const SHARED: u64 = 2 << 60;
    pub(crate) const PARAM: u64 = 3 << 60;
    /// Device memory: a host that dereferences such an address faults.
    pub(crate) const DEVICE: u64 = 4 << 60;
    pub(crate) const FUNCTION: u64 = 5 << 60;
}
