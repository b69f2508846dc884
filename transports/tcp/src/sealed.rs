//! The records between a socket's messages and its connection, where the connection is encrypted.
//!
//! A message up to 4 KiB with its header is one record; of a longer one the header is a record,
//! and what follows is cut into records of 64 KiB. Both ends know from that how long each record
//! is, but for the first. Records are sealed from the sender's memory into a buffer and opened
//! from another one straight into the memory of the receiver, so that each byte is read and written
//! once at each end beside what the kernel does.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;

use rustix::net::{self, RecvFlags, SendFlags};
use unisum_link::frame::HEADER_BYTES;
use unisum_link::secure::{Altered, RECORD_BYTES_MAX, RECORD_OVERHEAD, Session};
use unisum_link::{LinkError, LinkErrorKind, Rank};

use crate::socket::Message;

/// Messages up to this size, header and all, are one record.
const WHOLE_BYTES: usize = 4 << 10;
/// What the buffers hold until a longer message is under way.
const SMALL_BUFFER: usize = 16 << 10;
/// What they hold from then on, so that they stay in the processor's cache: a header and two full
/// records.
const LARGE_BUFFER: usize = HEADER_BYTES + 2 * RECORD_BYTES_MAX + 3 * RECORD_OVERHEAD;

/// One end of an encrypted connection.
#[derive(Debug)]
pub(crate) struct Sealed {
    socket: u8,
    session: Box<Session>,
    outgoing: Buffer,
    /// Bytes of records that were made, and that the kernel has.
    made: u64,
    sent: u64,
    incoming: Buffer,
    /// The record with a message's header.
    first: Box<[u8; WHOLE_BYTES]>,
}

/// Bytes on their way from one end to the other; it grows and never shrinks.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

impl Buffer {
    pub(crate) fn held(&self) -> &[u8] {
        &self.bytes[self.from..self.to]
    }

    /// Room for so many bytes behind those that it holds.
    pub(crate) fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
        if self.bytes.len() - self.to < bytes {
            self.bytes.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        if self.bytes.len() - self.to < bytes {
            self.bytes.resize(self.to + bytes, 0);
        }
        &mut self.bytes[self.to..]
    }

    /// So many bytes of the room were filled.
    pub(crate) const fn grew(&mut self, bytes: usize) {
        self.to += bytes;
    }

    /// So many of the bytes that it holds were used.
    pub(crate) const fn gave(&mut self, bytes: usize) {
        self.from += bytes;
    }
}

/// Bytes of the record that carries the next part of a message of which so many are through.
fn next_record(through: usize, total: usize) -> usize {
    match through {
        0 if total <= WHOLE_BYTES => total,
        0 => HEADER_BYTES,
        _ => (total - through).min(RECORD_BYTES_MAX),
    }
}

/// How much to read for a message: the rest of a long one, as far as whole records of it have room,
/// so that no part of a record has to be moved; whatever there is, where records are small.
fn wanted(through: usize, total: usize) -> usize {
    if total <= WHOLE_BYTES {
        return SMALL_BUFFER;
    }
    let (mut at, mut bytes) = (through, 0);
    while at < total {
        let record = next_record(at, total);
        if bytes + record + RECORD_OVERHEAD > LARGE_BUFFER {
            break;
        }
        at += record;
        bytes += record + RECORD_OVERHEAD;
    }
    bytes
}

impl Sealed {
    pub(crate) fn new(socket: u8, session: Box<Session>) -> Self {
        Self {
            socket,
            session,
            outgoing: Buffer::default(),
            made: 0,
            sent: 0,
            incoming: Buffer::default(),
            first: Box::new([0; WHOLE_BYTES]),
        }
    }

    /// Whether a whole record was read, or something that is none.
    pub(crate) fn has_record(&self) -> bool {
        let held = self.incoming.held();
        let Some(length) = held.first_chunk() else { return false };
        let bytes = u32::from_le_bytes(*length) as usize;
        bytes > RECORD_BYTES_MAX || held.len() >= bytes + RECORD_OVERHEAD
    }

