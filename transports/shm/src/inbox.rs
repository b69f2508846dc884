//! What this rank receives from one peer.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use unisum_kernels::copy;
use unisum_link::{Call, Landing, LinkError, LinkErrorKind, Rank, Region, Ticket};

use crate::doorbell::{Doorbell, URGENT};
use crate::ffi::read_process;
use crate::heaps::PeerHeap;
use crate::layout::STAGE_BYTES;
use crate::mailbox::{CallWords, Mailbox, Message, Place};
use crate::mapping::Mapping;

/// The receiving end of a mailbox.
#[derive(Debug)]
pub(crate) struct Inbox {
    mailbox: Mailbox,
    /// This rank.
    rank: Rank,
    peer: Peer,
    heap: PeerHeap,
    /// Entries whose room was given back.
    consumed: u64,
    /// The entries after those that were read: still held or only waiting for an older one.
    taken: VecDeque<Taken>,
    queue: VecDeque<Incoming>,
    /// Whether a message was marked since this was last cleared.
    pub(crate) marked: bool,
    /// Buffers for slots, to be used again.
    spare: Vec<Vec<u64>>,
}

#[derive(Debug)]
struct Taken {
    held: bool,
    /// Whether the sender has lent its own memory, and waits for this entry to be consumed.
    lent: bool,
}

#[derive(Debug)]
struct Incoming {
    ticket: Ticket,
    call: CallWords,
    memory: Region,
    landing: Landing,
    /// Where pieces gather for a slot.
    scratch: Vec<u64>,
    arrived: usize,
}

/// A done receive that landed in a slot.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) at: *const u8,
    bytes: usize,
    holds: Holds,
}

impl Arrived {
    fn in_scratch(scratch: Vec<u64>, bytes: usize) -> Self {
        Self { at: scratch.as_ptr().cast(), bytes, holds: Holds::Scratch(scratch) }
    }
}

#[derive(Debug)]
enum Holds {
    Entry(u64),
    Scratch(Vec<u64>),
}

// SAFETY: the pointer is into the mapping or into the scratch that goes along.
unsafe impl Send for Arrived {}

/// Whom an inbox, or a group, reads from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) rank: Rank,
    pub(crate) local_index: u64,
    pub(crate) pid: u32,
}

impl Peer {
    /// Copies private memory of the peer to `into`.
    ///
    /// # Safety
    /// `into` is valid for writing `bytes` bytes.
    pub(crate) unsafe fn pull(
        &self,
        mapping: &Mapping,
        from: u64,
        into: *mut u8,
        bytes: usize,
    ) -> Result<(), LinkError> {
        // SAFETY: the caller's promise.
        let read = unsafe { read_process(self.pid, from, into, bytes) };
        self.confirm(mapping)?;
        read.map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => LinkError::closed(self.rank),
            _ => LinkError::os(self.rank, "reading the peer's private memory", error),
        })
    }

    /// Says that the peer lent its memory until now, so that what was read of it is what it sent.
    pub(crate) fn confirm(&self, mapping: &Mapping) -> Result<(), LinkError> {
        // A peer that takes its memory back says so before its owner uses it again, so if we don't
        // see that now, what we read was what was lent. Acquire: orders our reads before the load;
        // pairs with the fence in `ShmLink::leave`.
        fence(Ordering::Acquire);
        let control = mapping.layout().control(self.local_index);
        // Relaxed: after the fence.
        match mapping.word(control.gone()).load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(LinkError::closed(self.rank)),
        }
    }

    /// The error for a call other than ours.
    pub(crate) fn mismatch(&self, ours: &CallWords, theirs: &CallWords) -> LinkError {
        match (Call::from_words(ours), Call::from_words(theirs)) {
            (Some(ours), Some(theirs)) => {
                LinkError { peer: self.rank, kind: LinkErrorKind::Mismatch { ours, theirs } }
            }
            _ => LinkError::protocol(self.rank, "an unknown call in the shared memory"),
        }
    }
}

impl Inbox {
    pub(crate) fn new(mapping: &Mapping, own: &Peer, peer: Peer, heap: PeerHeap) -> Self {
        Self {
            mailbox: Mailbox::new(mapping.layout(), peer.local_index, own.local_index),
            rank: own.rank,
            peer,
            heap,
            consumed: 0,
            taken: VecDeque::new(),
            queue: VecDeque::new(),
            marked: false,
            spare: Vec::new(),
        }
    }

