//! What can go wrong on a link. The engine adds rank, operation and step.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::{Call, PeerCounts, Rank};

/// An error of the operating system or of a library, as it was given. Equal to another one if both
/// say the same.
#[derive(Clone)]
pub struct Cause(Arc<io::Error>);

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
        /// What the system said.
        error: Cause,
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
    /// What came was not sealed by the peer: somebody has altered it on its way. Nothing of it was
    /// used.
    #[error(
        "what came after byte {at} of socket {socket} was altered on its way, or is not from \
         that rank: its authentication tag is wrong"
    )]
    Altered {
        /// Which of the sockets to the peer.
        socket: u8,
        /// Bytes that had come on it before.
        at: u64,
    },
    /// The connection could not be set up in time.
    #[error("not connected: {0}")]
    Unreachable(String),
    /// As [`LinkErrorKind::Unreachable`], as the peer does not accept this rank's certificate: the
    /// peer is not to blame.
    #[error("not connected: {0}")]
    NotAccepted(String),
    /// As [`LinkErrorKind::Unreachable`], where the other host gave no answer at all.
    #[error("not connected: {0}")]
    Unanswered(String),
    /// The other host has acknowledged nothing for so long, and what was sent after that neither.
    #[error("nothing that was sent there was acknowledged for {:.1} s", .0.as_secs_f64())]
    Unacknowledged(Duration),
    /// This rank lacks what the link takes, descriptors or threads, say: the peer is not to blame.
    #[error("{context}: {error}")]
    Lacking {
        /// What was tried, with the address where one is involved.
        context: String,
        /// What the system said.
        error: Cause,
    },
    /// No link failed: a function of the program on this rank, which `peer` names, panicked.
    #[error("{0}")]
    Panicked(String),
}

impl Cause {
    /// An error that is not the operating system's.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        io::Error::other(error).into()
    }

    /// The error itself.
    pub fn error(&self) -> &io::Error {
        &self.0
    }
}

impl<E: Into<io::Error>> From<E> for Cause {
    fn from(error: E) -> Self {
        Self(Arc::new(error.into()))
    }
}

impl PartialEq for Cause {
    fn eq(&self, other: &Self) -> bool {
        let [ours, theirs] = [self, other].map(|it| (it.0.raw_os_error(), it.0.kind()));
        ours == theirs && self.to_string() == other.to_string()
    }
}

impl Eq for Cause {}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Whether an error says that this process, or its host, has used something up: whoever is at the
/// other end of a link has no part in that.
pub fn is_lack(error: &io::Error) -> bool {
    let lacks =
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::NOSPC, Errno::DQUOT];
    Errno::from_io_error(error).is_some_and(|error| lacks.contains(&error))
}

impl LinkError {
    /// An error of the operating system while `context` was tried.
    pub fn os(peer: Rank, context: impl Into<String>, error: impl Into<Cause>) -> Self {
        let kind = LinkErrorKind::Os { context: context.into(), error: error.into() };
        Self { peer, kind }
    }

    /// An error of the operating system while `context` was tried: of the peer's link, or this
    /// rank's own where that lacks something.
    pub fn system(peer: Rank, context: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        match is_lack(&error) {
            true => Self::lacking(peer, context, error),
            false => Self::os(peer, context, error),
        }
    }

    /// This rank lacks what `context` takes.
    pub fn lacking(peer: Rank, context: impl Into<String>, error: impl Into<Cause>) -> Self {
        let kind = LinkErrorKind::Lacking { context: context.into(), error: error.into() };
        Self { peer, kind }
    }

    /// What the system said, if it said anything.
    pub const fn cause(&self) -> Option<&Cause> {
        match &self.kind {
            LinkErrorKind::Os { error, .. } | LinkErrorKind::Lacking { error, .. } => Some(error),
            _ => None,
        }
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
