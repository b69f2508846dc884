//! The first words on a new connection: how much each end has.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::{self, RecvFlags, SendFlags};
use unisum_link::LinkError;
use unisum_link::fork::ParentOnly;
use unisum_link::secure::Session;

use super::flow::Flow;
use super::{FIRST_BYTES, FIRST_SEALED_BYTES, First};

/// A connection on which the other end has not said yet how much it has.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) stream: Arc<ParentOnly<TcpStream>>,
    session: Option<Box<Session>>,
    /// The number of the connection, where this rank dialled it.
    attempt: Option<u32>,
    said: [u8; FIRST_SEALED_BYTES],
    filled: usize,
}

/// What has become of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Met {
    /// The other end has not said all.
    NotYet,
    /// It goes on.
    Stands,
    /// It broke, or is an old one.
    Left,
}

impl Meeting {
    /// Says how much this end has. The socket's buffer is empty, and takes it.
    fn say(&mut self, first: First) -> io::Result<()> {
        let text = first.encode();
        let mut record = [0; FIRST_SEALED_BYTES];
        let wire = match &mut self.session {
            Some(session) => {
                session.sealer.seal(&[], &text, &mut record);
                &record[..]
            }
            None => &text[..],
        };
        // NOSIGNAL: the host program may not ignore SIGPIPE.
        let sent = net::send(&**self.stream, wire, SendFlags::NOSIGNAL)?;
        if sent < wire.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
    }

    /// What the other end says, once all of it is there.
    fn hear(&mut self) -> io::Result<Option<First>> {
        let whole = if self.session.is_some() { FIRST_SEALED_BYTES } else { FIRST_BYTES };
        while self.filled < whole {
            let room = &mut self.said[self.filled..whole];
            match net::recv(&**self.stream, room, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, received)) => self.filled += received,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let said = &self.said[..whole];
        let mut text = [0; FIRST_BYTES];
        match &mut self.session {
            None => text.copy_from_slice(said),
            Some(session) => {
                let length = session.opener.length(said).map_err(io::Error::other)?;
                if length != Some(FIRST_BYTES) {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                session.opener.open(said, &mut text).map_err(io::Error::other)?;
            }
        }
        First::decode(&text).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl Flow {
    /// Takes over a connection that was dialled, as number `attempt`, or that came.
    ///
    /// # Errors
    /// If it broke already.
    pub(super) fn meet(
        &mut self,
        stream: Arc<ParentOnly<TcpStream>>,
        session: Option<Box<Session>>,
        attempt: Option<u32>,
    ) -> io::Result<()> {
        let (said, filled) = ([0; FIRST_SEALED_BYTES], 0);
        let mut meeting = Meeting { stream, session, attempt, said, filled };
        if let Some(attempt) = attempt {
            meeting.say(First { attempt, received: self.received })?;
        }
        self.meeting = Some(meeting);
        // The other end answers when it can: that is no outage.
        if let Some(since) = self.outage.since.take() {
            self.outage.left = self.outage.left.saturating_sub(since.elapsed());
        }
        Ok(())
    }

    /// Goes on with a new connection.
    ///
    /// # Errors
    /// If what the other end says makes no sense.
    pub(super) fn hear_first(&mut self) -> Result<Met, LinkError> {
        let Some(mut meeting) = self.meeting.take() else { return Ok(Met::Left) };
        let first = match meeting.hear() {
            Ok(Some(first)) => first,
            Ok(None) => {
                self.meeting = Some(meeting);
                return Ok(Met::NotYet);
            }
            Err(error) => return Ok(self.not_met(&error)),
        };
        let is_right = match meeting.attempt {
            Some(attempt) => first.attempt == attempt,
            None => first.attempt > self.attempt,
        };
        if !is_right {
            return Ok(self.not_met(&io::ErrorKind::InvalidData.into()));
        }
        if meeting.attempt.is_none() {
            // From here on, nothing more is received on the one before.
            let received = self.received;
            if let Err(error) = meeting.say(First { attempt: first.attempt, received }) {
                return Ok(self.not_met(&error));
            }
        }
        let Meeting { stream, session, .. } = meeting;
        self.resume(stream, session, first.attempt, first.received)?;
        Ok(Met::Stands)
    }

    /// A new connection did not come about; whatever there was before is as it was.
    fn not_met(&mut self, error: &io::Error) -> Met {
        let (peer, socket) = (self.peer, self.socket);
        tracing::debug!(peer, socket, %error, "a new connection broke");
        if self.stream().is_none() {
            self.outage.since = Some(Instant::now());
        }
        Met::Left
    }
}
