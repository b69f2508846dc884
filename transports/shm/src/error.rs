//! Why shared memory cannot be used, or can no longer be used.

use std::io;

use unisum_link::Rank;

/// A failure to join or use the memory of a host. A rank that gets one while joining falls back to
/// another transport.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShmError {
    /// No other rank is on this host, according to the cards.
    #[error("no other rank shares this host")]
    Alone,
    /// A rank's card cannot be decoded: another version, or garbage.
    #[error("the shared-memory card of rank {0} can't be read: do all ranks run the same version?")]
    Card(Rank),
    /// The operating system refused.
    #[error("{context}: {source}")]
    Os {
        /// What was attempted.
        context: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// This rank's address space is limited too much.
    #[error(
        "the limit of the address space (RLIMIT_AS) leaves room for {room} bytes, and sharing \
         memory takes {least}"
    )]
    Narrow {
        /// The room it leaves, in bytes.
        room: u64,
        /// The room that the ranks of this host need at least, in bytes.
        least: u64,
    },
    /// A rank of the host did not respond in time.
    #[error("ranks {0:?} of this host did not take part in time")]
    Late(Vec<Rank>),
    /// The job ended while this rank waited for the others of the host.
    #[error("the job ended meanwhile")]
    Over,
    /// What answered is not the leader, or the memory is not the one it described.
    #[error("joining the memory of rank {leader}: {reason}")]
    Refused {
        /// The rank that owns the memory.
        leader: Rank,
        /// What was wrong.
        reason: String,
    },
    /// The heap has no free range of that size.
    #[error("no {bytes} free bytes in a shared heap of {heap_bytes}")]
    Full {
        /// The requested size.
        bytes: usize,
        /// The total size of the heap.
        heap_bytes: u64,
    },
    /// The link of this heap was aborted.
    #[error("the communicator of this heap was aborted")]
    Aborted,
}

impl ShmError {
    /// The ranks that prevent sharing; empty if this rank itself lacks something.
    pub fn failed_ranks(&self) -> Vec<Rank> {
        match self {
            Self::Late(ranks) => ranks.clone(),
            Self::Refused { leader, .. } => vec![*leader],
            Self::Card(rank) => vec![*rank],
            Self::Alone
            | Self::Narrow { .. }
            | Self::Os { .. }
            | Self::Over
            | Self::Full { .. }
            | Self::Aborted => Vec::new(),
        }
    }

    /// Whether this rank has run out of something that the system gives: descriptors, memory.
    pub fn is_lack(&self) -> bool {
        matches!(self, Self::Os { source, .. } if unisum_link::is_lack(source))
    }

    /// The system's refusal of what `context` names; for `map_err`.
    pub(crate) fn os<E: Into<io::Error>>(context: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Os { context, source: source.into() }
    }
}
