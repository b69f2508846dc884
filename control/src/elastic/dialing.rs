//! How a member reaches another one. Blocks.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use unisum_link::dial::{Failure, dial};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{HandshakeError, Hello, Purpose, job_hash};
use unisum_link::secure::{self, Credentials, Proven};
use unisum_views::Member;

use super::super::ControlError;
use super::super::error::Reasons;
use super::ViewsConfig;
use crate::interface::Paths;

/// Longest time for one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);

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

    /// Connects to a member that listens there.
    pub(super) fn dial(
        &self,
        to: Member,
        addresses: &[SocketAddr],
    ) -> Result<Proven, ControlError> {
        let hello = Hello { to: to.0 as u32, ..self.hello };
        let started = Instant::now();
        let until = started + self.timeout;
        let (mut reasons, mut pause) = (Reasons::default(), PAUSE_MIN);
        let paths = Paths::new(None)
            .map_err(|error| ControlError::system("listing the network interfaces", error))?;
        let addresses = paths.to(addresses, true);
        loop {
            let time = until.saturating_duration_since(Instant::now());
            let time = time.clamp(PAUSE_MIN, ATTEMPT_TIMEOUT);
            let meet = |stream, _| self.knock(stream, &hello, time);
            let unreached = match dial(&addresses, Instant::now() + time, |_, _| {}, meet) {
                Ok(stream) => return Ok(stream),
                Err(unreached) => unreached,
            };
            let is_final = unreached.tried.iter().any(|(_, failure)| match failure {
                Failure::Met(error) => error.is_answer(),
                Failure::Connect(_) | Failure::Silent(_) => false,
            });
            reasons.add(unreached.to_string());
            let now = Instant::now();
            if is_final || now >= until {
                let target = format!("member {to:?} at {addresses:?}");
                let (waited, hint) = (now - started, String::new());
                return Err(ControlError::Unreachable { target, waited, reasons, hint });
            }
            thread::sleep(pause.min(until - now));
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn knock(
        &self,
        stream: TcpStream,
        hello: &Hello,
        time: Duration,
    ) -> Result<Proven, HandshakeError> {
        let mut stream = ParentOnly::new(stream);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(time))?;
        stream.set_write_timeout(Some(time))?;
        let (own, peer) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
        let wants_records = self.credentials.want_records(hello.purpose, own, peer);
        let session = secure::dial(&mut *stream, hello, &self.credentials, wants_records)?;
        Ok(Proven::new(stream, session))
    }
}
