//! Pinned host memory, which devices can access.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use super::codes::{Code, Done};
use super::mapping::Mapping;
use super::memory;

/// A range that devices can access.
#[derive(Debug)]
struct Range {
    bytes: usize,
    /// The memory itself, unless the caller has registered memory of its own.
    allocated: Option<Mapping>,
    flags: u32,
}

static RANGES: RwLock<BTreeMap<usize, Range>> = RwLock::new(BTreeMap::new());

/// Allocates pinned memory. Its device address is its host address.
pub(crate) fn allocate(bytes: usize, flags: u32) -> Done<usize> {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let mapping = Mapping::private(bytes)?;
    let address = mapping.pointer().addr();
    let range = Range { bytes, allocated: Some(mapping), flags };
    RANGES.write().unwrap_or_else(PoisonError::into_inner).insert(address, range);
    Ok(address)
}

/// Pins memory of the caller.
pub(crate) fn register(address: usize, bytes: usize, flags: u32) -> Done {
    if address == 0 || bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let mut ranges = RANGES.write().unwrap_or_else(PoisonError::into_inner);
    let before = ranges.range(..address + bytes).next_back();
    if before.is_some_and(|(start, range)| start + range.bytes > address) {
        return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
    }
    ranges.insert(address, Range { bytes, allocated: None, flags });
    Ok(())
}

/// Frees allocated memory, or unpins registered memory.
pub(crate) fn remove(address: usize, was_allocated: bool) -> Done {
    let mut ranges = RANGES.write().unwrap_or_else(PoisonError::into_inner);
    match ranges.get(&address) {
        Some(range) if range.allocated.is_some() == was_allocated => {
            let mapping = ranges.remove(&address).and_then(|range| range.allocated);
            mapping.into_iter().for_each(memory::retire);
            Ok(())
        }
        _ if was_allocated => Err(Code::INVALID_VALUE),
        _ => Err(Code::HOST_MEMORY_NOT_REGISTERED),
    }
}

/// The range that an address lies in: where it begins, its length and its flags.
pub(crate) fn find(address: usize) -> Option<(usize, usize, u32)> {
    let ranges = RANGES.read().unwrap_or_else(PoisonError::into_inner);
    let (start, range) = ranges.range(..=address).next_back()?;
    (address < start + range.bytes).then_some((*start, range.bytes, range.flags))
}

/// Whether devices can access all of a range.
pub(crate) fn contains(address: usize, bytes: usize) -> bool {
    find(address).is_some_and(|(start, length, _)| address - start + bytes <= length)
}

pub(crate) fn count() -> usize {
    RANGES.read().unwrap_or_else(PoisonError::into_inner).len()
}
