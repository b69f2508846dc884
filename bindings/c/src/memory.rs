//! Memory of the program's as slices, once all is checked that can be; and memory of the library's.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use unisum::{Buffer, Dtype, Element};

use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::status::{Failure, Outcome, guard, invalid, unisum_status};

/// A checked piece of the program's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    start: usize,
    end: usize,
    is_written: bool,
}

/// Checks a buffer of `count` elements of type `dtype`.
pub(crate) fn check(
    dtype: Dtype,
    data: *const c_void,
    count: usize,
    is_written: bool,
    what: &str,
) -> Outcome<Piece> {
    let bytes = count.checked_mul(dtype.bytes()).filter(|&it| isize::try_from(it).is_ok());
    let end = bytes.and_then(|bytes| data.addr().checked_add(bytes));
    let Some(end) = end else {
        return invalid(format!("{what}: {count} elements of {dtype} are more than memory holds"));
    };
    if count > 0 && data.is_null() {
        return invalid(format!("{what} is NULL, and is said to have {count} elements"));
    }
    // Elements are as large as what they are aligned to.
    if count > 0 && !data.addr().is_multiple_of(dtype.bytes()) {
        let bytes = dtype.bytes();
        return invalid(format!("{what} is not aligned to {bytes} bytes, as {dtype} is"));
    }
    Ok(Piece { start: data.addr(), end, is_written })
}

/// Refuses pieces of which one is written and overlaps another.
pub(crate) fn check_apart(pieces: &mut [Piece]) -> Outcome {
    pieces.sort_by_key(|piece| piece.start);
    let (mut end, mut written_end) = (0, 0);
    for piece in pieces.iter().filter(|piece| piece.start < piece.end) {
        if piece.start < written_end || piece.is_written && piece.start < end {
            return invalid(
                "buffers overlap, and one of them is written: for input and output in one buffer \
                 give UNISUM_IN_PLACE as the input",
            );
        }
        end = end.max(piece.end);
        if piece.is_written {
            written_end = written_end.max(piece.end);
        }
    }
    Ok(())
}

/// The elements of a checked buffer, to be read.
///
/// # Safety
/// C promises that they are there and that nobody writes them for `'a`.
pub(crate) unsafe fn elements<'a, T: Element>(data: *const c_void, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller promised it; `check` saw to alignment, size and NULL.
    unsafe { std::slice::from_raw_parts(data.cast(), count) }
}

/// The elements of a checked buffer, to be written.
///
/// # Safety
/// C promises that they are there and that nobody else uses them for `'a`.
pub(crate) unsafe fn elements_mut<'a, T: Element>(data: *mut c_void, count: usize) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: the caller promised it; `check` saw to alignment, size and NULL.
    unsafe { std::slice::from_raw_parts_mut(data.cast(), count) }
}

/// The values of a list of C's, such as counts.
///
/// # Safety
/// C promises `count` of them.
pub(crate) unsafe fn list<'a, T>(data: *const T, count: usize, what: &str) -> Outcome<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    let fits = count.checked_mul(size_of::<T>()).is_some_and(|it| isize::try_from(it).is_ok());
    if data.is_null() || !data.is_aligned() || !fits {
        return invalid(format!("{what} is NULL, misaligned, or longer than memory: {count}"));
    }
    // SAFETY: the caller promised it, and the rest was checked.
    Ok(unsafe { std::slice::from_raw_parts(data, count) })
}

/// A text of C's.
///
/// # Safety
/// C promises that it ends in a NUL byte.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &str) -> Outcome<&'a str> {
    if text.is_null() {
        return invalid(format!("{what} is NULL"));
    }
    // SAFETY: the caller promised it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_or_else(|_| invalid(format!("{what} is not UTF-8")), Ok)
}

/// Checks a place for a result.
pub(crate) fn check_place<T>(place: *mut T, what: &str) -> Outcome {
    match place.is_null() || !place.is_aligned() {
        true => invalid(format!("the place for {what} is NULL or misaligned")),
        false => Ok(()),
    }
}

/// Writes a result.
///
/// # Safety
/// C promises that it may be written.
pub(crate) unsafe fn put<T>(place: *mut T, value: T, what: &str) -> Outcome {
    check_place(place, what)?;
    // SAFETY: the caller promised it, and the rest was checked.
    unsafe { place.write(value) };
    Ok(())
}

