//! How a rank reaches the coordinator. Blocks; runs before the control thread.

use std::fmt;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use unisum_link::Rank;
use unisum_link::dial::{Failure, Within, dial, redial};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{self, HandshakeError, Hello, Refusal, STEADY};
use unisum_link::secure::{self, Credentials, Proven};

use super::error::Reasons;
use super::file;
use super::message::Message;
use super::pulse;
use super::resume::{RESUMED_BYTES, Word};
use super::verdict::{Finding, Report};
use super::{ControlError, GOODBYE_TIMEOUT};
use crate::address::{self, Rendezvous};
use crate::interface::Paths;

/// Longest time for the connections of one attempt, and for each handshake.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for the connections of one attempt where a process was reached before.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// The same where a process was reached before: the network may be back at any moment.
const AGAIN_PAUSE_MAX: Duration = Duration::from_millis(100);
/// How long a coordinator may refuse this rank before that is final: it may still be that of an
/// earlier start of the job, or not have noticed this rank's last attempt end.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The same where a file leads to it, which may yet be replaced by this job's.
const FILE_REFUSAL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a process is looked for that is this one's rank.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of the encoded welcome.
const WELCOME_BYTES: usize = 21;

/// A connection that the coordinator has admitted.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) connection: Proven,
    pub(super) coordinator: SocketAddr,
    pub(super) session: [u8; 16],
    /// The connection beside it by which the other host is felt, if that is not this one.
    pub(super) pulse: Option<ParentOnly<TcpStream>>,
}

/// One attempt's failure.
struct Failed {
    /// Who was there and said no.
    refused_by: Option<SocketAddr>,
    /// Nobody who was there speaks another TLS.
    speaks_alike: bool,
    error: String,
}

/// Dials until the coordinator admits this rank, with growing pauses.
#[cfg(test)]
pub(super) fn reach(
    rendezvous: &Rendezvous,
    hello: &Hello,
    credentials: &Credentials,
    timeout: Duration,
) -> Result<Reached, ControlError> {
    reach_unless(rendezvous, (hello, credentials), timeout, |_| false)
}

