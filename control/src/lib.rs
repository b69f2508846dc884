//! The control plane: how ranks find each other, agree, and learn why a communicator ends, on
//! connections of its own that answer even while the data path is stuck.
//!
//! Every rank has one control thread, which owns the process's one listening port and a connection
//! to rank 0, the coordinator. The coordinator decides (`coordinator`, `diagnosis`: pure) and every
//! rank hears the same verdict, the first one; a rank concludes on its own only when the
//! coordinator is dead or silent. If rank 0 leaves in order, it goes on to coordinate while its
//! process lives, and then another rank does (`thread::succession`).
//!
//! Beside it is what a process has to know first: who started it ([`launcher`]), where the ranks
//! meet ([`address`]), and by which addresses others reach it ([`interface`]).
//!
//! The crate uses `unisum-link` (handshake, what a call is), and the names in `unisum-algorithms`
//! and `unisum-kernels` for what errors say. It moves no data. Start at [`Control::start`], then
//! `thread` (the event loop), `message` (what is said) and `coordinator` (what is decided).

mod acceptor;
pub mod address;
mod asking;
pub mod callers;
mod comparison;
mod config;
mod connection;
mod coordinator;
mod crossing;
mod dial;
mod doing;
pub mod elastic;
mod environment;
mod error;
mod file;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod interface;
mod kept;
pub mod launcher;
pub mod leftovers;
mod listen;
mod member;
mod message;
mod opening;
mod pending;
mod pulse;
mod resume;
mod round;
mod share;
mod shared;
mod stall_diagnosis;
mod status;
mod thread;
mod verdict;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use mio::{Poll, Waker};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{self, Hello, Purpose, Secret, job_hash};
use unisum_link::secure::{Preamble, Proven};
use unisum_link::{Rank, Wake};

use self::coordinator::Coordinator;
use self::dial::Reached;
use self::listen::{Listeners, Listening};
use self::pulse::Pulses;
use self::shared::{Command, Shared};
use self::thread::{ControlThread, Identity, Resuming};
use crate::address::Rendezvous;

pub use self::config::{ControlConfig, IsMoot, Publish};
pub use self::environment::Environment;
pub use self::error::ControlError;
pub use self::kept::Kept;
pub use self::member::LINK_VERDICT_TIMEOUT;
pub use self::message::StalledCall;
pub use self::opening::tell_all_that_not;
pub use self::share::Share;
pub use self::shared::Inbox;
pub use self::status::{Needed, Status, Waiting, describe, describe_for_one, plan_of};
pub use self::verdict::{Calls, Finding, Report, Verdict, VerdictKind};

/// Largest world.
const WORLD_MAX: usize = 1 << 16;
/// How long the coordinator may take to say who is missing in an exchange.
const EXCHANGE_SPARE: Duration = Duration::from_secs(5);
/// How long leaving may wait for the goodbye to be with the kernel.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// This rank's membership in the control plane. Dropping it leaves.
pub struct Control {
    shared: Arc<Shared>,
    /// None in a world of one, which has no thread.
    waker: Option<Arc<Waker>>,
    session: [u8; 16],
    secret: Secret,
    /// Where this process listens.
    addresses: Vec<SocketAddr>,
    /// Where it reached rank 0.
    coordinator: Option<SocketAddr>,
    connect_timeout: Duration,
    reconnect_timeout: Duration,
    /// Held during an exchange: they go one by one.
    exchanging: Mutex<()>,
    has_left: AtomicBool,
    status: Arc<Status>,
    process: u32,
}

/// What a process has before its thread starts.
struct Joined {
    listening: Listening,
    session: [u8; 16],
    coordinator: Option<SocketAddr>,
    role: Role,
    /// How long rank 0 awaits ranks after the start has failed, if not as usual.
    patience: Option<Duration>,
}

enum Role {
    Coordinator(Option<file::Published>),
    Member(Proven, Option<ParentOnly<TcpStream>>),
}

