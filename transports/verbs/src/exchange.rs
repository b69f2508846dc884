//! What both ends of connections that failed tell each other, on a TCP connection that has proven
//! the job's token: what they have heard, and where they go on.
//!
//! ```text
//! first   "usmQ"  attempt u32  packet number u32  connections u32
//!         then for each connection: queue pair u32  heard u64
//! ready   "usmG"
//! ```
//! All integers are little endian. An end says the first words once its last queue pairs have
//! ended, so that `heard` does not change any more: so many of the writes that the other end ever
//! posted on this connection have arrived. `attempt` numbers the dialer's connections: the listener
//! answers none that is not newer than the last, and says the same number. An end that is `ready`
//! takes packets: before that they would be lost, and sent again much later.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use bytes::{Buf, BufMut};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use unisum_link::fork::ParentOnly;
use unisum_link::secure::{Proven, Session};

use crate::card::NUMBER_LIMIT;

const MAGIC: &[u8; 4] = b"usmQ";
const READY: &[u8; 4] = b"usmG";
const HEAD_BYTES: usize = 16;
const EACH_BYTES: usize = 12;

/// What an end says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct First {
    pub(crate) attempt: u32,
    /// Number of the first packet of each connection.
    pub(crate) psn: u32,
    /// By connection, the new queue pair and the writes that were heard.
    pub(crate) connections: Vec<(u32, u64)>,
}

impl First {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::bytes(self.connections.len()));
        bytes.put_slice(MAGIC);
        bytes.put_u32_le(self.attempt);
        bytes.put_u32_le(self.psn);
        bytes.put_u32_le(self.connections.len() as u32);
        for (number, heard) in &self.connections {
            bytes.put_u32_le(*number);
            bytes.put_u64_le(*heard);
        }
        bytes
    }

    const fn bytes(connections: usize) -> usize {
        HEAD_BYTES + connections * EACH_BYTES
    }

    /// Reads what an end with so many connections says; the error says what is wrong with it.
    pub(crate) fn decode(bytes: &[u8], connections: usize) -> Result<Self, String> {
        if bytes.len() != Self::bytes(connections) || bytes[..4] != *MAGIC {
            return Err("words that are not about connections that go on".into());
        }
        let mut from = &bytes[4..];
        let (attempt, psn) = (from.get_u32_le(), from.get_u32_le());
        let count = from.get_u32_le();
        if count as usize != connections {
            return Err(format!("{count} connections that go on, of {connections}"));
        }
        let mut each = || (from.get_u32_le(), from.get_u64_le());
        let connections: Vec<_> = (0..connections).map(|_| each()).collect();
        let mut numbers = connections.iter().map(|(number, _)| *number).chain([psn]);
        match numbers.find(|&number| number >= NUMBER_LIMIT) {
            Some(number) => Err(format!("a queue pair or packet number {number}")),
            None => Ok(Self { attempt, psn, connections }),
        }
    }
}

/// The connection on which both ends say that. Never blocks.
#[derive(Debug)]
pub(crate) struct Exchange {
    stream: ParentOnly<TcpStream>,
    session: Option<Box<Session>>,
    /// The number of the connection, where this rank dialled it.
    pub(crate) attempt: Option<u32>,
    outgoing: VecDeque<u8>,
    incoming: Vec<u8>,
    plain: Vec<u8>,
    /// What this end has said.
    pub(crate) has_said: bool,
    pub(crate) is_ready: bool,
    /// What the other end has said.
    pub(crate) first: Option<First>,
}

/// Most bytes that are read at once.
const READ_BYTES: usize = 4096;

