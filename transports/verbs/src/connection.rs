//! One connection to a peer: what waits to be posted, what was posted, and what was reported.

use std::collections::VecDeque;

use crate::queue_pair::{QueuePair, Write};

/// What a write carries, for its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    /// A small message from its cell.
    Small,
    /// A part of the large message with this number.
    Large(usize),
    /// Nothing that anything waits for.
    Word,
}

/// What is known to be done once a write is reported: itself and all writes before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) requests: usize,
    pub(crate) smalls: u32,
    pub(crate) large: Option<usize>,
}

/// A queue pair with its bookkeeping.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The link's device that it uses.
    pub(crate) rail: usize,
    pub(crate) pair: QueuePair,
    pending: VecDeque<(Write, Carries)>,
    /// The number of writes that the queue has room for.
    room: usize,
    /// The signaled writes under way, oldest first.
    under_way: VecDeque<Finished>,
    /// Announcements of the peer since the queue was last refilled.
    heard: usize,
}

/// Writes that a queue pair holds.
pub(crate) const WRITES: usize = 128;
/// This many announcements are refilled with one call.
pub(crate) const REFILL: usize = 16;

impl Connection {
    pub(crate) const fn new(rail: usize, pair: QueuePair) -> Self {
        Self {
            rail,
            pair,
            pending: VecDeque::new(),
            room: WRITES,
            under_way: VecDeque::new(),
            heard: 0,
        }
    }

    /// Appends a write to those to post.
    pub(crate) fn push(&mut self, write: Write, carries: Carries) {
        self.pending.push_back((write, carries));
    }

    /// Whether something is not posted yet.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a write is not known to be done.
    pub(crate) fn is_busy(&self) -> bool {
        self.has_pending() || self.room < WRITES
    }

    /// Posts as much as the queue has room for, with one call, and returns the number of writes.
    /// The last one is signaled, and each that ends a part of a large message.
    ///
    /// # Errors
    /// The library's error code.
    ///
    /// # Safety
    /// As [`QueuePair::write`], for all that was pushed.
    pub(crate) unsafe fn flush(&mut self) -> Result<usize, i32> {
        let count = self.pending.len().min(self.room);
        if count == 0 {
            return Ok(0);
        }
        self.room -= count;
        let mut finished = Finished::default();
        let under_way = &mut self.under_way;
        let batch = self.pending.drain(..count).enumerate().map(|(index, (write, carries))| {
            finished.requests += 1;
            match carries {
                Carries::Small => finished.smalls += 1,
                Carries::Large(number) => finished.large = Some(number),
                Carries::Word => {}
            }
            let signalled = finished.large.is_some() || index + 1 == count;
            if signalled {
                under_way.push_back(std::mem::take(&mut finished));
            }
            Write { signalled, ..write }
        });
        // SAFETY: the caller promised it.
        unsafe { self.pair.write(batch) }?;
        Ok(count)
    }

    /// Records a completed write; `None` if there was none to complete.
    pub(crate) fn reported(&mut self) -> Option<Finished> {
        let finished = self.under_way.pop_front()?;
        self.room += finished.requests;
        Some(finished)
    }

    /// Drops what was pushed, because the peer has it all. Returns the large messages of which a
    /// part was under way, once for each part. Nothing more may be posted or reported.
    pub(crate) fn drain(&mut self) -> Vec<usize> {
        let posted = self.under_way.drain(..).filter_map(|finished| finished.large);
        let mut large: Vec<usize> = posted.collect();
        let pending = self.pending.drain(..).filter_map(|(_, carries)| match carries {
            Carries::Large(number) => Some(number),
            Carries::Small | Carries::Word => None,
        });
        large.extend(pending);
        self.room = WRITES;
        large
    }

    /// Whether the peer has announced anything since.
    pub(crate) const fn has_heard(&self) -> bool {
        self.heard > 0
    }

    /// Records an announcement of the peer.
    pub(crate) const fn heard(&mut self) {
        self.heard += 1;
    }

    /// Posts receives for as many announcements as there were, if they are many.
    ///
    /// # Errors
    /// The library's error code.
    pub(crate) fn refill(&mut self) -> Result<(), i32> {
        if self.heard < REFILL {
            return Ok(());
        }
        self.pair.expect(std::mem::take(&mut self.heard))
    }
}
