//! Transfers to and from one peer.
//!
//! Messages of up to [`SMALL_BYTES`] are copied into a cell here, written to the same cell there,
//! and copied out. Larger ones are announced by their receiver, with the address where they may be
//! written, and are then written there from where they lie. Both ends know the length of every
//! message and so which way it goes; within each way and direction messages keep their order.
//!
//! Neither way waits for the other, nor one direction for the other: cells and announcements have
//! room of their own.

mod checks;
mod ending;

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use unisum_link::{Call, Landing, LinkError, PeerCounts, Rank, Ticket};

use crate::area::{Area, CELL_BYTES};
use crate::connection::{Carries, Connection};
use crate::domain::Access;
use crate::ledger::Finished;
use crate::link::renewal::{FIRST_ATTEMPT, Renewal};
use crate::link_state::{LinkState, Receive, Send, TransferMemory, UnderWay};
use crate::queue_pair::Write;
use crate::wire::{CREDITS, Kind, READY_BYTES, Ready, Word, part, parts};
use ending::Ending;

/// Largest message that goes through a cell.
pub(crate) const SMALL_BYTES: usize = CELL_BYTES - Call::ENCODED;
/// The spare byte of an encoded call, which says whether the collective is marked.
const MARK_AT: usize = Call::ENCODED - 1;

/// A peer, its connections and what is posted. Counters wrap.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) rank: Rank,
    pub(crate) connections: Vec<Connection>,
    area: Area,
    /// Whether the link looks after it at its next progress.
    pub(crate) is_listed: bool,
    /// What the call under way has for the peer and expects of it, where it does not say so itself.
    pub(crate) counts: Option<PeerCounts>,
    ending: Ending,
    /// While its queue pairs are made anew.
    pub(crate) renewal: Option<Box<Renewal>>,
    /// The number of the last connection on which that was agreed, or was to be.
    pub(crate) attempt: u32,
    /// When its queue pairs were made anew last.
    pub(crate) renewed_at: Option<Instant>,
    /// What a device said when writes could not be posted.
    pub(crate) unposted: Option<LinkError>,

    /// Small messages that wait for a cell.
    small_out: VecDeque<Send>,
    /// Small messages sent, the part that the peer has taken, and the part that is read.
    sent: u32,
    taken_there: u32,
    reported: u32,

    /// Receives that wait for a small message.
    small_in: VecDeque<Receive>,
    /// Lengths, with the call, of messages that lie in their cells.
    lengths: VecDeque<usize>,
    /// Small messages taken, and what the peer knows of that.
    taken: u32,
    told: u32,

    /// Large messages that wait for their announcement.
    large_out: VecDeque<Send>,
    /// Announcements of the peer that came, and that were used.
    heard: u32,
    used: u32,

    /// Receives that wait to be announced.
    large_in: VecDeque<Receive>,
    /// Announcements written down here, and those of them that are on their way.
    announced: u32,
    told_ready: u32,
    /// What was announced, by its place.
    incoming: Vec<Option<Incoming>>,
}

/// A large message that the peer may write.
#[derive(Debug)]
struct Incoming {
    receive: Receive,
    parts_left: usize,
    memory: TransferMemory,
}

impl Peer {
    pub(crate) fn new(rank: Rank, connections: Vec<Connection>, area: Area) -> Self {
        Self {
            rank,
            connections,
            area,
            is_listed: false,
            counts: None,
            ending: Ending::default(),
            renewal: None,
            attempt: FIRST_ATTEMPT,
            renewed_at: None,
            unposted: None,
            small_out: VecDeque::new(),
            sent: 0,
            taken_there: 0,
            reported: 0,
            small_in: VecDeque::new(),
            lengths: VecDeque::new(),
            taken: 0,
            told: 0,
            large_out: VecDeque::new(),
            heard: 0,
            used: 0,
            large_in: VecDeque::new(),
            announced: 0,
            told_ready: 0,
            incoming: (0..area.layout.readies).map(|_| None).collect(),
        }
    }

