//! What the control thread and the rank's other threads share.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use unisum_link::secure::{Preamble, Proven};
use unisum_link::{Rank, Wake};

use super::callers;
use super::doing::{Doing, PARTS_MAX, Part};
use super::kept::Kept;
use super::message::StalledCall;
use super::share::Share;
use super::status::{Snapshot, Status, Told};
use super::verdict::{Report, Verdict};

/// Most data connections between two ranks.
const SOCKETS_MAX: usize = 16;

/// Who takes the data connections: peer, socket index, non-blocking connection.
pub type Inbox = Arc<dyn Fn(Rank, u8, Proven) + Send + Sync>;

/// What the rank's threads ask of the control thread.
#[derive(Debug)]
pub(super) enum Command {
    Exchange(Share),
    /// The exchange has lasted so long, which is all that it may.
    Missing(Duration),
    Accuse(Report),
    Overdue(StalledCall),
    Stalled(StalledCall),
    /// This rank is no longer in a communicator, where it did this last.
    Part(u32, Snapshot),
    /// Rank 0 is to keep a line.
    Keep(String),
    Leave,
}

pub(super) struct Shared {
    pub(super) rank: Rank,
    /// What this rank does in each of its communicators.
    statuses: Mutex<Vec<(u32, Arc<Status>)>>,
    verdict: OnceLock<Verdict>,
    left: Box<[AtomicBool]>,
    /// Communicators and ranks that are no longer in them, of those that a message is awaited from.
    left_group: Mutex<BTreeSet<(u32, Rank)>>,
    /// Who is woken by the verdict, with the communicator it belongs to.
    wakers: Mutex<Vec<(u32, Arc<dyn Wake>)>>,
    arrivals: Mutex<Arrivals>,
    /// By rank, where it listens.
    addresses: OnceLock<Vec<Vec<SocketAddr>>>,
    commands: Mutex<Vec<Command>>,
    news: Mutex<News>,
    pub(super) kept: Arc<Kept>,
    changed: Condvar,
}

/// Data connections, by the communicators they belong to.
#[derive(Default)]
struct Arrivals {
    channels: Vec<Channel>,
}

/// A communicator that takes data connections; those that come too early wait.
struct Channel {
    communicator: u32,
    session: [u8; 16],
    preamble: Preamble,
    /// This rank's number in it, and how many ranks it has.
    rank: Rank,
    world: usize,
    inbox: Option<Inbox>,
    early: Vec<(Rank, u8, Proven)>,
}

/// What somebody may be waiting for, beside the verdict.
#[derive(Debug, Default)]
struct News {
    gathered: Option<Vec<Bytes>>,
    said_goodbye: bool,
    /// Until when a verdict is awaited, once the coordinator has asked what this rank does because
    /// a call is overdue.
    judged_until: Option<Instant>,
    /// Whether the job goes on without this communicator.
    is_superseded: bool,
}

