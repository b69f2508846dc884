//! What a flow receives: frames, of which posted receives take the bytes.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};

use rustix::net::{self, RecvFlags};
use unisum_link::secure::{Altered, RECORD_BYTES_MAX, RECORD_OVERHEAD};
use unisum_link::{Call, LinkError, LinkErrorKind, Rank};

use super::flow::{Connection, Flow, SMALL_BYTES};
use super::{HEAD_BYTES, HOLDS, Head, LEAVES, WINDOW};
use crate::socket::{Message, Moving, advance, failed};

/// What is read at once.
const READ_BYTES: usize = 64 << 10;
const READ_SEALED_BYTES: usize = 2 * (RECORD_BYTES_MAX + RECORD_OVERHEAD);
/// Where what comes is to go.
pub(crate) struct Arriving<'a> {
    pub(crate) receives: &'a mut VecDeque<Message>,
    /// Of the call that it has to be.
    pub(crate) call: Option<Call>,
    pub(crate) moving: &'a mut Moving,
}

impl Arriving<'_> {
    /// Fills posted receives; how many bytes they took.
    fn take(&mut self, peer: Rank, bytes: &[u8]) -> Result<usize, LinkError> {
        let mut taken = 0;
        while taken < bytes.len() {
            let Some(message) = self.receives.front_mut() else { break };
            let (header, payload) = message.rest();
            let of_header = header.len().min(bytes.len() - taken);
            header[..of_header].copy_from_slice(&bytes[taken..][..of_header]);
            let of_payload = payload.len().min(bytes.len() - taken - of_header);
            payload[..of_payload].copy_from_slice(&bytes[taken + of_header..][..of_payload]);
            taken += of_header + of_payload;
            self.advance(peer, of_header + of_payload)?;
        }
        Ok(taken)
    }

    /// Counts bytes of the first receive.
    fn advance(&mut self, peer: Rank, bytes: usize) -> Result<(), LinkError> {
        let message = self.receives.front_mut().expect("bytes of a receive are counted");
        let call = self.call.expect("receives are posted in a call");
        self.moving.marked |= advance(message, bytes, peer, call)?;
        if message.through == message.total() {
            self.moving.finished.push(message.transfer);
            self.receives.pop_front();
        }
        Ok(())
    }
}

