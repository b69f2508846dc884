//! The contract between the engine and a transport.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::{Call, LinkError, Patience, PeerCounts, Rank, Region, Regions};

/// The engine's name for a transfer it posted. Links hand it back and give it no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Where the bytes of a receive go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// Into the memory that the receive names: an arrival that stores.
    Place,
    /// Anywhere the link likes (a slot of its own, or right where the sender has them): an
    /// arrival that reduces. The engine reads them through [`Link::arrived`] and gives them back
    /// with [`Link::release`].
    Slot,
}

/// Wakes a thread that is parked in a link, from any other thread.
pub trait Wake: Send + Sync + fmt::Debug {
    /// Makes the current or the next park return. Idempotent, never blocks.
    fn wake(&self);
}

/// This rank's end of one transport: it moves bytes to and from every peer the transport reaches.
///
/// One thread at a time drives a link. Per peer and direction, transfers are matched in the order
/// in which they were posted (FIFO), and both ends post the same lengths in the same order: they
/// derive them from the same plan. Nothing blocks but [`Link::park`].
///
/// A link's error is final for the communicator: the engine calls [`Link::abort`] and nothing
/// else after it. Only that a peer is gone to which nothing is sent any more, and from which the
/// last receive was taken back ([`Link::retract`]), changes nothing for the others.
pub trait Link: Send + fmt::Debug {
    /// Starts a collective on `regions`. All transfers of the one before it are done.
    fn begin(&mut self, call: &Call, regions: &Regions);

    /// Says of the collective that was begun how many elements this rank has for `peer` and expects
    /// of it, where a rank knows only its own lengths: until the next one all that goes from one to
    /// the other tells both, so that both ends compare them before anything lands. Before the first
    /// transfer.
    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts);

    /// Sends `memory`, which is not empty, to `to`. It may be written again once the ticket is
    /// done.
    ///
    /// # Errors
    /// If the peer can't be reached or is gone.
    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError>;

    /// Receives what `from` sends next, which is as long as `memory` (not empty). With
    /// [`Landing::Place`] it goes there, and nobody touches that memory until the ticket is done;
    /// with [`Landing::Slot`] only the length of `memory` counts.
    ///
    /// # Errors
    /// If the peer can't be reached or is gone.
    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError>;

    /// Takes back the last receive posted from `from`, if nothing of it has come yet: its memory
    /// is the caller's again, its ticket never gets done, and what comes belongs to the next
    /// receive. Otherwise `false`, as on a link that can't do this: it stays posted.
    fn retract(&mut self, _from: Rank, _ticket: Ticket) -> bool {
        false
    }

    /// Whether this link itself fails what is posted to or from `peer` once that has left, after
    /// all that came from it; otherwise who waits has to ask whether it is still there.
    fn hears_leaving(&self, _peer: Rank) -> bool {
        false
    }

    /// Moves what can be moved now and appends the tickets that are done.
    ///
    /// # Errors
    /// The first failure of any peer that a posted transfer concerns.
    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError>;

    /// The bytes of a done receive that landed in a slot, readable until released. The address
    /// may change when the link is parked or armed (a slot in the sender's memory is then copied,
    /// so that the sender can go on): ask again after that.
    fn arrived(&self, ticket: Ticket) -> *const u8;

    /// Gives an arrival's slot back, when what was to be read there was read.
    ///
    /// # Errors
    /// If the slot was the sender's own memory and the sender has taken that back
    /// ([`Link::abort`]): what was read may be something else.
    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError>;

    /// Marks the collective under way: what is sent from here on carries the mark, and a group's
    /// next arrival does. A new collective begins unmarked.
    fn mark(&mut self);

    /// Whether the collective is marked: here, by the sender of something that was received, or,
    /// once an arrival is complete, by a member of the group before it.
    fn is_marked(&self) -> bool;

    /// How long a wait for this link's transfers pays before it parks.
    fn patience(&self) -> Patience {
        Patience::MEMORY
    }

    /// Sleeps until a transfer may have moved, until woken, or until `until`. So many tickets as
    /// `wanted` says (never 0) must get done before the engine can go on: a link may sleep
    /// through fewer.
    ///
    /// # Errors
    /// Only if sleeping itself is impossible.
    fn park(&mut self, until: Instant, wanted: usize) -> Result<(), LinkError>;

    /// Announces that the engine is about to sleep on [`Link::wake_fd`] together with other
    /// links'; `false` if something may have moved already, and then there is nothing to disarm.
    fn arm(&mut self) -> bool;

    /// Ends what [`Link::arm`] began and drains the descriptor.
    fn disarm(&mut self);

    /// A descriptor that becomes readable when an armed link should be looked at.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// A handle that wakes this link's parked or armed thread.
    fn waker(&self) -> Arc<dyn Wake>;

    /// Drops every posted transfer: from here on the link touches no region of this process, what
    /// peers still do to the region no longer shows in it, and what they still read of it they do
    /// not take for what was sent. Idempotent.
    fn abort(&mut self);

    /// The group of ranks that share memory with this one through this link, if it has that.
    fn group(&mut self) -> Option<&mut dyn Group>;
}