impl Control {
    /// Joins the job: on rank 0 returns when it listens (and, for a rendezvous file, has told
    /// where), elsewhere when rank 0 has admitted this rank. Blocks for `connect_timeout` at most,
    /// and for as long as the system's name resolver does. A world of one needs no network.
    ///
    /// # Errors
    /// If rank 0 can't be reached in time or refuses, this process can't listen, or the
    /// rendezvous file can't be written.
    pub fn start(config: ControlConfig) -> Result<Self, ControlError> {
        Self::start_with(config, None)
    }

    /// The same; rank 0 awaits ranks for so long after the start has failed.
    fn start_with(config: ControlConfig, patience: Option<Duration>) -> Result<Self, ControlError> {
        let ControlConfig { rank, world, connect_timeout, reconnect_timeout, .. } = config;
        let timeouts = (connect_timeout, reconnect_timeout);
        let secret = config.credentials.secret().clone();
        assert!(rank < world, "rank {rank} is not in a world of {world}");
        if world > WORLD_MAX {
            return Err(ControlError::World(world));
        }
        let shared = Arc::new(Shared::new(rank, world));
        if world == 1 {
            let nowhere = (Vec::new(), None);
            return Ok(Self::new(shared, None, (new_session()?, secret), nowhere, timeouts));
        }
        let joined = if rank == 0 { opening::open(&config)? } else { dial(&config)? };
        let joined = Joined { patience, ..joined };
        joined.listening.listeners.iter().for_each(config.prepare_listener);
        let places = (joined.listening.addresses.clone(), joined.coordinator);
        let session = joined.session;
        let waker = spawn(config, joined, &shared)?;
        Ok(Self::new(shared, Some(waker), (session, secret), places, timeouts))
    }

    fn new(
        shared: Arc<Shared>,
        waker: Option<Arc<Waker>>,
        (session, secret): ([u8; 16], Secret),
        (addresses, coordinator): (Vec<SocketAddr>, Option<SocketAddr>),
        (connect_timeout, reconnect_timeout): (Duration, Duration),
    ) -> Self {
        let status = shared.enroll(0, (0..shared.world()).collect(), shared.rank);
        Self {
            shared,
            waker,
            session,
            secret,
            addresses,
            coordinator,
            connect_timeout,
            reconnect_timeout,
            exchanging: Mutex::new(()),
            has_left: AtomicBool::new(false),
            status,
            process: std::process::id(),
        }
    }

    /// The random number of this start of the job, the same on all ranks.
    pub const fn session(&self) -> [u8; 16] {
        self.session
    }

    /// Where other ranks reach this process, the best address first. None in a world of one.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Where this process reached rank 0; none on rank 0 itself.
    pub const fn coordinator(&self) -> Option<SocketAddr> {
        self.coordinator
    }