/// Copies a text to `capacity` bytes at `place`, cut if it must be, with a NUL byte behind it, and
/// writes to `length` how long it is without that. Either may be NULL.
///
/// # Safety
/// C promises that both may be written.
pub(crate) unsafe fn put_text(
    text: &str,
    place: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Outcome {
    if !place.is_null() && capacity > 0 {
        // A character is not cut in the middle.
        let mut fits = text.len().min(capacity - 1);
        while !text.is_char_boundary(fits) {
            fits -= 1;
        }
        // SAFETY: so much fits there, as the caller promised.
        unsafe { ptr::copy_nonoverlapping(text.as_ptr(), place.cast(), fits) };
        // SAFETY: within `capacity`.
        let end = unsafe { place.add(fits) };
        // SAFETY: as above.
        unsafe { end.write(0) };
    }
    if !length.is_null() {
        // SAFETY: the caller promised it.
        unsafe { put(length, text.len(), "the length") }?;
    }
    Ok(())
}

/// Copies bytes to `place`, `capacity` at most, and writes to `length` how many there are.
///
/// # Safety
/// C promises that both may be written.
pub(crate) unsafe fn put_bytes(
    bytes: &[u8],
    place: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> Outcome {
    check_place(length, "the length")?;
    if !place.is_null() {
        let fits = bytes.len().min(capacity);
        // SAFETY: so many fit there, as the caller promised.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place.cast(), fits) };
    }
    // SAFETY: the caller promised it.
    unsafe { put(length, bytes.len(), "the length") }
}

/// Memory that C has of the library's.
enum Allocated {
    Shared(#[expect(dead_code, reason = "dropped, not read")] Buffer<u8>),
    Plain(#[expect(dead_code, reason = "dropped, not read")] Vec<u8>),
    Structure(#[expect(dead_code, reason = "dropped, not read")] Box<dyn Any + Send>),
}

/// What was allocated, by its address and the generation of processes that did.
static ALLOCATED: [Mutex<BTreeMap<usize, Allocated>>; 2] =
    [const { Mutex::new(BTreeMap::new()) }; 2];

fn allocated() -> Outcome<std::sync::MutexGuard<'static, BTreeMap<usize, Allocated>>> {
    match ALLOCATED.get(handles::generation()) {
        Some(table) => Ok(table.lock().unwrap_or_else(PoisonError::into_inner)),
        None => {
            let text = "processes that were forked from forked ones can't allocate memory";
            Err(Failure::Here(unisum_status::UNISUM_FORKED, text.into()))
        }
    }
}

/// Allocates zeroed memory that the links of a communicator reach without copies: peers on this
/// host map it, and RDMA devices know it. Not collective. It may outlive the communicator; it is
/// freed by unisum_free, and must not be touched in a forked child.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_allocate(
    comm: *const unisum_comm,
    bytes: usize,
    memory: *mut *mut c_void,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(memory, "the memory")?;
        let mut buffer = comm.communicator.allocate::<u8>(bytes.max(1))?;
        let start: *mut u8 = buffer.as_mut_ptr();
        allocated()?.insert(start.addr(), Allocated::Shared(buffer));
        // SAFETY: C promises that it may be written.
        unsafe { put(memory, start.cast(), "the memory") }
    })
}

/// Gives C bytes, to be freed by `unisum_free`: where they are, also if there are none.
pub(crate) fn give_bytes(mut bytes: Vec<u8>) -> Outcome<*mut c_void> {
    if bytes.capacity() == 0 {
        // Without room it has no address of its own.
        bytes.reserve(1);
    }
    let start = bytes.as_mut_ptr();
    allocated()?.insert(start.addr(), Allocated::Plain(bytes));
    Ok(start.cast())
}

/// Gives C the structure that begins at an address, with all that it points to, to be freed by
/// `unisum_free`.
pub(crate) fn give_structure(start: usize, whole: Box<dyn Any + Send>) -> Outcome {
    allocated()?.insert(start, Allocated::Structure(whole));
    Ok(())
}

/// Frees memory that unisum_allocate or unisum_comm_share_state gave, or a structure of
/// unisum_comm_stats or unisum_comm_description with all that it points to. Nobody may use it any
/// more: no call that is under way, no work. NULL is refused, and so is what was freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_free(memory: *const c_void) -> unisum_status {
    guard(|| match allocated()?.remove(&memory.addr()) {
        Some(memory) => {
            drop(memory);
            Ok(())
        }
        None => invalid("no memory of unisum's begins there, or it was freed"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: usize, end: usize, is_written: bool) -> Piece {
        Piece { start, end, is_written }
    }

    #[test]
    fn only_what_nobody_writes_may_overlap() {
        let apart = |pieces: &[Piece]| check_apart(&mut pieces.to_vec()).is_ok();
        assert!(apart(&[piece(8, 16, true), piece(0, 8, true), piece(16, 20, false)]));
        assert!(apart(&[piece(0, 8, false), piece(4, 12, false), piece(12, 13, true)]));
        assert!(!apart(&[piece(0, 8, true), piece(7, 12, false)]));
        assert!(!apart(&[piece(0, 8, false), piece(7, 12, true)]));
        assert!(!apart(&[piece(0, 100, true), piece(3, 4, false), piece(50, 51, false)]));
        assert!(!apart(&[piece(0, 100, false), piece(3, 4, false), piece(50, 51, true)]));
        // Nothing is nowhere.
        assert!(apart(&[piece(0, 8, true), piece(4, 4, true)]));
    }

    #[test]
    fn buffers_that_can_not_be_are_refused() {
        let some = [0_u32; 4];
        let at = some.as_ptr().cast::<c_void>();
        assert!(check(Dtype::U32, at, 4, false, "x").is_ok());
        assert!(check(Dtype::U32, ptr::null(), 0, false, "x").is_ok());
        assert!(check(Dtype::U32, ptr::null(), 1, false, "x").is_err());
        assert!(check(Dtype::U32, at.wrapping_byte_add(1), 1, false, "x").is_err());
        assert!(check(Dtype::U8, at.wrapping_byte_add(1), 1, false, "x").is_ok());
        for count in [usize::MAX, usize::MAX / 4 + 2, isize::MAX as usize / 4 + 1] {
            assert!(check(Dtype::U32, at, count, false, "x").is_err(), "{count}");
        }
    }
}