    /// Seals and sends what the socket takes. Gives the number of messages, from the first on, that
    /// the kernel has whole.
    pub(crate) fn flush(
        &mut self,
        stream: &TcpStream,
        sends: &mut VecDeque<Message>,
        writable: &mut bool,
    ) -> io::Result<usize> {
        while *writable {
            self.seal(sends);
            let held = self.outgoing.held();
            if held.is_empty() {
                break;
            }
            // NOSIGNAL: the host program may not ignore SIGPIPE.
            match net::send(stream, held, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    // A short send found the socket's buffer full: the next event tells of room.
                    *writable = sent == held.len();
                    self.outgoing.from += sent;
                    self.sent += sent as u64;
                }
                Err(rustix::io::Errno::AGAIN) => *writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let is_through = |it: &&Message| it.through == it.total() && it.ends_at <= self.sent;
        Ok(sends.iter().take_while(is_through).count())
    }

    /// Seals messages, small ones together, until the buffer has enough for one system call.
    fn seal(&mut self, sends: &mut VecDeque<Message>) {
        for message in sends {
            while message.through < message.total() {
                let bytes = next_record(message.through, message.total());
                let record = bytes + RECORD_OVERHEAD;
                let held = self.outgoing.held().len();
                if held > 0 && held + record > LARGE_BUFFER {
                    return;
                }
                let (header, payload) = message.rest();
                let payload = &payload[..bytes - header.len()];
                let room = &mut self.outgoing.room(record)[..record];
                self.session.sealer.seal(header, payload, room);
                self.outgoing.to += record;
                self.made += record as u64;
                message.through += bytes;
                message.ends_at = self.made;
            }
        }
    }

    /// Opens the next record that was read whole into its message; `false` if there is none.
    /// `check` looks at the header, and says whether it is marked.
    pub(crate) fn receive(
        &mut self,
        message: &mut Message,
        peer: Rank,
        check: impl FnOnce(&Message, [u8; HEADER_BYTES]) -> Result<bool, LinkError>,
        marked: &mut bool,
    ) -> Result<bool, LinkError> {
        let Self { socket, session, incoming, first, .. } = self;
        let altered = |Altered { at }| LinkError {
            peer,
            kind: LinkErrorKind::Altered { socket: *socket, at },
        };
        let held = incoming.held();
        let Some(bytes) = session.opener.length(held).map_err(altered)? else { return Ok(false) };
        let expected = next_record(message.through, message.total());
        let is_first = message.through == 0;
        // Of another call the first record may have another length, and says so.
        let may_be = if is_first { HEADER_BYTES..=WHOLE_BYTES } else { expected..=expected };
        if !may_be.contains(&bytes) {
            return Err(altered(Altered { at: session.opener.opened() }));
        }
        let Some(record) = held.get(..bytes + RECORD_OVERHEAD) else { return Ok(false) };
        if !is_first {
            let (_, payload) = message.rest();
            session.opener.open(record, &mut payload[..bytes]).map_err(altered)?;
        } else {
            let first = &mut first[..bytes];
            session.opener.open(record, first).map_err(altered)?;
            let (header, payload) = first.split_first_chunk().expect("it is longer than a header");
            *marked |= check(message, *header)?;
            if bytes != expected {
                let what = format!("a record of {bytes} bytes where {expected} are expected");
                return Err(LinkError::protocol(peer, what));
            }
            message.rest().1[..payload.len()].copy_from_slice(payload);
        }
        message.through += bytes;
        incoming.from += bytes + RECORD_OVERHEAD;
        Ok(true)
    }

    /// Reads once what the next records of a message need, or more; `false` if nothing is there.
    pub(crate) fn read(
        &mut self,
        stream: &TcpStream,
        message: &Message,
        readable: &mut bool,
    ) -> io::Result<bool> {
        while *readable {
            // What is held is less than a record, and so less than what is wanted.
            let more = wanted(message.through, message.total()) - self.incoming.held().len();
            let room = &mut self.incoming.room(more)[..more];
            match net::recv(stream, &mut *room, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, received)) => {
                    // A short read found the socket's buffer empty: the next event tells of more.
                    *readable = received == room.len();
                    self.incoming.to += received;
                    return Ok(true);
                }
                Err(rustix::io::Errno::AGAIN) => *readable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
#[cfg(feature = "tls")]
mod tests;
