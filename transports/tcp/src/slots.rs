//! Recycled memory for arrivals that reduce.

use std::collections::TryReserveError;

/// Slots of received bytes. At most as many exist as transfers are open at once; each keeps the
/// largest size it ever had.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    free: Vec<Vec<u8>>,
}

impl Slots {
    /// A slot of at least `bytes` bytes with unspecified content.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<Vec<u8>, TryReserveError> {
        let mut slot = self.free.pop().unwrap_or_default();
        if slot.len() < bytes {
            slot.try_reserve_exact(bytes - slot.len())?;
            slot.resize(bytes, 0);
        }
        Ok(slot)
    }

    /// Gives a slot back.
    pub(crate) fn give(&mut self, slot: Vec<u8>) {
        self.free.push(slot);
    }
}
