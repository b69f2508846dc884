//! Devices and their primary contexts.

use std::cell::RefCell;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::codes::{Code, Done};
use super::memory::{self, PeerMask};
use super::registry::lock;
use super::stream::Stream;
use super::{Driver, driver, host, report};
use crate::machine::{DeviceMemory, tag};

/// A device as this process sees it, with its primary context.
#[derive(Debug)]
pub(crate) struct Device {
    pub ordinal: usize,
    /// The number of the device on the host.
    pub physical: u32,
    /// How often the primary context is retained.
    retained: Mutex<u32>,
    pub flags: AtomicU32,
    /// The first error that an operation has had. It stays.
    failure: AtomicI32,
    pub peers: PeerMask,
    pub allocated: AtomicU64,
    null_stream: Mutex<Option<Arc<Stream>>>,
}

/// The upper bits of a context's handle.
const CONTEXT: u64 = 0xC0 << 48;

thread_local! {
    /// The contexts of this thread; the last is current. 0 is none.
    static CURRENT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

impl Device {
    pub(crate) fn new(ordinal: usize, physical: u32) -> Self {
        Self {
            ordinal,
            physical,
            retained: Mutex::new(0),
            flags: AtomicU32::new(0),
            failure: AtomicI32::new(0),
            peers: PeerMask::default(),
            allocated: AtomicU64::new(0),
            null_stream: Mutex::new(None),
        }
    }

    pub(crate) fn context(&self) -> u64 {
        CONTEXT | (self.ordinal as u64 + 1) << 4
    }

    pub(crate) fn retain(&self) -> u64 {
        *lock(&self.retained) += 1;
        self.context()
    }

    pub(crate) fn release(&self) -> Done {
        let mut retained = lock(&self.retained);
        *retained = retained.checked_sub(1).ok_or(Code::INVALID_CONTEXT)?;
        Ok(())
    }

    pub(crate) fn is_active(&self) -> bool {
        *lock(&self.retained) > 0
    }

    /// The error that the context has been left with.
    pub(crate) fn check(&self) -> Done {
        // Acquire: pairs with the release in `fail`.
        match self.failure.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }

    /// Leaves the context with an error, unless it has one already.
    pub(crate) fn fail(&self, code: Code, reason: &str) {
        report(&format!("device {}: error {}: {reason}", self.ordinal, code.0));
        // AcqRel: pairs with the acquire in `check`.
        let _ = self.failure.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The legacy default stream, made when it is first used.
    pub(crate) fn null_stream(&'static self) -> Arc<Stream> {
        let mut stream = lock(&self.null_stream);
        stream.get_or_insert_with(|| Stream::start(self, 0, 0, 0)).clone()
    }

    /// The legacy default stream, if it was used.
    pub(crate) fn existing_null_stream(&self) -> Option<Arc<Stream>> {
        lock(&self.null_stream).clone()
    }

    /// Waits for all that was enqueued.
    pub(crate) fn synchronize(&self, driver: &Driver) -> Done {
        for stream in driver.streams.all() {
            if std::ptr::eq(stream.device, self) {
                stream.synchronize();
            }
        }
        if let Some(stream) = self.existing_null_stream() {
            stream.synchronize();
        }
        self.check()
    }

    /// Accounts for memory that is allocated.
    pub(crate) fn charge(&self, bytes: usize, limit: u64) -> Done {
        // Relaxed: a number, and nothing depends on its order.
        let before = self.allocated.fetch_add(bytes as u64, Ordering::Relaxed);
        if before + bytes as u64 <= limit {
            return Ok(());
        }
        self.refund(bytes);
        Err(Code::OUT_OF_MEMORY)
    }

    pub(crate) fn refund(&self, bytes: usize) {
        // Relaxed: as above.
        self.allocated.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

/// Where memory lies that a device can access, or why it can't; see [`memory::place`].
pub(crate) fn place(
    address: u64,
    bytes: usize,
    accessor: Option<(usize, &PeerMask)>,
) -> Result<*mut u8, String> {
    match address & tag::MASK {
        tag::DEVICE => memory::place(address, bytes, accessor),
        0 => {
            let host = usize::try_from(address).unwrap_or(usize::MAX);
            if host::contains(host, bytes) {
                return Ok(std::ptr::with_exposed_provenance_mut(host));
            }
            Err(format!("{bytes} bytes at {address:#x}, which is not pinned host memory"))
        }
        _ => Err(format!("{address:#x} is no address")),
    }
}

impl DeviceMemory for Device {
    fn place(&self, address: u64, bytes: usize, _writes: bool) -> Result<*mut u8, String> {
        place(address, bytes, Some((self.ordinal, &self.peers)))
    }

    fn places(&self, address: u64, bytes: usize) -> Result<Vec<*mut u8>, String> {
        memory::places(address, bytes, self.ordinal)
    }

    fn is_stopped(&self) -> bool {
        self.check().is_err() || super::is_exiting()
    }
}

/// The device of a context's handle.
pub(crate) fn of_context(context: u64) -> Done<&'static Device> {
    let number = context.checked_sub(CONTEXT).ok_or(Code::INVALID_CONTEXT)?;
    let ordinal = usize::try_from(number >> 4).ok().and_then(|number| number.checked_sub(1));
    let device = ordinal.and_then(|ordinal| driver().ok()?.devices.get(ordinal));
    device.ok_or(Code::INVALID_CONTEXT)
}

/// The handle of the current context; 0 if there is none.
pub(crate) fn current_context() -> u64 {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

pub(crate) fn set_current(context: u64) -> Done {
    if context != 0 {
        of_context(context)?;
    }
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        stack.push(context);
    });
    Ok(())
}

pub(crate) fn push_current(context: u64) -> Done {
    of_context(context)?;
    CURRENT.with_borrow_mut(|stack| stack.push(context));
    Ok(())
}

pub(crate) fn pop_current() -> Done<u64> {
    CURRENT.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)
}

/// The current device, whether or not its context has failed.
pub(crate) fn current_or_failed() -> Done<&'static Device> {
    driver()?;
    let device = of_context(current_context())?;
    if device.is_active() { Ok(device) } else { Err(Code::CONTEXT_IS_DESTROYED) }
}

/// The current device.
///
/// # Errors
///
/// The error that its context has been left with.
pub(crate) fn current() -> Done<&'static Device> {
    let device = current_or_failed()?;
    device.check()?;
    Ok(device)
}
