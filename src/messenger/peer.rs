//! The messages to and from one rank: who matches whom, and what goes over the wire (sans-IO).
//!
//! A short message goes at once, and waits in a buffer of the receiver if nobody is there for it
//! yet. Both ends count what may lie in such buffers: beyond [`CREDIT_BYTES`], and when it is
//! long, a message is only announced. The receiver asks for it when somebody is there, and it then
//! lands where it belongs. So memory is bounded whatever is sent, and long messages move once.
//!
//! Headers of both kinds go in the order of the sends, so that the messages of a tag are matched
//! in that order; which tag is received first is the receiver's choice.

use std::collections::{HashMap, VecDeque};

use super::header::{Envelope, Header, Kind};

/// The longest message that goes unasked: what the shared-memory link stages.
pub(super) const EAGER_BYTES: u64 = 8 << 10;
/// What the messages that nobody has received may occupy at a receiver, per sender.
pub(super) const CREDIT_BYTES: u64 = 256 << 10;
/// What a message occupies beside its bytes, roughly.
const OVERHEAD_BYTES: u64 = 256;

/// A send or a receive, as its owner numbers them.
pub(super) type Operation = usize;

/// What has to be done next, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Send a header. If it is all that goes, its send ends an operation.
    Header(Header, Option<Operation>),
    /// Send the memory of a send, which ends it.
    Payload(Operation),
    /// Copy a message that came early to the memory of a receive, which ends it.
    Deliver(Vec<u8>, Operation),
    /// A receive has ended.
    Done(Operation),
}

/// What follows a header on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another header.
    Header,
    /// So many bytes, for the memory of a receive.
    Memory(Operation),
    /// So many bytes, for a buffer.
    Buffer(usize),
}

/// Why nothing can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The two ends of a message differ.
    Mismatch {
        /// What is received.
        ours: Envelope,
        /// What was sent.
        theirs: Envelope,
    },
    /// The peer said what it can't mean.
    Protocol(&'static str),
}

/// A message without a receive.
#[derive(Debug)]
enum Early {
    Whole(Envelope, Vec<u8>),
    Announced(Envelope, u64),
}

/// A message whose bytes are on the way.
#[derive(Debug)]
enum Arriving {
    /// To the memory of a receive.
    Expected(Operation),
    /// To a buffer, and from there to a receive that came meanwhile.
    Early(Envelope, Option<Operation>),
}

/// The messages to and from one rank.
#[derive(Debug, Default)]
pub(super) struct Peer {
    /// By tag, in order: receives without a message.
    receives: HashMap<u64, VecDeque<(Operation, Envelope)>>,
    /// By tag, in order.
    early: HashMap<u64, VecDeque<Early>>,
    arriving: Option<Arriving>,
    /// By id: sends that wait to be asked for, with their length.
    announced: HashMap<u64, (Operation, Envelope)>,
    /// By the peer's id: receives that have asked.
    asked: HashMap<u64, (Operation, Envelope)>,
    next_id: u64,
    /// Buffer space of all messages that ever went unasked, and how much of it is free again.
    sent: u64,
    sent_consumed: u64,
    /// The same for those that came.
    received: u64,
    consumed: u64,
    pub(super) outputs: VecDeque<Output>,
}

impl Peer {
    /// Starts a send.
    pub(super) fn send(&mut self, operation: Operation, envelope: Envelope) {
        let space = space(&envelope);
        let has_room = self.sent - self.sent_consumed + space <= CREDIT_BYTES;
        if envelope.bytes <= EAGER_BYTES && has_room {
            self.sent += space;
            self.put_out(Kind::Eager, envelope, 0, operation);
        } else {
            let id = self.next_id;
            self.next_id += 1;
            self.announced.insert(id, (operation, envelope));
            self.say(Kind::Announce, envelope, id, None);
        }
    }

    /// Starts a receive.
    ///
    /// # Errors
    /// If the message that it gets is another than it expects.
    pub(super) fn receive(&mut self, operation: Operation, ours: Envelope) -> Result<(), Fault> {
        match take(&mut self.early, ours.tag) {
            Some(Early::Whole(theirs, buffer)) => {
                agree(ours, theirs)?;
                self.consumed += space(&theirs);
                self.outputs.push_back(Output::Deliver(buffer, operation));
            }
            Some(Early::Announced(theirs, id)) => self.ask((operation, ours), theirs, id)?,
            None => match &mut self.arriving {
                Some(Arriving::Early(theirs, to @ None)) if theirs.tag == ours.tag => {
                    agree(ours, *theirs)?;
                    *to = Some(operation);
                }
                _ => self.receives.entry(ours.tag).or_default().push_back((operation, ours)),
            },
        }
        Ok(())
    }

    /// Whether a message with this tag has come, or was announced, that nobody receives yet.
    pub(super) fn has_early(&self, tag: u64) -> bool {
        let arrives = matches!(&self.arriving, Some(Arriving::Early(it, None)) if it.tag == tag);
        arrives || self.early.get(&tag).is_some_and(|messages| !messages.is_empty())
    }

