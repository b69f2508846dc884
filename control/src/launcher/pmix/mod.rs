//! PMIx, where the launcher is known by nothing else: the job's size from its library, and a value
//! that rank 0 tells all others.
//!
//! A process opens PMIx once: servers take one that comes back for one that has left, and end
//! barriers without it. All calls are made on a thread of their own, so that a server that does not
//! answer holds nobody up longer than allowed. PMIx is closed as soon as it has served: a process
//! that ends without that counts as crashed, and its launcher kills all others.

mod library;

use std::convert::Infallible;
use std::fmt;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::LauncherError;
use super::conventions::{MAX_WORLD, Placement};
use super::pmi::loaded_mpi;
use crate::environment::Environment;
use library::Library;

/// What is asked of PMIx, in this order: `init`, the sizes, `put` and `fence` or `fence` and `get`,
/// `finalize`.
trait Server: Send + 'static {
    /// Whether somebody else in this process has opened it.
    fn is_initialized(&self) -> bool;
    fn init(&mut self) -> Result<Identity, Refusal>;
    fn job_size(&self) -> Result<usize, Refusal>;
    fn local_size(&self) -> Result<usize, Refusal>;
    fn local_rank(&self) -> Result<usize, Refusal>;
    fn put(&self, key: &str, value: &[u8]) -> Result<(), Refusal>;
    /// Blocks until all ranks of the job are in it.
    fn fence(&self, timeout: Duration) -> Result<(), Refusal>;
    fn get(&self, rank: u32, key: &str, timeout: Duration) -> Result<Vec<u8>, Refusal>;
    fn finalize(&mut self);
}

/// Who PMIx takes this process for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    namespace: String,
    rank: u32,
}

/// Why PMIx did not do something.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Refusal {
    TimedOut,
    /// There is no server, or no longer; at which call.
    Gone(String),
    Other(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut => f.write_str("the launcher's PMIx server did not answer in time"),
            Self::Gone(call) => write!(f, "no PMIx server of the launcher answers ({call})"),
            Self::Other(why) => f.write_str(why),
        }
    }
}

/// PMIx, open in this process until it has served or is dropped.
pub struct Session {
    calls: Mutex<Option<Calls>>,
}

/// The way to the thread that makes the calls.
struct Calls {
    /// The thread closes PMIx when this is dropped.
    ask: Sender<Share>,
    /// Disconnected when the thread has ended.
    ended: Receiver<Infallible>,
}

/// What one rank puts and all others get.
struct Share {
    /// `None` if this rank gets.
    value: Option<Vec<u8>>,
    timeout: Duration,
    tell: Sender<Result<Option<Vec<u8>>, String>>,
}

/// What was found when this process opened PMIx.
static FOUND: Mutex<Option<Result<Placement, String>>> = Mutex::new(None);

/// This process's place in the job, and PMIx, unless it was open before.
pub(super) fn find(
    environment: &Environment,
) -> Result<(Placement, Option<Arc<Session>>), LauncherError> {
    // One at a time: the second finds what the first has found.
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = &*found {
        let placement = found.clone().map_err(|why| LauncherError::Pmix { why })?;
        return Ok((placement, None));
    }
    let expected = expected(environment)?;
    let opened = Library::open().and_then(|library| open(library, expected));
    *found = Some(opened.as_ref().map(|(placement, _)| *placement).map_err(Clone::clone));
    let (placement, session) = opened.map_err(|why| LauncherError::Pmix { why })?;
    Ok((placement, Some(Arc::new(session))))
}

/// Who the launcher says that this process is. The library reads the process's own variables, so
/// that others, which a program gives in code, would be those of another process.
fn expected(environment: &Environment) -> Result<Identity, LauncherError> {
    let get = |name| environment.get(name).unwrap_or_default().to_owned();
    for name in ["PMIX_RANK", "PMIX_NAMESPACE"] {
        let own = std::env::var(name).unwrap_or_default();
        if own != get(name) {
            let why = format!("{name} is not in this process's own environment");
            return Err(LauncherError::Pmix { why });
        }
    }
    let rank = get("PMIX_RANK");
    let rank = rank.parse().map_err(|_| {
        LauncherError::malformed(super::Source::Pmix, "PMIX_RANK", &rank, "expected a whole number")
    })?;
    Ok(Identity { namespace: get("PMIX_NAMESPACE"), rank })
}

/// Opens PMIx on a thread of its own.
fn open<S: Server>(server: S, expected: Identity) -> Result<(Placement, Session), String> {
    let (ask, asked) = mpsc::channel();
    let (ending, ended) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let serve = move || {
        let _until_the_end: Sender<Infallible> = ending;
        serve(server, &expected, &tell, &asked);
    };
    let thread = thread::Builder::new().name("unisum-pmix".to_owned()).spawn(serve);
    thread.map_err(|error| format!("no thread can be started for it: {error}"))?;
    let placement = told.recv_timeout(OPENING_TIMEOUT).unwrap_or_else(|_| {
        let seconds = OPENING_TIMEOUT.as_secs();
        Err(format!("the launcher's PMIx server did not answer within {seconds} s"))
    })?;
    Ok((placement, Session { calls: Mutex::new(Some(Calls { ask, ended })) }))
}

