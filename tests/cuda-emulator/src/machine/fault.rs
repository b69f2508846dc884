//! Why a kernel failed.

/// The kinds of failure, each an error code of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// Memory that is not there, or not accessible from this device.
    IllegalAddress,
    /// An address that is no multiple of the access's size.
    MisalignedAddress,
    /// Anything that PTX leaves undefined.
    IllegalInstruction,
    /// A `trap` instruction.
    Trap,
}

/// Why a kernel failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub kind: FaultKind,
    pub reason: String,
}

impl Fault {
    pub(crate) fn new(kind: FaultKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into() }
    }
}
