//! The contract between the engine and a transport.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::{Call, LinkCounters, LinkError, Patience, PeerCounts, Rank, Region, Regions};

/// The engine's identifier of a transfer it posted. Links return it on completion and give it no
/// meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Where the bytes of a receive go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// In the memory given to the receive: an arrival that stores.
    Place,
    /// Wherever the link chooses (a slot of its own, or the sender's memory in place): an arrival
    /// that reduces. The engine reads the bytes through [`Link::arrived`] and returns the slot with
    /// [`Link::release`].
    Slot,
}

/// Wakes a thread that is parked in a link. May be called from any thread.
pub trait Wake: Send + Sync + fmt::Debug {
    /// Makes the current or the next park return. Idempotent; never blocks.
    fn wake(&self);
}

/// This rank's end of one transport: it moves bytes to and from every peer the transport reaches.
///
/// One thread at a time drives a link. Transfers are matched per peer and direction in the order in
/// which they were posted (FIFO). Both ends post the same lengths in the same order, because they
/// derive them from the same plan. Only [`Link::park`] blocks.
///
/// An error of a link is final for the communicator: the engine calls [`Link::abort`] and nothing
/// else afterwards. One failure is not an error: losing a peer to which nothing more is sent and
/// whose last receive was withdrawn ([`Link::retract`]) changes nothing for the other peers.
pub trait Link: Send + fmt::Debug {
    /// Starts a collective on `regions`. All transfers of the previous one are done.
    fn begin(&mut self, call: &Call, regions: &Regions);

    /// States how many elements this rank has for `peer` and expects from it in the collective that
    /// was begun, where a rank knows only its own lengths. Until the next collective, everything
    /// sent between the two carries both counts, so that both ends compare them before anything
    /// lands. Called before the first transfer.
    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts);

    /// Sends `memory`, which is not empty, to `to`. The memory may be written again once the ticket
    /// is done.
    ///
    /// # Errors
    /// If the peer cannot be reached or is gone.
    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError>;

    /// Receives the next message from `from`, which is as long as `memory` (not empty). With
    /// [`Landing::Place`], it is written to `memory`, which nobody else touches until the ticket is
    /// done; with [`Landing::Slot`], only the length of `memory` matters.
    ///
    /// # Errors
    /// If the peer cannot be reached or is gone.
    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError>;

    /// Withdraws the last receive posted from `from`, if nothing of its message has arrived: the
    /// memory is the caller's again, the ticket never completes, and the message belongs to the
    /// next receive. Returns `false` if the receive stays posted, as on a link that cannot withdraw
    /// it. A link that fails the receives of a peer that has left has to support this: messengers
    /// withdraw what they no longer wait for, so that peers may leave.
    fn retract(&mut self, _from: Rank, _ticket: Ticket) -> bool {
        false
    }

    /// Whether this link fails transfers posted to or from `peer` once the peer has left, after
    /// everything that came from it. If not, a waiting rank has to ask whether the peer is still
    /// there.
    fn hears_leaving(&self, _peer: Rank) -> bool {
        false
    }

    /// Whether this rank is connecting to `peer`: the peer may have taken the connection, sent, and
    /// left, before this rank knows that it is connected. What becomes of it is told by what is
    /// posted.
    fn is_connecting(&self, _peer: Rank) -> bool {
        false
    }

    /// Moves what can be moved now, and appends the tickets that are done.
    ///
    /// # Errors
    /// The first failure of any peer that takes part in a posted transfer.
    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError>;

    /// The bytes of a completed receive that landed in a slot, readable until released. The address
    /// may change when the link is parked or armed (a slot in the sender's memory is then copied,
    /// so that the sender can continue): ask again afterwards.
    fn arrived(&self, ticket: Ticket) -> *const u8;

    /// Returns the slot of an arrival after its bytes have been read.
    ///
    /// # Errors
    /// If the slot was the sender's own memory and the sender has taken it back ([`Link::abort`]):
    /// the bytes that were read may be wrong.
    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError>;

    /// Marks the collective under way as nonfinite. Everything sent from now on carries the mark,
    /// and so does a group's next arrival. A new collective begins unmarked.
    fn mark(&mut self);

    /// Whether the collective is marked: by this rank, by the sender of a received message, or,
    /// once an arrival is complete, by a member of the group before that arrival.
    fn is_marked(&self) -> bool;

    /// How long waiting for this link's transfers pays off before parking.
    fn patience(&self) -> Patience {
        Patience::MEMORY
    }

    /// Sleeps until a transfer may have moved, until woken, or until `until`. At least `wanted`
    /// tickets (never 0) must complete before the engine can continue; a link may sleep through
    /// fewer.
    ///
    /// # Errors
    /// Only if sleeping itself is impossible.
    fn park(&mut self, until: Instant, wanted: usize) -> Result<(), LinkError>;

    /// Announces that the engine is about to sleep on [`Link::wake_fd`] together with other links'.
    /// Returns `false` if something may have moved already; there is then nothing to disarm.
    fn arm(&mut self) -> bool;

    /// Ends what [`Link::arm`] began and drains the descriptor.
    fn disarm(&mut self);

    /// A descriptor that becomes readable when an armed link needs attention.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// A handle that wakes the thread that is parked in, or has armed, this link.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Drops every posted transfer. From now on, the link touches no region of this process, later
    /// writes of peers to the region do not show in it, and peers do not take what they still read
    /// from it for valid data. Idempotent.
    fn abort(&mut self);

    /// Before this rank leaves in order, while connections still reach it: returns once the peers
    /// have what was sent to them, or the time for that is up. Does nothing where nothing that was
    /// sent can be lost any more, and after [`Link::abort`].
    fn linger(&mut self) {}

    /// The group of ranks that share memory with this one through this link, if there is one.
    fn group(&mut self) -> Option<&mut dyn Group>;

    /// Describes for people, in one line, what the link goes over; empty if there is nothing to
    /// say.
    fn description(&self) -> String {
        String::new()
    }

    /// What it counts, if it counts anything. The same at each call.
    fn counters(&self) -> Option<Arc<LinkCounters>> {
        None
    }
}

