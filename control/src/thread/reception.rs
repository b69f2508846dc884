//! What the acceptor of a rank knows of those who come.

use std::cell::Cell;
use std::collections::BTreeMap;

use unisum_link::Rank;
use unisum_link::handshake::{Hello, Refusal};
use unisum_link::secure::{Credentials, Preamble};

use super::{Identity, Shared};
use crate::acceptor::Host;
use crate::connection::Connection;
use crate::coordinator::Coordinator;

pub(super) struct Reception<'a> {
    pub(super) identity: &'a Identity,
    pub(super) shared: &'a Shared,
    pub(super) coordinator: Option<&'a Coordinator>,
    pub(super) connections: &'a BTreeMap<usize, (Rank, Connection)>,
    pub(super) processes: &'a BTreeMap<Rank, String>,
    /// Whether somebody has proven the token.
    pub(super) is_proven: Cell<bool>,
}

impl Host for Reception<'_> {
    fn credentials(&self) -> &Credentials {
        &self.identity.credentials
    }

    fn knows(&self, preamble: Preamble) -> bool {
        preamble == self.identity.preamble || self.shared.awaits(preamble)
    }

    /// Ranks that have yet to join do not know the session.
    fn awaits_unknown(&self) -> bool {
        self.coordinator.is_some_and(|coordinator| !coordinator.all_came())
    }

    /// Only who has proven the token is looked at more closely.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        self.is_proven.set(true);
        let is_connected =
            |rank| self.connections.values().any(|(connected, _)| *connected == rank);
        let taken = |rank: &Rank| self.processes.get(rank).cloned();
        self.identity.admit(hello, self.coordinator, self.shared, (is_connected, taken))
    }
}
