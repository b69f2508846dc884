//! Messages between two ranks, with tags, in any order of posting.

mod desk;
mod header;
mod memory;
mod office;
mod peer;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use unisum_kernels::Element;
use unisum_link::{Patience, Rank, fork};

use crate::groups::Making;
use crate::memory::Arena;
use crate::{Communicator, Error, ErrorKind};
use desk::Desk;
use header::Envelope;
use office::{Office, Posted};
use unisum_engine::Links;

/// Sends and receives messages between the ranks of a communicator.
///
/// A message goes from one rank to one rank, under a tag. Messages of the same two ranks and the
/// same tag arrive in the order in which they were sent; those of different tags are received in
/// any order. Length and element type are the same at both ends. A rank may send to itself. Calls
/// may come from any thread, and from several at once.
///
/// All calls block, and sleep while they have to wait; one of the threads that wait does the work.
/// A receive returns when the message is there. A send returns when its data may be overwritten.
/// Messages up to 8 KiB are buffered at the receiver, 256 KiB of each sender at most (each counts
/// 256 bytes more than it has), and their sends wait only until the transport has taken them;
/// beyond that, and for longer messages, a send waits for the receive. So two ranks that first
/// both send and then both receive may wait for ever: [`Messenger::exchange`] can't. Messages move
/// while both ranks are in a call with each other.
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
/// A messenger has links of its own, opened when first used, and is independent of the
/// communicator's collectives. What ranks are called in errors are the job's numbers. After an
/// error it is aborted: all calls under way return the error, later ones
/// [`ErrorKind::Aborted`]. Messages that nobody has received when it is dropped are lost, so a
/// rank drops it after it has received what was sent to it.
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
    /// There until it is dropped.
    desk: Option<Desk>,
}

/// One of the messages of an [`exchange`](Messenger::exchange).
#[derive(Debug)]
pub enum Message<'a, T> {
    /// From this rank.
    Send {
        /// What is sent.
        data: &'a [T],
        /// The rank that receives it.
        to: Rank,
        /// The receive has the same.
        tag: u64,
    },
    /// To this rank.
    Receive {
        /// Where it goes; as long as what is sent.
        data: &'a mut [T],
        /// The rank that sends it.
        from: Rank,
        /// The send has the same.
        tag: u64,
    },
}

impl Messenger {
    /// A messenger between the ranks of `communicator`.
    ///
    /// Collective: every rank calls it, and nothing else on this communicator meanwhile. Blocks.
    /// Costs what [`Communicator::duplicate`] does, and may outlive the communicator.
    ///
    /// # Errors
    /// As [`Communicator::split`].
    pub fn new(communicator: &Communicator) -> Result<Self, Error> {
        let (rank, world) = (communicator.rank(), communicator.world());
        let (joined, _) = communicator.regroup(&Making::Messenger, Some(0), rank as i64)?;
        let mut transport = "none".to_owned();
        let (desk, timeout, arena) = match (joined, &communicator.member) {
            (Some(joined), Some(member)) => {
                transport = joined.transport;
                let (links, patience) = joined.engine.into_links();
                let wakers = links.all.iter().map(|link| link.waker()).collect();
                let number = joined.membership.communicator();
                let office = Office::new(rank, world, number, links, patience);
                let job = &member.core.job;
                let desk = Desk::new(Some(joined.membership), wakers, office);
                (desk, job.settings.timeout, job.arena.clone())
            }
            _ => {
                let links = Links { all: Vec::new(), route: vec![0; world], group: None };
                let office = Office::new(rank, world, 0, links, Patience::MEMORY);
                (Desk::new(None, Vec::new(), office), ALONE, Arena::default())
            }
        };
        let fork_generation = fork::generation();
        Ok(Self { rank, world, timeout, arena, fork_generation, transport, desk: Some(desk) })
    }

    /// This process's number among the ranks, from 0.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    pub const fn world(&self) -> usize {
        self.world
    }

    /// What carries the messages, as [`Communicator::transport`] says it.
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

    /// Receives in `data` the next message with this tag of rank `from`, which is as long. Blocks
    /// until it is there.
    ///
    /// # Errors
    /// As [`Messenger::exchange`].
    #[doc(alias = "recv")]
    pub fn receive<T: Element>(&self, data: &mut [T], from: Rank, tag: u64) -> Result<(), Error> {
        self.exchange(&mut [Message::Receive { data, from, tag }])
    }

    /// Blocks until a message with this tag can be received, of any rank, and gives the rank. Ranks
    /// that leave meanwhile are no error. Threads that probe for one tag at once may all be given
    /// the same message.
    ///
    /// # Errors
    /// As [`Messenger::exchange`].
    #[doc(alias = "recv_any_source")]
    pub fn probe(&self, tag: u64) -> Result<Rank, Error> {
        let desk = self.desk.as_ref().expect("it is there until the messenger is dropped");
        if self.is_forked() {
            return Err(Error::forked().on(desk.job_rank()));
        }
        let found = Arc::new(OnceLock::new());
        desk.call(1, Instant::now() + self.timeout, |office, call| {
            office.probe(call, tag, found.clone());
            Ok(())
        })?;
        let unknown = || Error::new(ErrorKind::Aborted, "the messenger was closed");
        found.get().copied().ok_or_else(unknown)
    }

    /// Starts all messages, in their order, and then waits for all. Ranks that exchange at once
    /// what others wait for can't deadlock, in whichever order they list their messages.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such rank: nothing was sent, and the messenger
    /// stays usable. [`ErrorKind::Mismatch`] if the two ends of a message differ in length or
    /// type, [`ErrorKind::RankLost`] if a rank is gone, [`ErrorKind::Timeout`] if a message took
    /// longer than the job's timeout: these on all ranks of the job, and the last names the rank
    /// that the others wait for, which need not be one of the message's. What was to be received
    /// is then unspecified.
    pub fn exchange<T: Element>(&self, messages: &mut [Message<'_, T>]) -> Result<(), Error> {
        let desk = self.desk.as_ref().expect("it is there until the messenger is dropped");
        if self.is_forked() {
            return Err(Error::forked().on(desk.job_rank()));
        }
        let peers = messages.iter().map(Message::peer);
        if let Some(peer) = peers.into_iter().find(|&peer| peer >= self.world) {
            let text = format!("a message from or to rank {peer} of {} ranks", self.world);
            return Err(Error::new(ErrorKind::Configuration, text).on(desk.job_rank()));
        }
        let deadline = Instant::now() + self.timeout;
        desk.call(messages.len(), deadline, |office, call| {
            messages.iter_mut().try_for_each(|message| {
                // SAFETY: `call` returns only after all operations have ended or the links are
                // aborted or driven by nobody any more, and the messages are borrowed until then.
                let posted = unsafe { message.posted(&self.arena, call) };
                office.post(posted)
            })
        })
    }

    /// Whether this process is a child of the one that made it.
    fn is_forked(&self) -> bool {
        fork::current() != self.fork_generation
    }
}

impl Drop for Messenger {
    fn drop(&mut self) {
        if self.is_forked() {
            // Nothing may be dropped here: a thread that exists only in the parent may hold a lock.
            std::mem::forget(self.desk.take());
        }
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
