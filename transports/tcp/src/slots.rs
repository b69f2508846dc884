//! Recycled memory for arrivals that reduce.

/// Slots of received bytes. At most as many exist as transfers are open at once; each keeps the
/// largest size it ever had.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    free: Vec<Vec<u8>>,
}

impl Slots {
    /// A slot of at least `bytes` bytes with unspecified content.
    pub(crate) fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut slot = self.free.pop().unwrap_or_default();
        if slot.len() < bytes {
            slot.resize(bytes, 0);
        }
        slot
    }

    /// Gives a slot back.
    pub(crate) fn give(&mut self, slot: Vec<u8>) {
        self.free.push(slot);
    }
}
