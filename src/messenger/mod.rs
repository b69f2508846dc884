//! Messages between two ranks, with tags, in any order of posting.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod header;
mod memory;
mod message_engine;
mod peer;
mod progress_lock;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use unisum_kernels::Element;
use unisum_link::{Patience, Rank, fork};

use crate::communicator::groups::Making;
use crate::memory::Arena;
use crate::{Communicator, Error, ErrorKind};
use header::Envelope;
use message_engine::{MessageEngine, Posted};
use progress_lock::ProgressLock;
use unisum_engine::Links;

/// Sends and receives messages between the ranks of a communicator.
///
/// A message goes from one rank to another under a tag. Messages between the same two ranks with
/// the same tag arrive in the order in which they were sent; messages with different tags may be
/// received in any order. Length and element type must be the same at both ends. A rank may send to
/// itself. Any thread may make calls, several at the same time.
///
/// All calls block, and sleep while they have to wait; one of the waiting threads does the work. A
/// receive returns once the message has arrived. A send returns once its data may be overwritten.
/// Messages of up to 8 KiB are buffered at the receiver, up to 256 KiB for each sender (each
/// message counts 256 bytes more than its data), and their sends wait only until the transport has
/// taken them. Beyond that, and for longer messages, a send waits for its receive. Two ranks that
/// both send first and then both receive may therefore wait forever; [`Messenger::exchange`]
/// cannot. Messages progress while both ranks are in a call with each other.
///
/// ```no_run
/// # fn main() -> Result<(), unisum::Error> {
/// use unisum::{Communicator, Message, Messenger};
///
/// let comm = Communicator::from_environment()?;
/// let post = Messenger::new(&comm)?;
/// let (rank, world) = (comm.rank(), comm.world());
/// let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
/// let (out, mut inn) = (vec![1.0_f32; 1 << 20], vec![0.0; 1 << 20]);
/// post.exchange(&mut [
///     Message::Send { data: &out, to: next, tag: 7 },
///     Message::Receive { data: &mut inn, from: before, tag: 7 },
/// ])?;
/// match rank {
///     0 => post.send(&out[..10], 1, 8)?,
///     1 => post.receive(&mut inn[..10], 0, 8)?,
///     _ => {}
/// }
/// # Ok(())
/// # }
/// ```
///
/// A messenger has its own links, opened on first use, and is independent of the communicator's
/// collectives. Errors name ranks by their numbers in the job. After an error, the messenger is
/// aborted: all calls under way return the error, and later ones return [`ErrorKind::Aborted`].
/// Messages that nobody has received when it is dropped are lost, so a rank drops it only after it
/// has received everything sent to it.
#[derive(Debug)]
#[doc(alias = "send")]
#[doc(alias = "recv")]
#[doc(alias = "point-to-point")]
pub struct Messenger {
    rank: Rank,
    world: usize,
    timeout: Duration,
    arena: Arena,
    fork_generation: u32,
    transport: String,
    /// Present until the messenger is dropped.
    progress: Option<ProgressLock>,
}

/// One of the messages of an [`exchange`](Messenger::exchange).
#[derive(Debug)]
pub enum Message<'a, T> {
    /// A message from this rank.
    Send {
        /// The data to send.
        data: &'a [T],
        /// The receiving rank.
        to: Rank,
        /// The tag of the receive.
        tag: u64,
    },
    /// A message to this rank.
    Receive {
        /// Where to receive it; as long as the sent data.
        data: &'a mut [T],
        /// The sending rank.
        from: Rank,
        /// The tag of the send.
        tag: u64,
    },
}

impl Messenger {
    /// Creates a messenger between the ranks of `communicator`.
    ///
    /// Collective: every rank calls it, and makes no other call on this communicator meanwhile.
    /// Blocks. Costs as much as [`Communicator::duplicate`]. The messenger may outlive the
    /// communicator.
    ///
    /// # Errors
    /// As [`Communicator::split`].
    pub fn new(communicator: &Communicator) -> Result<Self, Error> {
        let (rank, world) = (communicator.rank(), communicator.world());
        let (joined, _) = communicator.regroup(&Making::Messenger, Some(0), rank as i64)?;
        let mut transport = "none".to_owned();
        let (progress, timeout, arena) = match (joined, &communicator.member) {
            (Some(joined), Some(member)) => {
                transport = joined.transport;
                let (links, patience) = joined.engine.into_links();
                let wakers = links.all.iter().map(|link| link.waker()).collect();
                let number = joined.membership.communicator();
                let status = Some(joined.membership.status().clone());
                let engine = MessageEngine::new((rank, world), (number, status), links, patience);
                let job = &member.core.job;
                let progress = ProgressLock::new(Some(joined.membership), wakers, engine);
                (progress, job.settings.timeout, job.arena.clone())
            }
            _ => {
                let links = Links { all: Vec::new(), route: vec![0; world], group: None };
                let engine = MessageEngine::new((rank, world), (0, None), links, Patience::MEMORY);
                (ProgressLock::new(None, Vec::new(), engine), ALONE, Arena::default())
            }
        };
        let fork_generation = fork::generation();
        Ok(Self {
            rank,
            world,
            timeout,
            arena,
            fork_generation,
            transport,
            progress: Some(progress),
        })
    }