    /// Gives every rank's blobs to the ranks that they are for: what each rank has for this one,
    /// in rank order. All ranks call it, equally often. Blobs have 64 KiB at most, and if there is
    /// one for each rank, all of them together 64 KiB, or 1 KiB for each rank if that is more.
    /// Blocks until all have called, `connect_timeout` at most. Cost: two messages' time, and the
    /// coordinator sends world² blobs.
    ///
    /// # Errors
    /// If a blob is too large, or the communicator ends; the verdict names ranks that never came.
    pub fn exchange(&self, share: impl Into<Share>) -> Result<Vec<Vec<u8>>, ControlError> {
        let share = share.into();
        share.check(self.shared.world()).map_err(ControlError::Blob)?;
        if self.waker.is_none() {
            return Ok(share.into_own());
        }
        let _one = self.exchanging.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verdict) = self.verdict() {
            return Err(ControlError::Ended(verdict));
        }
        // Acquire: pairs with the AcqRel swap in `leave`.
        if self.has_left.load(Ordering::Acquire) {
            return Err(ControlError::HasLeft);
        }
        self.command(Command::Exchange(share));
        let mut gathered = self.shared.await_gathered(Instant::now() + self.connect_timeout);
        if gathered.is_none() && self.verdict().is_none() {
            // The coordinator may be more patient; it knows who is missing.
            self.command(Command::Missing(self.connect_timeout));
            gathered = self.shared.await_gathered(Instant::now() + EXCHANGE_SPARE);
        }
        if let Some(blobs) = gathered {
            return Ok(blobs.into_iter().map(Vec::from).collect());
        }
        // The first verdict counts: this one only if there is none.
        self.shared.conclude(Verdict::coordinator_silent(0, "during an exchange"));
        Err(self.verdict().map_or(ControlError::HasLeft, ControlError::Ended))
    }

    /// Says where each rank listens, so that another rank can coordinate once rank 0 has left.
    pub fn set_addresses(&self, addresses: Vec<Vec<SocketAddr>>) {
        self.shared.set_addresses(addresses);
    }

    /// Gives data connections that have proven the token and name this session to `inbox`, on the
    /// control thread: peer, socket index, and the stream (non-blocking). Those that came before
    /// are delivered at once, on this thread. `inbox` must not block.
    pub fn set_inbox(&self, communicator: u32, inbox: Inbox) {
        self.shared.set_inbox(communicator, inbox);
    }

    /// Has `waker` woken when the verdict comes, as long as this rank is in the communicator; at
    /// once if it is there.
    pub fn add_waker(&self, communicator: u32, waker: Arc<dyn Wake>) {
        self.shared.add_waker(communicator, waker);
    }

    /// Where the engine of the job's own communicator says what this rank is doing.
    pub const fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Enrolls this rank in a communicator of these ranks, by their numbers in the job, in which it
    /// has the number `rank`: data connections of `session` are its. Gives the place where its
    /// engine says what it is doing.
    pub fn enroll(
        &self,
        communicator: u32,
        session: [u8; 16],
        (rank, ranks): (Rank, Arc<[Rank]>),
    ) -> Arc<Status> {
        let preamble = Preamble::of(&self.secret, &session);
        self.shared.open_channel(communicator, (session, preamble), (rank, ranks.len()));
        self.shared.enroll(communicator, ranks, rank)
    }

    /// This rank is no longer in a communicator.
    pub fn withdraw(&self, communicator: u32) {
        let last = self.shared.withdraw(communicator);
        self.command(Command::Part(communicator, last));
    }

    /// Tells rank 0 a line to keep; this is another rank. What is told after rank 0 has left is
    /// lost.
    pub fn keep(&self, line: String) {
        self.command(Command::Keep(line));
    }

    /// What other ranks told this one to keep, on rank 0.
    pub fn kept(&self) -> Arc<Kept> {
        self.shared.kept.clone()
    }

    /// Why the communicator has ended, if it has. One load until then.
    pub fn verdict(&self) -> Option<Verdict> {
        self.shared.verdict().cloned()
    }

    /// Whether there is a verdict. One load.
    pub fn is_over(&self) -> bool {
        self.shared.verdict().is_some()
    }

    /// Whether a rank has left the job in order. One load.
    pub fn has_left_job(&self, rank: Rank) -> bool {
        self.shared.has_left(rank)
    }

    /// Whether a rank for whose message this one waits is no longer in the communicator, as far as
    /// this rank has been told since it said so ([`Control::stalled`]).
    pub fn has_left_group(&self, communicator: u32, rank: Rank) -> bool {
        self.shared.has_left_group(communicator, rank)
    }

    /// Why the communicator has ended, or is about to: whoever may have missed that the others give
    /// up asks before it does what they count as the call that they wait for. Returns at once,
    /// unless the coordinator is finding out why a call is overdue; then within about 2 s.
    pub fn verdict_that_comes(&self) -> Option<Verdict> {
        self.shared.await_verdict_that_comes().cloned()
    }

    /// Blocks until there is a verdict, or until `until`.
    pub fn await_verdict(&self, until: Instant) -> Option<Verdict> {
        self.shared.await_verdict(until).cloned()
    }

    /// Tells the coordinator that this rank's link failed or its call differs; a verdict follows
    /// within about a second, or [`LINK_VERDICT_TIMEOUT`] if the coordinator is silent. Never
    /// blocks.
    pub fn accuse(&self, report: Report) {
        self.command(Command::Accuse(report));
    }

    /// Tells the coordinator that this rank's deadline for a call expired; a verdict follows
    /// within about 2 s. Never blocks.
    pub fn overdue(&self, stalled: StalledCall) {
        self.command(Command::Overdue(stalled));
    }

    /// Tells the coordinator that this rank has waited in a call for a while. A verdict follows
    /// only if another rank called something else under the same number. Never blocks.
    pub fn stalled(&self, stalled: StalledCall) {
        self.command(Command::Stalled(stalled));
    }

    /// What ends the communicator on this rank because the job goes on without it.
    pub(crate) fn superseder(&self) -> Superseder {
        Superseder(Arc::downgrade(&self.shared))
    }

    /// Leaves in order: for the others this rank has not died. Waits until the kernel has the
    /// goodbye, which is at once unless the network is stuck, and 1 s at most; where connections go
    /// on after they were cut, until its coordinator has it, or on the coordinator the others, and
    /// `reconnect_timeout` longer at most, unless there is a verdict; and not at all once the job
    /// goes on in another view. Joins no thread.
    /// Idempotent. Does nothing in a forked child: the membership is the parent's.
    pub fn leave(&self) {
        self.leave_within(GOODBYE_TIMEOUT);
    }

    fn leave_within(&self, limit: Duration) {
        if self.process != std::process::id() {
            return;
        }
        // AcqRel: pairs with itself, and with the load in `exchange`.
        if self.waker.is_none() || self.has_left.swap(true, Ordering::AcqRel) {
            return;
        }
        self.command(Command::Leave);
        // After a verdict nobody takes the end for a death.
        let more = if self.is_over() { Duration::ZERO } else { self.reconnect_timeout };
        self.shared.await_goodbye(Instant::now() + limit + more);
    }

    fn command(&self, command: Command) {
        let Some(waker) = &self.waker else { return };
        self.shared.command(command);
        // Writing to an eventfd fails only when it is full, and then the thread is awake.
        let _ = waker.wake();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Control");
        debug.field("rank", &self.shared.rank).field("world", &self.shared.world());
        debug.field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// Ends a communicator because the job goes on without it, as long as it is there.
pub(crate) struct Superseder(Weak<Shared>);

impl Superseder {
    /// Whether there is anything to end.
    fn is_needed(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Ends it, for this reason.
    fn supersede(&self, why: &str) {
        if let Some(shared) = self.0.upgrade() {
            shared.supersede(why);
        }
    }
}

fn new_session() -> Result<[u8; 16], ControlError> {
    handshake::random().map_err(|error| ControlError::system("choosing a session", error))
}

/// Tells rank 0, and so all ranks, that this one, which is another, can't join, and why. Blocks
/// until it is told, rank 0 has another `UNISUM_TLS`, or could not be reached within `timeout`.
///
/// # Errors
/// If rank 0 was not reached.
pub fn tell_that_not(
    config: &ControlConfig,
    why: &dyn fmt::Display,
    timeout: Duration,
) -> Result<(), ControlError> {
    let credentials = &config.credentials;
    let by = (&hello(config), credentials);
    let mut reached =
        dial::reach_unless(&config.rendezvous, by, timeout, |speaks_alike| !speaks_alike)?;
    dial::give_up(&mut reached.connection, config.rank, why);
    Ok(())
}

/// What a rank says first.
fn hello(config: &ControlConfig) -> Hello {
    Hello {
        purpose: Purpose::Control,
        socket: 0,
        from: config.rank as u32,
        to: 0,
        world: config.world as u32,
        session: Hello::of_process(std::process::id()),
        job: job_hash(&config.job),
        build: config.build,
    }
}

/// Other ranks: reach rank 0, then listen, best on the address that the route to it suggests.
fn dial(config: &ControlConfig) -> Result<Joined, ControlError> {
    let hello = hello(config);
    let is_moot = |_| config.is_moot.as_ref().is_some_and(|it| it.0());
    let with = (&hello, &config.credentials);
    let reached = dial::reach_unless(&config.rendezvous, with, config.connect_timeout, is_moot);
    let Reached { mut connection, coordinator, session, pulse } =
        reached.map_err(|error| error.with_origin(&config.secret_origin, &config.job))?;
    let filter = config.interface.as_ref();
    let is_name = match &config.rendezvous {
        Rendezvous::Tcp { host, .. } => !listen::is_literal(host),
        Rendezvous::File(_) | Rendezvous::Store { .. } => false,
    };
    // On its own host a name may be a loopback address, by which nobody else reaches this rank.
    let misleads = is_name && coordinator.ip().is_loopback();
    let towards = (!misleads).then_some(coordinator);
    let listening = listen::at_free_port(filter, towards, config.port_range)
        .inspect_err(|error| dial::give_up(&mut connection, config.rank, error))?;
    let role = Role::Member(connection, pulse);
    let coordinator = Some(coordinator);
    Ok(Joined { listening, session, coordinator, role, patience: None })
}

/// Starts the control thread. If that fails, the coordinator is told so.
fn spawn(
    config: ControlConfig,
    joined: Joined,
    shared: &Arc<Shared>,
) -> Result<Arc<Waker>, ControlError> {
    let (rank, world, connect_timeout) = (config.rank, config.world, config.connect_timeout);
    let failed = |error| ControlError::system("starting the control thread", error);
    let Joined { listening, session, role, patience, .. } = joined;
    let Listening { listeners, doubt, .. } = listening;
    // Before anybody learns where this rank listens.
    let preamble = Preamble::of(config.credentials.secret(), &session);
    shared.open_channel(0, (session, preamble), (rank, world));
    let made = prepare(config, listeners, session, shared);
    let made = made.and_then(|(waker, thread)| Ok((waker, thread, wait_to_run(rank, shared)?)));
    let (waker, thread, run) = match (made, role) {
        (Ok((waker, mut thread, run)), Role::Coordinator(published)) => {
            let coordinator = Coordinator::new(session, world, connect_timeout);
            let coordinator = coordinator.doubting(doubt).awaiting(patience);
            thread.coordinate(coordinator, published);
            (waker, thread, run)
        }
        (Ok((waker, mut thread, run)), Role::Member(connection, pulse)) => {
            thread.join(0, connection, pulse).map_err(failed)?;
            (waker, thread, run)
        }
        (Err(error), Role::Coordinator(_)) => return Err(failed(error)),
        (Err(error), Role::Member(mut connection, _)) => {
            let error = failed(error);
            dial::give_up(&mut connection, rank, &error);
            return Err(error);
        }
    };
    // It waits for nothing else.
    let _ = run.send(thread);
    Ok(waker)
}

/// What the control thread has, and what wakes it.
fn prepare(
    config: ControlConfig,
    listeners: Listeners,
    session: [u8; 16],
    shared: &Arc<Shared>,
) -> io::Result<(Arc<Waker>, ControlThread)> {
    let ControlConfig { rank, world, job, credentials, secret_origin, build, .. } = config;
    let felt = (Pulses::new(config.heartbeat_timeout), Resuming::new(config.reconnect_timeout));
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), thread::WAKER)?);
    let job = job_hash(&job);
    let preamble = Preamble::of(credentials.secret(), &session);
    let identity =
        Identity { rank, world, session, preamble, job, build, credentials, secret_origin };
    let poll = (poll, Arc::clone(&waker));
    let thread = ControlThread::new(poll, identity, Arc::clone(shared), listeners, felt)?;
    Ok((waker, thread))
}

/// A thread that runs what it is sent: so that a process that can have no more threads finds out
/// while it can still say so.
fn wait_to_run(rank: Rank, shared: &Arc<Shared>) -> io::Result<mpsc::Sender<ControlThread>> {
    let (sender, receiver) = mpsc::channel::<ControlThread>();
    let end = End(Arc::clone(shared));
    std::thread::Builder::new().name("unisum-control".into()).spawn(move || {
        let end = end;
        let Ok(mut thread) = receiver.recv() else { return };
        if let Err(error) = thread.run() {
            end.0.conclude(Verdict::died(rank, &format!("its control thread failed: {error}")));
        }
    })?;
    Ok(sender)
}

/// Lets nobody wait for a thread that has ended, be it by a panic.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let rank = self.0.rank;
            self.0.conclude(Verdict::died(rank, "its control thread panicked"));
        }
        self.0.said_goodbye();
        self.0.release();
    }
}
