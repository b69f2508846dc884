//! TCP as a [`Transport`]: it reaches every rank, and connects when a peer is first used.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use unisum_link::secure::Credentials;
use unisum_link::{Connected, Endpoint, Rank, Reach, Refusal, Setup, Site, Transport};

use crate::{Route, TcpConfig, TcpLink};

/// What a rank knows of a job before its first connection.
#[derive(Clone, Debug)]
pub struct TcpJob {
    /// Where each rank of the job listens, by rank, the addresses in the order in which they are to
    /// be tried.
    pub addresses: Vec<Vec<SocketAddr>>,
    /// Where rank 0 was met.
    pub coordinator: Option<SocketAddr>,
    /// Fingerprint of the job's name.
    pub job: [u8; 16],
    /// By what connections are proven to be the job's, and whether they are encrypted.
    pub credentials: Credentials,
    /// Sockets to each peer, at least 1: large messages are split over them.
    pub sockets_per_peer: u8,
    /// How long opening a connection may take.
    pub connect_timeout: Duration,
    /// How long another host may give no sign of life.
    pub heartbeat_timeout: Duration,
    /// How long a connection that broke may take to be there again; zero: the link fails at once.
    pub reconnect_timeout: Duration,
}

/// The transport of ranks that reach each other's listening ports.
#[derive(Debug)]
pub struct TcpTransport {
    job: TcpJob,
    /// By rank of the job. What one link has found out serves the others.
    routes: Vec<Arc<Route>>,
}

impl TcpTransport {
    /// For the ranks of a job.
    pub fn new(mut job: TcpJob) -> Self {
        let addresses = std::mem::take(&mut job.addresses);
        let routes: Vec<_> = addresses.into_iter().map(|it| Arc::new(Route::new(it))).collect();
        if let (Some(first), Some(address)) = (routes.first(), job.coordinator) {
            first.worked_at(address);
        }
        Self { job, routes }
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn reach(&self) -> Reach {
        Reach::Any
    }

    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal> {
        let job = &self.job;
        Ok(Box::new(TcpEndpoint(TcpConfig {
            rank: site.rank,
            routes: site.ranks.iter().map(|&rank| self.routes[rank].clone()).collect(),
            session: [0; 16],
            job: job.job,
            credentials: job.credentials.clone(),
            sockets_per_peer: job.sockets_per_peer,
            connect_timeout: job.connect_timeout,
            heartbeat_timeout: job.heartbeat_timeout,
            reconnect_timeout: job.reconnect_timeout,
        })))
    }
}

#[derive(Debug)]
struct TcpEndpoint(TcpConfig);

impl Endpoint for TcpEndpoint {
    fn connect(self: Box<Self>, _: &[Rank], setup: &Setup<'_>) -> Result<Connected, Refusal> {
        let link = TcpLink::new(TcpConfig { session: setup.session, ..self.0 });
        let link = link.map_err(|error| Refusal::system("making an event queue for TCP", error))?;
        let inbox = link.inbox();
        let deliver = move |peer, socket, connection| inbox.deliver(peer, socket, connection);
        Ok(Connected { inbox: Some(Arc::new(deliver)), ..Connected::new(Box::new(link)) })
    }
}
