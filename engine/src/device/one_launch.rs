//! An all-reduce of little data in a single launch: the protocol that `kernels/cuda/staged.h`
//! follows, as operations, so that it is simulated and reckoned like every other queue.
//!
//! Each rank copies its input to staging memory that the others read, signals them, waits for them,
//! and folds the staging memories of all ranks in rank order: the bits are those of a one-shot.
//! Nobody says that it has read: calls use two staging memories in turns, and a rank that comes to
//! use one again has waited, in the call between, for signals that the others sent after they had
//! read it.
//!
//! What such a launch takes where the switch between the devices adds is only reckoned here: in
//! which order it folds its operands, no plan can say.

use super::{
    DeviceCopy, DeviceFigures, DeviceFold, DeviceProgram, DeviceSource, Flag, Memory, Note,
    Operand, Operation, Place, Totals,
};

/// How many staging memories the calls use in turns.
pub const STAGING_MEMORIES: usize = 2;

/// The operations of one rank's launch, with staging memory number `half` of the two that lie one
/// behind the other in scratch memory, which nothing else uses between calls. `source` is of an
/// all-reduce; its algorithm and slices do not matter.
pub fn one_launch(source: &DeviceSource<'_>, half: usize) -> DeviceProgram {
    let (world, rank) = (source.world(), source.rank);
    let bytes = source.shapes[0].elements() * source.element_bytes;
    let stride = bytes.next_multiple_of(16);
    let staging = Place::new(Memory::Scratch, half * stride);
    let input = Operand { rank, place: Place::new(Memory::Input, 0) };
    let notes = || -> Vec<Note> {
        let peers = (0..world).filter(|&peer| peer != rank);
        peers.map(|peer| Note { peer, flag: Flag::Ready, count: 1 }).collect()
    };
    let operations = vec![
        Operation::Copy(vec![DeviceCopy { from: input, to: staging, bytes }]),
        Operation::Signal(notes()),
        Operation::Wait(notes()),
        Operation::Fold(DeviceFold {
            sources: (0..world).map(|rank| Operand { rank, place: staging }).collect(),
            to: Place::new(Memory::Output, 0),
            bytes,
            divides: source.average,
            scales: source.scales,
            watches: true,
        }),
    ];
    let once = |peer| if peer == rank { Totals::default() } else { Totals { ready: 1, taken: 0 } };
    let totals: Vec<Totals> = (0..world).map(once).collect();
    DeviceProgram {
        operations,
        scratch: vec![STAGING_MEMORIES * stride; world],
        sent: totals.clone(),
        received: totals,
        watched_by: vec![rank],
        watches_for: vec![rank],
    }
}

/// The time in seconds that such a launch takes, by the given figures: as
/// [`seconds`](super::seconds) would reckon it, with one launch instead of four.
pub fn one_launch_seconds(world: usize, bytes: usize, figures: &DeviceFigures) -> f64 {
    let (own, others) = (bytes as f64, (bytes * (world - 1)) as f64);
    let staging = 2.0 * own / figures.memory_bytes_per_s;
    // What comes in over the own link goes out over it to as many peers.
    let links = others / figures.link_bytes_per_s;
    // Own elements are read, results written; peers read this rank's staging memory meanwhile.
    let memory = (2.0 * own + others) / figures.memory_bytes_per_s;
    figures.launch_s + staging + figures.flag_s + links.max(memory)
}

/// The time in seconds that an all-reduce in the switch takes, as `kernels/cuda/multimem.h` has it,
/// with a launch for each piece of at most `piece` bytes.
///
/// In both directions a link carries all bytes once and this device's part of them once more: its
/// elements, as others load the sums, and the results that it stores; the sums that it loads, and
/// the results of all.
///
/// # Panics
/// If `piece` or `world` is 0.
pub fn multimem_seconds(world: usize, bytes: usize, piece: usize, figures: &DeviceFigures) -> f64 {
    let pieces = bytes.div_ceil(piece).max(1) as f64;
    let (all, part) = (bytes as f64, bytes as f64 / world as f64);
    // To the bound memory, and from there.
    let copies = 2.0 * 2.0 * all / figures.memory_bytes_per_s;
    let links = (all + part) / figures.link_bytes_per_s;
    let memory = 2.0 * all / figures.memory_bytes_per_s;
    pieces * (figures.launch_s + 2.0 * figures.flag_s) + copies + links.max(memory)
}