impl Shared {
    pub(super) fn new(rank: Rank, world: usize) -> Self {
        Self {
            rank,
            statuses: Mutex::default(),
            verdict: OnceLock::new(),
            left: (0..world).map(|_| AtomicBool::new(false)).collect(),
            left_group: Mutex::default(),
            wakers: Mutex::default(),
            arrivals: Mutex::default(),
            addresses: OnceLock::new(),
            commands: Mutex::default(),
            news: Mutex::default(),
            kept: Arc::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn world(&self) -> usize {
        self.left.len()
    }

    pub(super) fn verdict(&self) -> Option<&Verdict> {
        self.verdict.get()
    }

    /// Ends the communicator on this rank and wakes everybody; the first verdict counts.
    pub(super) fn conclude(&self, verdict: Verdict) {
        if self.verdict.set(verdict).is_err() {
            return;
        }
        // Taken so that nobody is between looking at the verdict and sleeping.
        drop(lock(&self.news));
        self.changed.notify_all();
        lock(&self.wakers).iter().for_each(|(_, waker)| waker.wake());
    }

    /// The job goes on without this communicator: that is the verdict, unless there is one, and
    /// nobody waits for those that have not come.
    pub(super) fn supersede(&self, why: &str) {
        self.conclude(Verdict::superseded(why));
        lock(&self.news).is_superseded = true;
        self.changed.notify_all();
    }

    /// Registers who is woken by the verdict, at once if there is one.
    pub(super) fn add_waker(&self, communicator: u32, waker: Arc<dyn Wake>) {
        lock(&self.wakers).push((communicator, Arc::clone(&waker)));
        // After the push: either `conclude` sees the waker, or this sees the verdict.
        if self.verdict().is_some() {
            waker.wake();
        }
    }

    /// The status of a communicator that this rank is in from now on.
    pub(super) fn enroll(&self, communicator: u32, ranks: Arc<[Rank]>, rank: Rank) -> Arc<Status> {
        let status = Arc::new(Status::new(ranks, rank));
        lock(&self.statuses).push((communicator, Arc::clone(&status)));
        status
    }

    /// The rank is no longer in a communicator; what it did there last. That of the job's own
    /// communicator is still told when the rank leaves the job.
    pub(super) fn withdraw(&self, communicator: u32) -> Snapshot {
        let last = self.snapshot(communicator);
        if communicator != 0 {
            lock(&self.statuses).retain(|(known, _)| *known != communicator);
        }
        lock(&self.wakers).retain(|(known, _)| *known != communicator);
        lock(&self.arrivals).channels.retain(|channel| channel.communicator != communicator);
        last
    }

    /// What this rank does in a communicator, or did last in the job's own; nothing if it is not in
    /// it.
    pub(super) fn snapshot(&self, communicator: u32) -> Snapshot {
        let statuses = lock(&self.statuses);
        let status = statuses.iter().find(|(known, _)| *known == communicator);
        status.map_or_else(Snapshot::default, |(_, status)| status.snapshot())
    }

    /// What this rank does in a communicator, and the job's numbers of the ranks there; none if it
    /// is not in it.
    pub(super) fn place(&self, communicator: u32) -> Option<(Snapshot, Arc<[Rank]>)> {
        let statuses = lock(&self.statuses);
        let (_, status) = statuses.iter().find(|(known, _)| *known == communicator)?;
        Some((status.snapshot(), status.ranks().clone()))
    }

    /// What this rank does in a communicator, and in all others.
    pub(super) fn doing(&self, communicator: u32) -> Doing {
        let statuses = lock(&self.statuses);
        let look = || -> Vec<Part> {
            statuses.iter().map(|(communicator, status)| status.part(*communicator)).collect()
        };
        let (hold, mut parts) = callers::while_held(look);
        let here = parts.iter().find(|part| part.communicator == communicator);
        let here = here.map_or_else(Snapshot::default, |part| part.doing);
        // Of too many those count that the rank is in a call of.
        parts.sort_by_key(|part| !part.is_inside());
        parts.truncate(PARTS_MAX);
        Doing { here, hold, parts }
    }

    /// The newest calls of this rank in a communicator; none if it is not in it.
    pub(super) fn told(&self, communicator: u32) -> Vec<Told> {
        let statuses = lock(&self.statuses);
        let status = statuses.iter().find(|(known, _)| *known == communicator);
        status.map_or_else(Vec::new, |(_, status)| status.told())
    }

    pub(super) fn set_left(&self, rank: Rank) {
        // Release: pairs with the Acquire load in `has_left`; what the rank did came before.
        self.left[rank].store(true, Ordering::Release);
    }

    /// Whether the rank has left in order. One load.
    pub(super) fn has_left(&self, rank: Rank) -> bool {
        self.left[rank].load(Ordering::Acquire)
    }

    /// A rank for whose message this one waits is no longer in the communicator.
    pub(super) fn set_left_group(&self, communicator: u32, rank: Rank) {
        lock(&self.left_group).insert((communicator, rank));
    }

    /// Whether that was told.
    pub(super) fn has_left_group(&self, communicator: u32, rank: Rank) -> bool {
        lock(&self.left_group).contains(&(communicator, rank))
    }

    /// By rank, where it listens; the first time counts.
    pub(super) fn set_addresses(&self, addresses: Vec<Vec<SocketAddr>>) {
        let _ = self.addresses.set(addresses);
    }

    /// By rank, where it listens; empty if that is not known.
    pub(super) fn addresses(&self) -> Vec<Vec<SocketAddr>> {
        self.addresses.get().cloned().unwrap_or_default()
    }

    /// Where a rank listens; empty if that is not known.
    pub(super) fn addresses_of(&self, rank: Rank) -> Vec<SocketAddr> {
        self.addresses.get().and_then(|all| all.get(rank)).cloned().unwrap_or_default()
    }

    /// Takes data connections of a communicator from now on.
    pub(super) fn open_channel(
        &self,
        communicator: u32,
        (session, preamble): ([u8; 16], Preamble),
        (rank, world): (Rank, usize),
    ) {
        let (inbox, early) = (None, Vec::new());
        let channel = Channel { communicator, session, preamble, rank, world, inbox, early };
        lock(&self.arrivals).channels.push(channel);
    }

    /// This rank's number and the number of ranks in the communicator of a session.
    pub(super) fn channel(&self, session: &[u8; 16]) -> Option<(Rank, usize)> {
        let arrivals = lock(&self.arrivals);
        let channel = arrivals.channels.iter().find(|channel| channel.session == *session)?;
        Some((channel.rank, channel.world))
    }

    /// Whether data connections are taken for the session with this preamble.
    pub(super) fn awaits(&self, preamble: Preamble) -> bool {
        lock(&self.arrivals).channels.iter().any(|channel| channel.preamble == preamble)
    }

    /// Hands a data connection over, or keeps it until somebody takes it. `false` if too many
    /// wait already, or nobody ever will.
    pub(super) fn arrived(
        &self,
        session: &[u8; 16],
        peer: Rank,
        socket: u8,
        connection: Proven,
    ) -> bool {
        let mut arrivals = lock(&self.arrivals);
        let mut channels = arrivals.channels.iter_mut();
        let Some(channel) = channels.find(|channel| channel.session == *session) else {
            return false;
        };
        if let Some(inbox) = channel.inbox.clone() {
            drop(arrivals);
            inbox(peer, socket, connection);
            return true;
        }
        let has_room = channel.early.len() < SOCKETS_MAX * channel.world;
        if has_room {
            channel.early.push((peer, socket, connection));
        }
        has_room
    }

    pub(super) fn set_inbox(&self, communicator: u32, inbox: Inbox) {
        let mut arrivals = lock(&self.arrivals);
        let mut channels = arrivals.channels.iter_mut();
        let Some(channel) = channels.find(|channel| channel.communicator == communicator) else {
            return;
        };
        for (peer, socket, connection) in channel.early.drain(..) {
            inbox(peer, socket, connection);
        }
        channel.inbox = Some(inbox);
    }

    /// Lets go of what others gave: wakers, the inbox and waiting connections.
    pub(super) fn release(&self) {
        *lock(&self.arrivals) = Arrivals::default();
        lock(&self.wakers).clear();
    }

    pub(super) fn command(&self, command: Command) {
        lock(&self.commands).push(command);
    }

    pub(super) fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut lock(&self.commands))
    }

