//! Handles of memory and events for other processes: 64 bytes, as fabric handles have.

use super::codes::{Code, Done};
use super::mapping::FilePlace;

/// `CUipcMemHandle` and `CUipcEventHandle`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IpcHandle(pub [u8; 64]);

/// What a handle says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exported {
    pub kind: Kind,
    pub place: FilePlace,
    /// The physical device.
    pub physical: u32,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    Memory = 0x4D55_4D45,
    Event = 0x4556_4D45,
    Fabric = 0x4641_4D45,
}

impl Exported {
    pub(crate) fn encode(&self) -> IpcHandle {
        let mut bytes = [0; 64];
        let words = [
            self.kind as u32,
            self.place.process,
            self.place.descriptor.cast_unsigned(),
            self.physical,
        ];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes[16..24].copy_from_slice(&self.place.nonce.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        IpcHandle(bytes)
    }

    /// # Errors
    ///
    /// An invalid handle, if it is none of this kind.
    pub(crate) fn decode(handle: &IpcHandle, kind: Kind) -> Done<Self> {
        let word = |index: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&handle.0[index * 4..index * 4 + 4]);
            u32::from_le_bytes(word)
        };
        let long = |index: usize| u64::from(word(index + 1)) << 32 | u64::from(word(index));
        if word(0) != kind as u32 {
            return Err(Code::INVALID_HANDLE);
        }
        let place =
            FilePlace { process: word(1), descriptor: word(2).cast_signed(), nonce: long(4) };
        Ok(Self { kind, place, physical: word(3), bytes: long(6) })
    }
}
