//! The kernels for NVIDIA devices, as compiled from `kernels/cuda`, and what they take.
//!
//! They give the same bits as the kernels of the host. Each takes one of the structs below by
//! value, whose layouts are those of `kernels/cuda/abi.h`. Grids and blocks have one dimension and
//! any size. Addresses are those of the device.

use crate::op::Undefined;
use crate::{Dtype, Fold, ReduceOp};

/// All kernels in PTX, from which a driver makes code for any device from compute capability 7.0
/// on. A zero byte is at the end, as the driver wants it.
pub static TEXT: &str = concat!(include_str!("../cuda/unisum.ptx"), "\0");

/// The kernels for which the switch adds ([`multimem_kernel`]) in PTX, for devices from compute
/// capability 9.0 on; others refuse it. As [`TEXT`], it ends with a zero byte.
pub static MULTIMEM_TEXT: &str = concat!(include_str!("../cuda/multimem.ptx"), "\0");

/// Machine code for the devices of a major compute capability, from a minor one on.
type Binary = (u32, u32, &'static [u8]);

static BINARIES: [Binary; 4] = [
    (7, 0, include_bytes!("../cuda/sm_70.cubin")),
    (8, 0, include_bytes!("../cuda/sm_80.cubin")),
    (9, 0, include_bytes!("../cuda/sm_90.cubin")),
    (10, 0, include_bytes!("../cuda/sm_100.cubin")),
];

static MULTIMEM_BINARIES: [Binary; 2] = [
    (9, 0, include_bytes!("../cuda/multimem_sm_90.cubin")),
    (10, 0, include_bytes!("../cuda/multimem_sm_100.cubin")),
];

/// The machine code for devices of a compute capability. Where there is none, [`TEXT`] serves.
pub fn binary(major: u32, minor: u32) -> Option<&'static [u8]> {
    of_capability(&BINARIES, (major, minor))
}

/// As [`binary`], of the kernels of [`MULTIMEM_TEXT`].
pub fn multimem_binary(major: u32, minor: u32) -> Option<&'static [u8]> {
    of_capability(&MULTIMEM_BINARIES, (major, minor))
}

fn of_capability(binaries: &[Binary], (major, minor): (u32, u32)) -> Option<&'static [u8]> {
    let runs = |&&(for_major, from_minor, _): &&Binary| for_major == major && from_minor <= minor;
    binaries.iter().find(runs).map(|&(_, _, binary)| binary)
}

/// The kernel of an operation, and what it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoldKernel {
    /// Its name in the images. It takes a [`FoldTask`].
    pub name: String,
    /// The bytes of what [`FoldTask::count`] counts. Pointers are aligned to it.
    pub unit_bytes: usize,
}

/// The kernel that folds elements of type `dtype` by `op`. An average is a sum with
/// [`DIVIDES`].
///
/// # Errors
/// If the operation is not defined for the type.
pub fn fold_kernel(op: ReduceOp, dtype: Dtype) -> Result<FoldKernel, Undefined> {
    Fold::new(dtype, op).check_defined()?;
    let (op, dtype) = match (op, dtype) {
        (ReduceOp::Sum | ReduceOp::Max, Dtype::Bool) => (ReduceOp::BitOr, dtype),
        (ReduceOp::Product | ReduceOp::Min, Dtype::Bool) => (ReduceOp::BitAnd, dtype),
        (_, Dtype::Bool) => (op, dtype),
        // Bits know no types.
        (ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor, _) => (op, Dtype::U8),
        // Where integers wrap, the sign does not matter.
        (ReduceOp::Product, Dtype::I8) => (op, Dtype::U8),
        (ReduceOp::Product, Dtype::I16) => (op, Dtype::U16),
        (ReduceOp::Product, Dtype::I32) => (op, Dtype::U32),
        (ReduceOp::Product, Dtype::I64) => (op, Dtype::U64),
        (ReduceOp::Average, _) => (ReduceOp::Sum, dtype),
        _ => (op, dtype),
    };
    Ok(FoldKernel { name: format!("unisum_fold_{op}_{dtype}"), unit_bytes: dtype.bytes() })
}