/// The thread: opens PMIx, tells what it has found, serves once if asked, closes PMIx.
fn serve<S: Server>(
    mut server: S,
    expected: &Identity,
    tell: &Sender<Result<Placement, String>>,
    asked: &Receiver<Share>,
) {
    let placement = place(&mut server, expected);
    let is_open = placement.is_ok();
    // Nobody waits any more if that took too long: then nobody asks either.
    let _ = tell.send(placement);
    if is_open && let Ok(Share { value, timeout, tell }) = asked.recv() {
        let _ = tell.send(share(&server, value.as_deref(), timeout));
    }
    server.finalize();
}

fn place<S: Server>(server: &mut S, expected: &Identity) -> Result<Placement, String> {
    if let Some(mpi) = loaded_mpi().filter(|_| !server.is_initialized()) {
        return Err(format!(
            "the program has loaded {mpi}, which is to open PMIx first: call MPI_Init earlier"
        ));
    }
    let found = server.init().map_err(|refusal| refusal.to_string())?;
    if found != *expected {
        return Err(format!(
            "no PMIx server of the launcher knows this process, rank {} of `{}`",
            expected.rank, expected.namespace
        ));
    }
    let rank = usize::try_from(found.rank).map_err(|error| error.to_string())?;
    let world = server.job_size().map_err(|refusal| format!("the job's size: {refusal}"))?;
    if !(1..=MAX_WORLD).contains(&world) || rank >= world {
        return Err(format!("PMIx says that the job has {world} ranks, and this one is {rank}"));
    }
    // Not every server tells.
    let local_size = told(server.local_size())?.filter(|size| (1..=world).contains(size));
    let limit = local_size.unwrap_or(world);
    let local_rank = told(server.local_rank())?.filter(|rank| *rank < limit);
    Ok(Placement { rank, world, local_rank, local_size })
}

/// What a server need not know. One that has gone, or does not answer, is no such server: another
/// rank may have been told, and would meet the others elsewhere.
fn told(answer: Result<usize, Refusal>) -> Result<Option<usize>, String> {
    match answer {
        Ok(number) => Ok(Some(number)),
        Err(Refusal::Other(_)) => Ok(None),
        Err(refusal) => Err(refusal.to_string()),
    }
}

fn share<S: Server>(
    server: &S,
    value: Option<&[u8]>,
    timeout: Duration,
) -> Result<Option<Vec<u8>>, String> {
    let remedy = "set UNISUM_RENDEZVOUS=tcp://HOST:PORT, with rank 0's host and a free port there";
    let failed = |refusal| format!("{refusal}: {remedy}");
    if let Some(value) = value {
        server.put(KEY, value).map_err(failed)?;
    }
    server.fence(timeout).map_err(|refusal| match refusal {
        Refusal::TimedOut => late(timeout),
        refusal => failed(refusal),
    })?;
    match value {
        Some(_) => Ok(None),
        None => server.get(0, KEY, timeout).map(Some).map_err(failed),
    }
}

fn late(timeout: Duration) -> String {
    format!(
        "PMIx: not all ranks came within {} s, one has not started or does not join",
        timeout.as_secs_f64()
    )
}

impl Session {
    /// Puts `value` for all ranks, or gets what rank 0 puts if `value` is `None`.
    ///
    /// Blocks until all ranks have called it, for little more than `timeout` at most. PMIx serves
    /// once: after this call it is closed.
    ///
    /// # Errors
    /// In words: not all ranks came in time, the server has gone or refuses, or this process has
    /// been served before.
    pub(super) fn share(
        &self,
        value: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<Option<Vec<u8>>, String> {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner).take();
        let calls = calls.ok_or_else(|| ONCE.to_owned())?;
        let (tell, told) = mpsc::channel();
        let share = Share { value: value.map(<[u8]>::to_vec), timeout, tell };
        let gone = || "PMIx's thread has ended".to_owned();
        calls.ask.send(share).map_err(|_| gone())?;
        let shared = match told.recv_timeout(timeout + SPARE) {
            Ok(shared) => shared,
            // The thread can't be ended.
            Err(RecvTimeoutError::Timeout) => return Err(late(timeout + SPARE)),
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        };
        calls.end();
        shared
    }
}

impl Calls {
    /// Waits until PMIx is closed, unless that hangs.
    fn end(self) {
        drop(self.ask);
        let _ = self.ended.recv_timeout(CLOSING_TIMEOUT);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(calls) = self.calls.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            calls.end();
        }
    }
}

/// All that are open are the same one: a process opens PMIx once.
impl PartialEq for Session {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for Session {}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PMIx")
    }
}

/// Why ranks can't meet by PMIx again.
pub(super) const ONCE: &str = "PMIx serves one start of a process, and an earlier one has used \
    it: set UNISUM_RENDEZVOUS=tcp://HOST:PORT for the others";

const KEY: &str = "unisum";
const OPENING_TIMEOUT: Duration = Duration::from_secs(30);
/// A server that keeps the time has ended the operation before.
const SPARE: Duration = Duration::from_secs(5);
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
