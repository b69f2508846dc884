//! The control plane of elastic jobs: who is in the job, agreed on anew after each loss, on
//! connections that outlive communicators.
//!
//! Every two members have a connection, served by one thread in each process, and dead while
//! nothing changes. The kernel closes a dead process's connections at once, and those to a host
//! that does not answer after a time that the user sets; what follows is for
//! [`Participant`] to say (`unisum-views`: pure). A [`Control`] belongs
//! to one view, or to a group of members. When the view changes, those that were bound to an
//! earlier one get a verdict, as do those of groups that lose a member, and the members start
//! another one, whose first rank tells the others by these connections where it listens.

mod dialing;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod joining;
mod record;
mod shared;
#[cfg(test)]
mod tests;
mod thread;
mod words;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Poll, Waker};
use unisum_link::handshake::{Build, job_hash};
use unisum_link::secure::{Credentials, Preamble};

use self::dialing::{Dialer, Dials};
use self::shared::{Bound, Command, Shared};
use self::thread::{Mesh, ViewsThread};
use super::{Control, ControlError, GOODBYE_TIMEOUT, Verdict, listen};
use crate::address::PortRange;
use crate::interface::InterfaceFilter;

pub use self::joining::Find;
pub use self::record::{PublishedRecord, Record};
pub use self::shared::Membership;
use unisum_views::Participant;
pub use unisum_views::{Member, Standing, View};

/// What a process needs to be a member of an elastic job.
#[derive(Clone, Debug)]
pub struct ViewsConfig {
    /// The job's name, the same on all ranks.
    pub job: String,
    /// What proves that a process belongs to the job.
    pub credentials: Credentials,
    /// Which network interfaces other members may reach this one by.
    pub interface: Option<InterfaceFilter>,
    /// Which ports this process may listen on.
    pub port_range: Option<PortRange>,
    /// How long a member may be silent before it is lost.
    pub silence: Duration,
    /// How long connecting to the others may take.
    pub connect_timeout: Duration,
    /// How long a connection that was cut while both processes live may take to go on in another
    /// one; zero: its end is a loss.
    pub reconnect_timeout: Duration,
    /// Which build this is: members of different builds are refused.
    pub build: Build,
    /// What all members have to have alike, as text: a newcomer that has something else ends with
    /// an error before it asks to be let in.
    pub terms: String,
    /// Who this process is if it joins a job that repeats an earlier one; otherwise, a newcomer
    /// draws its number.
    pub newcomer: Option<Member>,
}

/// A process that listens for other members, and is no member yet.
#[derive(Debug)]
pub struct Prospect {
    config: ViewsConfig,
    listening: listen::Listening,
}

/// This process's membership in an elastic job. Dropping it leaves, in order.
pub struct Views {
    shared: Arc<Shared>,
    waker: Arc<Waker>,
    own: Member,
    session: [u8; 16],
    process: u32,
    reconnect_timeout: Duration,
    listens_at: Option<SocketAddr>,
}

impl Prospect {
    /// Listens on a port of its own. The address that the others try first is that by which this
    /// process reaches `towards`, its own address on a network or another member's; if there is
    /// no way, or it is not given, that of the default route.
    ///
    /// # Errors
    /// If this process can't listen.
    pub fn listen(config: ViewsConfig, towards: Option<SocketAddr>) -> Result<Self, ControlError> {
        let filter = config.interface.as_ref();
        let listening = listen::preferably(filter, towards, config.port_range)?;
        Ok(Self { config, listening })
    }

    /// Where the other members reach this process.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.listening.addresses
    }

    /// Founds the job's views: a first view of as many members as there are `addresses`, by rank,
    /// in which this process has rank `rank`. Connects to the members of lower ranks; the others
    /// connect to this one, which all have done when all have returned from this. Blocks for that,
    /// `connect_timeout` at most, and no longer than until there is a `verdict` on the job.
    ///
    /// # Errors
    /// [`ControlError::Ended`] if there is a verdict while another member can't be reached, else
    /// why it can't be.
    pub fn found(
        self,
        session: [u8; 16],
        rank: usize,
        addresses: Vec<Vec<SocketAddr>>,
        verdict: &dyn Fn() -> Option<Verdict>,
    ) -> Result<Views, ControlError> {
        let view = View::first((0..addresses.len() as u64).map(Member).collect());
        let own = Member(rank as u64);
        let directory = (0..).map(Member).zip(addresses).collect();
        let dialer = Dialer::new(&self.config, own, session);
        let views = self.spawn(own, Some(view), session, (directory, dialer.clone()))?;
        for lower in (0..rank as u64).map(Member) {
            let addresses = views.shared.addresses(lower);
            let dialled = dialer.dial(lower, &addresses, || verdict().is_some());
            // It explains why nobody is there.
            let explained = |error| verdict().map_or(error, ControlError::Ended);
            let (stream, at) = dialled.map_err(explained)?;
            views.command(Command::Connected(lower, stream, at));
        }
        Ok(views)
    }

    fn spawn(
        self,
        own: Member,
        view: Option<View>,
        session: [u8; 16],
        (directory, dialer): (Vec<(Member, Vec<SocketAddr>)>, Dialer),
    ) -> Result<Views, ControlError> {
        let shared = Arc::new(Shared::new(view.clone(), directory));
        let system = |error| ControlError::system("starting the thread of an elastic job", error);
        let poll = Poll::new().map_err(system)?;
        let waker = Arc::new(Waker::new(poll.registry(), thread::WAKER).map_err(system)?);
        let reconnect_timeout = self.config.reconnect_timeout;
        let listens_at = self.listening.addresses.first().copied();
        let (listeners, world) = (self.listening.listeners, shared.world());
        let identity = thread::Identity {
            own,
            session,
            preamble: Preamble::of(self.config.credentials.secret(), &session),
            job: job_hash(&self.config.job),
            build: self.config.build,
            credentials: self.config.credentials,
            silence: self.config.silence,
            reconnect_timeout,
        };
        let dials = Dials::new(dialer, shared.clone(), waker.clone());
        let mesh = Mesh::new(dials, self.config.terms, view.clone().unwrap_or_default());
        let participant = match view {
            Some(view) => Participant::new(own, view),
            None => Participant::newcomer(own),
        };
        let with = (shared.clone(), mesh);
        let started = ViewsThread::new(poll, identity, (listeners, world), participant, with);
        let mut thread = started.map_err(system)?;
        let end = End(shared.clone());
        let run = move || {
            let end = end;
            if let Err(error) = thread.run() {
                end.0.fail(&format!("the thread of the elastic job failed: {error}"));
            }
        };
        std::thread::Builder::new().name("unisum-views".into()).spawn(run).map_err(system)?;
        let process = std::process::id();
        Ok(Views { shared, waker, own, session, process, reconnect_timeout, listens_at })
    }
}

