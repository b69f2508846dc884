//! A control connection after its handshake: frames in, frames out, never blocking.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use unisum_link::fork::ParentOnly;
use unisum_link::secure::{Altered, Proven, Session};
use unisum_link::silence::{self, Hush, Told};

use super::message::{Message, MessageError};
use super::resume::{self, Impossible, Ledger, Word};

/// Most bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// Most pieces written at a time.
const PIECES_MAX: usize = 64;
/// How often the kernel asks in vain whether the connection still exists, until it ends it.
const PROBES: u32 = 8;
/// The same of one that can go on in another: what stands between the ends may have forgotten it,
/// which they find out by asking.
const OFTEN: Duration = Duration::from_secs(1);
/// Most that the kernel asks.
const PROBES_MAX: f64 = 127.0;

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
    has_finished: bool,
    /// What it needs to go on in another one, if it can.
    ledger: Option<Ledger>,
    /// It has ended, and another one is to go on in its place.
    is_cut: bool,
    /// Whether it is silent, where another one can go on and it leads to another host.
    hush: Option<Hush>,
    /// The other end.
    peer: Option<SocketAddr>,
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
        let peer = stream.peer_addr().ok();
        Ok(Self {
            peer,
            stream,
            session,
            inbound: BytesMut::from(&early[..]),
            sealed: BytesMut::new(),
            outbound: VecDeque::new(),
            finishing: false,
            has_finished: false,
            ledger: None,
            is_cut: false,
            hush: None,
        })
    }

    /// One that can go on in another one. It still ends when the other host is silent for a little
    /// more than twice `limit`, but soon when nobody knows it any more.
    ///
    /// # Errors
    /// If the kernel refuses an option.
    pub(super) fn resumable(mut self, limit: Duration) -> io::Result<Self> {
        let probes = (2.0 * limit.as_secs_f64()).clamp(f64::from(PROBES), PROBES_MAX) as u32;
        let keepalive =
            TcpKeepalive::new().with_time(OFTEN).with_interval(OFTEN).with_retries(probes);
        SockRef::from(&*self.stream).set_tcp_keepalive(&keepalive)?;
        self.ledger = Some(Ledger::default());
        let own = self.stream.local_addr()?.ip();
        self.hush = self.peer.filter(|peer| peer.ip() != own).map(|_| Hush::default());
        Ok(self)
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Its other end as it was when they met: it may be gone, and then the kernel does not know.
    pub(super) const fn with_peer(mut self, peer: SocketAddr) -> Self {
        self.peer = Some(peer);
        self
    }

    /// The other end; none if it was gone already when this was made, and nobody said.
    pub(super) const fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Queues encoded messages for [`Connection::flush`].
    pub(super) fn queue(&mut self, encoded: Bytes) {
        if let Some(ledger) = &mut self.ledger {
            ledger.keep(&encoded);
        }
        if !self.is_cut {
            self.write(encoded);
        }
    }

    /// Queues what is said of the connection itself.
    pub(super) fn queue_word(&mut self, word: Word) {
        self.write(word.encode());
    }

    /// Says which messages have been taken, if there were any since it was said last.
    pub(super) fn acknowledge(&mut self) {
        let is_open = !self.is_cut && !self.finishing && !self.has_finished;
        let ledger = self.ledger.as_mut().filter(|_| is_open);
        if let Some(word) = ledger.and_then(Ledger::news) {
            self.queue_word(word);
            // At once: the end may have come together with what was taken, and the other end waits
            // to hear that its goodbye was. If it breaks, that shows again at the next attempt.
            let _ = self.flush();
        }
    }

    /// It has ended, and waits for another one to go on in its place.
    pub(super) fn cut(&mut self) {
        // It fails if the peer has closed already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.outbound.clear();
        self.is_cut = true;
    }

    /// Looks, if that is due, whether nothing is heard of the other host, though it was sent
    /// something.
    pub(super) fn is_silent(&mut self, now: Instant) -> bool {
        let hush = self.hush.as_mut().filter(|it| !self.is_cut && it.is_due(now));
        hush.is_some_and(|hush| {
            // What can't be asked is not known to be silent.
            let told = silence::ask(self.stream.as_fd()).unwrap_or(Told::NOTHING);
            hush.look(told, now).is_some()
        })
    }

    /// When to look for that next, if ever.
    pub(super) fn look_at(&self, now: Instant) -> Option<Instant> {
        self.hush.filter(|_| !self.is_cut).map(|hush| hush.look_at(now))
    }

    /// Whether the other end has said of all that was queued that it has it.
    pub(super) fn is_settled(&self) -> bool {
        self.ledger.as_ref().is_none_or(Ledger::is_settled)
    }

    /// How many messages were taken, of one that can go on in another.
    pub(super) fn taken(&self) -> u64 {
        self.ledger.as_ref().map_or(0, Ledger::taken)
    }

    /// Goes on in another connection, whose other end has taken so many messages.
    ///
    /// # Errors
    /// If that can't be.
    pub(super) fn go_on(&mut self, mut other: Self, taken_there: u64) -> Result<(), Impossible> {
        let ledger = self.ledger.as_mut().ok_or(Impossible)?;
        ledger.has_taken(taken_there)?;
        let again: Vec<Bytes> = ledger.again().collect();
        std::mem::swap(&mut self.stream, &mut other.stream);
        // It may have ended again already.
        self.peer = other.peer.or(self.peer);
        self.session = other.session.take();
        self.inbound = std::mem::take(&mut other.inbound);
        self.sealed = std::mem::take(&mut other.sealed);
        self.outbound = std::mem::take(&mut other.outbound);
        (self.is_cut, self.hush) = (false, other.hush);
        self.finishing |= std::mem::take(&mut self.has_finished);
        again.into_iter().for_each(|encoded| self.write(encoded));
        Ok(())
    }

    fn write(&mut self, encoded: Bytes) {
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
        self.finishing = !self.has_finished;
    }

    /// Whether all that was queued is with the kernel, or with the other end, if this can go on in
    /// another connection.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbound.is_empty() && self.is_settled()
    }

    /// Writes what the kernel takes.
    ///
    /// # Errors
    /// If the connection is broken.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.is_cut {
            return Ok(());
        }
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
            (self.finishing, self.has_finished) = (false, true);
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
        if self.is_cut {
            return Ok(Received::Drained);
        }
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
        resume::next(&mut self.inbound, self.ledger.as_mut())
    }

    /// What is said of the connection itself, where it begins with that.
    ///
    /// # Errors
    /// If the peer sent something else.
    pub(super) fn word(&mut self) -> Result<Option<Word>, MessageError> {
        Word::take(&mut self.inbound)
    }
}

/// Whether an error says that what came is not what the other end has sealed.
pub(super) fn is_altered(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<Altered>())
}

impl Drop for Connection {
    /// Closes the connection even if a child forked at an unlucky moment holds it. (Only the
    /// control thread drops connections, and a forked child has no such thread.)
    fn drop(&mut self) {
        // It fails if the peer has closed already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