/// One of a rank's two regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// [`Regions::input`].
    Input,
    /// [`Regions::output`].
    Output,
}

/// A step that all members of a [`Group`] take together, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival(pub u64);

/// The ranks of one node that can read each other's memory.
///
/// All members make the same sequence of arrivals, and each makes the next one only after it saw
/// [`Group::complete`] say that the last one was. Between arrivals they read and write each
/// other's regions where every region is registered; what is private goes over the members'
/// benches. A collective on a group is: [`Group::enter`] (after which all see all regions), the
/// work, [`Group::arrive`].
pub trait Group {
    /// The members, ascending; this rank is one of them.
    fn members(&self) -> &[Rank];

    /// Largest deposit in bytes.
    fn slot_bytes(&self) -> usize;

    /// Publishes this rank's call and regions (as given to [`Link::begin`]) and arrives. With
    /// `deposit`, copies the whole input (at most [`Group::slot_bytes`]) into this rank's slot
    /// first: the others then read the slot and not the input, so that it is this rank's alone
    /// once the arrival is complete.
    fn enter(&mut self, deposit: bool) -> Arrival;

    /// Arrives: everything this rank read and wrote before it is done.
    fn arrive(&mut self) -> Arrival;

    /// Marks the collective, as [`Link::mark`] of its link does. Before an arrival.
    fn mark(&mut self);

    /// Whether all members made this arrival. The first time that an [`Group::enter`] is complete,
    /// all members' calls are compared.
    ///
    /// # Errors
    /// [`crate::LinkErrorKind::Mismatch`] if a member called something else.
    fn complete(&mut self, arrival: Arrival) -> Result<bool, LinkError>;

    /// Whether a member that has not made the arrival was last seen waiting on the core that this
    /// thread runs on, or nobody knows where: then it may not come before this core is given away.
    fn awaits_own_core(&mut self, arrival: Arrival) -> bool;

    /// Hears that this thread gave its core away while it waited. Now and then that may move it to
    /// a core with fewer members.
    fn yielded(&mut self);

    /// Members that have not made the arrival yet: the ones to name when time is up.
    fn missing(&self, arrival: Arrival) -> Vec<Rank>;

    /// Sleeps until the arrival may be complete, until woken, or until `until`.
    ///
    /// # Errors
    /// Only if sleeping itself is impossible.
    fn park(&mut self, arrival: Arrival, until: Instant) -> Result<(), LinkError>;

    /// Whether every member's input, or output, of the entered collective is registered, so that
    /// all can read it and [`Group::target`] may be used. The same answer on all members. An empty
    /// region counts as registered, a deposit does not.
    fn registered(&self, part: Part) -> bool;

    /// Appends the address of `bytes` of each member's deposit, in the order of the members: what
    /// the last `enter`, which is complete, deposited. For this rank that of its input, where it
    /// lies: what one published oneself is dearer to read.
    ///
    /// # Panics
    /// If this rank deposited nothing, or more than a deposit holds is asked for.
    fn deposits(&self, bytes: &Range<usize>, addresses: &mut Vec<*const u8>);

    /// The address of `bytes` of one of a member's regions (`Part::Input`: of another's deposit, if
    /// `enter` deposited) where this rank can read it; `None` if it is another rank's private
    /// memory. What is read of a registered region counts once [`Group::confirm`] has said so.
    ///
    /// # Errors
    /// If the member's region is not where it says.
    fn source(
        &self,
        member: Rank,
        part: Part,
        bytes: Range<usize>,
    ) -> Result<Option<*const u8>, LinkError>;

    /// Says that all members lent their regions until now, so that what was read of them is what
    /// they put in. It is asked after reading, and before what came of that is told to anybody or
    /// is a result. One load.
    ///
    /// # Errors
    /// If a member has taken its memory back ([`Link::abort`]).
    fn confirm(&self) -> Result<(), LinkError>;

    /// The address of `bytes` of a member's registered output, to write to.
    ///
    /// # Errors
    /// If the member has none, though [`Group::registered`] said that outputs are.
    ///
    /// # Panics
    /// If the range is outside of this rank's output, which is as long as the others'.
    fn target(&self, member: Rank, bytes: Range<usize>) -> Result<*mut u8, LinkError>;

    /// Bytes of each member's bench.
    fn bench_bytes(&self) -> usize;

    /// The address of `bytes` of a member's bench: memory that all members map, for what moves
    /// between private regions. Who uses which part of it when is up to the caller.
    ///
    /// # Panics
    /// If the range is outside of [`Group::bench_bytes`].
    fn bench(&self, member: Rank, bytes: Range<usize>) -> *mut u8;
}