impl Exchange {
    /// # Errors
    /// If the connection is broken.
    pub(crate) fn new(connection: Proven, attempt: Option<u32>) -> io::Result<Self> {
        let Proven { stream, session, early: plain } = connection;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            session,
            attempt,
            outgoing: VecDeque::new(),
            incoming: Vec::new(),
            plain,
            has_said: false,
            is_ready: false,
            first: None,
        })
    }

    /// Readable when there is news.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Says where this end goes on.
    pub(crate) fn say_first(&mut self, first: &First) {
        self.has_said = true;
        self.say(&first.encode());
    }

    /// Says that this end takes packets.
    pub(crate) fn say_ready(&mut self) {
        self.is_ready = true;
        self.say(READY);
    }

    fn say(&mut self, text: &[u8]) {
        match &mut self.session {
            None => self.outgoing.extend(text),
            Some(session) => {
                let mut wire = Vec::new();
                session.seal(text, &mut wire);
                self.outgoing.extend(wire);
            }
        }
    }

    /// Moves what is said and what is heard, as far as that goes now; whether all was said.
    ///
    /// # Errors
    /// If the connection broke, or what came was altered.
    pub(crate) fn move_on(&mut self) -> io::Result<bool> {
        while !self.outgoing.is_empty() {
            // NOSIGNAL: the host program may not ignore SIGPIPE.
            match send(&*self.stream, self.outgoing.as_slices().0, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.outgoing.is_empty())
    }

    /// Reads what has come, up to the end of the connection.
    fn read(&mut self) -> io::Result<()> {
        let mut room = [0; READ_BYTES];
        match recv(&*self.stream, &mut room, RecvFlags::empty()) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, received)) => self.incoming.extend_from_slice(&room[..received]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        match &mut self.session {
            None => self.plain.append(&mut self.incoming),
            Some(session) => {
                let taken = session.open(&self.incoming, &mut self.plain);
                self.incoming.drain(..taken.map_err(io::Error::other)?);
            }
        }
        Ok(())
    }

    /// The next `bytes` bytes that the other end says, once they are there.
    fn hear(&mut self, bytes: usize) -> io::Result<Option<Vec<u8>>> {
        if self.plain.len() < bytes {
            self.read()?;
        }
        Ok((self.plain.len() >= bytes).then(|| self.plain.drain(..bytes).collect()))
    }

    /// What the other end, with so many connections, says first, once it is there.
    ///
    /// # Errors
    /// If the connection broke. In it: what is wrong with the words.
    pub(crate) fn hear_first(
        &mut self,
        connections: usize,
    ) -> io::Result<Option<Result<First, String>>> {
        let said = self.hear(First::bytes(connections))?;
        Ok(said.map(|said| First::decode(&said, connections)))
    }

    /// Whether the other end has said that it takes packets.
    ///
    /// # Errors
    /// If the connection broke, or something else was said.
    pub(crate) fn hear_ready(&mut self) -> io::Result<bool> {
        match self.hear(READY.len())? {
            Some(said) if said == READY => Ok(true),
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
            None => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn first() -> First {
        First { attempt: 7, psn: 99, connections: vec![(17, 1 << 40), (18, 0)] }
    }

    #[test]
    fn first_words_survive_the_wire_and_say_what_is_wrong() {
        let encoded = first().encode();
        assert_eq!(First::decode(&encoded, 2), Ok(first()));
        for end in 0..encoded.len() {
            assert!(First::decode(&encoded[..end], 2).is_err(), "{end} bytes were accepted");
        }
        assert!(First::decode(&encoded, 1).is_err());
        assert!(First::decode(&[&encoded[..], &[0]].concat(), 2).is_err());
        let wrong = First { connections: vec![(NUMBER_LIMIT, 0), (18, 0)], ..first() };
        assert!(First::decode(&wrong.encode(), 2).is_err());
        let wrong = First { psn: NUMBER_LIMIT, ..first() };
        assert!(First::decode(&wrong.encode(), 2).is_err());
    }

    #[test]
    fn both_ends_hear_what_was_said_and_an_end_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        let exchange =
            |stream: TcpStream| Exchange::new(ParentOnly::new(stream).into(), None).unwrap();
        let (mut own, mut other) = (exchange(own), exchange(other));
        assert!(other.hear_first(2).unwrap().is_none());
        own.say_first(&first());
        own.say_ready();
        assert!(own.move_on().unwrap());
        let heard = loop {
            if let Some(heard) = other.hear_first(2).unwrap() {
                break heard;
            }
        };
        assert_eq!(heard, Ok(first()));
        while !other.hear_ready().unwrap() {}
        drop(own);
        let end = loop {
            match other.hear_ready() {
                Ok(is_ready) => assert!(!is_ready),
                Err(error) => break error.kind(),
            }
        };
        assert_eq!(end, io::ErrorKind::UnexpectedEof);
    }
}
