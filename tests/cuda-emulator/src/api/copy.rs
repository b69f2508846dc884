//! Copies and fills.

use std::sync::Arc;

use super::{In, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::stream::{self, Failure, Stream};
use crate::driver::{device, driver, host, memory};
use crate::machine::tag;

/// One end of a copy, as the caller names it.
#[derive(Clone, Copy)]
enum End {
    /// Device memory or pinned host memory.
    Pinned(u64),
    /// Host memory that only the caller's thread may access.
    Pageable(usize),
}

impl End {
    /// # Errors
    ///
    /// An invalid value, if it is no device memory with room for so many bytes.
    fn device(address: u64, bytes: usize) -> Done<Self> {
        if memory::contains(address, bytes) || is_pinned(address, bytes) {
            return Ok(Self::Pinned(address));
        }
        Err(Code::INVALID_VALUE)
    }

    fn host(address: usize, bytes: usize) -> Done<Self> {
        if address == 0 {
            return Err(Code::INVALID_VALUE);
        }
        if is_pinned(address as u64, bytes) {
            return Ok(Self::Pinned(address as u64));
        }
        Ok(Self::Pageable(address))
    }

    fn any(address: u64, bytes: usize) -> Done<Self> {
        match address & tag::MASK {
            0 => Self::host(usize::try_from(address).map_err(|_| Code::INVALID_VALUE)?, bytes),
            _ => Self::device(address, bytes),
        }
    }
}

fn is_pinned(address: u64, bytes: usize) -> bool {
    let pointer = usize::try_from(address).unwrap_or(usize::MAX);
    address & tag::MASK == 0 && host::contains(pointer, bytes)
}

fn place(address: u64, bytes: usize) -> Result<*mut u8, Failure> {
    device::place(address, bytes, None).map_err(|reason| Failure {
        code: Code::ILLEGAL_ADDRESS,
        reason: format!("copy: {reason}"),
    })
}

/// Enqueues a copy. Returns at once if both ends are pinned; pageable sources are read before, and
/// pageable destinations are written before it returns.
fn copy(to: End, from: End, bytes: usize, stream: &Arc<Stream>) -> Done {
    if bytes == 0 {
        return Ok(());
    }
    let staged = match from {
        End::Pageable(pointer) => {
            Some(In::<u8>(std::ptr::with_exposed_provenance(pointer)).bytes(bytes))
        }
        End::Pinned(_) => None,
    };
    stream.push(move |_| {
        let injected = driver().and_then(|driver| driver.count("copy"));
        injected.map_err(|code| Failure { code, reason: "injected into a copy".to_owned() })?;
        let from = match (from, &staged) {
            (End::Pinned(address), _) => place(address, bytes)?.cast_const(),
            (End::Pageable(_), staged) => staged.as_ref().map_or(std::ptr::null(), Vec::as_ptr),
        };
        let to = match to {
            End::Pinned(address) => place(address, bytes)?,
            End::Pageable(pointer) => std::ptr::with_exposed_provenance_mut(pointer),
        };
        // SAFETY: both are `bytes` long: regions and pinned ranges as looked up, which stay mapped
        // while the operation runs; what was staged; and the caller's memory, as it promises,
        // which it lends until `synchronize` below returns. Other processes may access device
        // memory meanwhile, as other devices would: a program that lets them sees torn data here.
        unsafe { to.copy_from(from, bytes) };
        Ok(())
    })?;
    if matches!(to, End::Pageable(_)) {
        stream.synchronize();
        stream.device.check()?;
    }
    Ok(())
}

fn copy_and_wait(to: End, from: End, bytes: usize) -> Done {
    let stream = stream::find(0)?;
    copy(to, from, bytes, &stream)?;
    stream.synchronize();
    stream.device.check()
}

/// Enqueues a fill with a pattern of 1, 2 or 4 bytes.
fn fill(address: u64, pattern: &[u8], count: usize, stream: &Arc<Stream>) -> Done {
    let bytes = count.checked_mul(pattern.len()).ok_or(Code::INVALID_VALUE)?;
    if bytes == 0 {
        return Ok(());
    }
    End::device(address, bytes)?;
    let pattern = pattern.to_vec();
    stream.push(move |_| {
        let to = place(address, bytes)?;
        let filled = pattern.repeat(count);
        // SAFETY: the place has room for so many bytes and stays mapped while the operation runs.
        unsafe { to.copy_from_nonoverlapping(filled.as_ptr(), bytes) };
        Ok(())
    })
}

fn fill_and_wait(address: u64, pattern: &[u8], count: usize) -> Done {
    let stream = stream::find(0)?;
    fill(address, pattern, count, &stream)?;
    stream.synchronize();
    stream.device.check()
}

entry_points! {
    fn cuMemcpyHtoD_v2(to: u64, from: usize, bytes: usize) {
        copy_and_wait(End::device(to, bytes)?, End::host(from, bytes)?, bytes)
    }

    fn cuMemcpyDtoH_v2(to: usize, from: u64, bytes: usize) {
        copy_and_wait(End::host(to, bytes)?, End::device(from, bytes)?, bytes)
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        copy_and_wait(End::device(to, bytes)?, End::device(from, bytes)?, bytes)
    }

    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        copy_and_wait(End::any(to, bytes)?, End::any(from, bytes)?, bytes)
    }

    fn cuMemcpyPeer(to: u64, _to_context: u64, from: u64, _from_context: u64, bytes: usize) {
        copy_and_wait(End::device(to, bytes)?, End::device(from, bytes)?, bytes)
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, bytes: usize, stream: u64) {
        let stream = stream::find(stream)?;
        copy(End::device(to, bytes)?, End::host(from, bytes)?, bytes, &stream)
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, bytes: usize, stream: u64) {
        let stream = stream::find(stream)?;
        copy(End::host(to, bytes)?, End::device(from, bytes)?, bytes, &stream)
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        let stream = stream::find(stream)?;
        copy(End::device(to, bytes)?, End::device(from, bytes)?, bytes, &stream)
    }

    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) {
        let stream = stream::find(stream)?;
        copy(End::any(to, bytes)?, End::any(from, bytes)?, bytes, &stream)
    }

    fn cuMemcpyPeerAsync(
        to: u64,
        _to_context: u64,
        from: u64,
        _from_context: u64,
        bytes: usize,
        stream: u64,
    ) {
        let stream = stream::find(stream)?;
        copy(End::device(to, bytes)?, End::device(from, bytes)?, bytes, &stream)
    }

    fn cuMemsetD8_v2(address: u64, value: u8, count: usize) {
        fill_and_wait(address, &[value], count)
    }

    fn cuMemsetD16_v2(address: u64, value: u16, count: usize) {
        fill_and_wait(address, &value.to_le_bytes(), count)
    }

    fn cuMemsetD32_v2(address: u64, value: u32, count: usize) {
        fill_and_wait(address, &value.to_le_bytes(), count)
    }

    fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: u64) {
        fill(address, &[value], count, &stream::find(stream)?)
    }

    fn cuMemsetD16Async(address: u64, value: u16, count: usize, stream: u64) {
        fill(address, &value.to_le_bytes(), count, &stream::find(stream)?)
    }

    fn cuMemsetD32Async(address: u64, value: u32, count: usize, stream: u64) {
        fill(address, &value.to_le_bytes(), count, &stream::find(stream)?)
    }
}
