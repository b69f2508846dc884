//! Collectives in general: what C asks for, and buffers that are lent for it.

use std::ffi::c_void;

use unisum::{Buffers, Collective, Dtype, Element, Outcome as Told, Reduction};

use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::memory::{Piece, check, check_apart, elements, elements_mut, list, put};
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::{dtype, for_dtype, op};

/// A collective with its arguments, the same on all ranks but where it says otherwise. A structure
/// of zeros, with `kind` and, if it reduces, `op`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_collective {
    /// Which it is: a unisum_kind.
    pub kind: u32,
    /// How it reduces, if it does: a unisum_op.
    pub op: u32,
    /// The root, if it has one.
    pub root: u32,
    /// unisum_flags, added.
    pub flags: u32,
    /// With UNISUM_SCALED: the factor of the inputs of a sum of floats.
    pub scale: f64,
    /// How long the blocks are, in elements: one number for each rank, in rank order. NULL if all
    /// are alike. Of an all-to-all: what goes to each rank.
    pub counts: *const usize,
    /// Of an all-to-all with counts: what comes from each rank. Else NULL.
    pub receive_counts: *const usize,
}

/// What a collective is asked for beside its result.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_flags {
    /// The inputs of a sum are multiplied by `scale`, in the same pass.
    UNISUM_SCALED = 1,
    /// It is told whether a result is infinite or NaN, at no further pass and no further message:
    /// of sums, products and averages of floats, in an all-reduce or a reduce-scatter.
    UNISUM_DETECT_NONFINITE = 2,
}

/// The buffers of a collective. With UNISUM_IN_PLACE as the input, the output is both: as long as
/// all blocks, with the rank's own at its place, on ranks that have or get all blocks, else as long
/// as one. Else the two are apart. A rank that puts nothing in or gets nothing gives NULL and 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_buffers {
    /// What this rank puts in; it stays as it is.
    pub input: *const c_void,
    /// How many elements that are; not looked at in place.
    pub input_count: usize,
    /// Where the result goes.
    pub output: *mut c_void,
    /// How many elements that are.
    pub output_count: usize,
}

/// The address that UNISUM_IN_PLACE is.
const IN_PLACE: usize = 1;

const KNOWN_FLAGS: u32 =
    unisum_flags::UNISUM_SCALED as u32 | unisum_flags::UNISUM_DETECT_NONFINITE as u32;

/// Checked buffers of the program's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lent {
    InPlace(*mut c_void, usize),
    Apart(*const c_void, usize, *mut c_void, usize),
}

// SAFETY: C promises that nobody else uses the buffers during a call, on whichever thread it runs.
unsafe impl Send for Lent {}

impl Lent {
    /// The buffers, if they can be those of elements of type `T`; with the pieces that they are.
    pub(crate) fn new<T: Element>(buffers: &unisum_buffers) -> Outcome<(Self, [Piece; 2])> {
        let unisum_buffers { input, input_count, output, output_count } = *buffers;
        let to_write = check::<T>(output, output_count, true, "the output")?;
        // Other libraries say it by giving the same buffer twice.
        let is_same = input == output.cast_const() && input_count == output_count;
        if input.addr() == IN_PLACE || is_same && input_count > 0 {
            let nothing = check::<T>(std::ptr::null(), 0, false, "nothing")?;
            return Ok((Self::InPlace(output, output_count), [to_write, nothing]));
        }
        let to_read = check::<T>(input, input_count, false, "the input")?;
        let pieces = [to_write, to_read];
        check_apart(&mut { pieces })?;
        Ok((Self::Apart(input, input_count, output, output_count), pieces))
    }

    /// The buffers as slices.
    ///
    /// # Safety
    /// C promises the memory, and that nobody else uses it for `'a`; the buffers were checked for
    /// elements of type `T`.
    pub(crate) unsafe fn lend<'a, T: Element>(self) -> Buffers<'a, T> {
        match self {
            // SAFETY: the caller vouches for it.
            Self::InPlace(data, count) => Buffers::InPlace(unsafe { elements_mut(data, count) }),
            Self::Apart(input, input_count, output, output_count) => {
                // SAFETY: the caller vouches for it.
                let input = unsafe { elements(input, input_count) };
                // SAFETY: as above; the two were found apart.
                Buffers::Apart(input, unsafe { elements_mut(output, output_count) })
            }
        }
    }
}

/// What C's structure asks for, on so many ranks.
///
/// # Safety
/// C promises counts for so many ranks.
pub(crate) unsafe fn collective(
    asked: *const unisum_collective,
    world: usize,
) -> Outcome<Collective> {
    if asked.is_null() || !asked.is_aligned() {
        return invalid("the collective is NULL or misaligned");
    }
    // SAFETY: C promises a structure.
    let asked = unsafe { asked.read() };
    let kind = plain(&asked)?;
    let one_list = if asked.counts.is_null() { asked.receive_counts } else { asked.counts };
    if one_list.is_null() {
        return Ok(kind);
    }
    let is_all_to_all = asked.kind == crate::types::unisum_kind::UNISUM_ALL_TO_ALL as u32;
    match (is_all_to_all, asked.counts.is_null(), asked.receive_counts.is_null()) {
        (true, false, false) => {
            // SAFETY: the caller vouches for both.
            let sends = unsafe { list(asked.counts, world, "counts") }?;
            // SAFETY: as above.
            let receives = unsafe { list(asked.receive_counts, world, "receive_counts") }?;
            Ok(Collective::all_to_all_v(sends, receives))
        }
        (false, false, true) => {
            // SAFETY: as above.
            Ok(kind.with_counts(unsafe { list(asked.counts, world, "counts") }?))
        }
        (true, ..) => invalid("an all-to-all takes both counts and receive_counts, or neither"),
        (false, ..) => invalid("only an all-to-all takes receive_counts"),
    }
}

