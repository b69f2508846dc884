//! Whether both ends mean the same call, and whether what came can be.

use unisum_link::{Call, LinkError, LinkErrorKind};

use super::Peer;
use crate::link_state::LinkState;

impl Peer {
    /// Looks at what came that nothing was posted for. If it is of the running collective's number
    /// and not of its call, nothing ever will be.
    pub(super) fn check_ahead(&self, state: &LinkState) -> Result<(), LinkError> {
        if state.current.is_none() {
            return Ok(());
        }
        // A message says what the peer has for this rank, an announcement what it expects of it.
        let mut calls = Vec::new();
        if let Some(&length) = self.lengths.front() {
            calls.extend(self.small_call(length)?.0.map(|call| (self.call_from(state), call)));
        }
        if self.heard != self.used {
            calls.extend(self.oldest_ready().map(|ready| (self.call_to(state), ready.call)));
        }
        let differs =
            |(ours, theirs): &&(Call, Call)| theirs.number == ours.number && theirs != ours;
        let different = calls.iter().find(differs);
        different.map_or(Ok(()), |(ours, theirs)| self.mismatch(*ours, *theirs))
    }

    /// The call under way as the peer hears it with what is sent.
    pub(super) fn call_to(&self, state: &LinkState) -> Call {
        let call = state.current().call;
        self.counts.map_or(call, |counts| counts.told(call))
    }

    /// The call under way as the peer has to say it with what it sends.
    pub(super) fn call_from(&self, state: &LinkState) -> Call {
        let call = state.current().call;
        self.counts.map_or(call, |counts| counts.heard(call))
    }

    /// What goes before a small message.
    pub(super) fn encoded_call(&self, state: &LinkState) -> [u8; Call::ENCODED] {
        match self.counts {
            Some(_) => self.call_to(state).encode(),
            None => state.current().encoded,
        }
    }

    pub(super) fn check_call(&self, theirs: Option<&Call>, ours: Call) -> Result<(), LinkError> {
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
