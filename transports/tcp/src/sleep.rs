//! How the link sleeps: on few sockets by `poll`, on many by epoll.
//!
//! Few sockets are looked at directly, without asking the kernel which are ready: an event queue
//! would then report what was read long ago, and end the next sleep for nothing. `poll` knows the
//! state of now.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use unisum_link::Wake;

/// Most sockets that are polled one by one.
pub(crate) const FEW: usize = 4;

/// The event queue over all sockets, and a bell that ends any sleep.
#[derive(Debug)]
pub(crate) struct Sleeper {
    queue: Poll,
    events: Events,
    bell: Arc<Bell>,
}

/// Ends a sleep from any thread.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wake for Bell {
    fn wake(&self) {
        // It fails only if the counter is full, and then a wake-up is pending.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn silence(&self) {
        // It fails only if nobody rang.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// A socket to sleep on, and what for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watched<'a> {
    pub(crate) socket: usize,
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

/// A socket that may be tried again, for reading and for writing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    pub(crate) socket: usize,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

const BELL: Token = Token(usize::MAX);

impl Sleeper {
    pub(crate) fn new() -> io::Result<Self> {
        let queue = Poll::new()?;
        let bell = Bell::new()?;
        queue.registry().register(&mut SourceFd(&bell.0.as_raw_fd()), BELL, Interest::READABLE)?;
        Ok(Self { queue, events: Events::with_capacity(64), bell: Arc::new(bell) })
    }

    pub(crate) fn bell(&self) -> Arc<Bell> {
        self.bell.clone()
    }

    /// Adds a socket to the event queue.
    pub(crate) fn watch(&self, socket: usize, fd: BorrowedFd<'_>) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        self.queue.registry().register(&mut SourceFd(&fd.as_raw_fd()), Token(socket), both)
    }

    /// Readable when the event queue has news.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self.queue`, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.queue.as_raw_fd()) }
    }

    /// Sleeps on the event queue for at most `timeout`, and tells what it reported.
    pub(crate) fn on_queue(
        &mut self,
        timeout: Duration,
        mut ready: impl FnMut(Ready),
    ) -> io::Result<()> {
        match self.queue.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in &self.events {
            if event.token() == BELL {
                self.bell.silence();
                continue;
            }
            let failed = event.is_error();
            ready(Ready {
                socket: event.token().0,
                reads: event.is_readable() || event.is_read_closed() || failed,
                writes: event.is_writable() || event.is_write_closed() || failed,
            });
        }
        Ok(())
    }

    /// Sleeps on these sockets for at most `timeout`, and tells which of them to try.
    pub(crate) fn on_few(
        &self,
        watched: &[Option<Watched<'_>>; FEW],
        timeout: Duration,
    ) -> io::Result<[Option<Ready>; FEW]> {
        // The bell comes first; empty places repeat it, which changes nothing.
        let bell = || PollFd::from_borrowed_fd(self.bell.0.as_fd(), PollFlags::IN);
        let mut entries: [PollFd<'_>; FEW + 1] = std::array::from_fn(|place| {
            let watched = place.checked_sub(1).and_then(|place| watched[place].as_ref());
            watched.map_or_else(bell, |it| PollFd::from_borrowed_fd(it.fd, it.interest()))
        });
        let places = 1 + watched.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        match poll(&mut entries[..places], Timespec::try_from(timeout).ok().as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok([None; FEW]),
            result => result?,
        };
        if !entries[0].revents().is_empty() {
            self.bell.silence();
        }
        let ready = |place: usize| {
            let watched = watched[place].as_ref()?;
            let events = entries[place + 1].revents();
            let failed = events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
            let reads = failed || events.contains(PollFlags::IN);
            let writes = failed || events.contains(PollFlags::OUT);
            Some(Ready { socket: watched.socket, reads, writes })
        };
        Ok(std::array::from_fn(ready))
    }
}

impl Watched<'_> {
    fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.reads);
        flags.set(PollFlags::OUT, self.writes);
        flags
    }
}
