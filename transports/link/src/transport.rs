//! How a rank comes to a link: what a transport tells of itself, whom it reaches, and what it knows
//! of memory.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::inbox::Ways;
use crate::secure::Proven;
use crate::{Limit, Link, Rank};

/// A way to move bytes between ranks. One value serves all communicators of a job.
///
/// The caller (crate `unisum`) makes one [`Link`] of it for each communicator, with the other
/// ranks, which do the same at the same time:
///
/// 1. [`Transport::endpoint`] makes this rank's end, and [`Endpoint::info`] says what the others
///    have to know of it. All ranks exchange that.
/// 2. [`Endpoint::agree`] gets everybody's information and says with whom this rank can be
///    connected. All ranks exchange that, too.
/// 3. [`Endpoint::connect`] makes the link to those that said the same.
///
/// A step that fails gives a [`Refusal`]. The ranks hear of it in the next exchange and do without
/// this transport, or, if the user asked for it by name, all report the same error. No step may
/// wait for a rank beyond its [`Limit`]. What a transport exchanges this way is authenticated;
/// connections that it opens itself it must authenticate itself ([`crate::handshake`],
/// [`crate::secure`]).
pub trait Transport: Send + Sync + fmt::Debug {
    /// Its name, by which users ask for it: lower-case letters, digits and `-`.
    fn name(&self) -> &'static str;

    /// Whom it reaches. Always the same answer, on all ranks.
    fn reach(&self) -> Reach;

    /// Makes this rank's end of a link between the ranks of a communicator. Called once for each
    /// communicator, from the thread that makes it; calls of several threads may overlap. Blocks
    /// for no other rank.
    ///
    /// # Errors
    /// Why this rank can't have one.
    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal>;
}

/// Whom a transport reaches, and thereby how its ranks agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Ranks of one host, in sets: each rank is in one set or alone. The sets are the nodes by
    /// which algorithms are chosen. All three steps are taken; what a rank tells is the same for
    /// all.
    Host,
    /// All ranks that do not share a set, or none: if one refuses, all do without. All three steps
    /// are taken, each with its exchange; what a rank tells may differ from rank to rank.
    Unanimous,
    /// Every rank, without asking: only [`Transport::endpoint`] and [`Endpoint::connect`] are
    /// called, and nothing is exchanged. Connections are made when they are first used.
    Any,
}

/// The communicator that an endpoint is for, as this rank sees it.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// This rank's number in it.
    pub rank: Rank,
    /// The job's number of each of its ranks.
    pub ranks: &'a [Rank],
    /// The ranks to reach, ascending; with [`Reach::Host`], all others.
    pub peers: &'a [Rank],
    /// Whether the user asked for this transport by its name.
    pub is_asked_for: bool,
}

/// What the ranks of a communicator have in common while they connect.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Drawn anew for each communicator, the same on all its ranks: connections of another one are
    /// to be refused.
    pub session: [u8; 16],
    /// How long this step may wait for other ranks.
    pub limit: Limit<'a>,
    /// By rank of the communicator, how to reach the others later, for a link that has no way of
    /// its own to them: [`Connected::inbox`] gets what they open. `None` where connections that
    /// break are not to be made anew.
    pub ways: Option<&'a Ways>,
}

/// What a rank tells the others of its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointInfo {
    /// The same to all; the only kind with [`Reach::Host`].
    Same(Vec<u8>),
    /// By rank of the communicator, empty for those that are not to be reached.
    Each(Vec<Vec<u8>>),
}

/// This rank's end of a link that is not connected yet. Dropping it gives it up.
pub trait Endpoint: fmt::Debug {
    /// What the others have to know to connect to it.
    fn info(&self) -> EndpointInfo {
        EndpointInfo::Same(Vec::new())
    }

    /// Finds out who can be connected. `infos` has what each rank told this one, by rank, and is
    /// empty where a rank has no endpoint. Returns the lowest rank of the set that this rank is in:
    /// ranks that return the same are connected. With [`Reach::Unanimous`], that is the same rank
    /// on all.
    ///
    /// # Errors
    /// Why this rank is in no set.
    fn agree(&mut self, infos: &[Vec<u8>], setup: &Setup<'_>) -> Result<Rank, Refusal> {
        let _ = (infos, setup);
        Ok(0)
    }

