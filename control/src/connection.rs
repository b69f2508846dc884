//! A control connection after its handshake: frames in, frames out, never blocking.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use unisum_link::fork::ParentOnly;

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
    inbound: BytesMut,
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
    pub(super) fn new(stream: ParentOnly<TcpStream>, limit: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&*stream);
        let period = (limit / 4).clamp(Duration::from_secs(1), Duration::from_secs(3600));
        let keepalive =
            TcpKeepalive::new().with_time(period).with_interval(period).with_retries(PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
        Ok(Self { stream, inbound: BytesMut::new(), outbound: VecDeque::new(), finishing: false })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Queues encoded messages for [`Connection::flush`].
    pub(super) fn queue(&mut self, encoded: Bytes) {
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

    /// Reads once, at most [`READ_BYTES`]. The messages are taken with [`Connection::next`].
    ///
    /// # Errors
    /// If the connection is broken.
    pub(super) fn receive(&mut self) -> io::Result<Received> {
        let filled = self.inbound.len();
        self.inbound.resize(filled + READ_BYTES, 0);
        let result = self.stream.read(&mut self.inbound[filled..]);
        self.inbound.truncate(filled + *result.as_ref().unwrap_or(&0));
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
