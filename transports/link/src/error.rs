//! What can go wrong on a link. The engine adds rank, operation and step.

use crate::{Call, PeerCounts, Rank};

/// A link's failure, with the peer it concerns.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("link to rank {peer}: {kind}")]
pub struct LinkError {
    /// The rank at the other end.
    pub peer: Rank,
    /// What happened.
    pub kind: LinkErrorKind,
}

/// The kinds of [`LinkError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkErrorKind {
    /// The peer closed the connection, or its process ended.
    #[error("closed by the peer")]
    Closed,
    /// The operating system reported an error.
    #[error("{context}: {error}")]
    Os {
        /// What was tried, with the address where one is involved.
        context: String,
        /// The system's words.
        error: String,
    },
    /// The peer called something else.
    #[error("mismatched calls: this rank called {ours}, the peer called {theirs}")]
    Mismatch {
        /// This rank's call.
        ours: Call,
        /// The peer's.
        theirs: Call,
    },
    /// The peer sent bytes that make no sense here: a bug, or not unisum at all.
    #[error("protocol violation: {0}")]
    Protocol(String),
    /// The connection could not be set up in time.
    #[error("not connected: {0}")]
    Unreachable(String),
    /// This rank lacks what the link takes, descriptors or threads, say: the peer is not to blame.
    #[error("{context}: {error}")]
    Lacking {
        /// What was tried, with the address where one is involved.
        context: String,
        /// The system's words.
        error: String,
    },
    /// No link failed: a function of the program on this rank, which `peer` names, panicked.
    #[error("{0}")]
    Panicked(String),
}

impl LinkError {
    /// An error of the operating system while `context` was tried.
    pub fn os(peer: Rank, context: impl Into<String>, error: impl ToString) -> Self {
        let kind = LinkErrorKind::Os { context: context.into(), error: error.to_string() };
        Self { peer, kind }
    }

    /// This rank lacks what `context` takes.
    pub fn lacking(peer: Rank, context: impl Into<String>, error: impl ToString) -> Self {
        let kind = LinkErrorKind::Lacking { context: context.into(), error: error.to_string() };
        Self { peer, kind }
    }

    /// The peer is gone.
    pub fn closed(peer: Rank) -> Self {
        Self { peer, kind: LinkErrorKind::Closed }
    }

    /// Code of the program panicked on this rank: whose it is, and what the panic said.
    pub fn panicked(rank: Rank, what: impl Into<String>) -> Self {
        Self { peer: rank, kind: LinkErrorKind::Panicked(what.into()) }
    }

    /// The same as people are told it, where this rank called `call`: a mismatch of what one of two
    /// ranks has for the other shows the counts that differ (see [`PeerCounts`]).
    #[must_use]
    pub fn in_words(mut self, call: &Call) -> Self {
        if let LinkErrorKind::Mismatch { ours, theirs } = &mut self.kind {
            (*ours, *theirs) = PeerCounts::in_words(call, *ours, *theirs);
        }
        self
    }

    /// The peer broke the protocol.
    pub fn protocol(peer: Rank, what: impl Into<String>) -> Self {
        Self { peer, kind: LinkErrorKind::Protocol(what.into()) }
    }
}
