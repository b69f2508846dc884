//! How a member reaches another one. Blocks.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mio::Waker;
use unisum_link::dial::{Failure, Unreached, Within, dial};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{HandshakeError, Hello, Purpose, Refusal, STEADY, job_hash};
use unisum_link::secure::{self, Credentials, Proven};
use unisum_views::Member;

use super::super::ControlError;
use super::super::dial::{self, Again};
use super::super::error::Reasons;
use super::ViewsConfig;
use super::shared::{Command, Shared};
use crate::interface::Paths;

/// Longest time for one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Most threads that dial at a time.
const DIALLERS_MAX: usize = 16;

/// What a process dials with.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    hello: Hello,
    credentials: Credentials,
    timeout: Duration,
}

impl Dialer {
    pub(super) fn new(config: &ViewsConfig, own: Member, session: [u8; 16]) -> Self {
        let hello = Hello {
            purpose: Purpose::View,
            socket: 0,
            from: own.0 as u32, // below 2^32: ranks, or numbers made for newcomers
            to: 0,
            world: 0,
            session,
            job: job_hash(&config.job),
            build: config.build,
        };
        Self { hello, credentials: config.credentials.clone(), timeout: config.connect_timeout }
    }

    /// Connects to a member that listens there, once; where it was reached, or why not.
    pub(super) fn try_once(
        &self,
        to: Member,
        addresses: &[SocketAddr],
        time: Duration,
    ) -> Result<(Proven, SocketAddr), Missed> {
        let hello = Hello { to: to.0 as u32, ..self.hello };
        let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
        let paths = Paths::new(None);
        let paths = paths.map_err(|error| Missed { why: error.to_string(), how: How::Away })?;
        let addresses = paths.to(addresses, true);
        let meet = |stream, at| self.preamble(stream, &hello, time).map(|it| (it, at));
        let met = dial(&addresses, Instant::now() + time, |_, _| {}, meet);
        met.map_err(|unreached| Missed::new(&unreached, &hello))
    }

    /// Connects to a member that listens there, unless that `is_moot` meanwhile. Where it was
    /// reached.
    pub(super) fn dial(
        &self,
        to: Member,
        addresses: &[SocketAddr],
        is_moot: impl Fn() -> bool,
    ) -> Result<(Proven, SocketAddr), ControlError> {
        let hello = Hello { to: to.0 as u32, ..self.hello };
        let started = Instant::now();
        let until = started + self.timeout;
        let (mut reasons, mut pause, mut refused) = (Reasons::default(), PAUSE_MIN, 0);
        let paths = Paths::new(None)
            .map_err(|error| ControlError::system("listing the network interfaces", error))?;
        let addresses = paths.to(addresses, true);
        loop {
            let time = until.saturating_duration_since(Instant::now());
            let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
            let meet = |stream, at| self.preamble(stream, &hello, time).map(|it| (it, at));
            let unreached = match dial(&addresses, Instant::now() + time, |_, _| {}, meet) {
                Ok(met) => return Ok(met),
                Err(unreached) => unreached,
            };
            let is_refused = unreached.tried.iter().any(|(_, failure)| match failure {
                Failure::Met(error) => error.is_refusal(),
                Failure::Connect(_) | Failure::Silent(_) => false,
            });
            refused = if is_refused { refused + 1 } else { 0 };
            reasons.add(unreached.to_string());
            let now = Instant::now();
            if refused >= STEADY || now >= until || is_moot() {
                let target = format!("member {to:?} at {addresses:?}");
                let (waited, hint) = (now - started, String::new());
                return Err(ControlError::Unreachable { target, waited, reasons, hint });
            }
            thread::sleep(pause.min(until - now));
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn preamble(
        &self,
        stream: TcpStream,
        hello: &Hello,
        time: Duration,
    ) -> Result<Proven, HandshakeError> {
        let stream = ParentOnly::new(stream);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(time))?;
        stream.set_write_timeout(Some(time))?;
        let (own, peer) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
        let wants_records = self.credentials.want_records(hello.purpose, own, peer);
        let mut within = Within::new(&stream, time);
        let session = secure::dial(&mut within, hello, &self.credentials, wants_records)?;
        drop(within);
        Ok(Proven::new(stream, session))
    }
}

/// Why a member was not reached.
#[derive(Debug)]
pub(super) struct Missed {
    pub(super) why: String,
    pub(super) how: How,
}

/// What an attempt at a member says about the next one, in the order of what counts more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum How {
    /// Nobody is there, or somebody who has nothing to do with this start of the job.
    Away,
    /// Refused by somebody who may have the member's port now: of another job, or for another rank.
    Elsewhere,
    /// Refused for the token, which that of another job may be, too.
    Unproven,
    /// Refused for something that only members of the job know.
    Refused,
    /// The member may have been there, and take this process in a moment.
    Busy,
}