/// The kernel that does a whole all-reduce of little data in one launch, if there is one for
/// elements of type `dtype` and `op`. It takes a [`StagedTask`].
pub fn staged_kernel(op: ReduceOp, dtype: Dtype) -> Option<FoldKernel> {
    let op = if op == ReduceOp::Average { ReduceOp::Sum } else { op };
    let all = matches!(dtype, Dtype::F32 | Dtype::I32 | Dtype::I64);
    let only_sums = matches!(dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F64);
    let is_there = match op {
        ReduceOp::Sum => all || only_sums,
        ReduceOp::Min | ReduceOp::Max => all,
        _ => false,
    };
    let name = || format!("unisum_staged_{op}_{dtype}");
    is_there.then(|| FoldKernel { name: name(), unit_bytes: dtype.bytes() })
}

/// The kernel of [`MULTIMEM_TEXT`] for which the switch adds elements of type `dtype`, each times a
/// factor or not, if there is one. It takes a [`MultimemTask`].
///
/// The switch adds what is in memory and rounds each sum to the type. So there are no averages of
/// f16, whose sums may be too large where the averages are not, and no factors for 16-bit floats,
/// which would be rounded before they are added.
pub fn multimem_kernel(op: ReduceOp, dtype: Dtype, scales: bool) -> Option<FoldKernel> {
    let is_there = match (op, dtype) {
        (ReduceOp::Sum | ReduceOp::Average, Dtype::F32) => true,
        (ReduceOp::Sum | ReduceOp::Average, Dtype::Bf16) | (ReduceOp::Sum, Dtype::F16) => !scales,
        _ => false,
    };
    let name = || format!("unisum_multimem_sum_{dtype}");
    is_there.then(|| FoldKernel { name: name(), unit_bytes: dtype.bytes() })
}

/// Most sources of one fold.
pub const SOURCES_MAX: usize = 32;
/// Most copies of one launch.
pub const COPIES_MAX: usize = 32;
/// Most flags of one signal or wait.
pub const FLAGS_MAX: usize = 64;
/// Most ranks of one staged all-reduce.
pub const RANKS_MAX: usize = 32;

/// Of [`FoldTask::flags`]: divides by [`FoldTask::divisor`] before the result is rounded. Only for
/// sums.
pub const DIVIDES: u32 = 1;
/// Of [`FoldTask::flags`]: multiplies each element by [`FoldTask::factor`] before it is added. Only
/// for sums of floats.
pub const SCALES: u32 = 2;
/// Of [`FoldTask::flags`]: sets the word at [`FoldTask::nonfinite`] to 1 if a result is infinite or
/// NaN. Results of integers never are.
pub const WATCHES: u32 = 4;

/// What `unisum_fold_<op>_<dtype>` takes ([`fold_kernel`]).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FoldTask {
    /// Where the results go: to one of the sources, or apart from all.
    pub to: u64,
    /// The sources, folded in this order.
    pub from: [u64; SOURCES_MAX],
    /// How many units to fold ([`FoldKernel::unit_bytes`]).
    pub count: u64,
    /// A whole number from 1 to `u32::MAX`.
    pub divisor: f64,
    /// As [`Fold::factor`].
    pub factor: f64,
    /// A word that is set.
    pub nonfinite: u64,
    /// How many sources there are, at least 1.
    pub sources: u32,
    /// [`DIVIDES`], [`SCALES`], [`WATCHES`].
    pub flags: u32,
}

/// What `unisum_copy` takes. Any alignment will do, but 16-byte accesses need addresses that are
/// the same modulo 16.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopyTask {
    /// Overlaps nothing that is read.
    pub to: u64,
    /// What is copied.
    pub from: u64,
    /// How much.
    pub bytes: u64,
}