/// Dials until the coordinator admits this rank, with growing pauses, or until that `is_moot`: it
/// is told after an attempt whether the other end, as far as is known, has the same `UNISUM_TLS`.
pub(super) fn reach_unless(
    rendezvous: &Rendezvous,
    (hello, credentials): (&Hello, &Credentials),
    timeout: Duration,
    is_moot: impl Fn(bool) -> bool,
) -> Result<Reached, ControlError> {
    let started = Instant::now();
    let mut until = started + timeout;
    let (mut reasons, mut pause) = (Reasons::default(), PAUSE_MIN);
    let mut refused: Option<(SocketAddr, Instant)> = None;
    loop {
        let failed = match attempt(rendezvous, hello, credentials, until) {
            Ok(reached) => return Ok(reached),
            Err(failed) => failed,
        };
        let now = Instant::now();
        if let Some(by) = failed.refused_by {
            let (known, since) = *refused.get_or_insert((by, now));
            // Somebody else may refuse for other reasons.
            let since = if known == by { since } else { now };
            refused = Some((by, since));
            let patience = match rendezvous {
                Rendezvous::Tcp { .. } | Rendezvous::Store { .. } => REFUSAL_TIMEOUT,
                Rendezvous::File(_) => FILE_REFUSAL_TIMEOUT,
            };
            until = (started + timeout).min(since + patience);
        } else {
            // A refusal that does not last was another start's, or this rank's own last attempt's.
            (refused, until) = (None, started + timeout);
        }
        tracing::debug!(%rendezvous, error = failed.error, "rank 0 is not reached yet");
        let speaks_alike = failed.speaks_alike;
        reasons.add(failed.error);
        if now >= until || is_moot(speaks_alike) {
            let (target, waited) = (rendezvous.to_string(), now - started);
            return Err(ControlError::Unreachable { target, waited, reasons, hint: String::new() });
        }
        thread::sleep(jittered(pause).min(until - now));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Looks whether a process at one of these addresses is the rank already that this one would be.
/// Blocks for [`ATTEMPT_TIMEOUT`] at most, and for
/// [`LOOK_TIMEOUT`] where nobody takes a connection.
///
/// # Errors
/// [`ControlError::Taken`] if one is.
pub(super) fn look_for_another(
    addresses: &[SocketAddr],
    hello: &Hello,
    credentials: &Credentials,
) -> Result<(), ControlError> {
    let (until, by) = (Instant::now() + LOOK_TIMEOUT, Instant::now() + ATTEMPT_TIMEOUT);
    // Without a list of interfaces, what needs none is tried.
    let addresses =
        Paths::new(None).map_or_else(|_| addresses.to_vec(), |paths| paths.to(addresses, true));
    let meet = |stream, _| {
        let left = by.saturating_duration_since(Instant::now()).max(PAUSE_MIN);
        prove(stream, (hello, credentials), left).map(drop)
    };
    let Err(unreached) = dial(&addresses, until, |_, _| {}, meet) else { return Ok(()) };
    let taken = unreached.tried.into_iter().find_map(|(address, failure)| match failure {
        Failure::Met(HandshakeError::Refused(why)) if is_taken(hello.from as Rank, &why) => {
            Some(format!("{why} (at {address})"))
        }
        _ => None,
    });
    taken.map_or(Ok(()), |why| Err(ControlError::Taken { why }))
}

/// Whether a refusal is [`Refusal::RankTaken`].
pub(super) fn is_taken(rank: Rank, why: &str) -> bool {
    why.starts_with(&format!("rank {rank} is taken: "))
}

/// Between half and one and a half times the pause, so that ranks that start together do not
/// keep dialling together.
fn jittered(pause: Duration) -> Duration {
    let [random] = handshake::random().unwrap_or([128]);
    pause / 2 + pause * u32::from(random) / 256
}

/// What became of an attempt to reach the rank that is to coordinate.
pub(super) enum Heir {
    /// It coordinates.
    Reached(Reached),
    /// It is there, but does not coordinate: it has not heard that it is to, or is stopped.
    Waits,
    /// Nobody is there.
    Gone,
}

/// Dials the rank that is to coordinate, until it does, or until `until`.
pub(super) fn heir(
    addresses: &[SocketAddr],
    hello: &Hello,
    credentials: &Credentials,
    until: Instant,
) -> Heir {
    let mut pause = PAUSE_MIN;
    loop {
        let time = until.saturating_duration_since(Instant::now());
        let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
        let meet = |stream, address| preamble(stream, address, hello, credentials, time);
        let unreached = match dial(addresses, Instant::now() + time, |_, _| {}, meet) {
            Ok(reached) => return Heir::Reached(reached),
            Err(unreached) => unreached,
        };
        let is_there = unreached.tried.iter().any(|(_, failure)| match failure {
            Failure::Silent(_) => false,
            Failure::Connect(error) => is_cut(error),
            Failure::Met(HandshakeError::Io(error)) => is_cut(error) || is_silence(error),
            // Among these: it said no, or nothing in all that time.
            Failure::Met(_) => true,
        });
        tracing::debug!(error = %unreached, is_there, "the next coordinator is not reached");
        if !is_there {
            return Heir::Gone;
        }
        if Instant::now() >= until {
            return Heir::Waits;
        }
        thread::sleep(jittered(pause));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// What became of the attempts to go on with a connection to the coordinator that was cut.
pub(super) enum Again {
    /// The other end goes on, and has taken so many messages.
    Reached(Reached, u64),
    /// Nobody listens any more where the coordinator was reached, or somebody else does: its
    /// process has ended.
    Gone,
    /// The coordinator does not go on, and says why.
    Refused(String),
    /// There was no answer in all that time.
    Silent,
}

/// Dials the coordinator until a connection goes on for the one that was cut, after so many
/// messages were `taken` of it, or until `until`. The first of the addresses is the one where the
/// coordinator was reached before. Attempts are numbered from `attempt` on. With or without a pulse
/// beside it.
pub(super) fn again(
    addresses: &[SocketAddr],
    (hello, credentials): (&Hello, &Credentials),
    (mut attempt, taken): (u64, u64),
    until: Instant,
    has_pulse: bool,
) -> Again {
    let (mut pause, mut patience, mut refusals) = (PAUSE_MIN, CONNECT_TIMEOUT, 0);
    loop {
        let time = until.saturating_duration_since(Instant::now());
        let time = time.clamp(PAUSE_MIN, patience);
        // At the next address, or in the next attempt, somebody may answer sooner; but this one may
        // be busy.
        patience = (patience * 2).min(ATTEMPT_TIMEOUT);
        let meet = |stream, address| {
            attempt += 1;
            let word = Word::Resume { attempt, taken };
            let (mut reached, taken) = resume(stream, address, (hello, credentials), word, time)?;
            if has_pulse {
                let (control, session) = (&reached.connection.stream, reached.session);
                reached.pulse = pulse::open(control, hello, session, (credentials, time))?;
            }
            Ok((reached, taken))
        };
        // The next address has its turn, too, when one takes a connection and says nothing.
        let by = Instant::now() + time.min(CONNECT_TIMEOUT) + time;
        let unreached = match redial(addresses, by, |_, _| {}, meet) {
            Ok((reached, taken)) => return Again::Reached(reached, taken),
            Err(unreached) => unreached,
        };
        tracing::debug!(error = %unreached, "the coordinator is not reached again yet");
        let mut answers = unreached.tried.iter().filter_map(|(_, failure)| match failure {
            Failure::Met(error) => Some(error),
            Failure::Connect(_) | Failure::Silent(_) => None,
        });
        // Somebody in between may have led one of them elsewhere.
        match answers.clone().find(|it| is_final(it)) {
            Some(refused) if refusals + 1 == STEADY => return Again::Refused(refused.to_string()),
            Some(_) => refusals += 1,
            None => refusals = 0,
        }
        let is_refused = |(address, failure): &(SocketAddr, Failure<_>)| {
            let is_proven = addresses.first() == Some(address);
            matches!(failure, Failure::Connect(error) if is_proven && is_refusal(error))
        };
        if answers.next().is_none() && unreached.tried.iter().any(is_refused) {
            return Again::Gone;
        }
        if Instant::now() >= until {
            return Again::Silent;
        }
        thread::sleep(jittered(pause));
        pause = (pause * 2).min(AGAIN_PAUSE_MAX);
    }
}

/// Whether a listener said no, and not because its process lacks descriptors at the moment.
fn is_final(error: &HandshakeError) -> bool {
    matches!(error, HandshakeError::Refused(why) if *why != Refusal::Exhausted.to_string())
}

/// Whether a host said that nobody listens there.
fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

/// Whether a connection is there on which nothing came.
fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Whether a connection was there, and ended.
fn is_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

fn attempt(
    rendezvous: &Rendezvous,
    hello: &Hello,
    credentials: &Credentials,
    until: Instant,
) -> Result<Reached, Failed> {
    let found = match rendezvous {
        Rendezvous::Tcp { host, port } => address::resolve(host, *port),
        Rendezvous::File(path) => file::read(path),
        Rendezvous::Store { addresses, .. } => Ok(addresses.clone()),
    };
    // A link-local address may be behind any of this host's interfaces.
    let found = found.and_then(|found| Ok(Paths::new(None)?.to(&found, true)));
    let addresses = found.map_err(|error| Failed {
        refused_by: None,
        speaks_alike: true,
        error: error.to_string(),
    })?;
    // A timeout of zero is not allowed.
    let time = until.saturating_duration_since(Instant::now());
    let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
    let meet =
        |stream, address| preamble(stream, address, hello, credentials, time).map_err(NotRank0);
    dial(&addresses, Instant::now() + time, |_, _| {}, meet).map_err(|unreached| {
        let refusal = unreached.tried.iter().find(|(_, failure)| match failure {
            Failure::Met(it) => it.is_refusal(),
            _ => false,
        });
        let refused_by = refusal.map(|(address, _)| *address);
        let speaks_alike = unreached.tried.iter().all(|(_, failure)| match failure {
            Failure::Met(it) => it.speaks_alike(),
            _ => true,
        });
        Failed { refused_by, speaks_alike, error: unreached.to_string() }
    })
}

/// Somebody took a connection, and was not rank 0, or would not have this rank.
struct NotRank0(HandshakeError);

impl NotRank0 {
    /// Whether what was said, if anything, is no word about TLS.
    fn speaks_alike(&self) -> bool {
        match &self.0 {
            HandshakeError::Certificate(_)
            | HandshakeError::OwnCertificate(_)
            | HandshakeError::Unlike(_) => false,
            HandshakeError::Refused(why) => {
                ![Refusal::Clear, Refusal::Encrypted].iter().any(|it| it.to_string() == *why)
            }
            _ => true,
        }
    }

    fn is_refusal(&self) -> bool {
        // Another program on the port may yet make room for rank 0.
        self.0.is_answer() && !matches!(self.0, HandshakeError::NotUnisum)
    }
}

impl fmt::Display for NotRank0 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use io::ErrorKind::{TimedOut, WouldBlock};
        match &self.0 {
            // How a socket's time-out is told.
            HandshakeError::Io(error) if matches!(error.kind(), TimedOut | WouldBlock) => {
                f.write_str("somebody took the connection and said nothing")
            }
            error => error.fmt(f),
        }
    }
}

/// Proves this rank to who listens at the other end of `stream`, and hears that it is let in.
pub(super) fn preamble(
    stream: TcpStream,
    address: SocketAddr,
    hello: &Hello,
    credentials: &Credentials,
    time: Duration,
) -> Result<Reached, HandshakeError> {
    let mut connection = prove(stream, (hello, credentials), time)?;
    let session = read_welcome(&mut connection)?;
    let pulse = pulse::open(&connection.stream, hello, session, (credentials, time))?;
    Ok(Reached { connection, coordinator: address, session, pulse })
}

/// Proves this rank to the coordinator, and hears that it goes on with a connection that was cut.
fn resume(
    stream: TcpStream,
    address: SocketAddr,
    (hello, credentials): (&Hello, &Credentials),
    word: Word,
    time: Duration,
) -> Result<(Reached, u64), HandshakeError> {
    let mut connection = prove(stream, (hello, credentials), time)?;
    connection.write_all(&word.encode())?;
    let mut frame = [0; RESUMED_BYTES];
    connection.read_exact(&mut frame)?;
    let Ok(Some(Word::Resumed { taken })) = Word::take(&mut BytesMut::from(&frame[..])) else {
        let text = "no welcome after the handshake";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text).into());
    };
    let session = hello.session;
    Ok((Reached { connection, coordinator: address, session, pulse: None }, taken))
}

