//! The memory of messages: what callers lend, and the messenger's own.

use std::ptr::NonNull;

use unisum_kernels::Element;
use unisum_link::Region;

use super::peer::EAGER_BYTES;
use crate::memory::Arena;

/// What a send reads.
///
/// # Safety
/// The data stays where it is, and nobody writes it, until the send has ended or the links are
/// aborted.
pub(super) unsafe fn to_send<T: Element>(arena: &Arena, data: &[T]) -> Region {
    if size_of_val(data) as u64 <= EAGER_BYTES {
        // As if it were private, so that no link lends it to the peer: short messages are gone
        // when they are sent.
        // SAFETY: the caller's promise.
        return unsafe { Region::new(NonNull::from(data).cast(), size_of_val(data), None) };
    }
    // SAFETY: the caller's promise.
    unsafe { arena.region_to_read(data) }
}

/// What a receive writes.
///
/// # Safety
/// The data stays where it is, and nobody else touches it, until the receive has ended or the links
/// are aborted.
pub(super) unsafe fn to_receive<T: Element>(data: &mut [T]) -> Region {
    let bytes = size_of_val(data);
    // SAFETY: the caller's promise.
    unsafe { Region::new(NonNull::from(data).cast(), bytes, None) }
}

/// Bytes of the messenger's own, which it keeps in place and leaves alone while a transfer of them
/// is under way.
pub(super) fn of_bytes(bytes: &mut [u8]) -> Region {
    // SAFETY: as said above; who drops them has aborted the links before, or drops them too.
    unsafe { to_receive(bytes) }
}

/// Copies a message to the memory of its receive, which is as long.
pub(super) fn copy(message: &[u8], to: Region) {
    let into = to.pointer(&(0..message.len()));
    // SAFETY: `pointer` checked the length; the memory is the receive's alone (`to_receive`).
    unsafe { into.copy_from_nonoverlapping(message.as_ptr(), message.len()) };
}

/// The bytes of a send.
pub(super) fn to_vec(from: Region) -> Vec<u8> {
    // SAFETY: the memory is readable for that many bytes, and nobody writes it (`to_send`).
    unsafe { std::slice::from_raw_parts(from.base(), from.bytes()) }.to_vec()
}
