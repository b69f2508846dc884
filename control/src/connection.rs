//! A control connection after its handshake: frames in, frames out, never blocking.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use unisum_link::fork::ParentOnly;
use unisum_link::secure::{Proven, Session};

use super::message::{Message, MessageError};

/// Most bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// Most pieces written at a time.
const PIECES_MAX: usize = 64;
/// How often the kernel asks in vain whether the connection still exists, until it ends it.
const PROBES: u32 = 8;

#[derive(Debug)]
pub(super) struct Connection {
    stream: ParentOnly<TcpStream>,
    /// The keys, unless it is in clear text.
    session: Option<Box<Session>>,
    inbound: BytesMut,
    /// Received and not opened: less than a record, after each [`Connection::receive`].
    sealed: BytesMut,
    /// In clear text, or sealed already.
    outbound: VecDeque<Bytes>,
    finishing: bool,
}

/// How far a [`Connection::receive`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// There may be more.
    More,
    /// There is nothing more for now.
    Drained,
    /// There will never be more.
    Ended,
}

impl Connection {
    /// Takes over a stream whose handshake is done. That the other host has not answered for
    /// `limit` is for its pulse to say; this connection ends after a little more than twice that,
    /// or when a host that was started anew says that it does not know it.
    ///
    /// # Errors
    /// If the kernel refuses an option.
    pub(super) fn new(proven: Proven, limit: Duration) -> io::Result<Self> {
        let Proven { stream, session, early } = proven;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&*stream);
        let period = (limit / 4).clamp(Duration::from_secs(1), Duration::from_secs(3600));
        let keepalive =
            TcpKeepalive::new().with_time(period).with_interval(period).with_retries(PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
        let (inbound, sealed) = (BytesMut::from(&early[..]), BytesMut::new());
        let outbound = VecDeque::new();
        Ok(Self { stream, session, inbound, sealed, outbound, finishing: false })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Queues encoded messages for [`Connection::flush`].
    pub(super) fn queue(&mut self, encoded: Bytes) {
        let encoded = match &mut self.session {
            None => encoded,
            Some(session) => {
                let mut sealed = Vec::new();
                session.seal(&encoded, &mut sealed);
                sealed.into()
            }
        };
        self.outbound.push_back(encoded);
    }

    /// Queues nothing more: the direction closes once all is written.
    pub(super) const fn finish(&mut self) {
        self.finishing = true;
    }

    /// Whether all that was queued is with the kernel.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbound.is_empty()
    }

    /// Writes what the kernel takes.
    ///
    /// # Errors
    /// If the connection is broken.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.outbound.is_empty() {
            let pieces: Vec<_> =
                self.outbound.iter().take(PIECES_MAX).map(|piece| IoSlice::new(piece)).collect();
            match self.stream.write_vectored(&pieces) {
                Ok(written) => self.written(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.finishing {
            self.finishing = false;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn written(&mut self, mut bytes: usize) {
        while let Some(piece) = self.outbound.front_mut() {
            if bytes < piece.len() {
                piece.advance(bytes);
                return;
            }
            bytes -= piece.len();
            self.outbound.pop_front();
        }
    }

    /// Reads once, at most [`READ_BYTES`], and opens all whole records, so that nothing waits here
    /// of which no event would tell. The messages are taken with [`Connection::next`].
    ///
    /// # Errors
    /// If the connection is broken, or what came was altered on its way.
    pub(super) fn receive(&mut self) -> io::Result<Received> {
        let Self { stream, session, inbound, sealed, .. } = self;
        let into = if session.is_some() { &mut *sealed } else { &mut *inbound };
        let filled = into.len();
        into.resize(filled + READ_BYTES, 0);
        let result = stream.read(&mut into[filled..]);
        into.truncate(filled + *result.as_ref().unwrap_or(&0));
        if let Some(session) = session {
            let taken = session.open(sealed, inbound).map_err(io::Error::other)?;
            sealed.advance(taken);
        }
        match result {
            Ok(0) => Ok(Received::Ended),
            Ok(_) => Ok(Received::More),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Received::Drained),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Received::More),
            Err(error) => Err(error),
        }
    }

    /// Forgets what was received and not taken yet.
    pub(super) fn discard(&mut self) {
        self.inbound.clear();
    }

    /// The next whole message that was received.
    ///
    /// # Errors
    /// If the peer sent something else.
    pub(super) fn next(&mut self) -> Result<Option<Message>, MessageError> {
        Message::decode(&mut self.inbound)
    }
}

impl Drop for Connection {
    /// Closes the connection even if a child forked at an unlucky moment holds it. (Only the
    /// control thread drops connections, and a forked child has no such thread.)
    fn drop(&mut self) {
        // It fails if the peer has closed already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
