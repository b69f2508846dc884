//! How a peer ends: it leaves in order, or a connection to it breaks.
//!
//! Who leaves says so, behind everything that it has sent. It waits for nothing then, so nothing is
//! sent to it any more, and what was on the way to it is done: its device may be gone before it has
//! acknowledged the last of it. What it sent before is there and can be received. For others it
//! changes nothing.

use unisum_link::LinkError;

use super::Peer;
use crate::connection::{Carries, Connection};
use crate::link_state::LinkState;
use crate::wire::Kind;

/// What is known of a peer's end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    has_left: bool,
    /// Why it can't be reached any more.
    broken: Option<Broken>,
}

#[derive(Debug)]
struct Broken {
    error: LinkError,
    /// Whether that is the consequence of another failure: a broken connection flushes what it
    /// holds.
    is_consequence: bool,
    /// Whether that was waited for in vain: it matters only to who needs the peer.
    is_late: bool,
}

impl Peer {
    /// Whether nothing more comes from it, and nothing can be sent to it.
    pub(crate) const fn is_gone(&self) -> bool {
        self.ending.has_left || self.ending.broken.is_some()
    }

    /// Why it is gone, if it is.
    pub(crate) fn why_gone(&self) -> Option<LinkError> {
        match self.ending.has_left {
            true => Some(LinkError::closed(self.rank)),
            false => self.ending.broken.as_ref().map(|broken| broken.error.clone()),
        }
    }

    /// Whether nothing can go on because it is gone: a connection broke, or it left and a posted
    /// transfer can't end. If so, whether the reason is not the consequence of another.
    pub(crate) fn is_missed(&self) -> Option<bool> {
        let Ending { has_left, broken } = &self.ending;
        if !has_left {
            let broken = broken.as_ref()?;
            if !broken.is_late || self.is_waiting() {
                return Some(!broken.is_consequence);
            }
            return None;
        }
        self.is_waiting().then_some(true)
    }

    /// Whether a posted transfer needs it.
    fn is_waiting(&self) -> bool {
        !self.small_in.is_empty()
            || !self.small_out.is_empty()
            || !self.large_in.is_empty()
            || !self.large_out.is_empty()
            || self.incoming.iter().any(Option::is_some)
    }

    /// Whether it has left in order.
    pub(crate) const fn has_left(&self) -> bool {
        self.ending.has_left
    }

    /// The peer leaves: it has all that was on the way to it, acknowledged or not.
    pub(super) fn says_goodbye(&mut self, state: &mut LinkState) {
        self.ending.has_left = true;
        let read = self.connections.iter_mut().flat_map(Connection::drain);
        read.for_each(|number| state.part_sent(number));
    }

    /// A connection broke, as the device says. Of several errors the first counts that is not the
    /// consequence of another.
    pub(crate) fn broke(&mut self, error: LinkError, is_consequence: bool) {
        let counts =
            self.ending.broken.as_ref().is_none_or(|known| known.is_consequence && !is_consequence);
        if counts && !self.ending.has_left {
            self.ending.broken = Some(Broken { error, is_consequence, is_late: false });
        }
    }

    /// No queue pairs in place of those that failed were to be had.
    pub(crate) fn is_lost(&mut self, error: LinkError) {
        if !self.is_gone() {
            let (is_consequence, is_late) = (false, true);
            self.ending.broken = Some(Broken { error, is_consequence, is_late });
        }
    }

    /// Tells the peer that this rank leaves, if it is still there.
    pub(crate) fn push_goodbye(&mut self) {
        if !self.is_gone() {
            self.push_word(Kind::Goodbye, 0, 0, Carries::Word);
        }
    }

    /// Whether writes to it are not known to be done that somebody may wait for.
    pub(crate) fn is_busy(&self) -> bool {
        !self.is_gone() && self.connections.iter().any(Connection::is_busy)
    }
}