    pub(super) fn gathered(&self, blobs: Vec<Bytes>) {
        lock(&self.news).gathered = Some(blobs);
        self.changed.notify_all();
    }

    pub(super) fn said_goodbye(&self) {
        lock(&self.news).said_goodbye = true;
        self.changed.notify_all();
    }

    /// Waits for the blobs of the exchange under way; `None` at the verdict or at `until`.
    pub(super) fn await_gathered(&self, until: Instant) -> Option<Vec<Bytes>> {
        let is_over = |news: &News| news.gathered.is_some() || self.verdict().is_some();
        self.wait(until, is_over).gathered.take()
    }

    pub(super) fn await_verdict(&self, until: Instant) -> Option<&Verdict> {
        drop(self.wait(until, |_| self.verdict().is_some()));
        self.verdict()
    }

    /// The coordinator asks all ranks why a call is overdue: a verdict follows by then, unless the
    /// coordinator ends or all that waited have left. This rank has not answered yet, so that none
    /// has given up.
    pub(super) fn is_judged(&self, until: Instant) {
        lock(&self.news).judged_until = Some(until);
    }

    /// Blocks until there is a verdict if one is on its way.
    pub(super) fn await_verdict_that_comes(&self) -> Option<&Verdict> {
        if self.verdict().is_some() {
            return self.verdict();
        }
        let until = lock(&self.news).judged_until;
        until.and_then(|until| self.await_verdict(until))
    }

    pub(super) fn await_goodbye(&self, until: Instant) {
        drop(self.wait(until, |news| news.said_goodbye || news.is_superseded));
    }

    fn wait(&self, until: Instant, is_over: impl Fn(&News) -> bool) -> MutexGuard<'_, News> {
        let time = until.saturating_duration_since(Instant::now());
        let news = lock(&self.news);
        let waited = self.changed.wait_timeout_while(news, time, |news| !is_over(news));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Every critical section leaves what it guards whole, so a panic of another thread spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The coordinator would stay for ranks that were lost before they came, and the next view
    /// would wait for it.
    #[test]
    fn nobody_waits_for_a_goodbye_where_the_job_has_gone_on() {
        let far = Instant::now() + Duration::from_secs(3600);
        for has_verdict in [false, true] {
            let shared = Shared::new(0, 3);
            if has_verdict {
                shared.conclude(Verdict::died(2, "its connection ended"));
            }
            std::thread::scope(|scope| {
                let leaving = scope.spawn(|| shared.await_goodbye(far));
                shared.supersede("the job goes on in epoch 2");
                leaving.join().expect("it returns");
            });
            let first = shared.verdict().expect("there is one");
            assert_eq!(first.failed_ranks.is_empty(), !has_verdict, "the first verdict stays");
        }
    }
}
