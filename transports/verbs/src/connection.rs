//! One connection to a peer: a queue pair, its writes, and its receives.

use std::sync::Arc;

use crate::completions::Completions;
use crate::error::VerbsError;
pub(crate) use crate::ledger::{Carries, WRITES};
use crate::ledger::{Finished, Ledger};
use crate::queue_pair::{Path, QueuePair, Write};

/// A queue pair with its bookkeeping.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The link's device that it uses.
    pub(crate) rail: usize,
    pub(crate) pair: QueuePair,
    pub(crate) ledger: Ledger,
    /// The way to the peer.
    pub(crate) path: Path,
    /// Announcements of the peer since the queue was last refilled.
    heard: usize,
    /// Receives that the queue holds, and those that it holds at first.
    expected: usize,
    receives: usize,
    /// Whether the queue pair was made to go on, and has not been connected yet.
    is_fresh: bool,
}

/// This many announcements are refilled with one call.
pub(crate) const REFILL: usize = 16;

impl Connection {
    /// A connection whose queue pair holds so many receives; `keeps` if it may be made anew.
    pub(crate) fn new(
        rail: usize,
        pair: QueuePair,
        path: Path,
        receives: usize,
        keeps: bool,
    ) -> Self {
        let (ledger, expected) = (Ledger::new(keeps), receives);
        Self { rail, pair, ledger, path, heard: 0, expected, receives, is_fresh: false }
    }

    /// Appends a write to those to post.
    pub(crate) fn push(&mut self, write: Write, carries: Carries) {
        self.ledger.push(write, carries);
    }

    /// Posts as much as the queue has room for, with one call, and returns the number of writes.
    ///
    /// # Errors
    /// The library's error code.
    ///
    /// # Safety
    /// As [`QueuePair::write`], for all that was pushed.
    pub(crate) unsafe fn flush(&mut self) -> Result<usize, i32> {
        let count = self.ledger.ready();
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: the caller promised it.
        unsafe { self.pair.write(self.ledger.batch()) }?;
        Ok(count)
    }

    /// Records a completed write; `None` if there was none to complete.
    pub(crate) fn reported(&mut self) -> Option<Finished> {
        self.ledger.reported()
    }

    /// Whether something is not posted yet.
    pub(crate) fn has_pending(&self) -> bool {
        self.ledger.has_pending()
    }

    /// Whether a write is not known to be done.
    pub(crate) fn is_busy(&self) -> bool {
        self.ledger.is_busy()
    }

    /// Drops what was pushed, because the peer has it all: see [`Ledger::drain`].
    pub(crate) fn drain(&mut self) -> Vec<usize> {
        self.ledger.drain()
    }

    /// Whether the peer has announced anything.
    pub(crate) const fn has_heard(&self) -> bool {
        self.ledger.heard() > 0
    }

    /// Records an announcement of the peer.
    pub(crate) const fn heard(&mut self) {
        self.heard += 1;
        self.ledger.hear();
        self.received();
    }

    /// Records that a receive has ended, with an announcement or without one.
    pub(crate) const fn received(&mut self) {
        self.expected = self.expected.saturating_sub(1);
    }

    /// Has the queue pair fail, unless it never was connected.
    ///
    /// # Errors
    /// If the device refuses.
    pub(crate) fn fail(&self) -> Result<(), VerbsError> {
        if self.is_fresh { Ok(()) } else { self.pair.fail() }
    }

    /// Whether all receives of a queue pair that has failed have ended, so that nothing more is
    /// heard on it.
    pub(crate) const fn is_drained(&self) -> bool {
        self.is_fresh || self.expected == 0
    }

    /// Connects the queue pair that is to go on.
    ///
    /// # Errors
    /// If the device refuses the path.
    pub(crate) fn go_on(&mut self, number: u32, (own, peer): (u32, u32)) -> Result<(), VerbsError> {
        self.path = Path { number, own_psn: own, peer_psn: peer, ..self.path };
        self.is_fresh = false;
        self.pair.connect(&self.path)
    }

    /// Posts receives for as many announcements as there were, if they are many.
    ///
    /// # Errors
    /// The library's error code.
    pub(crate) fn refill(&mut self) -> Result<(), i32> {
        if self.heard < REFILL {
            return Ok(());
        }
        let count = std::mem::take(&mut self.heard);
        self.pair.expect(count)?;
        self.expected += count;
        Ok(())
    }

    /// Replaces the queue pair, which has failed and is drained, by one that is not
    /// connected, unless it is such a one. Completions of the old one that are still to come name
    /// another generation.
    ///
    /// # Errors
    /// If the device has none left.
    pub(crate) fn replace(&mut self, completions: &Arc<Completions>) -> Result<(), VerbsError> {
        if self.is_fresh {
            return Ok(());
        }
        let generation = self.pair.generation().wrapping_add(1);
        let pair = QueuePair::filled(completions, self.receives, generation)?;
        self.pair = pair;
        self.heard = 0;
        self.expected = self.receives;
        self.is_fresh = true;
        Ok(())
    }
}