/// What `unisum_copies` takes: copies that may run at once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopiesTask {
    /// The copies.
    pub copy: [CopyTask; COPIES_MAX],
    /// How many there are.
    pub count: u32,
}

/// What `unisum_signal` takes: words that are set when all that was enqueued before is done.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SignalTask {
    /// Where the words are, also on other devices.
    pub flag: [u64; FLAGS_MAX],
    /// What they are set to.
    pub value: [u32; FLAGS_MAX],
    /// How many there are.
    pub count: u32,
    /// [`WaitTask::stopped`], or 0. Once that word is set, nothing is signalled.
    pub stopped: u64,
}

/// What `unisum_wait` takes: words that have to reach values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WaitTask {
    /// Where the words are, on the own device.
    pub flag: [u64; FLAGS_MAX],
    /// What they have to reach, counting modulo 2³².
    pub value: [u32; FLAGS_MAX],
    /// How many there are.
    pub count: u32,
    /// A word in pinned host memory, or 0. Once it is not 0, the wait ends early.
    pub abort: u64,
    /// A word on the own device, or 0. It is set by a wait that ends early.
    pub stopped: u64,
}

/// What `unisum_staged_<op>_<dtype>` takes ([`staged_kernel`]): an all-reduce, of which every rank
/// launches its part with the same grid. Each block copies its elements to memory that the others
/// read, signals the blocks with the same index, waits for them, and folds.
///
/// Any number of launches may follow one another, with other counts and grids, and other kernels
/// between them. Each needs the staging memory that the launch before did not use.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StagedTask {
    /// Where the results go: `from`, or apart from it.
    pub to: u64,
    /// This rank's elements, aligned to the element.
    pub from: u64,
    /// Of each rank, this one's included: the memory that this launch uses. Aligned to 16 bytes,
    /// and as large as the elements, rounded up to 16 bytes.
    pub staging: [u64; RANKS_MAX],
    /// At each other rank: where this rank's flags are, 64-bit words, one for each block.
    pub theirs: [u64; RANKS_MAX],
    /// At this rank: where each other rank's flags are. They are 0 at first.
    pub mine: [u64; RANKS_MAX],
    /// How many elements.
    pub count: u64,
    /// The same on all ranks, from 1 on, and greater than in each launch before.
    pub call: u64,
    /// As [`FoldTask::divisor`].
    pub divisor: f64,
    /// As [`FoldTask::factor`].
    pub factor: f64,
    /// As [`FoldTask::nonfinite`].
    pub nonfinite: u64,
    /// As [`WaitTask::abort`]. The results of a launch that ends early are unspecified.
    pub abort: u64,
    /// As [`WaitTask::stopped`]. Once it is set, launches signal and write nothing.
    pub stopped: u64,
    /// As [`FoldTask::flags`].
    pub flags: u32,
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub ranks: u32,
}

