//! The collectives one by one, without a structure.

use std::ffi::c_void;
use std::ptr;

use crate::collective::{collective, run, unisum_buffers, unisum_collective};
use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::{dtype, unisum_dtype, unisum_kind};

/// What a simple call says.
struct Call {
    kind: unisum_kind,
    op: u32,
    root: u32,
    /// Elements of a block, or of everything where there are no blocks.
    count: usize,
    dtype: u32,
}

/// Runs a simple call.
///
/// # Safety
/// C promises the memory.
unsafe fn simple(
    handle: *const unisum_comm,
    call: Call,
    (input, output): (*const c_void, *mut c_void),
) -> Outcome {
    let comm = handles::get::<Comm, _>(handle)?;
    let (rank, world) = (comm.communicator.rank(), comm.communicator.world());
    let Call { kind, op, root, count, dtype } = call;
    let asked = unisum_collective {
        kind: kind as u32,
        op,
        root,
        flags: 0,
        scale: 0.0,
        counts: ptr::null(),
        receive_counts: ptr::null(),
        reduction: ptr::null(),
    };
    // SAFETY: the structure is there, and has no counts.
    let collective = unsafe { collective(&raw const asked, world) }?;
    let Some(all) = count.checked_mul(world) else {
        return invalid(format!("{count} elements for each of {world} ranks are too many"));
    };
    let is_root = root as usize == rank;
    let at_root = |count| if is_root { count } else { 0 };
    let (input_count, output_count) = match kind {
        unisum_kind::UNISUM_ALL_GATHER => (count, all),
        unisum_kind::UNISUM_REDUCE_SCATTER => (all, count),
        unisum_kind::UNISUM_ALL_TO_ALL => (all, all),
        unisum_kind::UNISUM_GATHER => (count, at_root(all)),
        unisum_kind::UNISUM_SCATTER => (at_root(all), count),
        _ => (count, count),
    };
    let in_place = input.addr() == in_place().addr();
    // In place the buffer is as long as the longer of the two.
    let output_count = if in_place { input_count.max(output_count) } else { output_count };
    // Where nothing goes in or comes out, it does not matter what is given.
    let input = if input_count == 0 && !in_place { ptr::null() } else { input };
    let output = if output_count == 0 { ptr::null_mut() } else { output };
    let buffers = unisum_buffers { input, input_count, output, output_count };
    // SAFETY: the caller vouches for the memory.
    unsafe { run(&comm, &collective, self::dtype(dtype)?, &buffers) }.map(drop)
}

const fn in_place() -> *const c_void {
    ptr::without_provenance(1)
}

/// Reduces `count` elements over all ranks, in place, and leaves the result on every rank: the same
/// bits. Collective: every rank calls it, in the same order, with the same arguments. Blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_all_reduce(
    comm: *const unisum_comm,
    data: *mut c_void,
    count: usize,
    dtype: u32,
    op: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_ALL_REDUCE, op, root: 0, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (in_place(), data)) })
}

/// Reduces `count` elements over all ranks, in place, and leaves the result at the root; elsewhere
/// `data` stays as it is. Else as unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_reduce(
    comm: *const unisum_comm,
    data: *mut c_void,
    count: usize,
    dtype: u32,
    op: u32,
    root: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_REDUCE, op, root, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (in_place(), data)) })
}

/// Copies `count` elements of the root to all ranks. Else as unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_broadcast(
    comm: *const unisum_comm,
    data: *mut c_void,
    count: usize,
    dtype: u32,
    root: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_BROADCAST, op: 0, root, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (in_place(), data)) })
}

/// Gathers `count` elements of each rank, in rank order, in the output of all ranks, which has
/// world times `count`. With UNISUM_IN_PLACE as the input, the rank's own are in the output
/// already, at their place. Else as unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_all_gather(
    comm: *const unisum_comm,
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_ALL_GATHER, op: 0, root: 0, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (input, output)) })
}

/// Reduces world times `count` elements of all ranks and leaves in the output this rank's block of
/// `count`. With UNISUM_IN_PLACE as the input, the output has world times `count` elements, and the
/// result is at the rank's place in it. Else as unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_reduce_scatter(
    comm: *const unisum_comm,
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: u32,
    op: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_REDUCE_SCATTER, op, root: 0, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (input, output)) })
}

/// Sends block r of the input, of `count` elements, to rank r, and receives its block for this rank
/// in block r of the output. Input or UNISUM_IN_PLACE, and output, have world blocks. Else as
/// unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_all_to_all(
    comm: *const unisum_comm,
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_ALL_TO_ALL, op: 0, root: 0, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (input, output)) })
}

/// Gathers `count` elements of each rank, in rank order, in the root's output, which has world
/// times `count`; elsewhere the output is not looked at. Else as unisum_all_gather.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_gather(
    comm: *const unisum_comm,
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: u32,
    root: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_GATHER, op: 0, root, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (input, output)) })
}

/// Sends block r of the root's input, of `count` elements, to the output of rank r; elsewhere the
/// input is not looked at. With UNISUM_IN_PLACE as the input, the root's output has all blocks.
/// Else as unisum_all_reduce.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scatter(
    comm: *const unisum_comm,
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: u32,
    root: u32,
) -> unisum_status {
    let call = Call { kind: unisum_kind::UNISUM_SCATTER, op: 0, root, count, dtype };
    // SAFETY: C promises the memory.
    guard(|| unsafe { simple(comm, call, (input, output)) })
}

/// Returns when all ranks have called it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_barrier(comm: *const unisum_comm) -> unisum_status {
    let (kind, dtype) = (unisum_kind::UNISUM_BARRIER, unisum_dtype::UNISUM_U8 as u32);
    let call = Call { kind, op: 0, root: 0, count: 0, dtype };
    // SAFETY: it has no memory.
    guard(|| unsafe { simple(comm, call, (in_place(), ptr::null_mut())) })
}
