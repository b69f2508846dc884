//! How a control connection goes on in another one after it was cut (no I/O): each end counts the
//! messages that it has taken, and keeps those that it has sent until the other one says that it
//! has taken them.
//!
//! ```text
//! length u32, kind u8, as every message, then
//! dialer    64 attempt u64, taken u64   first on a connection that is to go on for another one
//! listener  65 taken u64                the answer to it: now both send again what was not taken
//! both      66 taken u64                so many have been taken; after what came together
//! ```
//! These words are about the connection; they are not counted, and neither is the welcome, with
//! which a connection begins that goes on for none.

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::message::{Message, MessageError};

const RESUME: u8 = 64;
const RESUMED: u8 = 65;
const TAKEN: u8 = 66;
/// Bytes of a frame before its body: length and kind.
const HEAD_BYTES: usize = 5;
/// Bytes of an encoded [`Word::Resumed`].
pub(super) const RESUMED_BYTES: usize = HEAD_BYTES + 8;

/// What the ends say about the connection itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Dialer: this connection is to go on for the one that was cut. Of two attempts the one with
    /// the larger number is the newer one.
    Resume { attempt: u64, taken: u64 },
    /// Listener: it does.
    Resumed { taken: u64 },
    /// So many messages have been taken.
    Taken(u64),
}

impl Word {
    pub(super) fn encode(self) -> Bytes {
        let (kind, numbers) = match self {
            Self::Resume { attempt, taken } => (RESUME, &[attempt, taken][..]),
            Self::Resumed { taken } => (RESUMED, &[taken][..]),
            Self::Taken(taken) => (TAKEN, &[taken][..]),
        };
        let mut encoded = BytesMut::new();
        encoded.put_u32_le(1 + 8 * numbers.len() as u32);
        encoded.put_u8(kind);
        numbers.iter().for_each(|number| encoded.put_u64_le(*number));
        encoded.freeze()
    }

    /// Takes a word off the front of `from`, if it begins with a whole one.
    ///
    /// # Errors
    /// If it begins with one whose length is not that of its kind.
    pub(super) fn take(from: &mut BytesMut) -> Result<Option<Self>, MessageError> {
        let Some((head, kind)) = from.first_chunk::<HEAD_BYTES>().map(|head| (*head, head[4]))
        else {
            return Ok(None);
        };
        let numbers = match kind {
            RESUME => 2,
            RESUMED | TAKEN => 1,
            _ => return Ok(None),
        };
        if u32::from_le_bytes([head[0], head[1], head[2], head[3]]) != 1 + 8 * numbers {
            return Err(MessageError::Body(kind));
        }
        if from.len() < HEAD_BYTES + 8 * numbers as usize {
            return Ok(None);
        }
        from.advance(HEAD_BYTES);
        Ok(Some(match kind {
            RESUME => Self::Resume { attempt: from.get_u64_le(), taken: from.get_u64_le() },
            RESUMED => Self::Resumed { taken: from.get_u64_le() },
            _ => Self::Taken(from.get_u64_le()),
        }))
    }
}

/// What one end of a control connection remembers, so that it can go on in another one.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Encoded messages that were sent and, as far as is known, not taken, the oldest first.
    kept: VecDeque<Bytes>,
    /// How many the other end has taken, as far as is known.
    taken_there: u64,
    /// How many this end has.
    taken: u64,
    /// Of these, so many it has told the other end of.
    told: u64,
}

/// A number of messages that the other end can't have taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Impossible;

impl Ledger {
    /// Keeps what is sent: whole messages.
    pub(super) fn keep(&mut self, encoded: &Bytes) {
        let mut rest = encoded.clone();
        while let Some(head) = rest.first_chunk::<4>() {
            let bytes = 4 + u32::from_le_bytes(*head) as usize;
            let message = rest.split_to(bytes);
            if message[4] != Message::WELCOME {
                self.kept.push_back(message);
            }
        }
    }

    /// A message was taken, or none if it was the welcome.
    pub(super) const fn take(&mut self, message: &Message) {
        if !matches!(message, Message::Welcome { .. }) {
            self.taken += 1;
        }
    }

    /// How many were taken.
    pub(super) const fn taken(&self) -> u64 {
        self.taken
    }

    /// The other end has taken so many: they need not be kept.
    ///
    /// # Errors
    /// If it said before that it has more, or there are not so many.
    pub(super) fn has_taken(&mut self, there: u64) -> Result<(), Impossible> {
        let more = there.checked_sub(self.taken_there).ok_or(Impossible)?;
        let more = usize::try_from(more).map_err(|_| Impossible)?;
        if more > self.kept.len() {
            return Err(Impossible);
        }
        self.kept.drain(..more);
        self.taken_there = there;
        Ok(())
    }

    /// What is to be said again on another connection, after [`Ledger::has_taken`].
    pub(super) fn again(&mut self) -> impl Iterator<Item = Bytes> {
        // Going on tells the other end.
        self.told = self.taken;
        self.kept.iter().cloned()
    }

    /// What the other end is to be told, if it has not been told already.
    pub(super) fn news(&mut self) -> Option<Word> {
        let is_news = self.told < self.taken;
        self.told = self.taken;
        is_news.then_some(Word::Taken(self.taken))
    }

    /// Whether the other end has said of all that was sent that it has it.
    pub(super) fn is_settled(&self) -> bool {
        self.kept.is_empty()
    }
}

/// Takes the next message off the front of `inbound`, and what is said of the connection before it.
///
/// # Errors
/// If there is something else.
pub(super) fn next(
    inbound: &mut BytesMut,
    ledger: Option<&mut Ledger>,
) -> Result<Option<Message>, MessageError> {
    let mut ledger = ledger;
    while let Some(word) = Word::take(inbound)? {
        match (word, &mut ledger) {
            (Word::Taken(there), Some(ledger)) => {
                ledger.has_taken(there).map_err(|Impossible| MessageError::Body(TAKEN))?;
            }
            // The rank has other settings, which it is told in other words.
            (Word::Taken(_), None) => {}
            (Word::Resume { .. }, _) => return Err(MessageError::Kind(RESUME)),
            (Word::Resumed { .. }, _) => return Err(MessageError::Kind(RESUMED)),
        }
    }
    let message = Message::decode(inbound)?;
    if let (Some(message), Some(ledger)) = (&message, ledger) {
        ledger.take(message);
    }
    Ok(message)
}

#[cfg(test)]
mod tests;
