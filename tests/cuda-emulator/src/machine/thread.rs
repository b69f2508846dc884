//! One thread of a grid: registers, memory of its own, and the loop that executes instructions.

use super::WARP;
use super::code::{Flow, Function, Instruction, LaneMask, Special, tag};
use super::fault::{Fault, FaultKind};
use super::grid::{Launch, Shape};
use super::place::{Place, Scalar};

/// How often a thread may look at memory that others write before it lets them run.
const POLLS: u32 = 32;

/// How many branches a thread may take before it lets others run.
const BRANCHES: u32 = 1 << 20;

/// What a thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rendezvous {
    /// A barrier of the block. `threads` is 0 if all of them take part.
    Barrier { id: u64, threads: u64, value: u64 },
    /// The lanes of a mask, at an instruction of the warp.
    Warp { mask: u32, value: u64 },
}

/// A function that waits for one it has called.
#[derive(Debug)]
struct Frame {
    function: usize,
    registers: Vec<u64>,
    params: Vec<u64>,
    counter: usize,
    local_base: usize,
}

/// The memory of a thread, kept for the next one when it has ended.
#[derive(Debug, Default)]
pub(super) struct Storage {
    registers: Vec<u64>,
    local: Vec<u64>,
}

/// A thread.
pub(crate) struct Thread<'l> {
    pub(super) launch: &'l Launch<'l>,
    function: &'l Function,
    function_index: usize,
    registers: Vec<u64>,
    /// Parameters of a called function; those of the kernel belong to the launch.
    params: Vec<u64>,
    local: Vec<u64>,
    local_base: usize,
    frames: Vec<Frame>,
    pub counter: usize,
    shared: *mut u64,
    shared_bytes: usize,
    pub(super) block: [u32; 3],
    pub(super) index: u32,
    polls: u32,
    branches: u32,
    /// The carry of multi-word arithmetic.
    pub carry: bool,
    pub rendezvous: Option<Rendezvous>,
    pub fault: Option<Fault>,
}

/// A block's shared memory.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub pointer: *mut u64,
    pub bytes: usize,
}

impl<'l> Thread<'l> {
    pub(super) fn new(
        launch: &'l Launch<'l>,
        shared: Shared,
        block: [u32; 3],
        index: u32,
        storage: Storage,
    ) -> Self {
        let function = &launch.module.functions[launch.kernel];
        let Storage { mut registers, mut local } = storage;
        // All but what constants hold is written before it is read.
        if registers.len() != function.registers.len() {
            registers.clone_from(&function.registers);
        }
        local.resize(function.local_bytes.div_ceil(8), POISON);
        let mut thread = Self {
            launch,
            function,
            function_index: launch.kernel,
            registers,
            params: Vec::new(),
            local,
            local_base: 0,
            frames: Vec::new(),
            counter: 0,
            shared: shared.pointer,
            shared_bytes: shared.bytes,
            block,
            index,
            polls: 0,
            branches: 0,
            carry: false,
            rendezvous: None,
            fault: None,
        };
        thread.set_specials();
        thread
    }

    pub(super) fn into_storage(self) -> Storage {
        if self.frames.is_empty() {
            return Storage { registers: self.registers, local: self.local };
        }
        // It has ended in a called function, whose registers these are.
        Storage::default()
    }

    fn set_specials(&mut self) {
        for (special, slot) in &self.function.specials {
            self.registers[*slot as usize] = self.special(*special);
        }
    }

    fn special(&self, special: Special) -> u64 {
        let Shape { grid, block, .. } = self.launch.shape;
        let lane = self.index % WARP;
        let value = match special {
            Special::Thread(axis) => coordinates(self.index, block)[usize::from(axis)],
            Special::Threads(axis) => block[usize::from(axis)],
            Special::Block(axis) => self.block[usize::from(axis)],
            Special::Blocks(axis) => grid[usize::from(axis)],
            Special::Lane => lane,
            Special::Warp => self.index / WARP,
            Special::Warps => self.launch.shape.threads().div_ceil(WARP),
            Special::LaneMask(mask) => lanes(mask, lane),
            Special::LocalBase => return self.local_base as u64,
            Special::DynamicShared => return self.launch.static_shared() as u64,
            Special::DynamicSharedBytes => self.launch.shape.dynamic_shared,
        };
        u64::from(value)
    }

    /// Executes until the thread ends, fails or waits.
    pub(super) fn run(&mut self) -> Flow {
        self.polls = 0;
        self.branches = 0;
        loop {
            let instruction = &self.function.code[self.counter];
            match (instruction.run)(self, instruction) {
                Flow::Next => self.counter += 1,
                Flow::Jump => {}
                flow => return flow,
            }
        }
    }

    #[inline(always)]
    pub(crate) fn read<T: Scalar>(&self, slot: u32) -> T {
        T::from_register(self.registers[slot as usize])
    }

    #[inline(always)]
    pub(crate) fn write<T: Scalar>(&mut self, slot: u32, value: T) {
        self.registers[slot as usize] = value.into_register();
    }

