//! Memory for lists of tensors, which collectives want in one piece.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use unisum::{Buffer, Communicator};

/// Registered memory that is kept from call to call: fresh pages would cost as much as copying.
#[derive(Debug)]
pub(crate) struct Staging {
    communicator: Weak<Communicator>,
    free: Mutex<Vec<Buffer<u8>>>,
}

/// Memory of so many bytes at least, given back when it is dropped.
#[derive(Debug)]
pub(crate) enum Lease {
    Registered(Option<Buffer<u8>>, Weak<Staging>),
    /// Where there is no registered memory left.
    Plain(Vec<u64>),
}

/// How much is kept while nobody needs it.
const KEPT_BYTES: usize = 256 << 20;
/// Sizes of allocations, so that those of about one size can be exchanged.
const STEP_BYTES: usize = 64 << 10;

impl Staging {
    pub(crate) fn new(communicator: &Arc<Communicator>) -> Arc<Self> {
        Arc::new(Self { communicator: Arc::downgrade(communicator), free: Mutex::default() })
    }

    pub(crate) fn lease(self: &Arc<Self>, bytes: usize) -> Lease {
        let home = Arc::downgrade(self);
        if let Some(buffer) = self.find(bytes) {
            return Lease::Registered(Some(buffer), home);
        }
        let size = bytes.max(1).next_multiple_of(STEP_BYTES);
        let allocated = self.communicator.upgrade().and_then(|it| it.allocate::<u8>(size).ok());
        match allocated {
            Some(buffer) => Lease::Registered(Some(buffer), home),
            None => Lease::Plain(vec![0; bytes.div_ceil(8)]),
        }
    }

    /// The smallest that is kept and large enough.
    fn find(&self, bytes: usize) -> Option<Buffer<u8>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = free.iter().enumerate().filter(|(_, buffer)| buffer.len() >= bytes);
        let (place, _) = fitting.min_by_key(|(_, buffer)| buffer.len())?;
        Some(free.remove(place))
    }

    fn give_back(&self, buffer: Buffer<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(buffer);
        let mut kept: usize = free.iter().map(|buffer| buffer.len()).sum();
        while kept > KEPT_BYTES {
            // The one that was used longest ago.
            kept -= free.remove(0).len();
        }
    }
}

impl Lease {
    pub(crate) fn start(&self) -> *const u8 {
        match self {
            Self::Registered(buffer, _) => {
                buffer.as_ref().map_or(std::ptr::null(), |it| it.as_ptr())
            }
            Self::Plain(words) => words.as_ptr().cast(),
        }
    }

    pub(crate) fn start_mut(&mut self) -> *mut u8 {
        match self {
            Self::Registered(buffer, _) => {
                buffer.as_mut().map_or(std::ptr::null_mut(), |it| it.as_mut_ptr())
            }
            Self::Plain(words) => words.as_mut_ptr().cast(),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Self::Registered(buffer, home) = self
            && let (Some(buffer), Some(home)) = (buffer.take(), home.upgrade())
        {
            home.give_back(buffer);
        }
    }
}
