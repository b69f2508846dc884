//! The leader's side: it creates the memory and hands it to the candidates that prove themselves.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use rustix::process::{Resource, getrlimit};
use rustix::system::sysinfo;
use unisum_link::handshake::random;
use unisum_link::{Limit, Passed, Rank};

use super::pending::PendingConnections;
use super::{Mapped, Proof};
use crate::ShmError;
use crate::layout::{HEAP_ALIGN, Layout, MAGIC, NONCE};
use crate::mapping::{Mapping, create};

/// Creates the memory and serves it until all of `candidates` have it or failed, within `limit`.
pub(super) fn serve(
    listener: &UnixListener,
    proof: &Proof,
    candidates: &[Rank],
    heap_bytes: Option<u64>,
    room: u64,
    limit: Limit<'_>,
) -> Result<Mapped, ShmError> {
    let mapping = create_mapping(candidates.len(), heap_bytes, room)?;
    let nonce: [u8; 16] = random().map_err(ShmError::os("drawing a nonce"))?;
    for (offset, word) in [NONCE, NONCE + 8].into_iter().zip(nonce_words(&nonce)) {
        mapping.wide(offset).store(word, Ordering::Relaxed);
    }
    // Relaxed: whoever maps it does so after a message from us.
    mapping.wide(0).store(MAGIC, Ordering::Relaxed);
    let mapped = Mapped::new(mapping, 0)?;
    let mut pending = PendingConnections::new(listener, proof, &mapped.mapping, nonce, candidates);
    while pending.is_waiting() {
        match limit.check() {
            Ok(()) => pending.turn(limit.nap()).map_err(ShmError::os("taking in a rank"))?,
            Err(Passed::Late) => break,
            Err(Passed::Over) => return Err(ShmError::Over),
        }
    }
    for (rank, state) in pending.absent() {
        unisum_link::warning!(rank, state, "a rank of this host does not share memory");
    }
    Ok(mapped)
}

/// Creates and maps memory with heaps as large as the limits of the process and of the address
/// space allow.
fn create_mapping(
    local_ranks: usize,
    heap_bytes: Option<u64>,
    room: u64,
) -> Result<Mapping, ShmError> {
    let asked = heap_bytes.unwrap_or_else(physical_bytes);
    // Exceeding the file size limit would be a signal and not an error.
    let file_limit = getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX);
    let limit = file_limit.min(room);
    let mut heap = asked.min(limit / local_ranks as u64).max(HEAP_ALIGN);
    loop {
        let error = match Layout::new(local_ranks, heap).filter(|layout| layout.bytes() <= limit) {
            None => {
                let why = match file_limit < room {
                    true => format!(
                        "files may have {file_limit} bytes at most: raise the limit (ulimit -f)"
                    ),
                    false => format!("{room} bytes are left"),
                };
                let source = io::Error::new(io::ErrorKind::OutOfMemory, why);
                ShmError::Os { context: "fitting shared memory into the limits", source }
            }
            Some(layout) => match create(layout).and_then(|memory| Mapping::new(memory, layout)) {
                Ok(mapping) => return Ok(mapping),
                Err(error) => error,
            },
        };
        if heap <= HEAP_ALIGN {
            return Err(error);
        }
        heap = (heap / 2).max(HEAP_ALIGN);
        tracing::info!(%error, heap_bytes = heap, "trying with smaller heaps");
    }
}

fn physical_bytes() -> u64 {
    let info = sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)))
}

/// A nonce as words of the mapping.
pub(super) fn nonce_words(nonce: &[u8; 16]) -> [u64; 2] {
    let words = u128::from_le_bytes(*nonce);
    [words as u64, (words >> 64) as u64]
}