    /// The registers of a vector.
    #[inline(always)]
    pub(crate) fn lanes(&self, index: u32) -> [u32; 4] {
        self.function.lanes[index as usize]
    }

    /// The instruction at which the thread is.
    pub(crate) fn instruction(&self) -> &'l Instruction {
        &self.function.code[self.counter]
    }

    /// The thread's place in its warp.
    pub(crate) fn lane(&self) -> u32 {
        self.index % WARP
    }

    pub(crate) fn fail(&mut self, kind: FaultKind, reason: impl Into<String>) -> Flow {
        self.fault = Some(Fault::new(kind, reason));
        Flow::Fault
    }

    /// Says that the thread has looked at memory that others may write.
    #[inline(always)]
    pub(crate) fn count_poll(&mut self) {
        self.polls += 1;
    }

    /// Goes to an instruction, and lets others run if it is a loop that waits for them.
    #[inline(always)]
    pub(crate) fn branch(&mut self, target: i64) -> Flow {
        let target = target as usize;
        let backwards = target <= self.counter;
        self.counter = target;
        self.branches += 1;
        if backwards && (self.polls >= POLLS || self.branches >= BRANCHES) {
            return Flow::Yield;
        }
        Flow::Jump
    }

    /// Takes a target of an indexed branch.
    pub(crate) fn branch_indexed(&mut self, table: i64, index: u32) -> Flow {
        let targets =
            usize::try_from(table).ok().and_then(|table| self.function.targets.get(table));
        match targets.and_then(|targets| targets.get(index as usize)) {
            Some(target) => self.branch(i64::from(*target)),
            None => self.fail(FaultKind::IllegalInstruction, "a branch target that is not listed"),
        }
    }

    /// Whether the thread waits for memory that others write, rather than computing.
    /// Whether what it acquires is to show more than is there, so that waits for counts end.
    pub(crate) fn passes_waits(&self) -> bool {
        self.launch.hasty == Some(self.index)
    }

    pub(super) fn is_polling(&self) -> bool {
        self.polls >= POLLS
    }

    /// Makes the next backward branch let others run.
    pub(crate) fn pause(&mut self) {
        self.polls = POLLS;
    }

    /// The line of PTX at which the thread is.
    pub(super) fn line(&self) -> u32 {
        self.function.lines[self.counter.min(self.function.lines.len() - 1)]
    }

    pub(super) fn coordinates(&self) -> [u32; 3] {
        coordinates(self.index, self.launch.shape.block)
    }

    // Memory.

    /// Bytes at a generic address.
    #[inline(always)]
    pub(crate) fn generic(&mut self, address: u64, bytes: usize, writes: bool) -> Option<Place> {
        match address & tag::MASK {
            tag::SHARED => self.shared(address & !tag::MASK, bytes),
            tag::LOCAL => self.local(address & !tag::MASK, bytes),
            tag::PARAM => self.param(address & !tag::MASK, bytes, writes),
            _ => self.global(address, bytes, writes),
        }
    }

    #[inline(always)]
    pub(crate) fn global(&mut self, address: u64, bytes: usize, writes: bool) -> Option<Place> {
        if !self.check_alignment(address, bytes) {
            return None;
        }
        match self.launch.memory.place(address, bytes, writes) {
            Ok(pointer) => Some(Place::new(pointer)),
            Err(reason) => {
                self.fault = Some(Fault::new(FaultKind::IllegalAddress, reason));
                None
            }
        }
    }

    /// The bytes of all devices for which a multicast address stands.
    pub(crate) fn multicast(&mut self, address: u64, bytes: usize) -> Option<Vec<Place>> {
        if !self.check_alignment(address, bytes) {
            return None;
        }
        match self.launch.memory.places(address, bytes) {
            Ok(pointers) => Some(pointers.into_iter().map(Place::new).collect()),
            Err(reason) => {
                self.fault = Some(Fault::new(FaultKind::IllegalAddress, reason));
                None
            }
        }
    }

    #[inline(always)]
    pub(crate) fn shared(&mut self, offset: u64, bytes: usize) -> Option<Place> {
        let pointer = self.shared;
        self.within(pointer, self.shared_bytes, offset, bytes, "shared")
    }

    #[inline(always)]
    pub(crate) fn local(&mut self, offset: u64, bytes: usize) -> Option<Place> {
        let length = self.local.len() * 8;
        let pointer = self.local.as_mut_ptr();
        self.within(pointer, length, offset, bytes, "local")
    }

    /// Bytes of the parameters. Only a called function may write there: its result.
    pub(crate) fn param(&mut self, offset: u64, bytes: usize, writes: bool) -> Option<Place> {
        let length = self.function.param_bytes;
        if self.frames.is_empty() {
            if writes {
                let reason = "a kernel writes to its parameters";
                self.fault = Some(Fault::new(FaultKind::IllegalAddress, reason));
                return None;
            }
            let pointer = self.launch.params.as_ptr().cast_mut();
            return self.within(pointer, length, offset, bytes, "parameter");
        }
        let pointer = self.params.as_mut_ptr();
        self.within(pointer, length, offset, bytes, "parameter")
    }

    #[inline(always)]
    fn within(
        &mut self,
        pointer: *mut u64,
        length: usize,
        offset: u64,
        bytes: usize,
        name: &str,
    ) -> Option<Place> {
        if !self.check_alignment(offset, bytes) {
            return None;
        }
        let end = offset.checked_add(bytes as u64);
        if end.is_none_or(|end| end > length as u64) {
            let reason = format!("{bytes} bytes at {offset} of {length} bytes of {name} memory");
            self.fault = Some(Fault::new(FaultKind::IllegalAddress, reason));
            return None;
        }
        Some(Place::new(pointer.cast::<u8>().wrapping_add(offset as usize)))
    }

    #[inline(always)]
    fn check_alignment(&mut self, address: u64, bytes: usize) -> bool {
        if address.is_multiple_of(bytes as u64) {
            return true;
        }
        let reason = format!("{bytes} bytes at {address:#x}, which is not a multiple");
        self.fault = Some(Fault::new(FaultKind::MisalignedAddress, reason));
        false
    }

    // Calls.

    /// Enters the function that a call site names, or that `address` does.
    pub(crate) fn call(&mut self, site: i64, address: u64) -> Flow {
        let function = self.function;
        let Some(site) = usize::try_from(site).ok().and_then(|site| function.calls.get(site))
        else {
            return self.fail(FaultKind::IllegalInstruction, "an unknown call");
        };
        let by_address = (address & tag::MASK == tag::FUNCTION)
            .then(|| usize::try_from(address & !tag::MASK).unwrap_or(usize::MAX));
        let callee = site.callee.or(by_address);
        let module = self.launch.module;
        let Some((index, callee)) =
            callee.and_then(|index| Some((index, module.functions.get(index)?)))
        else {
            return self.fail(FaultKind::IllegalInstruction, "a call of what is not a function");
        };
        if site.arguments.len() != callee.params.len() || self.frames.len() >= 1 << 10 {
            return self.fail(FaultKind::IllegalInstruction, format!("a call of {}", callee.name));
        }
        let mut params = vec![POISON; callee.param_bytes.div_ceil(8)];
        for (from, to) in site.arguments.iter().zip(&callee.params) {
            for byte in 0..from.bytes.min(to.bytes) {
                let value = byte_of(&self.local, self.local_base + from.offset + byte);
                set_byte(&mut params, to.offset + byte, value);
            }
        }
        let frame = Frame {
            function: self.function_index,
            registers: std::mem::replace(&mut self.registers, callee.registers.clone()),
            params: std::mem::replace(&mut self.params, params),
            counter: self.counter,
            local_base: self.local_base,
        };
        self.frames.push(frame);
        self.function = callee;
        self.function_index = index;
        self.local_base = self.local.len() * 8;
        self.local.resize(self.local.len() + callee.local_bytes.div_ceil(16) * 2, POISON);
        self.counter = 0;
        self.set_specials();
        Flow::Jump
    }

    /// Leaves a function. The thread ends when it leaves the kernel.
    pub(crate) fn leave(&mut self) -> Flow {
        let Some(frame) = self.frames.pop() else { return Flow::Exit };
        let callee = self.function;
        let results = std::mem::replace(&mut self.params, frame.params);
        self.local.truncate(self.local_base / 8);
        self.registers = frame.registers;
        self.function_index = frame.function;
        let module = self.launch.module;
        self.function = &module.functions[frame.function];
        self.local_base = frame.local_base;
        self.counter = frame.counter + 1;
        let site = self.function.code[frame.counter].extra;
        let function = self.function;
        let site = usize::try_from(site).ok().and_then(|site| function.calls.get(site));
        for (from, to) in callee.results.iter().zip(site.iter().flat_map(|site| &site.results)) {
            for byte in 0..from.bytes.min(to.bytes) {
                let value = byte_of(&results, from.offset + byte);
                set_byte(&mut self.local, self.local_base + to.offset + byte, value);
            }
        }
        Flow::Jump
    }
}

/// What memory holds that nobody has written.
const POISON: u64 = 0xCDCD_CDCD_CDCD_CDCD;

fn byte_of(words: &[u64], at: usize) -> u8 {
    words[at / 8].to_le_bytes()[at % 8]
}

fn set_byte(words: &mut [u64], at: usize, value: u8) {
    let mut bytes = words[at / 8].to_le_bytes();
    bytes[at % 8] = value;
    words[at / 8] = u64::from_le_bytes(bytes);
}

/// The coordinates of a thread in its block, or of a block in its grid.
pub(super) fn coordinates(index: u32, extent: [u32; 3]) -> [u32; 3] {
    [index % extent[0], index / extent[0] % extent[1], index / extent[0] / extent[1]]
}

fn lanes(mask: LaneMask, lane: u32) -> u32 {
    let own = 1_u32 << lane;
    match mask {
        LaneMask::Equal => own,
        LaneMask::Less => own - 1,
        LaneMask::LessOrEqual => own | (own - 1),
        LaneMask::Greater => !(own | (own - 1)),
        LaneMask::GreaterOrEqual => !(own - 1),
    }
}