impl Flow {
    /// Receives what is there and posted; where acknowledgements are needed, or with `reads_all`,
    /// what is not posted as well.
    ///
    /// # Errors
    /// If what is posted will not come any more, or what came makes no sense.
    pub(crate) fn drain(
        &mut self,
        arriving: &mut Arriving<'_>,
        readable: &mut bool,
        reads_all: bool,
    ) -> Result<(), LinkError> {
        loop {
            self.unstash(arriving)?;
            let reads = !arriving.receives.is_empty() || self.is_full() || reads_all;
            if !reads || !*readable || self.peer_ended || self.connection.is_none() {
                break;
            }
            let read = match self.reads_in_place(arriving) {
                true => self.read_in_place(arriving, readable)?,
                false => self.read(arriving, readable)?,
            };
            if let Err(error) = read {
                match rustix::io::Errno::from_io_error(&error) {
                    Some(rustix::io::Errno::AGAIN) => *readable = false,
                    Some(rustix::io::Errno::INTR) => {}
                    _ => self.ended(error)?,
                }
            }
        }
        match &self.failed {
            Some(error) if !arriving.receives.is_empty() => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// The connection ended: in order if the other end has said so before.
    fn ended(&mut self, error: io::Error) -> Result<(), LinkError> {
        let is_end = error.kind() == io::ErrorKind::UnexpectedEof;
        if is_end && self.peer_leaves {
            // It waits for the answer, for which the socket may have no room yet: what it holds
            // is on its way to an end that still reads.
            self.peer_ended = true;
            return self.flush(&mut VecDeque::new(), &mut true).map(drop);
        }
        if is_end {
            return self.broke(LinkError::closed(self.peer));
        }
        self.broke(failed(self.peer, "receiving", error))
    }

    fn unstash(&mut self, arriving: &mut Arriving<'_>) -> Result<(), LinkError> {
        while !self.stash.is_empty() {
            let taken = arriving.take(self.peer, self.stash.as_slices().0)?;
            if taken == 0 {
                break;
            }
            self.stash.drain(..taken);
            self.taken += taken as u64;
        }
        Ok(())
    }

    /// Whether the rest of a frame is so long that it is received where it belongs.
    fn reads_in_place(&self, arriving: &mut Arriving<'_>) -> bool {
        let Some(connection) = &self.connection else { return false };
        let rest = arriving.receives.front().map_or(0, |it| it.total() - it.through);
        self.stash.is_empty()
            && connection.session.is_none()
            && connection.incoming.held().is_empty()
            && rest.min(connection.left) > SMALL_BYTES
    }

    fn read_in_place(
        &mut self,
        arriving: &mut Arriving<'_>,
        readable: &mut bool,
    ) -> Result<io::Result<()>, LinkError> {
        let (Some(connection), Some(message)) =
            (&mut self.connection, arriving.receives.front_mut())
        else {
            return Ok(Ok(()));
        };
        let most = connection.left;
        let (header, payload) = message.rest();
        let header_bytes = header.len();
        let payload_bytes = payload.len().min(most - header_bytes);
        let in_place = header_bytes + payload_bytes;
        // What follows the message, or the frame, comes with it.
        let room = &mut connection.incoming.room(READ_BYTES)[..READ_BYTES];
        let room_bytes = room.len();
        let mut parts = [
            IoSliceMut::new(header),
            IoSliceMut::new(&mut payload[..payload_bytes]),
            IoSliceMut::new(room),
        ];
        let flags = RecvFlags::empty();
        let received =
            net::recvmsg(&**connection.stream, &mut parts, &mut Default::default(), flags);
        let received = match received {
            Ok(message) if message.bytes == 0 => {
                return Ok(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            Ok(message) => message.bytes,
            Err(error) => return Ok(Err(error.into())),
        };
        // A short read found the socket's buffer empty: the next event tells of more.
        *readable = received == in_place + room_bytes;
        let placed = received.min(in_place);
        connection.incoming.grew(received - placed);
        connection.left -= placed;
        self.received += placed as u64;
        self.taken += placed as u64;
        arriving.advance(self.peer, placed)?;
        self.hear(arriving)?;
        Ok(Ok(()))
    }

    fn read(
        &mut self,
        arriving: &mut Arriving<'_>,
        readable: &mut bool,
    ) -> Result<io::Result<()>, LinkError> {
        let Some(connection) = &mut self.connection else { return Ok(Ok(())) };
        let is_sealed = connection.session.is_some();
        let most = if is_sealed { READ_SEALED_BYTES } else { READ_BYTES };
        // What is held is less than a frame's head, or than a record.
        let more = most - connection.incoming.held().len();
        let room = &mut connection.incoming.room(more)[..more];
        match net::recv(&**connection.stream, &mut *room, RecvFlags::empty()) {
            Ok((_, 0)) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
            Ok((_, received)) => {
                // A short read found the socket's buffer empty: the next event tells of more.
                *readable = received == more;
                connection.incoming.grew(received);
            }
            Err(error) => return Ok(Err(error.into())),
        }
        if is_sealed {
            self.hear_sealed(arriving)?
        } else {
            self.hear(arriving)?
        }
        Ok(Ok(()))
    }

    /// Takes the frames that were read.
    fn hear(&mut self, arriving: &mut Arriving<'_>) -> Result<(), LinkError> {
        while let Some(connection) = &mut self.connection {
            let held = connection.incoming.held();
            if connection.left > 0 && !held.is_empty() {
                let mut incoming = std::mem::take(&mut connection.incoming);
                let bytes = incoming.held().len().min(connection.left);
                connection.left -= bytes;
                let result = self.arrived(&incoming.held()[..bytes], arriving);
                incoming.gave(bytes);
                if let Some(connection) = &mut self.connection {
                    connection.incoming = incoming;
                }
                result?;
                continue;
            }
            let Some(head) = held.first_chunk() else { break };
            let head = Head::decode(head);
            connection.incoming.gave(HEAD_BYTES);
            connection.left = head.bytes;
            self.told_by(head)?;
        }
        Ok(())
    }

    fn hear_sealed(&mut self, arriving: &mut Arriving<'_>) -> Result<(), LinkError> {
        loop {
            let (peer, socket) = (self.peer, self.socket);
            let altered = |Altered { at }: Altered| LinkError {
                peer,
                kind: LinkErrorKind::Altered { socket, at },
            };
            let Some(Connection { session: Some(session), incoming, plain, .. }) =
                &mut self.connection
            else {
                return Ok(());
            };
            let held = incoming.held();
            let Some(bytes) = session.opener.length(held).map_err(altered)? else { return Ok(()) };
            let Some(record) = held.get(..bytes + RECORD_OVERHEAD) else { return Ok(()) };
            let mut text = std::mem::take(plain);
            text.resize(bytes, 0);
            session.opener.open(record, &mut text).map_err(altered)?;
            incoming.gave(bytes + RECORD_OVERHEAD);
            let Some((head, body)) = text.split_first_chunk::<HEAD_BYTES>() else {
                return Err(LinkError::protocol(peer, "a record without a head"));
            };
            let head = Head::decode(head);
            if head.bytes != body.len() {
                return Err(LinkError::protocol(peer, "a record of another length than its head"));
            }
            self.told_by(head)?;
            self.arrived(body, arriving)?;
            if let Some(connection) = &mut self.connection {
                connection.plain = text;
            }
        }
    }

    /// Takes what a frame's head says.
    fn told_by(&mut self, head: Head) -> Result<(), LinkError> {
        // What was acknowledged and what is here may have passed each other.
        let now = head.acknowledged.max(self.acknowledged);
        if now > self.sent {
            let what = format!("byte {now} is acknowledged, of {}", self.sent);
            return Err(LinkError::protocol(self.peer, what));
        }
        self.kept.drain(..(now - self.acknowledged) as usize);
        self.acknowledged = now;
        self.is_answered |= head.flags & HOLDS != 0;
        if head.flags & LEAVES != 0 {
            (self.peer_leaves, self.owes_answer) = (true, true);
        }
        Ok(())
    }

    /// Takes bytes of the stream.
    fn arrived(&mut self, bytes: &[u8], arriving: &mut Arriving<'_>) -> Result<(), LinkError> {
        self.received += bytes.len() as u64;
        let taken = if self.stash.is_empty() { arriving.take(self.peer, bytes)? } else { 0 };
        self.taken += taken as u64;
        self.stash.extend(&bytes[taken..]);
        if self.stash.len() > WINDOW {
            return Err(LinkError::protocol(self.peer, "more than was acknowledged"));
        }
        Ok(())
    }
}
