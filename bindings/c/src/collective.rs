//! Collectives in general: what C asks for, and buffers that are lent for it.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum::{Collective, Dtype, Outcome as Told, RawBuffers, Reduction};

use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::memory::{Piece, check, check_apart, list, put};
use crate::reduction::{Own, unisum_reduction};
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::{dtype, op};

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
    /// A reduction of the program's own, instead of `op`, which is then 0; else NULL.
    pub reduction: *const unisum_reduction,
}

/// A collective for the library, with what it needs to be there until it has ended.
pub(crate) struct Asked {
    pub(crate) collective: Collective,
    /// The reduction of the program's own.
    pub(crate) reduction: Option<Arc<Own>>,
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
pub(crate) const IN_PLACE: usize = 1;

const KNOWN_FLAGS: u32 =
    unisum_flags::UNISUM_SCALED as u32 | unisum_flags::UNISUM_DETECT_NONFINITE as u32;

/// Checked buffers of the program's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lent {
    dtype: Dtype,
    /// `None` in place.
    input: Option<(NonNull<u8>, usize)>,
    output: (NonNull<u8>, usize),
}

// SAFETY: C promises that nobody else uses the buffers during a call, on whichever thread it runs.
unsafe impl Send for Lent {}

impl Lent {
    /// The buffers, if they can be those of elements of type `dtype`; with the pieces that they
    /// are.
    pub(crate) fn new(dtype: Dtype, buffers: &unisum_buffers) -> Outcome<(Self, [Piece; 2])> {
        let unisum_buffers { input, input_count, output, output_count } = *buffers;
        let to_write = check(dtype, output, output_count, true, "the output")?;
        // Without elements NULL is legal.
        let start = |data: *mut c_void| NonNull::new(data.cast()).unwrap_or(ALIGNED);
        let to = (start(output), output_count);
        // Other libraries say it by giving the same buffer twice.
        let is_same = input == output.cast_const() && input_count == output_count;
        if input.addr() == IN_PLACE || is_same && input_count > 0 {
            let nothing = check(dtype, std::ptr::null(), 0, false, "nothing")?;
            return Ok((Self { dtype, input: None, output: to }, [to_write, nothing]));
        }
        let to_read = check(dtype, input, input_count, false, "the input")?;
        let pieces = [to_write, to_read];
        check_apart(&mut { pieces })?;
        let from = (start(input.cast_mut()), input_count);
        Ok((Self { dtype, input: Some(from), output: to }, pieces))
    }

    pub(crate) const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The buffers for the library.
    ///
    /// # Safety
    /// C promises the memory, and that nobody else uses it for `'a`.
    pub(crate) const unsafe fn lend<'a>(self) -> RawBuffers<'a> {
        match self.input {
            // SAFETY: the caller vouches for it; alignment, size and NULL were checked.
            None => unsafe { RawBuffers::in_place(self.dtype, self.output.0, self.output.1) },
            Some(input) => {
                // SAFETY: as above; the two were found apart.
                unsafe { RawBuffers::out_of_place(self.dtype, input, self.output) }
            }
        }
    }
}

/// Where buffers without elements lie.
const ALIGNED: NonNull<u8> = NonNull::<u128>::dangling().cast();

/// What C's structure asks for, on so many ranks.
///
/// # Safety
/// C promises counts for so many ranks.
pub(crate) unsafe fn collective(asked: *const unisum_collective, world: usize) -> Outcome<Asked> {
    if asked.is_null() || !asked.is_aligned() {
        return invalid("the collective is NULL or misaligned");
    }
    // SAFETY: C promises a structure.
    let asked = unsafe { asked.read() };
    let reduction = match asked.reduction.is_null() {
        true => None,
        false => Some(handles::get::<Own, _>(asked.reduction)?),
    };
    let kind = plain(&asked, reduction.as_deref())?;
    // SAFETY: the caller vouches for the counts.
    let collective = unsafe { with_counts(&asked, kind, world) }?;
    Ok(Asked { collective, reduction })
}

/// # Safety
/// C promises counts for so many ranks.
unsafe fn with_counts(
    asked: &unisum_collective,
    kind: Collective,
    world: usize,
) -> Outcome<Collective> {
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
fn plain(asked: &unisum_collective, own: Option<&Own>) -> Outcome<Collective> {
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
        return match own {
            None => Ok(make(unisum::ReduceOp::Sum.into(), root)),
            Some(_) => invalid("a collective that does not reduce was given a reduction"),
        };
    }
    let reduction = match own {
        None => reduction(asked)?,
        Some(_) if asked.op != 0 => {
            return invalid("a reduction of the program's own and an op at once");
        }
        Some(_) if asked.flags != 0 => {
            return invalid("a reduction of the program's own takes no flags");
        }
        Some(own) => own.reduction(),
    };
    Ok(make(reduction, root))
}

/// How elements are reduced if that is up to the library.
fn reduction(asked: &unisum_collective) -> Outcome<Reduction> {
    let op = op(asked.op)?;
    let is_scaled = asked.flags & unisum_flags::UNISUM_SCALED as u32 != 0;
    let reduction = match is_scaled {
        false => Reduction::new(op),
        true if op == unisum::ReduceOp::Sum => Reduction::sum_scaled_by(asked.scale),
        true => return invalid("only a sum takes UNISUM_SCALED"),
    };
    let detects = asked.flags & unisum_flags::UNISUM_DETECT_NONFINITE as u32 != 0;
    Ok(if detects { reduction.detect_nonfinite() } else { reduction })
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
        let asked = unsafe { self::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises one.
        let buffers = unsafe { list(buffers, 1, "the buffers") }?;
        // SAFETY: C promises the memory.
        let told = unsafe { run(&comm, &asked, self::dtype(dtype)?, &buffers[0]) }?;
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
        let asked = unsafe { self::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises so many.
        let tensors = unsafe { list(tensors, count, "the tensors") }?;
        let dtype = self::dtype(dtype)?;
        let lent = lent_batch(dtype, tensors)?;
        // SAFETY: C promises the memory; all were found apart.
        let mut lent: Vec<_> = lent.into_iter().map(|it| unsafe { it.lend() }).collect();
        let told = comm.communicator.run_batch_raw(&asked.collective, dtype, &mut lent)?;
        // SAFETY: C promises that it may be written.
        unsafe { tell(told, nonfinite) }
    })
}

/// The buffers of a batch, none of which overlaps another.
pub(crate) fn lent_batch(dtype: Dtype, tensors: &[unisum_buffers]) -> Outcome<Vec<Lent>> {
    let mut pieces = Vec::with_capacity(tensors.len() * 2);
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let (lent, of_tensor) = Lent::new(dtype, tensor)?;
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
    asked: &Asked,
    dtype: Dtype,
    buffers: &unisum_buffers,
) -> Outcome<Told> {
    let (lent, _) = Lent::new(dtype, buffers)?;
    // SAFETY: the caller vouches for it.
    Ok(comm.communicator.run_raw(&asked.collective, unsafe { lent.lend() })?)
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
