//! How a rank reaches the coordinator. Blocks; runs before the control thread.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use unisum_link::dial::{Failure, Unreached, dial};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{self, HandshakeError, Hello, Secret};

use super::ControlError;
use super::file;
use super::message::Message;
use super::pulse;
use crate::address::{self, Rendezvous};
use crate::interface::Paths;

/// Longest time for the connections of one attempt, and for each handshake.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How long a coordinator at a fixed address may refuse this rank before that is final: it may
/// still be that of an earlier start of the job, or not have noticed this rank's last attempt end.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the encoded welcome.
const WELCOME_BYTES: usize = 21;

/// A connection that the coordinator has admitted.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) stream: ParentOnly<TcpStream>,
    pub(super) coordinator: SocketAddr,
    pub(super) session: [u8; 16],
    /// The connection beside it by which the other host is felt, if that is not this one.
    pub(super) pulse: Option<ParentOnly<TcpStream>>,
}

/// One attempt's failure.
struct Failed {
    target: String,
    /// Somebody was there and said no.
    is_refusal: bool,
    error: String,
}

/// Dials until the coordinator admits this rank, with growing pauses.
pub(super) fn reach(
    rendezvous: &Rendezvous,
    hello: &Hello,
    secret: &Secret,
    timeout: Duration,
) -> Result<Reached, ControlError> {
    let started = Instant::now();
    let mut until = started + timeout;
    let (mut attempts, mut pause, mut refused_since) = (0, PAUSE_MIN, None);
    loop {
        attempts += 1;
        let Failed { target, is_refusal, error: last } =
            match attempt(rendezvous, hello, secret, until) {
                Ok(reached) => return Ok(reached),
                Err(failed) => failed,
            };
        let now = Instant::now();
        // A file may yet be replaced by this job's; who listens at a fixed address stays.
        if is_refusal && matches!(rendezvous, Rendezvous::Tcp { .. }) {
            let since = *refused_since.get_or_insert(now);
            until = (started + timeout).min(since + REFUSAL_TIMEOUT);
        } else {
            // A refusal that does not last was another start's, or this rank's own last attempt's.
            (refused_since, until) = (None, started + timeout);
        }
        if now >= until {
            return Err(ControlError::Unreachable {
                target,
                waited: now - started,
                attempts,
                last,
            });
        }
        tracing::debug!(%target, error = %last, "rank 0 is not reached yet");
        thread::sleep(jittered(pause).min(until - now));
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Between half and one and a half times the pause, so that ranks that start together do not
/// keep dialling together.
fn jittered(pause: Duration) -> Duration {
    let [random] = handshake::random().unwrap_or([128]);
    pause / 2 + pause * u32::from(random) / 256
}

/// Dials the rank that is to coordinate, until it does; `None` if it is gone.
pub(super) fn heir(
    addresses: &[SocketAddr],
    hello: &Hello,
    secret: &Secret,
    until: Instant,
) -> Option<Reached> {
    loop {
        let mut is_there = false;
        for &address in addresses {
            match knock(address, hello, secret, until) {
                Ok(reached) => return Some(reached),
                Err(HandshakeError::Io(error)) if !is_cut(&error) => {
                    tracing::debug!(%address, %error, "the next coordinator is gone");
                }
                // It has not heard yet that it is the heir.
                Err(_) => is_there = true,
            }
        }
        if !is_there || Instant::now() >= until {
            return None;
        }
        thread::sleep(jittered(PAUSE_MIN));
    }
}

/// Whether a connection was there, and ended.
fn is_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

fn attempt(
    rendezvous: &Rendezvous,
    hello: &Hello,
    secret: &Secret,
    until: Instant,
) -> Result<Reached, Failed> {
    let target = rendezvous.to_string();
    let found = match rendezvous {
        Rendezvous::Tcp { host, port } => address::resolve(host, *port),
        Rendezvous::File(path) => file::read(path),
    };
    // A link-local address may be behind any of this host's interfaces.
    let found = found.and_then(|found| Ok(Paths::new(None)?.to(&found, true)));
    let addresses = found.map_err(|error| Failed {
        target: target.clone(),
        is_refusal: false,
        error: error.to_string(),
    })?;
    // A timeout of zero is not allowed.
    let time = until.saturating_duration_since(Instant::now());
    let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
    let meet = |stream, address| knock(stream, address, hello, secret, time);
    dial(&addresses, Instant::now() + time, |_, _| {}, meet).map_err(|unreached| {
        let Unreached { tried } = &unreached;
        let is_refusal = tried.iter().any(|(_, failure)| match failure {
            // Another program on the port may yet make room for rank 0.
            Failure::Met(HandshakeError::NotUnisum) => false,
            Failure::Met(error) => error.is_answer(),
            _ => false,
        });
        match &tried[..] {
            [(address, failure)] => {
                let target = format!("{target} ({address})");
                Failed { target, is_refusal, error: failure.to_string() }
            }
            _ => Failed { target, is_refusal, error: unreached.to_string() },
        }
    })
}

fn knock(
    stream: TcpStream,
    address: SocketAddr,
    hello: &Hello,
    secret: &Secret,
    time: Duration,
) -> Result<Reached, HandshakeError> {
    let mut stream = ParentOnly::new(stream);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(time))?;
    stream.set_write_timeout(Some(time))?;
    handshake::dial(&mut *stream, hello, secret)?;
    let session = read_welcome(&mut stream)?;
    let pulse = pulse::open(&stream, hello, session, (secret, time))?;
    Ok(Reached { stream, coordinator: address, session, pulse })
}

fn read_welcome(stream: &mut TcpStream) -> io::Result<[u8; 16]> {
    let mut frame = [0; WELCOME_BYTES];
    stream.read_exact(&mut frame)?;
    match Message::decode(&mut BytesMut::from(&frame[..])) {
        Ok(Some(Message::Welcome { session })) => Ok(session),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no welcome after the handshake")),
    }
}