/// One of a rank's two regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// [`Regions::input`].
    Input,
    /// [`Regions::output`].
    Output,
}

/// A step that all members of a [`Group`] take together, numbered from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival(pub u64);

/// The ranks of one node that can read each other's memory.
///
/// All members make the same sequence of arrivals. Each makes the next one only after
/// [`Group::complete`] has reported the previous one. Between arrivals, members read and write each
/// other's regions if every region is registered; private memory passes through the members'
/// staging buffers. A collective on a group is [`Group::enter`] (after which all members see all
/// regions), the work, and [`Group::arrive`].
pub trait Group {
    /// The members, ascending; this rank is one of them.
    fn members(&self) -> &[Rank];

    /// Largest deposit in bytes.
    fn slot_bytes(&self) -> usize;

    /// Publishes this rank's call and regions (as given to [`Link::begin`]) and arrives. With
    /// `deposit`, first copies the whole input (at most [`Group::slot_bytes`]) into this rank's
    /// slot: the others then read the slot instead of the input, which is this rank's alone once
    /// the arrival is complete.
    fn enter(&mut self, deposit: bool) -> Arrival;

    /// Arrives: all reads and writes this rank made before are done.
    fn arrive(&mut self) -> Arrival;

    /// Marks the collective, as [`Link::mark`] does. Called before an arrival.
    fn mark(&mut self);

    /// Whether all members have made this arrival. The first time that an [`Group::enter`] is
    /// complete, the calls of all members are compared.
    ///
    /// # Errors
    /// [`crate::LinkErrorKind::Mismatch`] if a member called something else.
    fn complete(&mut self, arrival: Arrival) -> Result<bool, LinkError>;

    /// Whether a member that has not made the arrival was last seen waiting on the core of this
    /// thread, or in an unknown place: it may then be unable to arrive before this core is yielded.
    fn awaits_own_core(&mut self, arrival: Arrival) -> bool;

    /// Tells the group that this thread yielded its core while it waited. Occasionally this moves
    /// the thread to a core with fewer members.
    fn yielded(&mut self);

    /// The members that have not made the arrival yet, for the error when time is up.
    fn missing(&self, arrival: Arrival) -> Vec<Rank>;

    /// Sleeps until the arrival may be complete, until woken, or until `until`.
    ///
    /// # Errors
    /// Only if sleeping itself is impossible.
    fn park(&mut self, arrival: Arrival, until: Instant) -> Result<(), LinkError>;

    /// Whether every member's input, or output, of the entered collective is registered, so that
    /// all members can read it and [`Group::target`] may be used. The answer is the same on all
    /// members. An empty region counts as registered, a deposit does not.
    fn registered(&self, part: Part) -> bool;

    /// Appends the address of `bytes` of each member's deposit in the last `enter`, which is
    /// complete, in the order of the members. For this rank, it is the address in its input,
    /// because reading back a published line is more expensive.
    ///
    /// # Panics
    /// If this rank deposited nothing, or more than a deposit holds is asked for.
    fn deposits(&self, bytes: &Range<usize>, addresses: &mut Vec<*const u8>);

    /// The address at which this rank can read `bytes` of one of a member's regions (`Part::Input`:
    /// of another member's deposit, if `enter` deposited), or `None` if it is another rank's
    /// private memory. Data read from a registered region is valid once [`Group::confirm`] has
    /// returned.
    ///
    /// # Errors
    /// If the member's region does not lie where the member says it does.
    fn source(
        &self,
        member: Rank,
        part: Part,
        bytes: Range<usize>,
    ) -> Result<Option<*const u8>, LinkError>;

    /// Confirms that all members have lent their regions until now, so that what was read from them
    /// is what they put in. Called after reading, and before a value that depends on the data is
    /// sent to any rank or becomes a result. Costs one load.
    ///
    /// # Errors
    /// If a member has taken its memory back ([`Link::abort`]).
    fn confirm(&self) -> Result<(), LinkError>;

    /// The address of `bytes` of a member's registered output, for writing.
    ///
    /// # Errors
    /// If the member has none although [`Group::registered`] reported that outputs are registered.
    ///
    /// # Panics
    /// If the range is outside of this rank's output, which is as long as the others'.
    fn target(&self, member: Rank, bytes: Range<usize>) -> Result<*mut u8, LinkError>;

    /// Size of each member's staging buffer, in bytes.
    fn staging_bytes(&self) -> usize;

    /// The address of `bytes` of a member's staging buffer: memory that all members map, through
    /// which data moves between private regions. The caller decides who uses which part of it when.
    ///
    /// # Panics
    /// If the range is outside of [`Group::staging_bytes`].
    fn staging(&self, member: Rank, bytes: Range<usize>) -> *mut u8;
}
