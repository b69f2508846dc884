//! Whether both ends mean the same call, and whether what came can be.

use unisum_link::{Call, LinkError, LinkErrorKind};

use super::Peer;
use crate::desk::Desk;

impl Peer {
    /// Looks at what came that nothing was posted for. If it is of the running collective's number
    /// and not of its call, nothing ever will be.
    pub(super) fn check_ahead(&self, desk: &Desk) -> Result<(), LinkError> {
        let Some(current) = &desk.current else { return Ok(()) };
        let mut calls = Vec::new();
        if let Some(&length) = self.lengths.front() {
            calls.extend(self.small_call(length)?.0);
        }
        if self.heard != self.used {
            calls.extend(self.oldest_ready().map(|ready| ready.call));
        }
        let ours = current.call;
        let differs = |call: &Call| call.number == ours.number && *call != ours;
        calls.iter().find(|call| differs(call)).map_or(Ok(()), |call| self.mismatch(ours, *call))
    }

    pub(super) fn check_call(&self, theirs: Option<&Call>, desk: &Desk) -> Result<(), LinkError> {
        let ours = desk.current().call;
        match theirs {
            Some(theirs) if *theirs == ours => Ok(()),
            Some(theirs) => self.mismatch(ours, *theirs),
            None => self.require(false, "a call that this version does not know"),
        }
    }

    pub(super) fn mismatch(&self, ours: Call, theirs: Call) -> Result<(), LinkError> {
        Err(LinkError { peer: self.rank, kind: LinkErrorKind::Mismatch { ours, theirs } })
    }

    pub(super) fn require(&self, is_sane: bool, what: &str) -> Result<(), LinkError> {
        if is_sane { Ok(()) } else { Err(LinkError::protocol(self.rank, what)) }
    }
}
