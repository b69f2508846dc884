//! What happens to connections while the program is not in a call: a thread of the link notices
//! those that break, dials them anew or answers, and sends again what was lost.
//!
//! It is woken by ends and errors, not by data, so that calls go on as if it were not there; and
//! some ten times a second, to see whether connections to other hosts are silent. Beside one that
//! is, it dials another, with an attempt every 50 ms: the flow goes on in whichever is heard first.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use unisum_link::secure::Proven;
use unisum_link::{LinkError, Rank, Wake, fork};

use super::flow::{Flow, KNOCK_PAUSE, Knock};
use super::incoming::Arriving;
use super::meeting::Met;
use crate::TcpConfig;
use crate::options;
use crate::sleep::Bell;
use crate::socket::Moving;
use unisum_link::inbox::{Arrived, Inbox};

/// The pause before a connection is dialled that broke before it stood; twice as long each time,
/// up to the second of these.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(320);
/// How long the other end may take to see that this one leaves, before its keeper is woken.
const LEAVING_SEEN: Duration = Duration::from_millis(20);

/// How long it may take to say what it has, where the connection stands (it may be stopped), and
/// how long a connection may take on which there is nothing left to say but that.
const LEAVING_MAX: Duration = Duration::from_secs(2);

/// In place of the number of a connection: a dial that only asks whether the other end, which
/// dials, still listens for this socket, and has it dial.
const KNOCK: u32 = u32::MAX;
/// How long a connection is dialled beside one that is silent, until it is asked again whether it
/// still is.
const BESIDE: Duration = Duration::from_secs(1);

/// What the thread is to do.
const SERVE: u8 = 0;
const LEAVE: u8 = 1;
const STOP: u8 = 2;

/// A flow, shared by the link and its keeper.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Arc<Mutex<Flow>>);

