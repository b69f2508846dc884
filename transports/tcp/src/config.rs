//! What a link knows before its first connection.

use std::sync::Arc;
use std::time::Duration;

use unisum_link::Rank;
use unisum_link::handshake::{Build, Hello, Purpose};
use unisum_link::secure::Credentials;

use unisum_link::inbox::Dial;
use unisum_link::inbox::Route;

/// What a rank knows of the job before its first connection.
#[derive(Clone, Debug)]
pub struct TcpConfig {
    /// This rank.
    pub rank: Rank,
    /// Where each rank listens, by rank, this one included.
    pub routes: Vec<Arc<Route>>,
    /// The session that rank 0 opened: connections of another one are refused.
    pub session: [u8; 16],
    /// Fingerprint of the job's name.
    pub job: [u8; 16],
    /// By what connections are proven to be the job's, and whether they are encrypted.
    pub credentials: Credentials,
    /// Sockets to each peer, at least 1: large messages are split over them.
    pub sockets_per_peer: u8,
    /// How long opening a connection may take.
    pub connect_timeout: Duration,
    /// How long another host may give no sign of life. Its end is for others to tell first; a
    /// connection on which it acknowledges nothing fails within about twice the time.
    pub heartbeat_timeout: Duration,
    /// How long a connection that broke may take to be there again; zero: the link fails at once.
    pub reconnect_timeout: Duration,
}

impl TcpConfig {
    /// What it takes to dial a connection for the `socket`-th socket to a peer, its `attempt`-th.
    pub(crate) fn dial(&self, peer: Rank, socket: u8, attempt: u32) -> Dial {
        let hello = Hello {
            purpose: Purpose::Data,
            socket,
            from: self.rank as u32,
            to: peer as u32,
            world: self.routes.len() as u32,
            session: self.session,
            job: self.job,
            build: Build::default(),
        };
        Dial {
            route: self.routes[peer].clone(),
            own: self.routes[self.rank].clone(),
            hello,
            credentials: self.credentials.clone(),
            timeout: self.connect_timeout,
            pause: Duration::ZERO,
            attempt,
            resumes: !self.reconnect_timeout.is_zero(),
        }
    }
}