    /// This process's rank, from 0.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// The number of ranks.
    pub const fn world(&self) -> usize {
        self.world
    }

    /// The transports in use, as in [`Communicator::transport`].
    pub fn transport(&self) -> &str {
        &self.transport
    }

    /// Sends `data` to rank `to`. Blocks until it may be overwritten: see [`Messenger`].
    ///
    /// # Errors
    /// As [`Messenger::exchange`].
    pub fn send<T: Element>(&self, data: &[T], to: Rank, tag: u64) -> Result<(), Error> {
        self.exchange(&mut [Message::Send { data, to, tag }])
    }

    /// Receives into `data` the next message from rank `from` with this tag, which must have the
    /// same length. Blocks until it has arrived.
    ///
    /// # Errors
    /// As [`Messenger::exchange`].
    #[doc(alias = "recv")]
    pub fn receive<T: Element>(&self, data: &mut [T], from: Rank, tag: u64) -> Result<(), Error> {
        self.exchange(&mut [Message::Receive { data, from, tag }])
    }

    /// Blocks until a message with this tag can be received from any rank, and returns that rank.
    /// Ranks that leave meanwhile are no error. Threads that probe for the same tag concurrently
    /// may all be given the same message.
    ///
    /// # Errors
    /// As [`Messenger::exchange`].
    #[doc(alias = "recv_any_source")]
    pub fn probe(&self, tag: u64) -> Result<Rank, Error> {
        let progress = self.progress.as_ref().expect("it is there until the messenger is dropped");
        if self.is_forked() {
            return Err(Error::forked().on(progress.job_rank()));
        }
        let found = Arc::new(OnceLock::new());
        progress.call(1, Instant::now() + self.timeout, |engine, call| {
            engine.probe(call, tag, found.clone());
            Ok(())
        })?;
        let unknown = || Error::new(ErrorKind::Aborted, "the messenger was closed");
        found.get().copied().ok_or_else(unknown)
    }

    /// Starts all messages in their order, and then waits for all of them. Ranks that exchange at
    /// once everything the others wait for cannot deadlock, in whatever order they list their
    /// messages.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such rank: nothing was sent, and the messenger
    /// stays usable. [`ErrorKind::Mismatch`] if the two ends of a message differ in length or type,
    /// [`ErrorKind::RankLost`] if a rank is gone, [`ErrorKind::Timeout`] if a message took longer
    /// than the job's timeout: these occur on all ranks of the job, and the last one names the rank
    /// that the others wait for, which need not be one of the message's. The contents of buffers to
    /// be received are then unspecified.
    pub fn exchange<T: Element>(&self, messages: &mut [Message<'_, T>]) -> Result<(), Error> {
        let progress = self.progress.as_ref().expect("it is there until the messenger is dropped");
        if self.is_forked() {
            return Err(Error::forked().on(progress.job_rank()));
        }
        let peers = messages.iter().map(Message::peer);
        if let Some(peer) = peers.into_iter().find(|&peer| peer >= self.world) {
            let text = format!("a message from or to rank {peer} of {} ranks", self.world);
            return Err(Error::new(ErrorKind::Configuration, text).on(progress.job_rank()));
        }
        let deadline = Instant::now() + self.timeout;
        progress.call(messages.len(), deadline, |engine, call| {
            messages.iter_mut().try_for_each(|message| {
                // SAFETY: `call` returns only after all operations have ended or the links are
                // aborted or driven by nobody any more, and the messages are borrowed until then.
                let posted = unsafe { message.posted(&self.arena, call) };
                engine.post(posted)
            })
        })
    }

    /// Whether this process was forked from the one that created the messenger.
    fn is_forked(&self) -> bool {
        fork::current() != self.fork_generation
    }
}

impl Drop for Messenger {
    fn drop(&mut self) {
        if self.is_forked() {
            // Nothing may be dropped here: a thread that exists only in the parent may hold a lock.
            std::mem::forget(self.progress.take());
        }
        self.progress.iter_mut().for_each(ProgressLock::leave);
    }
}

impl<T: Element> Message<'_, T> {
    const fn peer(&self) -> Rank {
        match self {
            Self::Send { to, .. } => *to,
            Self::Receive { from, .. } => *from,
        }
    }

    /// # Safety
    /// The data stays where it is, and nobody else touches it, until the operation has ended or
    /// the links are aborted.
    unsafe fn posted(&mut self, arena: &Arena, call: usize) -> Posted {
        let (peer, receives, tag, memory) = match self {
            Self::Send { data, to, tag } => {
                // SAFETY: the caller's promise.
                (*to, false, *tag, unsafe { memory::to_send(arena, data) })
            }
            Self::Receive { data, from, tag } => {
                // SAFETY: the caller's promise.
                (*from, true, *tag, unsafe { memory::to_receive(data) })
            }
        };
        let envelope = Envelope { tag, dtype: T::DTYPE, bytes: memory.bytes() as u64 };
        Posted { call, peer, receives, envelope, memory }
    }
}

/// The timeout in a world of one, which has no settings.
const ALONE: Duration = Duration::from_secs(300);
