//! Memory of other processes: handles, and what is open here.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys;

use crate::device::{Device, lock};
use crate::error::{CudaError, cuda};

/// By which another process opens an allocation: the driver's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub [u8; Self::BYTES]);

/// A handle, and the number that the allocation has in the process that made it: handles may come
/// again.
pub(crate) type Key = (Handle, u64);

/// An allocation of another process that is open in this one. Closed when dropped.
pub struct Opened {
    device: Arc<Device>,
    key: Key,
    base: u64,
}

static OPENED: AtomicUsize = AtomicUsize::new(0);
static UNCLOSED: AtomicUsize = AtomicUsize::new(0);

/// Counts one more that is open, or one less.
pub(crate) fn count(more: bool) {
    // Relaxed: see `opened`.
    match more {
        true => OPENED.fetch_add(1, Ordering::Relaxed),
        false => OPENED.fetch_sub(1, Ordering::Relaxed),
    };
}

/// How many allocations of other processes are open in this one, and windows to mapped memory of
/// theirs.
pub fn opened() -> usize {
    // Relaxed: a number for people and tests.
    OPENED.load(Ordering::Relaxed)
}

/// Counts a call that should have let go of memory that processes share, if it has failed.
pub(crate) fn let_go(result: Result<(), CudaError>) {
    if let Err(error) = result {
        // Relaxed: see `unclosed`.
        UNCLOSED.fetch_add(1, Ordering::Relaxed);
        tracing::debug!("{error}");
    }
}

/// How many calls of the driver have failed in this process that let go of memory that processes
/// share: it may stay allocated until they end.
pub fn unclosed() -> usize {
    // Relaxed: a number for people and tests.
    UNCLOSED.load(Ordering::Relaxed)
}

impl Handle {
    /// How long a handle is.
    pub const BYTES: usize = 64;
}

impl Device {
    /// A handle of the allocation that begins at `base`, or `None` if it is of a kind that has
    /// none: of a memory pool, mapped by the program ([`Device::mapped`]), or managed.
    ///
    /// # Errors
    /// If the driver fails for another reason.
    pub fn export(&self, base: u64) -> Result<Option<Handle>, CudaError> {
        use sys::CUresult as Code;
        let _entered = self.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; Handle::BYTES] };
        // SAFETY: the driver writes one handle, whatever the address is.
        match cuda!(Some(self.ordinal()), cuIpcGetMemHandle(&raw mut handle, base)) {
            Ok(()) => Ok(Some(Handle(handle.reserved.map(|byte| byte as u8)))),
            Err(error) => {
                let none = [
                    Code::CUDA_ERROR_INVALID_VALUE,
                    Code::CUDA_ERROR_NOT_SUPPORTED,
                    Code::CUDA_ERROR_MAP_FAILED,
                ];
                let has_none = none.into_iter().any(|code| code as u32 == error.code());
                if has_none { Ok(None) } else { Err(error) }
            }
        }
    }

    /// Opens an allocation of another process, whose number there is `id`. What is open already is
    /// shared.
    ///
    /// # Errors
    /// If the driver refuses: the process has ended or freed it, or its device can't be reached.
    pub fn open_handle(
        self: &Arc<Self>,
        handle: Handle,
        id: u64,
    ) -> Result<Arc<Opened>, CudaError> {
        let mut opened = lock(&self.opened);
        let key = (handle, id);
        if let Some(known) = opened.get(&key).and_then(std::sync::Weak::upgrade) {
            return Ok(known);
        }
        let _entered = self.enter()?;
        let raw = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as i8 as _) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: the driver writes one address; `drop` closes it.
        cuda!(Some(self.ordinal()), cuIpcOpenMemHandle_v2(&raw mut base, raw, flags))?;
        count(true);
        let new = Arc::new(Opened { device: self.clone(), key, base });
        opened.insert(key, Arc::downgrade(&new));
        Ok(new)
    }
}

impl Opened {
    /// Where it begins in this process.
    pub const fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        count(false);
        // Held until it is closed: who opens it again meanwhile would get what is closed here.
        let mut opened = lock(&self.device.opened);
        if opened.get(&self.key).is_some_and(|known| known.strong_count() == 0) {
            opened.remove(&self.key);
        }
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: opened once, and nobody has its address any more.
        let_go(cuda!(Some(self.device.ordinal()), cuIpcCloseMemHandle(self.base)));
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of another process at {:#x}", self.base)
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "handle {a:02x}{b:02x}{c:02x}{d:02x}…")
    }
}