/// What `unisum_multimem_sum_<dtype>` takes ([`multimem_kernel`]): an all-reduce in the switch, of
/// which every rank launches its part with the same grid. Each block copies its elements to memory
/// that a multicast address stands for, meets the blocks with the same index, loads the sums of its
/// part from that address, stores them there, meets the others again, and copies the results out.
///
/// Launches may follow one another as those of a [`StagedTask`]; all use the same memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MultimemTask {
    /// Where the results go: `from`, or apart from it.
    pub to: u64,
    /// This rank's elements, aligned to the element.
    pub from: u64,
    /// The memory of this rank's device. Aligned to 16 bytes, and as large as the elements, rounded
    /// up to 16 bytes.
    pub own: u64,
    /// The multicast address that stands for `own` of all ranks.
    pub all: u64,
    /// As [`StagedTask::theirs`], and not the same words.
    pub theirs: [u64; RANKS_MAX],
    /// As [`StagedTask::mine`].
    pub mine: [u64; RANKS_MAX],
    /// How many elements.
    pub count: u64,
    /// The same on all ranks, from 1 on, and greater than in each launch before.
    pub call: u64,
    /// As [`FoldTask::divisor`].
    pub divisor: f64,
    /// As [`FoldTask::factor`].
    pub factor: f64,
    /// As [`FoldTask::nonfinite`].
    pub nonfinite: u64,
    /// As [`StagedTask::abort`].
    pub abort: u64,
    /// As [`StagedTask::stopped`].
    pub stopped: u64,
    /// As [`FoldTask::flags`].
    pub flags: u32,
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub ranks: u32,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn entries(text: &str) -> BTreeSet<String> {
        let names = text.lines().filter_map(|line| line.strip_prefix(".visible .entry "));
        names.map(|name| name.trim_end_matches('(').to_owned()).collect()
    }

    #[test]
    fn every_defined_fold_has_a_kernel_and_every_kernel_a_use() {
        let others = ["copy", "copies", "signal", "wait"];
        let mut used = BTreeSet::from(others.map(|name| format!("unisum_{name}")));
        let mut undefined = 0;
        for (op, dtype) in ReduceOp::ALL.iter().flat_map(|&op| Dtype::ALL.map(|it| (op, it))) {
            match fold_kernel(op, dtype) {
                Ok(kernel) => {
                    assert_eq!(dtype.bytes() % kernel.unit_bytes, 0, "{op} {dtype}");
                    used.insert(kernel.name);
                }
                Err(_) => undefined += 1,
            }
            used.extend(staged_kernel(op, dtype).map(|kernel| kernel.name));
        }
        assert_eq!(undefined, 3 * 6 + 1, "bits of floats, and the average of truth values");
        assert_eq!(used, entries(TEXT));
    }

    #[test]
    fn every_sum_of_the_switch_has_a_kernel_and_every_kernel_a_use() {
        let all = ReduceOp::ALL.iter().flat_map(|&op| Dtype::ALL.map(|dtype| (op, dtype)));
        let scaled = all.flat_map(|(op, dtype)| [(op, dtype, false), (op, dtype, true)]);
        let kernel = |(op, dtype, scales)| multimem_kernel(op, dtype, scales).map(|it| it.name);
        let used: BTreeSet<String> = scaled.filter_map(kernel).collect();
        assert_eq!(used, entries(MULTIMEM_TEXT));
        assert_eq!(multimem_kernel(ReduceOp::Average, Dtype::F16, false), None);
    }

    #[test]
    fn a_device_gets_the_binary_of_its_major_version() {
        assert_eq!(binary(7, 5), binary(7, 0));
        assert_eq!(binary(8, 9), binary(8, 0));
        assert_ne!(binary(9, 0), binary(8, 0));
        assert!(binary(10, 3).is_some());
        assert_eq!([binary(6, 1), binary(11, 0), binary(12, 0)], [None; 3]);
        assert_ne!(multimem_binary(9, 0), multimem_binary(10, 0));
        assert_eq!([multimem_binary(8, 9), multimem_binary(12, 0)], [None; 2]);
        for (_, _, binary) in BINARIES.into_iter().chain(MULTIMEM_BINARIES) {
            assert_eq!(binary[..4], *b"\x7fELF");
        }
    }

    #[test]
    fn the_text_is_what_old_drivers_understand() {
        assert!(TEXT.contains("\n.version 8.1\n"), "of driver 530 and later");
        assert!(TEXT.contains("\n.target sm_70\n"));
        assert!(MULTIMEM_TEXT.contains("\n.version 8.2\n"), "of driver 535 and later");
        assert!(MULTIMEM_TEXT.contains("\n.target sm_90\n"));
        for text in [TEXT, MULTIMEM_TEXT] {
            assert_eq!(text.find('\0'), Some(text.len() - 1));
        }
    }
}