    /// Posts a send.
    ///
    /// # Errors
    /// If the peer is gone.
    pub(crate) fn send(&mut self, send: Send) -> Result<(), LinkError> {
        if let Some(error) = self.why_gone() {
            return Err(error);
        }
        match send.bytes <= SMALL_BYTES {
            true => self.small_out.push_back(send),
            false => self.large_out.push_back(send),
        }
        Ok(())
    }

    pub(crate) fn receive(&mut self, receive: Receive) {
        match receive.bytes <= SMALL_BYTES {
            true => self.small_in.push_back(receive),
            false => self.large_in.push_back(receive),
        }
    }

    /// Takes back the last receive, if it is this one, small, and nothing has come for it.
    pub(crate) fn retract(&mut self, ticket: Ticket) -> bool {
        let is_last = self.small_in.back().is_some_and(|receive| receive.ticket == ticket);
        let is_awaited = self.small_in.len() > self.lengths.len();
        if is_last && is_awaited {
            self.small_in.pop_back();
        }
        is_last && is_awaited
    }

    /// Whether something came that the next collective may be about.
    pub(crate) fn is_ahead(&self) -> bool {
        !self.lengths.is_empty() || self.heard != self.used
    }

    /// Whether it has to be told as soon as own writes are reported, and not only when the peer
    /// sends something.
    pub(crate) fn waits_for_reports(&self) -> bool {
        !self.small_out.is_empty() || self.connections.iter().any(Connection::has_pending)
    }

    /// Does what messages and reports have made possible, and posts it. How many writes that were.
    ///
    /// # Errors
    /// If the peer's calls differ or make no sense, memory can't be had, or a connection is broken.
    pub(crate) fn advance(&mut self, state: &mut LinkState) -> Result<usize, LinkError> {
        self.take_small(state)?;
        self.send_small(state);
        self.send_large(state)?;
        self.announce(state)?;
        self.check_ahead(state)?;
        self.flush()
    }

    /// Takes note of an announcing write of the peer, of `bytes` bytes, on a connection.
    ///
    /// # Errors
    /// If it makes no sense.
    pub(crate) fn hear(
        &mut self,
        connection: usize,
        word: Word,
        bytes: usize,
        state: &mut LinkState,
    ) -> Result<(), LinkError> {
        self.connections[connection].heard();
        if connection == 0 {
            self.credit(word.credit)?;
        }
        match word.kind {
            Kind::Small if connection == 0 => {
                self.lengths.push_back(bytes);
                let is_sane = self.lengths.len() <= self.area.layout.cells;
                self.require(is_sane, "more small messages than there are cells")
            }
            Kind::Ready { count } if connection == 0 => {
                self.heard = self.heard.wrapping_add(u32::from(count));
                let open = self.heard.wrapping_sub(self.used) as usize;
                let is_sane = open <= self.area.layout.readies;
                self.require(is_sane, "more announcements than there are places")
            }
            Kind::Data { place } => {
                state.marked |= word.marked;
                self.part_arrived(usize::from(place), state)
            }
            Kind::Credit => Ok(()),
            Kind::Goodbye => {
                self.says_goodbye(state);
                Ok(())
            }
            Kind::Small | Kind::Ready { .. } => {
                self.require(false, "a message on a connection that carries only data")
            }
        }
    }

    /// Takes note of a reported write on a connection.
    pub(crate) fn reported(
        &mut self,
        connection: usize,
        state: &mut LinkState,
    ) -> Result<(), LinkError> {
        if self.has_left() {
            return Ok(());
        }
        let finished = self.connections[connection].reported();
        self.require(finished.is_some(), "a report of a write that was not posted")?;
        self.finished(finished.unwrap_or_default(), state);
        Ok(())
    }

    fn finished(&mut self, finished: Finished, state: &mut LinkState) {
        self.reported = self.reported.wrapping_add(finished.smalls);
        finished.large.into_iter().for_each(|number| state.part_sent(number));
    }