impl Handle {
    pub(super) fn new(flow: Flow) -> Self {
        Self(Arc::new(Mutex::new(flow)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Flow> {
        // A panic of the one thread ends the other, too: the link's error is the panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The flow of the `socket`-th connection to a rank.
type Key = (Rank, u8);

/// The thread, for the link.
#[derive(Debug)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    fork_generation: u32,
}

#[derive(Debug)]
struct Shared {
    config: TcpConfig,
    inbox: Arc<Inbox>,
    bell: Arc<Bell>,
    link: Arc<dyn Wake>,
    order: AtomicU8,
    flows: Mutex<BTreeMap<Key, Handle>>,
    /// Flows with another connection, bytes that no event tells of, or none ever again.
    news: Mutex<Vec<Key>>,
}

impl Keeper {
    /// A keeper, which has connections from `inbox` and is woken by `bell`; it wakes `link`.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(crate) fn new(
        config: TcpConfig,
        inbox: Arc<Inbox>,
        bell: Arc<Bell>,
        link: Arc<dyn Wake>,
    ) -> io::Result<Self> {
        let (order, flows, news) = (AtomicU8::new(SERVE), Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { config, inbox, bell, link, order, flows, news });
        let kept = shared.clone();
        let thread =
            thread::Builder::new().name("unisum-reconnect".into()).spawn(move || kept.run())?;
        Ok(Self { shared, thread: Some(thread), fork_generation: fork::generation() })
    }

    /// The flow of the `socket`-th connection to a rank.
    pub(crate) fn flow(&self, peer: Rank, socket: u8) -> Handle {
        self.shared.flow((peer, socket))
    }

    /// Dials a peer's `socket`-th connection for the first time.
    ///
    /// # Errors
    /// If the system gives no thread to dial.
    pub(crate) fn dial_first(&self, peer: Rank, socket: u8) -> Result<(), LinkError> {
        self.flow(peer, socket).lock().dials_first();
        self.shared.inbox.dial(self.shared.config.dial(peer, socket, 1))
    }

    /// The flows that have news.
    pub(crate) fn take_news(&self) -> Vec<Key> {
        std::mem::take(&mut lock(&self.shared.news))
    }

    pub(crate) fn has_news(&self) -> bool {
        !lock(&self.shared.news).is_empty()
    }

    /// Ends the thread without waiting for anybody.
    pub(crate) fn stop(&self) {
        self.order(STOP);
    }

    /// Waits until the others have what was sent to them, unless the thread was stopped. Blocks for
    /// as long as a connection may be away at most.
    pub(crate) fn leave(&mut self) {
        if fork::current() != self.fork_generation {
            // The thread is the parent's.
            return drop(self.thread.take());
        }
        self.order(LEAVE);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was told where it happened.
            let _ = thread.join();
        }
    }

    fn order(&self, order: u8) {
        // Relaxed: the order says nothing of other memory. It is never taken back: `STOP` is the
        // highest.
        self.shared.order.fetch_max(order, Ordering::Relaxed);
        self.shared.bell.wake();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that holds one of these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn flow(&self, key: Key) -> Handle {
        let limit = self.config.reconnect_timeout;
        let (peer, socket) = key;
        let bell = self.bell.clone();
        let new = || Handle::new(Flow::new((peer, socket), limit, bell));
        lock(&self.flows).entry(key).or_insert_with(new).clone()
    }

    fn tell(&self, key: Key) {
        lock(&self.news).push(key);
        self.link.wake();
    }

    fn run(&self) {
        let mut leaving = None;
        loop {
            // Relaxed: see `Keeper::order`.
            let order = self.order.load(Ordering::Relaxed);
            if order == STOP {
                return;
            }
            self.inbox.take().into_iter().for_each(|arrived| self.take(arrived));
            let flows: Vec<(Key, Handle)> =
                lock(&self.flows).iter().map(|(key, flow)| (*key, flow.clone())).collect();
            if order == LEAVE {
                let since = *leaving.get_or_insert_with(Instant::now);
                let is_through = flows.iter().all(|(_, flow)| self.leave(flow, since));
                if is_through {
                    return;
                }
            }
            let due = flows.iter().filter_map(|(key, flow)| self.look(*key, flow)).min();
            let leaving_due = leaving.map(|since| since + LEAVING_SEEN);
            let leaving_due = leaving_due.map(|due| due.max(Instant::now() + LEAVING_SEEN));
            let due = due.into_iter().chain(leaving_due).min();
            self.wait(&flows, order == LEAVE, due);
        }
    }

    /// Takes over a connection that was dialled, or came, or was not to be had.
    fn take(&self, arrived: Arrived) {
        let Arrived { peer, socket, attempt, result, is_late } = arrived;
        let own = self.config.rank;
        let is_dialled = attempt > 0;
        if attempt == KNOCK {
            return self.knocked((peer, socket), result.map(drop), is_late);
        }
        // The higher rank dials.
        if peer < own && !is_dialled {
            return self.asked((peer, socket));
        }
        if socket >= self.config.sockets_per_peer || (peer < own) != is_dialled {
            unisum_link::warning!(peer, socket, "a connection that nobody asked for is closed");
            return;
        }
        let key = (peer, socket);
        let handle = self.flow(key);
        let mut flow = handle.lock();
        if flow.is_failed() {
            return;
        }
        if is_dialled {
            let is_beside = std::mem::take(&mut flow.outage.is_beside);
            flow.outage.is_dialled = false;
            if is_beside && !take_over(&mut flow, &result) {
                return;
            }
        }
        let met = result.and_then(|connection| {
            match options::prepare(&connection.stream, self.config.heartbeat_timeout) {
                Err(error) if unisum_link::is_lack(&error) => {
                    Err(LinkError::lacking(peer, "preparing the socket", error))
                }
                Err(error) => Ok(Err(error)),
                Ok(_) => {
                    let stream = Arc::new(connection.stream);
                    Ok(flow.meet(stream, connection.session, is_dialled.then_some(attempt)))
                }
            }
        });
        match met {
            Ok(Ok(())) => drop(flow),
            Ok(Err(error)) => {
                tracing::debug!(peer, socket, %error, "a new connection broke at once");
                flow.outage.since.get_or_insert_with(Instant::now);
            }
            Err(error) => {
                // What broke the connection is the cause, not that there is no other one.
                let cause = flow.outage.cause.take();
                tracing::info!(peer, socket, %error, "a connection is not to be had");
                flow.fail(cause.unwrap_or(error));
                drop(flow);
                self.tell(key);
            }
        }
    }

    /// Asks, where the other end dials and has not come back, whether it is there at all. It may
    /// have left after an answer that did not arrive: then it does not listen for this socket any
    /// more, its port refuses, and nothing is to be waited for.
    fn knock(&self, flow: &mut Flow, left: Duration) {
        let is_missed = flow.stream().is_none() && flow.meeting.is_none() && !flow.is_failed();
        if flow.peer > self.config.rank && is_missed {
            self.ask(flow, left);
        }
    }

    /// Asks the other end, which dials, for so long, unless it was asked a moment ago.
    fn ask(&self, flow: &mut Flow, left: Duration) {
        let Knock::Due(due) = flow.outage.knock else { return };
        if Instant::now() < due {
            return;
        }
        let mut dial = self.config.dial(flow.peer, flow.socket, KNOCK);
        dial.timeout = left;
        flow.outage.knock = match self.inbox.dial(dial) {
            Ok(()) => Knock::UnderWay,
            Err(error) => Knock::after(&Err(error), false, Instant::now()),
        };
    }

    /// What came of that.
    fn knocked(&self, key: Key, result: Result<(), LinkError>, is_late: bool) {
        let handle = self.flow(key);
        let mut flow = handle.lock();
        // It may have come back meanwhile.
        if flow.outage.knock != Knock::UnderWay {
            return;
        }
        flow.outage.knock = Knock::after(&result, is_late, Instant::now());
        if let (Knock::Gone, Err(error)) = (flow.outage.knock, result) {
            let (peer, socket) = key;
            tracing::info!(peer, socket, %error, "nobody is there any more who would come back");
        }
    }

    /// The other end, which can't dial, asks whether this one is there: this one has not noticed
    /// yet that the connection has ended, or is silent, or comes back just now.
    fn asked(&self, (peer, socket): Key) {
        tracing::debug!(peer, socket, "asked whether this end is there: it is");
        // That of a socket which there is not would be made here.
        let Some(handle) = lock(&self.flows).get(&(peer, socket)).cloned() else { return };
        let mut flow = handle.lock();
        if flow.stream().is_some() && flow.stands_for() >= KNOCK_PAUSE {
            flow.outage.is_asked = true;
            self.dial_beside(&mut flow);
        }
    }

    /// Sees to another connection if the one that stands is silent; when to look again.
    fn listen(&self, flow: &mut Flow) -> Option<Instant> {
        let (silent, next) = flow.listen(Instant::now());
        let Some(silent) = silent.filter(|_| flow.meeting.is_none()) else { return next };
        let (peer, socket) = (flow.peer, flow.socket);
        tracing::debug!(peer, socket, ?silent, "nothing is heard of the other host");
        if peer < self.config.rank {
            self.dial_beside(flow);
        } else {
            self.ask(flow, BESIDE);
        }
        next
    }

    /// Dials another connection beside the one that stands, unless one is being dialled.
    fn dial_beside(&self, flow: &mut Flow) {
        if flow.outage.is_dialled || flow.meeting.is_some() || flow.is_failed() {
            return;
        }
        flow.attempt += 1;
        let mut dial = self.config.dial(flow.peer, flow.socket, flow.attempt);
        dial.timeout = BESIDE;
        match self.inbox.dial(dial) {
            Ok(()) => (flow.outage.is_dialled, flow.outage.is_beside) = (true, true),
            // The one that stands may be heard of again.
            Err(error) => tracing::debug!(%error, "no connection is dialled beside one"),
        }
    }

    /// Looks whether a flow needs a connection; until when to come back.
    fn look(&self, key: Key, handle: &Handle) -> Option<Instant> {
        let (peer, socket) = key;
        let mut flow = handle.lock();
        let Some(since) = flow.outage.since else { return self.listen(&mut flow) };
        let due = since + flow.outage.left;
        if Instant::now() >= due {
            let cause = flow.outage.cause.take();
            flow.outage.since = None;
            flow.fail(cause.unwrap_or_else(|| LinkError::closed(peer)));
            drop(flow);
            self.tell(key);
            return None;
        }
        if peer < self.config.rank && !flow.outage.is_dialled && flow.meeting.is_none() {
            flow.attempt += 1;
            let attempts = flow.outage.attempts;
            flow.outage.attempts += 1;
            let mut dial = self.config.dial(peer, socket, flow.attempt);
            dial.timeout = due.saturating_duration_since(Instant::now());
            dial.pause = match attempts {
                0 => Duration::ZERO,
                attempts => PAUSE_MIN.saturating_mul(1 << attempts.min(16)).min(PAUSE_MAX),
            };
            flow.outage.is_dialled = true;
            if let Err(error) = self.inbox.dial(dial) {
                flow.fail(error);
                drop(flow);
                self.tell(key);
                return None;
            }
        }
        Some(due)
    }

    /// Has a flow say that this end leaves; whether the other end has all that it sent, or had the
    /// time to say so.
    fn leave(&self, handle: &Handle, since: Instant) -> bool {
        let mut flow = handle.lock();
        flow.leave();
        if since.elapsed() >= LEAVING_SEEN {
            flow.end_sending();
        }
        let limit = self.config.reconnect_timeout;
        let is_lost = flow.stream().is_none() && flow.holds();
        let limit = if is_lost { limit } else { limit.min(LEAVING_MAX) };
        let is_gone = flow.outage.knock == Knock::Gone && flow.stream().is_none();
        if flow.is_through() || is_gone {
            return true;
        }
        let is_late = since.elapsed() >= limit;
        if is_lost && !is_late {
            self.knock(&mut flow, limit - since.elapsed().min(limit));
        }
        if is_late {
            let (peer, socket, is_away) = (flow.peer, flow.socket, flow.stream().is_none());
            tracing::info!(peer, socket, is_away, "left without an answer, after {limit:?}");
        }
        is_late
    }

    /// Sleeps until something happens, and sees to it.
    fn wait(&self, flows: &[(Key, Handle)], leaves: bool, due: Option<Instant>) {
        let mut places = Vec::new();
        for (at, (_, flow)) in flows.iter().enumerate() {
            let flow = flow.lock();
            if let Some(stream) = flow.stream() {
                // An end that was read is told of for ever.
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::RDHUP, !flow.peer_ended);
                flags.set(PollFlags::IN, leaves && !flow.peer_ended);
                flags.set(PollFlags::OUT, flow.owes());
                places.push((at, stream.clone(), flags));
            }
            if let Some(meeting) = &flow.meeting {
                places.push((at, meeting.stream.clone(), PollFlags::IN));
            }
        }
        let mut polled = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
        polled.extend(
            places
                .iter()
                .map(|(_, stream, flags)| PollFd::from_borrowed_fd(stream.as_fd(), *flags)),
        );
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        if let Err(error) = poll(&mut polled, left.as_ref())
            && error != rustix::io::Errno::INTR
        {
            // Out of memory, say: what can be seen without events is seen a moment later.
            unisum_link::warning!(%error, "connections can't be watched");
            thread::sleep(PAUSE_MAX);
        }
        if !polled[0].revents().is_empty() {
            self.bell.silence();
        }
        let mut ready: Vec<usize> = places
            .iter()
            .zip(&polled[1..])
            .filter(|(_, polled)| !polled.revents().is_empty())
            .map(|((at, ..), _)| *at)
            .collect();
        ready.dedup();
        for at in ready {
            let (key, handle) = &flows[at];
            if Self::move_on(handle) {
                self.tell(*key);
            }
        }
    }

    /// Moves what a flow has to move outside of calls; whether there is news for the link.
    fn move_on(handle: &Handle) -> bool {
        let mut flow = handle.lock();
        let before = flow.stood();
        if let Err(error) = move_on(&mut flow) {
            flow.fail(error);
        }
        before != flow.stood() || flow.has_news()
    }
}

/// Has a flow go on in what was dialled beside its connection, if that is still wanted; whether it
/// does.
fn take_over(flow: &mut Flow, dialled: &Result<Proven, LinkError>) -> bool {
    let (peer, socket) = (flow.peer, flow.socket);
    if let Err(error) = dialled {
        // If the connection has broken meanwhile, another one is dialled in its place.
        tracing::debug!(peer, socket, %error, "no other connection is to be had yet");
        return false;
    }
    if flow.stream().is_none() {
        return true;
    }
    if !flow.wants_another() {
        tracing::debug!(peer, socket, "a connection was heard of again");
        return false;
    }
    // From here on, nothing more is received on it. It lacks nothing, so that it is no failure.
    flow.broke(LinkError::closed(peer)).is_ok()
}

/// The same of the flow itself.
pub(super) fn move_on(flow: &mut Flow) -> Result<(), LinkError> {
    if flow.meeting.is_some() && flow.hear_first()? != Met::Stands {
        return Ok(());
    }
    let (mut receives, mut moving) = (VecDeque::new(), Moving::default());
    let mut arriving = Arriving { receives: &mut receives, call: None, moving: &mut moving };
    // What came last is behind all that came before.
    flow.drain(&mut arriving, &mut true, true)?;
    flow.flush(&mut VecDeque::new(), &mut true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};

    use rustix::net::{SendFlags, send, sockopt};
    use unisum_link::LinkErrorKind;
    use unisum_link::fork::ParentOnly;
    use unisum_link::silence::Told;

    use super::super::{HOLDS, Head, LEAVES};
    use super::*;
    use crate::socket::Socket;

    /// A connection, and its other end.
    fn connection() -> (Arc<ParentOnly<TcpStream>>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (own, _) = listener.accept().unwrap();
        own.set_nonblocking(true).unwrap();
        (Arc::new(ParentOnly::new(own)), other)
    }

    /// Until the kernel asks in vain whether there is room again.
    fn fill(socket: &Socket, stream: &TcpStream) {
        while send(stream, &[0; 1 << 16], SendFlags::NOSIGNAL).is_ok() {}
        let until = Instant::now() + Duration::from_secs(20);
        while !socket.told().unwrap().awaits {
            assert!(Instant::now() < until, "the other end reads nothing");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_end_that_leaves_has_its_answer_also_where_the_socket_was_full() {
        let bell = Arc::new(Bell::new().unwrap());
        let handle = Handle(Arc::new(Mutex::new(Flow::new((1, 0), Duration::from_secs(30), bell))));
        let (own, mut other) = connection();
        let leaves = Head { flags: LEAVES, bytes: 0, acknowledged: 0 };
        other.write_all(&leaves.encode()).unwrap();
        other.shutdown(Shutdown::Write).unwrap();
        // Buffers that were set do not grow: once both are full, they stay so.
        sockopt::set_socket_send_buffer_size(&**own, 8192).unwrap();
        sockopt::set_socket_recv_buffer_size(&other, 8192).unwrap();
        let (mut sent, mut before) = (0, usize::MAX);
        while sent != before {
            before = sent;
            while let Ok(more) = send(&**own, &[0; 1 << 16], SendFlags::NOSIGNAL) {
                sent += more;
            }
            thread::sleep(Duration::from_millis(100));
        }
        handle.lock().resume(own, None, 1, 0).unwrap();
        while !handle.lock().peer_ended {
            move_on(&mut handle.lock()).unwrap();
        }
        assert!(!handle.lock().is_failed(), "it was given up without an answer");
        // What is on its way makes room.
        let ended = thread::spawn(move || {
            let mut all = Vec::new();
            other.read_to_end(&mut all).unwrap();
            all
        });
        while !handle.lock().is_failed() {
            move_on(&mut handle.lock()).unwrap();
            thread::yield_now();
        }
        let answer = Head { flags: HOLDS, bytes: 0, acknowledged: 0 };
        assert_eq!(ended.join().unwrap()[sent..], answer.encode());
    }

    #[test]
    fn the_silence_of_a_connection_that_broke_breaks_no_other_one() {
        let limit = Duration::from_secs(30);
        let handle =
            Handle(Arc::new(Mutex::new(Flow::new((1, 0), limit, Arc::new(Bell::new().unwrap())))));
        let mut socket = Socket::new(1, Some(handle.clone()));
        let ((first, _first_end), (second, _second_end)) = (connection(), connection());
        let silent =
            || LinkError { peer: 1, kind: LinkErrorKind::Unacknowledged(Duration::from_secs(2)) };
        handle.lock().resume(first.clone(), None, 1, 0).unwrap();
        assert!(socket.renew().is_some());
        fill(&socket, &first);
        assert!(socket.broke(silent()).is_none());
        assert!(handle.lock().stream().is_none());
        // Its kernel still has what was not acknowledged.
        assert_eq!(socket.told().unwrap(), Told::NOTHING);
        handle.lock().resume(second.clone(), None, 2, 0).unwrap();
        // The socket has not been told yet.
        assert_eq!(socket.told().unwrap(), Told::NOTHING);
        assert!(socket.broke(silent()).is_none());
        let stands = || handle.lock().stream().is_some_and(|it| Arc::ptr_eq(it, &second));
        assert!(stands(), "the second one was broken by the first");
        assert!(socket.renew().is_some());
        assert!(socket.broke(silent()).is_none());
        assert!(!stands());
    }
}
