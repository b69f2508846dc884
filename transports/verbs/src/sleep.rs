//! How the link sleeps: in epoll, on the devices' event descriptors and a doorbell.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use rustix::event::{EventfdFlags, Timespec, eventfd};
use unisum_link::Wake;

use crate::wire::RAILS_MAX;

/// What became readable.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct News {
    /// A device has completions.
    pub(crate) completions: bool,
    /// A device has something to say about itself.
    pub(crate) events: bool,
}

/// The event queue.
#[derive(Debug)]
pub(crate) struct Sleeper {
    queue: OwnedFd,
    doorbell: Arc<Doorbell>,
}

/// Ends a sleep from any thread.
#[derive(Debug)]
pub(crate) struct Doorbell(OwnedFd);

impl Wake for Doorbell {
    fn wake(&self) {
        // It fails only if the counter is full, and then a wake-up is pending.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

const DOORBELL: u64 = 0;
const COMPLETIONS: u64 = 1;
const EVENTS: u64 = 2;
const WORDS: u64 = 3;
/// Two for each device and one for the doorbell are watched.
const EVENTS_MAX: usize = 2 * RAILS_MAX + 1;

impl Sleeper {
    pub(crate) fn new() -> io::Result<Self> {
        let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let sleeper = Self { queue, doorbell: Arc::new(Doorbell(doorbell)) };
        sleeper.watch(sleeper.doorbell.0.as_fd(), DOORBELL)?;
        Ok(sleeper)
    }

    /// Adds a device's two descriptors, which it closes itself later.
    pub(crate) fn add(
        &self,
        completions: BorrowedFd<'_>,
        events: BorrowedFd<'_>,
    ) -> io::Result<()> {
        self.watch(completions, COMPLETIONS)?;
        self.watch(events, EVENTS)
    }

    /// Adds a connection to a peer, until it is closed.
    pub(crate) fn add_words(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.watch(connection, WORDS)
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, what: u64) -> io::Result<()> {
        let data = epoll::EventData::new_u64(what);
        Ok(epoll::add(&self.queue, descriptor, data, epoll::EventFlags::IN)?)
    }

    pub(crate) fn doorbell(&self) -> Arc<Doorbell> {
        self.doorbell.clone()
    }

    /// Readable when there is news.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Sleeps for at most `timeout`; silences the doorbell.
    pub(crate) fn sleep(&self, timeout: Duration) -> io::Result<News> {
        let mut room = [const { MaybeUninit::uninit() }; EVENTS_MAX];
        let timeout = Timespec::try_from(timeout).ok();
        let ready = match epoll::wait(&self.queue, &mut room, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(News::default()),
            result => result?.0,
        };
        let mut news = News::default();
        for event in ready {
            match event.data.u64() {
                COMPLETIONS => news.completions = true,
                EVENTS => news.events = true,
                // Whoever waits for them looks at each progress.
                WORDS => {}
                // It fails only if nobody rang.
                _ => drop(rustix::io::read(&self.doorbell.0, &mut [0; 8])),
            }
        }
        Ok(news)
    }
}
