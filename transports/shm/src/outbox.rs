//! What this rank sends to one peer.

use std::collections::VecDeque;
use std::ops::Range;

use unisum_kernels::copy;
use unisum_link::{LinkError, Region, Ticket};

use crate::doorbell::{Doorbell, URGENT};
use crate::inbox::Peer;
use crate::layout::{RING, STAGE_BYTES};
use crate::mailbox::{CallWords, Mailbox, Message, Place};
use crate::mapping::Mapping;

/// Registered messages up to this are staged all the same: a copy is cheaper than the wait for
/// the reader.
const STAGE_REGISTERED_MAX: usize = 2 << 10;

/// The sending end of a mailbox.
#[derive(Debug)]
pub(crate) struct Outbox {
    mailbox: Mailbox,
    peer: Peer,
    staging: Range<u64>,
    staging_reserved: bool,
    posted: u64,
    /// How much of that the reader has consumed, as it last said.
    consumed: u64,
    /// How much was posted when we last asked the reader for room.
    stalled: Option<u64>,
    queue: VecDeque<Outgoing>,
    /// Published messages whose memory the peer still reads: done when `consumed` passes them.
    lent: VecDeque<(u64, Ticket)>,
}

#[derive(Debug)]
struct Outgoing {
    ticket: Ticket,
    call: CallWords,
    memory: Region,
    /// Bytes staged so far.
    staged: usize,
}

/// What sending needs beside the outbox.
pub(crate) struct Sender<'a> {
    pub(crate) mapping: &'a Mapping,
    pub(crate) doorbell: &'a Doorbell,
    /// Whether peers can read this process's private memory.
    pub(crate) readable: bool,
    /// Whether the collective is marked.
    pub(crate) marked: bool,
    pub(crate) done: &'a mut Vec<Ticket>,
}

impl Outbox {
    pub(crate) fn new(mapping: &Mapping, own: u64, peer: Peer) -> Self {
        let (start, bytes) = mapping.layout().staging(own, peer.local_index);
        Self {
            mailbox: Mailbox::new(mapping.layout(), own, peer.local_index),
            peer,
            staging: start..start + bytes,
            staging_reserved: false,
            posted: 0,
            consumed: 0,
            stalled: None,
            queue: VecDeque::new(),
            lent: VecDeque::new(),
        }
    }

    /// Queues a message; `progress` sends it.
    pub(crate) fn push(&mut self, call: CallWords, memory: Region, ticket: Ticket) {
        self.queue.push_back(Outgoing { ticket, call, memory, staged: 0 });
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.lent.clear();
    }

    /// Publishes what there is room for and reports what is done.
    ///
    /// # Errors
    /// If memory can't be had, or the reader says what can't be.
    pub(crate) fn progress(&mut self, sender: &mut Sender<'_>) -> Result<(), LinkError> {
        if self.queue.is_empty() && self.lent.is_empty() {
            return Ok(());
        }
        self.hear(self.mailbox.consumed(sender.mapping))?;
        while let Some(&(number, ticket)) = self.lent.front() {
            if number >= self.consumed {
                break;
            }
            sender.done.push(ticket);
            self.lent.pop_front();
        }
        while !self.queue.is_empty() {
            if self.posted - self.consumed >= RING {
                self.stall(sender)?;
                if self.posted - self.consumed >= RING {
                    return Ok(());
                }
            }
            self.publish(sender)?;
        }
        if self.stalled.take().is_some() {
            self.mailbox.stall(sender.mapping, false);
        }
        Ok(())
    }

    /// Takes note of how much the reader says it has consumed.
    fn hear(&mut self, consumed: u64) -> Result<(), LinkError> {
        if !(self.consumed..=self.posted).contains(&consumed) {
            let Self { posted, consumed: before, .. } = self;
            let what = format!("{consumed} messages read, of {posted} sent and {before} before");
            return Err(LinkError::protocol(self.peer.rank, what));
        }
        self.consumed = consumed;
        Ok(())
    }

    /// Asks the reader to tell us when there is room, and hears how much it has consumed by then.
    fn stall(&mut self, sender: &Sender<'_>) -> Result<(), LinkError> {
        if self.stalled == Some(self.posted) {
            return self.hear(self.mailbox.consumed(sender.mapping));
        }
        self.stalled = Some(self.posted);
        let consumed = self.mailbox.stall(sender.mapping, true);
        sender.doorbell.ring(self.peer.local_index, URGENT);
        self.hear(consumed)
    }

    /// Publishes the first queued message, or its next piece. There is room.
    fn publish(&mut self, sender: &mut Sender<'_>) -> Result<(), LinkError> {
        let Some(first) = self.queue.front() else {
            return Ok(());
        };
        let (call, ticket, total) = (first.call, first.ticket, first.memory.bytes());
        let place = place(first, sender.readable);
        let mut weight = URGENT;
        if place == Place::Staged {
            self.reserve_staging(sender.mapping)?;
            if self.stage(sender.mapping) {
                sender.done.push(ticket);
                self.queue.pop_front();
            }
            if total <= STAGE_BYTES {
                // We don't wait for the reader, so it may sleep on for more.
                weight = 1;
            }
        } else {
            self.lent.push_back((self.posted, ticket));
            self.queue.pop_front();
        }
        let (bytes, marked) = (total as u64, sender.marked);
        let message = Message { call, bytes, marked, place: Some(place) };
        self.mailbox.publish(sender.mapping, self.posted, &message);
        self.posted += 1;
        sender.doorbell.ring(self.peer.local_index, weight);
        Ok(())
    }

    /// Copies the next piece of the first message; whether it is the last.
    fn stage(&mut self, mapping: &Mapping) -> bool {
        let first = self.queue.front_mut().expect("the caller looked");
        let total = first.memory.bytes();
        let piece = first.staged..total.min(first.staged + STAGE_BYTES);
        let into = self.mailbox.stage(mapping, self.posted);
        // SAFETY: the region is readable there (`pointer` checks the bounds), a staging buffer is
        // no smaller than a piece, and it is ours until the entry is published.
        unsafe { copy(first.memory.pointer(&piece), into, piece.len()) };
        first.staged += piece.len();
        piece.end == total
    }

    fn reserve_staging(&mut self, mapping: &Mapping) -> Result<(), LinkError> {
        if !self.staging_reserved {
            let what = "allocating shared memory to send";
            let failed = |error| LinkError::system(self.peer.rank, what, error);
            mapping.reserve(self.staging.clone()).map_err(failed)?;
            self.staging_reserved = true;
        }
        Ok(())
    }
}

/// How a message travels.
fn place(message: &Outgoing, readable: bool) -> Place {
    let bytes = message.memory.bytes();
    match message.memory.heap_offset() {
        Some(offset) if bytes > STAGE_REGISTERED_MAX => Place::Heap(offset),
        None if readable && bytes > STAGE_BYTES => Place::Process(message.memory.base() as u64),
        _ => Place::Staged,
    }
}