impl How {
    /// Whether it would be so again: somebody has said what it thinks of this process.
    pub(super) const fn is_refusal(self) -> bool {
        matches!(self, Self::Elsewhere | Self::Unproven | Self::Refused)
    }

    fn of(failure: &Failure<HandshakeError>, hello: &Hello) -> Self {
        let is_told = |told: &str, why: Refusal| told == why.to_string();
        let Failure::Met(error) = failure else { return Self::Away };
        match error {
            HandshakeError::Refused(told) if is_told(told, Refusal::Session) => Self::Away,
            HandshakeError::Refused(told) if is_told(told, Refusal::Exhausted) => Self::Busy,
            HandshakeError::Refused(told) if is_told(told, Refusal::Token) => Self::Unproven,
            HandshakeError::Refused(told)
                if is_told(told, Refusal::Job)
                    || is_told(told, Refusal::Rank { from: hello.from, to: hello.to }) =>
            {
                Self::Elsewhere
            }
            HandshakeError::Impostor => Self::Unproven,
            error if error.is_refusal() => Self::Refused,
            error if error.is_answer() => Self::Away,
            _ => Self::Busy,
        }
    }
}

impl Missed {
    fn new(unreached: &Unreached<HandshakeError>, hello: &Hello) -> Self {
        let all = unreached.tried.iter().map(|(_, failure)| How::of(failure, hello));
        Self { why: unreached.to_string(), how: all.max().unwrap_or(How::Away) }
    }
}

/// Connects to others beside the thread of the elastic job, which never blocks.
pub(super) struct Dials {
    dialer: Dialer,
    shared: Arc<Shared>,
    waker: Arc<Waker>,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    targets: VecDeque<(Member, Vec<SocketAddr>)>,
    /// How many threads serve it.
    threads: usize,
}

impl Dials {
    pub(super) fn new(dialer: Dialer, shared: Arc<Shared>, waker: Arc<Waker>) -> Self {
        Self { dialer, shared, waker, queue: Arc::default() }
    }

    /// Has a process dialled. What comes of it is a command to the thread.
    pub(super) fn add(&self, member: Member, addresses: Vec<SocketAddr>) {
        let mut queue = lock(&self.queue);
        queue.targets.push_back((member, addresses));
        if queue.threads == DIALLERS_MAX {
            return;
        }
        queue.threads += 1;
        drop(queue);
        let (dialer, shared, waker) =
            (self.dialer.clone(), self.shared.clone(), self.waker.clone());
        let targets = self.queue.clone();
        let serve = move || {
            while let Some((member, addresses)) = next(&targets) {
                let is_moot = || !shared.is_wanted(member);
                shared.command(match dialer.dial(member, &addresses, is_moot) {
                    Ok((proven, at)) => Command::Connected(member, proven, at),
                    Err(error) => Command::Unreached(member, error.to_string()),
                });
                // Writing to an eventfd fails only when it is full, and then the thread is awake.
                let _ = waker.wake();
            }
            // It may wait for all to be dialled.
            let _ = waker.wake();
        };
        if let Err(error) = thread::Builder::new().name("unisum-dialer".into()).spawn(serve) {
            let mut queue = lock(&self.queue);
            queue.threads -= 1;
            // Those that there are serve it.
            if queue.threads == 0 {
                for (member, _) in queue.targets.drain(..) {
                    let why = format!("starting a thread that dials: {error}");
                    self.shared.command(Command::Unreached(member, why));
                }
                let _ = self.waker.wake();
            }
        }
    }

    /// Dials a process once more, whose connection was cut after so many messages were taken:
    /// until it goes on, is known to be gone, or `until`. `None` if there is no thread for that.
    pub(super) fn again(
        &self,
        member: Member,
        addresses: Vec<SocketAddr>,
        (attempt, taken): (u64, u64),
        until: Instant,
    ) -> Option<Receiver<Again>> {
        let Dialer { hello, credentials, .. } = self.dialer.clone();
        let hello = Hello { purpose: Purpose::Resume, to: member.0 as u32, ..hello };
        let waker = self.waker.clone();
        let (sender, again) = mpsc::channel();
        let redial = move || {
            let with = (&hello, &credentials);
            // Nobody waits for it any more if this process has left.
            let _ = sender.send(dial::again(&addresses, with, (attempt, taken), until, false));
            // As above.
            let _ = waker.wake();
        };
        let spawned = thread::Builder::new().name("unisum-again".into()).spawn(redial);
        spawned.is_ok().then_some(again)
    }

    /// Whether nobody is being dialled.
    pub(super) fn are_idle(&self) -> bool {
        lock(&self.queue).threads == 0
    }
}

/// The next target; the thread that gets none ends.
fn next(queue: &Mutex<Queue>) -> Option<(Member, Vec<SocketAddr>)> {
    let mut queue = lock(queue);
    let target = queue.targets.pop_front();
    if target.is_none() {
        queue.threads -= 1;
    }
    target
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    // Every critical section leaves it whole.
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