    /// Queues a receive.
    pub(crate) fn push(
        &mut self,
        call: CallWords,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) {
        let scratch = Vec::new();
        let incoming = Incoming { ticket, call, memory, landing, scratch, arrived: 0 };
        self.queue.push_back(incoming);
    }

    /// Drops the newest queued receive if it has this ticket and nothing of it has come.
    pub(crate) fn retract(&mut self, ticket: Ticket) -> bool {
        let is_it = |last: &Incoming| last.ticket == ticket && last.arrived == 0;
        let untouched = self.queue.back().is_some_and(is_it);
        if untouched {
            self.queue.pop_back();
        }
        untouched
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.spare.clear();
    }

    /// Takes what has arrived for the posted receives; `done` gets the finished ones, with their
    /// slot if they landed in one.
    pub(crate) fn progress(
        &mut self,
        mapping: &Mapping,
        doorbell: &Doorbell,
        done: &mut impl FnMut(Ticket, Option<Arrived>),
    ) -> Result<(), LinkError> {
        while !self.queue.is_empty() {
            let number = self.consumed + self.taken.len() as u64;
            let Some(message) = self.mailbox.read(mapping, number) else {
                break;
            };
            self.take(mapping, number, &message, done)?;
            // Not once at the end: the sender may go on while we copy the next.
            self.consume(mapping, doorbell);
        }
        Ok(())
    }

    /// Gives an arrival's slot back. An error if what was read there may not have been the message.
    pub(crate) fn release(
        &mut self,
        mapping: &Mapping,
        doorbell: &Doorbell,
        arrived: Arrived,
    ) -> Result<(), LinkError> {
        match arrived.holds {
            Holds::Entry(number) => return self.let_go(mapping, doorbell, number),
            Holds::Scratch(scratch) if self.spare.len() < SPARES => self.spare.push(scratch),
            Holds::Scratch(_) => {}
        }
        Ok(())
    }

    /// Copies an arrival that is read where the sender has it, so that the sender can go on. An
    /// error if that may not have been the message.
    pub(crate) fn copy_out(
        &mut self,
        mapping: &Mapping,
        doorbell: &Doorbell,
        arrived: &mut Arrived,
    ) -> Result<(), LinkError> {
        let Holds::Entry(number) = arrived.holds else {
            return Ok(());
        };
        let (from, bytes) = (arrived.at, arrived.bytes);
        let mut scratch = buffer(&mut self.spare, bytes, self.rank)?;
        // SAFETY: an arrival is readable until its entry is let go, and the buffer is as long.
        unsafe { copy(from, scratch.as_mut_ptr().cast(), bytes) };
        *arrived = Arrived::in_scratch(scratch, bytes);
        self.let_go(mapping, doorbell, number)
    }

    /// What an entry held was read for the last time.
    fn let_go(
        &mut self,
        mapping: &Mapping,
        doorbell: &Doorbell,
        number: u64,
    ) -> Result<(), LinkError> {
        let taken = &mut self.taken[(number - self.consumed) as usize];
        taken.held = false;
        if taken.lent {
            // Before the sender hears that it may use its memory again.
            self.peer.confirm(mapping)?;
        }
        self.consume(mapping, doorbell);
        Ok(())
    }

    /// Acts on one entry, which belongs to the first receive.
    fn take(
        &mut self,
        mapping: &Mapping,
        number: u64,
        message: &Message,
        done: &mut impl FnMut(Ticket, Option<Arrived>),
    ) -> Result<(), LinkError> {
        let in_place = self.land(mapping, number, message)?;
        self.marked |= message.marked;
        let lent = message.place != Some(Place::Staged);
        self.taken.push_back(Taken { held: in_place.is_some(), lent });
        let whole = |first: &&Incoming| in_place.is_some() || first.arrived == first.memory.bytes();
        if self.queue.front().filter(whole).is_none() {
            return Ok(());
        }
        let first = self.queue.pop_front().expect("it was just looked at");
        let bytes = first.memory.bytes();
        let slot = (first.landing == Landing::Slot).then(|| match in_place {
            Some(at) => Arrived { at, bytes, holds: Holds::Entry(number) },
            None => Arrived::in_scratch(first.scratch, bytes),
        });
        done(first.ticket, slot);
        Ok(())
    }