    /// Goes on with new queue pairs, where the peer has heard so many writes on each connection.
    ///
    /// # Errors
    /// If it can't have.
    pub(crate) fn go_on(
        &mut self,
        heard: impl Iterator<Item = u64>,
        state: &mut LinkState,
    ) -> Result<(), LinkError> {
        // Who has left has heard all that was meant for it.
        if self.has_left() {
            return Ok(());
        }
        let mut done = Vec::new();
        for (connection, heard) in self.connections.iter_mut().zip(heard) {
            let is_sane = connection.ledger.go_on(heard, |finished| done.push(finished));
            if !is_sane {
                let what = format!("that it heard {heard} writes, which can't be");
                return Err(LinkError::protocol(self.rank, what));
            }
        }
        done.into_iter().for_each(|finished| self.finished(finished, state));
        Ok(())
    }

    fn credit(&mut self, credit: u32) -> Result<(), LinkError> {
        let more = credit.wrapping_sub(self.taken_there) % CREDITS;
        let is_sane = more <= self.sent.wrapping_sub(self.taken_there);
        self.taken_there = self.taken_there.wrapping_add(if is_sane { more } else { 0 });
        self.require(is_sane, "credit for messages that were not sent")
    }

    fn send_small(&mut self, state: &mut LinkState) {
        let cells = self.area.layout.cells as u32;
        while let Some(send) = self.small_out.front() {
            let there = self.sent.wrapping_sub(self.taken_there);
            let unread = self.sent.wrapping_sub(self.reported);
            if there >= cells || unread >= cells {
                return;
            }
            let at = self.area.layout.cell(self.sent as usize % self.area.layout.cells);
            let mut encoded = self.encoded_call(state);
            encoded[MARK_AT] = u8::from(state.marked);
            // SAFETY: the write from this cell is reported, and the array is that long.
            unsafe { self.area.copy_out(at, encoded.as_ptr(), encoded.len()) };
            // SAFETY: as above; the region's promise covers what is sent until it is done.
            unsafe { self.area.copy_out(at + encoded.len(), send.from, send.bytes) };
            let (ticket, bytes) = (send.ticket, encoded.len() + send.bytes);
            self.small_out.pop_front();
            self.sent = self.sent.wrapping_add(1);
            self.push_word(Kind::Small, at, bytes, Carries::Small);
            state.finish(ticket);
        }
    }

    fn take_small(&mut self, state: &mut LinkState) -> Result<(), LinkError> {
        while let (Some(receive), Some(&length)) = (self.small_in.front(), self.lengths.front()) {
            let at = self.area.layout.cell(self.taken as usize % self.area.layout.cells);
            let Receive { ticket, bytes, landing, into } = *receive;
            let (call, marked) = self.small_call(length)?;
            self.check_call(call.as_ref(), self.call_from(state))?;
            state.marked |= marked;
            if length != Call::ENCODED + bytes {
                let what = format!("a message of {length} bytes with its call, and not of {bytes}");
                return Err(LinkError::protocol(self.rank, what));
            }
            let mut bounce = match landing {
                Landing::Place => None,
                Landing::Slot => Some(state.take_bounce_buffer(bytes)),
            };
            let into = bounce.as_mut().map_or(into, |bounce| bounce.as_mut_ptr());
            // SAFETY: the message was announced, and its cell is given back below. The place is
            // the region's, untouched by others until the receive is done; a bounce has the room.
            unsafe { self.area.copy_in(at + Call::ENCODED, bytes, into) };
            self.small_in.pop_front();
            self.lengths.pop_front();
            self.taken = self.taken.wrapping_add(1);
            match bounce {
                Some(bounce) => state.small_arrived(ticket, bounce),
                None => state.finish(ticket),
            }
        }
        Ok(())
    }

    /// The call of the oldest small message that was not taken, and whether it is marked.
    fn small_call(&self, length: usize) -> Result<(Option<Call>, bool), LinkError> {
        let is_sane = (Call::ENCODED..=CELL_BYTES).contains(&length);
        self.require(is_sane, "a small message of no possible length")?;
        let at = self.area.layout.cell(self.taken as usize % self.area.layout.cells);
        let mut encoded = [0; Call::ENCODED];
        // SAFETY: the message was announced and its cell not given back; the array has the room.
        unsafe { self.area.copy_in(at, Call::ENCODED, encoded.as_mut_ptr()) };
        let marked = std::mem::take(&mut encoded[MARK_AT]) == 1;
        Ok((Call::decode(&encoded), marked))
    }

