//! What can go wrong before a link exists.

use std::io;

use rustix::process::{Resource, getrlimit};

/// Why there is no link over RDMA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbsError {
    /// The library can't be opened.
    #[error("libibverbs was not found: {0}")]
    Library(String),
    /// There is no RDMA device, as on most hosts.
    #[error("{0}")]
    Absent(String),
    /// No device matches, or none that works.
    #[error("{0}")]
    Device(String),
    /// The system refused.
    #[error("{0}: {1}")]
    Os(String, #[source] io::Error),
    /// A rank's card cannot be decoded.
    #[error("rank {0} told {1}")]
    Card(usize, String),
    /// The device refuses the path to a rank.
    #[error("no way to rank {0} {1}")]
    Path(usize, String),
}

impl VerbsError {
    /// Whether this rank has run out of something that the system gives: descriptors, memory.
    pub fn is_lack(&self) -> bool {
        matches!(self, Self::Os(_, error) if unisum_link::is_lack(error))
    }

    /// The last error of the system, while `what` was tried.
    pub(crate) fn os(what: String) -> Self {
        Self::Os(what, io::Error::last_os_error())
    }
}

/// A hint for errors of registering memory, to follow the description: empty unless the limit
/// caused it.
pub(crate) fn locked_memory_hint(error: &io::Error) -> String {
    let limit = getrlimit(Resource::Memlock).current;
    let limited = match error.raw_os_error() {
        Some(ENOMEM) => true,
        // A process that may lock nothing at all gets EPERM.
        Some(EPERM) => limit == Some(0),
        _ => false,
    };
    match limit.filter(|_| limited) {
        Some(bytes) => format!(
            " (this process may lock {} KiB of memory: raise RLIMIT_MEMLOCK, as by ulimit -l)",
            bytes >> 10
        ),
        None => String::new(),
    }
}

const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();
const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