    /// Moves an entry's bytes to where the first receive wants them. The address instead, if it
    /// wants them in a slot and can read the whole message where it is.
    fn land(
        &mut self,
        mapping: &Mapping,
        number: u64,
        message: &Message,
    ) -> Result<Option<*const u8>, LinkError> {
        let first = self.queue.front_mut().expect("an entry is read for a receive");
        let place = first.check(&self.peer, message)?;
        let bytes = first.memory.bytes();
        let (from, piece) = match place {
            Place::Heap(offset) => (self.heap.mapped(self.peer.rank, offset, bytes as u64)?, bytes),
            Place::Staged => {
                (self.mailbox.stage(mapping, number), STAGE_BYTES.min(bytes - first.arrived))
            }
            Place::Process(address) => {
                let into = first.room(&mut self.spare, bytes, self.rank)?;
                // SAFETY: `room` has that many bytes.
                unsafe { self.peer.pull(mapping, address, into, bytes) }?;
                first.arrived = bytes;
                return Ok(None);
            }
        };
        if first.landing == Landing::Slot && piece == bytes {
            return Ok(Some(from));
        }
        let into = first.room(&mut self.spare, piece, self.rank)?;
        // SAFETY: both have `piece` bytes and lie in memory of different ranks; the sender leaves
        // the source alone until we say that it is consumed, or says that it does not.
        unsafe { copy(from, into, piece) };
        if place != Place::Staged {
            self.peer.confirm(mapping)?;
        }
        first.arrived += piece;
        Ok(None)
    }

    /// Gives the room of entries back that nobody holds, and tells a sender that waits for it.
    fn consume(&mut self, mapping: &Mapping, doorbell: &Doorbell) {
        let (mut awaited, before) = (0, self.consumed);
        while self.taken.front().is_some_and(|first| !first.held) {
            awaited += u32::from(self.taken.pop_front().is_some_and(|first| first.lent));
            self.consumed += 1;
        }
        if self.consumed == before {
            return;
        }
        let stalled = self.mailbox.consume(mapping, self.consumed);
        let weight = if stalled { URGENT } else { awaited };
        if weight > 0 {
            doorbell.ring(self.peer.local_index, weight);
        }
    }
}

impl Incoming {
    /// Where the message is, if it can be the one that was posted for.
    fn check(&self, peer: &Peer, message: &Message) -> Result<Place, LinkError> {
        if message.call != self.call {
            return Err(peer.mismatch(&self.call, &message.call));
        }
        let bytes = self.memory.bytes();
        let what = match message.place {
            _ if message.bytes != bytes as u64 => {
                format!("{} bytes came where {bytes} were expected", message.bytes)
            }
            None => "a message at an unknown place".to_owned(),
            Some(place) if self.arrived > 0 && place != Place::Staged => {
                "a whole message after a piece of it".to_owned()
            }
            Some(place) => return Ok(place),
        };
        Err(LinkError::protocol(peer.rank, what))
    }

    /// Where the next `piece` bytes go: their place in the region, or scratch for the slot.
    ///
    /// # Errors
    /// If rank `rank`, which is this one, has no memory for the slot.
    ///
    /// # Panics
    /// If there are not so many left.
    fn room(
        &mut self,
        spare: &mut Vec<Vec<u64>>,
        piece: usize,
        rank: Rank,
    ) -> Result<*mut u8, LinkError> {
        let place = self.memory.pointer(&(self.arrived..self.arrived + piece));
        if self.landing == Landing::Place {
            return Ok(place);
        }
        if self.scratch.is_empty() {
            self.scratch = buffer(spare, self.memory.bytes(), rank)?;
        }
        Ok(self.scratch.as_mut_ptr().cast::<u8>().wrapping_add(self.arrived))
    }
}

/// A buffer for `bytes` bytes, a used one if there is one; an error of rank `rank`, which is this
/// one, if there is no memory for it.
fn buffer(spare: &mut Vec<Vec<u64>>, bytes: usize, rank: Rank) -> Result<Vec<u64>, LinkError> {
    let mut buffer = spare.pop().unwrap_or_default();
    let words = bytes.div_ceil(8);
    buffer.try_reserve_exact(words.saturating_sub(buffer.len())).map_err(|error| {
        let what = format!("has no memory for the {bytes} bytes of an arrival");
        LinkError::lacking(rank, what, error)
    })?;
    buffer.resize(words, 0);
    Ok(buffer)
}

/// Slot buffers kept per peer.
const SPARES: usize = 4;
