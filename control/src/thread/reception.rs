//! What the door of a rank knows of those who come.

use std::cell::Cell;
use std::collections::BTreeMap;

use unisum_link::Rank;
use unisum_link::handshake::{Hello, Refusal};
use unisum_link::secure::{Credentials, Knock};

use super::{Identity, Shared};
use crate::connection::Connection;
use crate::coordinator::Coordinator;
use crate::door::Host;

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

    fn knows(&self, knock: Knock) -> bool {
        knock == self.identity.knock || self.shared.awaits(knock)
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
