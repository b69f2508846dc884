//! What it takes to reach the ranks of a communicator after its start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Dial, Route};
use crate::Rank;
use crate::handshake::{Build, Hello, Purpose};
use crate::secure::Credentials;

/// By what a rank reaches the others' listening ports, and how long that may take.
#[derive(Clone, Debug)]
pub struct Ways {
    /// Where each rank listens, by rank, this one included.
    pub routes: Vec<Arc<Route>>,
    /// Fingerprint of the job's name.
    pub job: [u8; 16],
    /// By what connections are proven to be the job's, and whether they are encrypted.
    pub credentials: Credentials,
    /// How long a connection that broke may take to be there again; not zero.
    pub reconnect_timeout: Duration,
}

impl Ways {
    /// The ways to the ranks that listen at these addresses, in the order in which they are to be
    /// tried.
    pub fn new(
        addresses: Vec<Vec<SocketAddr>>,
        job: [u8; 16],
        credentials: Credentials,
        reconnect_timeout: Duration,
    ) -> Self {
        let routes = addresses.into_iter().map(|it| Arc::new(Route::new(it))).collect();
        Self { routes, job, credentials, reconnect_timeout }
    }

    /// The same ways for some of these ranks, whose places among `ranks` are their numbers.
    #[must_use]
    pub fn of(&self, ranks: &[Rank]) -> Self {
        let routes = ranks.iter().map(|&rank| self.routes[rank].clone()).collect();
        Self { routes, ..self.clone() }
    }

    /// What it takes for `own` to dial a peer's first connection in a session, as its `attempt`-th
    /// from 2 on, within `timeout` of the `pause`.
    pub fn dial(
        &self,
        (own, peer): (Rank, Rank),
        session: [u8; 16],
        attempt: u32,
        (pause, timeout): (Duration, Duration),
    ) -> Dial {
        let hello = Hello {
            purpose: Purpose::Data,
            socket: 0,
            from: own as u32,
            to: peer as u32,
            world: self.routes.len() as u32,
            session,
            job: self.job,
            build: Build::default(),
        };
        Dial {
            route: self.routes[peer].clone(),
            own: self.routes[own].clone(),
            hello,
            credentials: self.credentials.clone(),
            timeout: timeout.saturating_add(pause),
            pause,
            attempt,
            resumes: true,
        }
    }
}