    fn send_large(&mut self, state: &mut LinkState) -> Result<(), LinkError> {
        while self.heard != self.used
            && let Some(send) = self.large_out.pop_front()
        {
            let ready = self.oldest_ready();
            self.check_call(ready.as_ref().map(|ready| &ready.call), self.call_to(state))?;
            let Some(ready) = ready.filter(|ready| ready.bytes == send.bytes as u64) else {
                let what = format!("an announcement that is not of {} bytes", send.bytes);
                return Err(LinkError::protocol(self.rank, what));
            };
            self.depart(&send, &ready, state)?;
            self.used = self.used.wrapping_add(1);
        }
        Ok(())
    }

    /// The oldest announcement that was not used; `None` if it makes no sense.
    fn oldest_ready(&self) -> Option<Ready> {
        let place = self.used as usize % self.area.layout.readies;
        let mut encoded = [0; READY_BYTES];
        let into = encoded.as_mut_ptr();
        // SAFETY: it was told of, and the peer writes no other there before it has been used; the
        // array has the room.
        unsafe { self.area.copy_in(self.area.layout.ready(place), READY_BYTES, into) };
        Ready::decode(&encoded)
    }

    fn depart(
        &mut self,
        send: &Send,
        ready: &Ready,
        state: &mut LinkState,
    ) -> Result<(), LinkError> {
        let place = (self.used as usize % self.area.layout.readies) as u8;
        let memory = state.memory_for(send.from, send.bytes, Access::Read)?;
        if let Some(slot) = memory.slot() {
            // SAFETY: the region's promise covers what is sent until it is done; the slot has the
            // room and is nobody else's.
            unsafe { slot.start().copy_from_nonoverlapping(send.from, send.bytes) };
        }
        let from = memory.slot().map_or(send.from, |slot| slot.start().cast_const());
        let (keys, parts_left) = (memory.keys(), parts(send.bytes, self.connections.len()));
        let number = state.depart(UnderWay { ticket: send.ticket, parts_left, memory });
        for index in 0..parts_left {
            let part = part(send.bytes, parts_left, index);
            // Single parts take turns.
            let turn = if parts_left == 1 { self.used as usize } else { index };
            let connection = turn % self.connections.len();
            let rail = self.connections[connection].rail;
            let (kind, marked) = (Kind::Data { place }, state.marked);
            let word = Word { kind, marked, credit: self.credit_on(connection) };
            let write = Write {
                from: from.wrapping_add(part.start) as u64,
                bytes: part.len() as u32,
                local: keys.local[rail],
                to: ready.address.wrapping_add(part.start as u64),
                remote: ready.keys[rail],
                immediate: Some(word.encode()),
                signalled: true,
            };
            self.connections[connection].push(write, Carries::Large(number));
        }
        Ok(())
    }

    /// Writes down announcements of posted receives, as far as there are places.
    fn announce(&mut self, state: &mut LinkState) -> Result<(), LinkError> {
        let places = self.area.layout.readies;
        while self.incoming[self.announced as usize % places].is_none()
            && let Some(receive) = self.large_in.pop_front()
        {
            let place = self.announced as usize % places;
            let memory = match receive.landing {
                Landing::Place => state.memory_for(receive.into, receive.bytes, Access::Write)?,
                Landing::Slot => TransferMemory::Slot(state.take_slot(receive.bytes)?),
            };
            let into = memory.slot().map_or(receive.into, |slot| slot.start());
            let (bytes, call) = (receive.bytes as u64, self.call_from(state));
            let ready = Ready { address: into as u64, bytes, keys: memory.keys().remote, call };
            let encoded = ready.encode();
            let at = self.area.layout.ready(place);
            // SAFETY: what was announced in this place has arrived, so that its announcement was
            // read; the array is that long.
            unsafe { self.area.copy_out(at, encoded.as_ptr(), READY_BYTES) };
            let parts_left = parts(receive.bytes, self.connections.len());
            self.incoming[place] = Some(Incoming { receive, parts_left, memory });
            self.announced = self.announced.wrapping_add(1);
        }
        Ok(())
    }