    /// Takes a header; what comes after it. Not while bytes are on the way.
    ///
    /// # Errors
    /// If it can't be, or announces another message than is expected.
    pub(super) fn header(&mut self, header: Header) -> Result<Next, Fault> {
        let Header { kind, envelope, id, consumed } = header;
        if !(self.sent_consumed..=self.sent).contains(&consumed) {
            return Err(Fault::Protocol("it freed more than it was sent"));
        }
        self.sent_consumed = consumed;
        match kind {
            Kind::Eager => self.eager(envelope),
            Kind::Announce => {
                match take(&mut self.receives, envelope.tag) {
                    Some(receive) => self.ask(receive, envelope, id)?,
                    None => self.keep(Early::Announced(envelope, id), envelope.tag),
                }
                Ok(Next::Header)
            }
            Kind::Ask => {
                let unknown = Fault::Protocol("it asked for a message that was not announced");
                let (operation, envelope) = self.announced.remove(&id).ok_or(unknown)?;
                self.put_out(Kind::Answer, envelope, id, operation);
                Ok(Next::Header)
            }
            Kind::Answer => {
                let unknown = Fault::Protocol("it answered what nobody asked");
                let (operation, ours) = self.asked.remove(&id).ok_or(unknown)?;
                agree(ours, envelope)?;
                Ok(self.expect(operation, envelope))
            }
        }
    }

    /// The bytes after a header have come: to memory, or to this buffer.
    pub(super) fn payload(&mut self, buffer: Vec<u8>) {
        match self.arriving.take() {
            Some(Arriving::Expected(operation)) => self.outputs.push_back(Output::Done(operation)),
            Some(Arriving::Early(envelope, Some(operation))) => {
                self.consumed += space(&envelope);
                self.outputs.push_back(Output::Deliver(buffer, operation));
            }
            Some(Arriving::Early(envelope, None)) => {
                self.keep(Early::Whole(envelope, buffer), envelope.tag);
            }
            None => {}
        }
    }

    fn eager(&mut self, theirs: Envelope) -> Result<Next, Fault> {
        let space = space(&theirs);
        if theirs.bytes > EAGER_BYTES || self.received - self.consumed + space > CREDIT_BYTES {
            return Err(Fault::Protocol("it sent more than may be sent unasked"));
        }
        self.received += space;
        if let Some((operation, ours)) = take(&mut self.receives, theirs.tag) {
            agree(ours, theirs)?;
            self.consumed += space;
            return Ok(self.expect(operation, theirs));
        }
        if theirs.bytes == 0 {
            self.keep(Early::Whole(theirs, Vec::new()), theirs.tag);
            return Ok(Next::Header);
        }
        self.arriving = Some(Arriving::Early(theirs, None));
        Ok(Next::Buffer(theirs.bytes as usize))
    }

    /// What comes next is for a receive.
    fn expect(&mut self, operation: Operation, envelope: Envelope) -> Next {
        if envelope.bytes == 0 {
            self.outputs.push_back(Output::Done(operation));
            return Next::Header;
        }
        self.arriving = Some(Arriving::Expected(operation));
        Next::Memory(operation)
    }

    fn ask(
        &mut self,
        (operation, ours): (Operation, Envelope),
        theirs: Envelope,
        id: u64,
    ) -> Result<(), Fault> {
        agree(ours, theirs)?;
        if self.asked.insert(id, (operation, ours)).is_some() {
            return Err(Fault::Protocol("it announced two messages under one number"));
        }
        self.say(Kind::Ask, ours, id, None);
        Ok(())
    }

    /// Sends a header and the message after it.
    fn put_out(&mut self, kind: Kind, envelope: Envelope, id: u64, operation: Operation) {
        let is_empty = envelope.bytes == 0;
        self.say(kind, envelope, id, is_empty.then_some(operation));
        if !is_empty {
            self.outputs.push_back(Output::Payload(operation));
        }
    }

    fn say(&mut self, kind: Kind, envelope: Envelope, id: u64, ends: Option<Operation>) {
        let header = Header { kind, envelope, id, consumed: self.consumed };
        self.outputs.push_back(Output::Header(header, ends));
    }

    fn keep(&mut self, early: Early, tag: u64) {
        self.early.entry(tag).or_default().push_back(early);
    }
}

/// What a message occupies while it waits in a buffer.
const fn space(envelope: &Envelope) -> u64 {
    envelope.bytes.saturating_add(OVERHEAD_BYTES)
}

fn agree(ours: Envelope, theirs: Envelope) -> Result<(), Fault> {
    if ours == theirs { Ok(()) } else { Err(Fault::Mismatch { ours, theirs }) }
}

/// The first of a tag.
fn take<T>(queues: &mut HashMap<u64, VecDeque<T>>, tag: u64) -> Option<T> {
    let queue = queues.get_mut(&tag)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&tag);
    }
    first
}

#[cfg(test)]
mod tests;