/// The collective without counts.
fn plain(asked: &unisum_collective) -> Outcome<Collective> {
    use crate::types::unisum_kind::*;
    if asked.flags & !KNOWN_FLAGS != 0 {
        return invalid(format!("there are flags that do not exist among {:#x}", asked.flags));
    }
    let root = asked.root as usize;
    type Make = fn(Reduction, usize) -> Collective;
    let codes: [(u32, Make); 9] = [
        (UNISUM_ALL_REDUCE as u32, |how, _| Collective::all_reduce(how)),
        (UNISUM_REDUCE as u32, Collective::reduce),
        (UNISUM_BROADCAST as u32, |_, root| Collective::broadcast(root)),
        (UNISUM_ALL_GATHER as u32, |_, _| Collective::all_gather()),
        (UNISUM_REDUCE_SCATTER as u32, |how, _| Collective::reduce_scatter(how)),
        (UNISUM_ALL_TO_ALL as u32, |_, _| Collective::all_to_all()),
        (UNISUM_GATHER as u32, |_, root| Collective::gather(root)),
        (UNISUM_SCATTER as u32, |_, root| Collective::scatter(root)),
        (UNISUM_BARRIER as u32, |_, _| Collective::barrier()),
    ];
    let Some((_, make)) = codes.iter().find(|(code, _)| *code == asked.kind) else {
        return invalid(format!("{} is no kind of collective", asked.kind));
    };
    let reduces = [UNISUM_ALL_REDUCE, UNISUM_REDUCE, UNISUM_REDUCE_SCATTER];
    if !reduces.iter().any(|kind| *kind as u32 == asked.kind) {
        return Ok(make(unisum::ReduceOp::Sum.into(), root));
    }
    let op = op(asked.op)?;
    let is_scaled = asked.flags & unisum_flags::UNISUM_SCALED as u32 != 0;
    let reduction = match is_scaled {
        false => Reduction::new(op),
        true if op == unisum::ReduceOp::Sum => Reduction::sum_scaled_by(asked.scale),
        true => return invalid("only a sum takes UNISUM_SCALED"),
    };
    let detects = asked.flags & unisum_flags::UNISUM_DETECT_NONFINITE as u32 != 0;
    Ok(make(if detects { reduction.watched() } else { reduction }, root))
}

/// Runs a collective. Collective: every rank calls it, in the same order, with the same arguments
/// and buffers that fit. Blocks. `nonfinite`, which may be NULL, gets whether a result is infinite
/// or NaN, with UNISUM_DETECT_NONFINITE. After an error that other ranks hear of the communicator
/// is aborted and the output unspecified.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_run(
    comm: *const unisum_comm,
    collective: *const unisum_collective,
    dtype: u32,
    buffers: *const unisum_buffers,
    nonfinite: *mut bool,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        // SAFETY: C promises counts.
        let collective = unsafe { self::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises one.
        let buffers = unsafe { list(buffers, 1, "the buffers") }?;
        // SAFETY: C promises the memory.
        let told = unsafe { run(&comm, &collective, self::dtype(dtype)?, &buffers[0]) }?;
        // SAFETY: C promises that it may be written.
        unsafe { tell(told, nonfinite) }
    })
}

/// Runs one collective on each of several tensors, as so many calls of unisum_run would, but in few
/// launches. Every rank gives as many, in the same order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_run_batch(
    comm: *const unisum_comm,
    collective: *const unisum_collective,
    dtype: u32,
    tensors: *const unisum_buffers,
    count: usize,
    nonfinite: *mut bool,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        // SAFETY: C promises counts.
        let collective = unsafe { self::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises so many.
        let tensors = unsafe { list(tensors, count, "the tensors") }?;
        let told: Told = for_dtype!(self::dtype(dtype)?, T => {
            let lent = lent_batch::<T>(tensors)?;
            // SAFETY: C promises the memory; all were found apart.
            let mut lent: Vec<_> = lent.into_iter().map(|it| unsafe { it.lend::<T>() }).collect();
            Ok(comm.communicator.run_batch(&collective, &mut lent)?)
        })?;
        // SAFETY: C promises that it may be written.
        unsafe { tell(told, nonfinite) }
    })
}

/// The buffers of a batch, none of which overlaps another.
pub(crate) fn lent_batch<T: Element>(tensors: &[unisum_buffers]) -> Outcome<Vec<Lent>> {
    let mut pieces = Vec::with_capacity(tensors.len() * 2);
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let (lent, of_tensor) = Lent::new::<T>(tensor)?;
        all.push(lent);
        pieces.extend(of_tensor);
    }
    check_apart(&mut pieces)?;
    Ok(all)
}

/// Runs a collective on the program's buffers.
///
/// # Safety
/// C promises the memory, and that nobody else uses it meanwhile.
pub(crate) unsafe fn run(
    comm: &Comm,
    collective: &Collective,
    dtype: Dtype,
    buffers: &unisum_buffers,
) -> Outcome<Told> {
    for_dtype!(dtype, T => {
        let (lent, _) = Lent::new::<T>(buffers)?;
        // SAFETY: the caller vouches for it.
        Ok(comm.communicator.run::<T>(collective, unsafe { lent.lend() })?)
    })
}

/// Says what a collective told.
///
/// # Safety
/// C promises that it may be written.
pub(crate) unsafe fn tell(told: Told, nonfinite: *mut bool) -> Outcome {
    if nonfinite.is_null() {
        return Ok(());
    }
    // SAFETY: the caller vouches for it.
    unsafe { put(nonfinite, told.nonfinite, "`nonfinite`") }
}