    fn part_arrived(&mut self, place: usize, state: &mut LinkState) -> Result<(), LinkError> {
        let entry = self.incoming.get_mut(place).filter(|entry| entry.is_some());
        let Some(entry) = entry else {
            return self.require(false, "data for a place where nothing is awaited");
        };
        let last = |incoming: &mut Incoming| {
            incoming.parts_left -= 1;
            incoming.parts_left == 0
        };
        let Some(Incoming { receive, memory, .. }) = entry.take_if(last) else { return Ok(()) };
        match (receive.landing, memory) {
            (Landing::Slot, TransferMemory::Slot(slot)) => {
                state.large_arrived(receive.ticket, slot)
            }
            (_, memory) => {
                if let Some(slot) = memory.slot() {
                    // SAFETY: the slot holds the message, and the region's promise covers the
                    // place until the receive is done.
                    unsafe { receive.into.copy_from_nonoverlapping(slot.start(), receive.bytes) };
                }
                state.give_back(memory);
                state.finish(receive.ticket);
            }
        }
        Ok(())
    }

    /// What a word on this connection tells of small messages taken: only one connection carries
    /// credit, so that it comes in order.
    fn credit_on(&mut self, connection: usize) -> u32 {
        if connection > 0 {
            return 0;
        }
        self.told = self.taken;
        self.taken % CREDITS
    }

    /// Puts a write to the same place of the peer's area on the first connection.
    fn push_word(&mut self, kind: Kind, at: usize, bytes: usize, carries: Carries) {
        let word = Word { kind, marked: false, credit: self.credit_on(0) };
        let write = Write {
            from: self.area.outbound.wrapping_add(at) as u64,
            bytes: bytes as u32,
            local: self.area.outbound_key,
            to: self.area.remote + at as u64,
            remote: self.area.remote_key,
            immediate: Some(word.encode()),
            signalled: false,
        };
        self.connections[0].push(write, carries);
    }

    /// Sends an empty word on every connection: what proves that there is a way.
    pub(crate) fn push_probes(&mut self) {
        let word = Word { kind: Kind::Credit, marked: false, credit: 0 };
        for connection in &mut self.connections {
            let write = Write {
                from: self.area.outbound as u64,
                bytes: 0,
                local: self.area.outbound_key,
                to: self.area.remote,
                remote: self.area.remote_key,
                immediate: Some(word.encode()),
                signalled: false,
            };
            connection.push(write, Carries::Word);
        }
    }

    fn push_announcements(&mut self) {
        let places = self.area.layout.readies;
        while self.told_ready != self.announced {
            let first = self.told_ready as usize % places;
            let open = self.announced.wrapping_sub(self.told_ready) as usize;
            let count = open.min(places - first);
            self.told_ready = self.told_ready.wrapping_add(count as u32);
            let at = self.area.layout.ready(first);
            let kind = Kind::Ready { count: count as u8 };
            self.push_word(kind, at, count * READY_BYTES, Carries::Word);
        }
    }

    /// Posts everything that the queues hold, after making good for what was heard.
    pub(crate) fn flush(&mut self) -> Result<usize, LinkError> {
        if self.is_gone() || self.renewal.is_some() {
            return Ok(0);
        }
        self.push_announcements();
        let untold = self.taken.wrapping_sub(self.told) as usize;
        if untold >= self.area.layout.cells / 2 {
            self.push_word(Kind::Credit, 0, 0, Carries::Word);
        }
        let mut posted = 0;
        for connection in &mut self.connections {
            // SAFETY: cells and announcements are changed only when their writes are reported or
            // their contents were read; slots and the region's bytes when their sends are done.
            let flushed = connection.refill().and_then(|()| unsafe { connection.flush() });
            let flushed = flushed.map_err(|code| {
                let error = io::Error::from_raw_os_error(code.abs());
                LinkError::os(self.rank, format!("posting to {}", connection.pair), error)
            });
            match flushed {
                Ok(count) => posted += count,
                Err(error) if connection.ledger.keeps() => self.unposted = Some(error),
                Err(error) => return Err(error),
            }
        }
        Ok(posted)
    }
}