/// Lets nobody wait for a thread that has ended.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.fail("the thread of the elastic job has ended");
    }
}

impl Views {
    /// Who this process is, in all views.
    pub const fn own(&self) -> Member {
        self.own
    }

    /// Where the others try first to reach this process. Later communicators prefer that network.
    pub const fn listens_at(&self) -> Option<SocketAddr> {
        self.listens_at
    }

    /// Where the members of a view can be reached, as far as this process knows, for processes that
    /// want to join.
    pub fn record(&self, view: &View) -> Record {
        let mut members = self.shared.directory();
        members.retain(|(member, addresses)| view.has(*member) && !addresses.is_empty());
        members.sort_by_key(|(member, _)| view.rank(*member));
        Record { session: self.session, epoch: view.epoch, members }
    }

    /// What this process knows of the job now.
    pub fn membership(&self) -> Membership {
        self.shared.membership()
    }

    /// Has the view changed, for the whole job: without the members in `out`, and with those that
    /// wait to be let in if it `admits` them. Only if the epoch is still `epoch`: a change that is
    /// over is not repeated. Never blocks.
    pub fn change(&self, epoch: u64, out: Vec<Member>, admits: bool) {
        self.command(Command::Change { epoch, out, admits });
    }

    /// Waits until the job is in a later epoch than `epoch` and the view is not changing, or this
    /// process is no longer in it; `until` at most. What is known then.
    pub fn await_change(&self, epoch: u64, until: Instant) -> Membership {
        self.shared.wait(until, |it| it.is_over() || it.view.epoch > epoch && !it.is_changing)
    }

    /// Waits until what is known of the job is something else than `known`, or `until`.
    pub fn await_other(&self, known: &Membership, until: Instant) -> Membership {
        self.shared.wait(until, |it| it != known)
    }

    /// Waits until as many processes as `count` ask to be let in, or this one is no longer in the
    /// job, or `until`. What is known then.
    pub fn await_newcomers(&self, count: usize, until: Instant) -> Membership {
        self.shared.wait(until, |it| it.is_over() || it.newcomers >= count)
    }

    /// Ends `control` when the job leaves `epoch`, at once if it has: what waits there gets a
    /// verdict.
    pub fn bind(&self, epoch: u64, control: &Arc<Control>) {
        self.shared.bind(Bound::Epoch(epoch), control.superseder());
    }

    /// Ends `control` when one of `members` is no longer in the job, or this process is not, at
    /// once if that is so: what waits there gets a verdict.
    pub fn bind_members(&self, members: Vec<Member>, control: &Arc<Control>) {
        self.shared.bind(Bound::Members(members), control.superseder());
    }

    /// Tells all members of `epoch` a value, where its first rank can be reached. Never blocks.
    pub fn tell(&self, epoch: u64, value: &[u8]) {
        self.command(Command::Tell { epoch, value: value.to_vec() });
    }

    /// What the first rank of `epoch` told last. Blocks until it has, or the epoch is over, or
    /// `until`.
    pub fn told(&self, epoch: u64, until: Instant) -> Option<Vec<u8>> {
        self.shared.told(epoch, until)
    }

    /// Says whether every member of the view is needed, as this process makes a communicator of it:
    /// then those that leave in order are lost like others. What was said is taken back as often.
    /// Never blocks.
    pub fn need_all(&self, need: bool) {
        self.command(Command::NeedAll(need));
    }

    /// Whether `epoch` is over, or about to be.
    pub fn is_left(&self, epoch: u64) -> bool {
        self.shared.membership().has_left(epoch)
    }

    /// Whether `epoch` is over, or about to be, at `until` or before; blocks until it is.
    pub fn await_left(&self, epoch: u64, until: Instant) -> bool {
        self.shared.wait(until, |it| it.has_left(epoch)).has_left(epoch)
    }

    /// Leaves in order: to the others this process has not died. Waits until the kernel has the
    /// goodbyes, a second at most; where connections go on after they were cut, until the others
    /// have them, and as much longer at most as that may take. Idempotent. Does nothing in a forked
    /// child.
    pub fn leave(&self) {
        if self.process != std::process::id() {
            return;
        }
        self.command(Command::Leave);
        self.shared.await_goodbye(Instant::now() + GOODBYE_TIMEOUT + self.reconnect_timeout);
    }

    fn command(&self, command: Command) {
        self.shared.command(command);
        // Writing to an eventfd fails only when it is full, and then the thread is awake.
        let _ = self.waker.wake();
    }
}

impl Drop for Views {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for Views {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let membership = self.membership();
        f.debug_struct("Views").field("own", &self.own).field("is", &membership).finish()
    }
}