    /// Connects the members: this rank's set with itself (ascending; with [`Reach::Unanimous`] and
    /// [`Reach::Any`], the peers of the [`Site`] and this rank), all of which agreed.
    ///
    /// # Errors
    /// Why there is no connection. With [`Reach::Unanimous`], all ranks then do without; with
    /// others the communicator fails.
    fn connect(self: Box<Self>, members: &[Rank], setup: &Setup<'_>) -> Result<Connected, Refusal>;
}

/// What connecting gave.
pub struct Connected {
    /// The link to the members.
    pub link: Box<dyn Link>,
    /// Memory that the members read and write in place.
    pub heap: Option<Arc<dyn Heap>>,
    /// What has to know memory before the transport reaches it without copies.
    pub registrar: Option<Arc<dyn Registrar>>,
    /// Where connections go that peers open at this rank's listening port for this communicator.
    pub inbox: Option<Inbox>,
    /// What the job's later communicators are connected over, if not over the same value: one that
    /// shares what this link has opened. Only asked for by the job's first communicator.
    pub for_groups: Option<Arc<dyn Transport>>,
}

impl Connected {
    /// A link that has nothing beside it.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self { link, heap: None, registrar: None, inbox: None, for_groups: None }
    }
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected").field("link", &self.link).finish_non_exhaustive()
    }
}

/// Takes a connection whose handshake is done: the peer, which of its connections it is, and the
/// connection, non-blocking. Called from the thread that accepts.
pub type Inbox = Arc<dyn Fn(Rank, u8, Proven) + Send + Sync>;

/// Memory of this rank that the members of a link map: it is reached without copies.
pub trait Heap: Send + Sync + fmt::Debug {
    /// The addresses that allocations lie in. Always the same; a [`Region`](crate::Region) there
    /// has its distance from the start as [`heap_offset`](crate::Region::heap_offset).
    fn addresses(&self) -> Range<usize>;

    /// At least `bytes` (not 0) zeroed bytes, aligned to pages. From any thread.
    ///
    /// # Errors
    /// The reason, for people.
    fn allocate(&self, bytes: usize) -> Result<Allocation, String>;
}

/// A piece of memory, which is given back when it is dropped.
#[derive(Debug)]
pub struct Allocation {
    /// Where it starts.
    pub start: NonNull<u8>,
    /// What owns it. The memory outlives the link, and is valid as long as this lives.
    pub owner: Box<dyn Any + Send + Sync>,
}

/// What has to know memory before the transport reaches it without copies, such as an RDMA device.
pub trait Registrar: Send + Sync + fmt::Debug {
    /// Registers memory until the returned value is dropped. From any thread.
    ///
    /// # Errors
    /// The reason, for people. The memory can still be used, like any other.
    ///
    /// # Safety
    /// The memory stays mapped, with the same pages, until the returned value is dropped.
    unsafe fn register(
        self: Arc<Self>,
        start: NonNull<u8>,
        bytes: usize,
    ) -> Result<Registration, String>;
}

/// Registered memory, until it is dropped.
#[derive(Debug)]
pub struct Registration(pub Box<dyn Any + Send + Sync>);

/// Why a rank does not use a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing is wrong: there is no device, say, or no other rank on the host.
    NotWanted(String),
    /// The rank itself has a reason.
    Own(String),
    /// The rank has run out of something: descriptors, memory.
    Lacks(String),
    /// Other ranks of the communicator, which are named, prevent it. From [`Endpoint::connect`],
    /// what they did or did not do, as in "did not connect in time".
    Others(Vec<Rank>, String),
}

impl Refusal {
    /// The reason, for people.
    pub fn why(&self) -> &str {
        match self {
            Self::NotWanted(why) | Self::Own(why) | Self::Lacks(why) | Self::Others(_, why) => why,
        }
    }

    /// The system's refusal of what `context` names: of the rank itself, which may have run out of
    /// something.
    pub fn system(context: &str, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        let why = format!("{context}: {error}");
        if crate::is_lack(&error) { Self::Lacks(why) } else { Self::Own(why) }
    }
}