fn prove(
    stream: TcpStream,
    (hello, credentials): (&Hello, &Credentials),
    time: Duration,
) -> Result<Proven, HandshakeError> {
    let stream = ParentOnly::new(stream);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(time))?;
    stream.set_write_timeout(Some(time))?;
    let wants_records = credentials.want_records(
        hello.purpose,
        stream.local_addr()?.ip(),
        stream.peer_addr()?.ip(),
    );
    let session = secure::dial(&mut Within::new(&stream, time), hello, credentials, wants_records)?;
    Ok(Proven::new(stream, session))
}

/// Tells the coordinator, which has admitted this rank, that it can't join, and why. Blocks until
/// the coordinator knows, a second at most.
pub(super) fn give_up(connection: &mut Proven, rank: Rank, why: &dyn fmt::Display) {
    let (against, finding, text) = (rank, Finding::CannotJoin, why.to_string());
    let mut encoded = BytesMut::new();
    Message::Joined.encode(&mut encoded);
    Message::Accuse(Report::new(0, against, finding, text)).encode(&mut encoded);
    // Best effort: who hears nothing sees the connection end.
    let _ = connection.write_all(&encoded);
    let mut stream = &*connection.stream;
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(GOODBYE_TIMEOUT));
    // Closing earlier could destroy the words on their way (RFC 2525, 2.17).
    let _ = stream.read(&mut [0; 1024]);
}

fn read_welcome(connection: &mut Proven) -> io::Result<[u8; 16]> {
    let mut frame = [0; WELCOME_BYTES];
    connection.read_exact(&mut frame)?;
    match Message::decode(&mut BytesMut::from(&frame[..])) {
        Ok(Some(Message::Welcome { session })) => Ok(session),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no welcome after the handshake")),
    }
}
