//! What can go wrong on the control plane.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::message::BLOB_BYTES_MAX;
use super::verdict::Verdict;
use crate::interface::InterfaceError;

/// Why a rank could not join, or an exchange failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ControlError {
    /// The coordinator could not be reached in time.
    #[error(
        "rank 0 could not be reached at {target} within {seconds:.1} s ({attempts} attempts, the \
         last one: {last})",
        seconds = waited.as_secs_f64()
    )]
    Unreachable {
        /// Where: an address, or the rendezvous file with what it says.
        target: String,
        /// How long it was tried.
        waited: Duration,
        /// How often.
        attempts: u32,
        /// The last error.
        last: String,
    },
    /// This process could not listen.
    #[error("listening on {target}: {source}")]
    Listen {
        /// The address, with the ports that were tried.
        target: String,
        /// The system's words.
        source: io::Error,
    },
    /// The rendezvous host's name could not be resolved on rank 0.
    #[error(transparent)]
    Resolve(io::Error),
    /// This host has no address that fits.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// Rank 0 could not write the rendezvous file.
    #[error("writing the rendezvous file {}: {source}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// A world larger than the protocol allows.
    #[error("a world of {0} ranks; the largest has {max}", max = super::WORLD_MAX)]
    World(usize),
    /// The blob is too large, or the blobs for all ranks together are.
    #[error("{0} bytes in an exchange; the largest blob has {BLOB_BYTES_MAX}")]
    Blob(usize),
    /// The communicator is over.
    #[error("{0}")]
    Ended(Verdict),
    /// This rank has left the communicator.
    #[error("this rank has left the communicator")]
    HasLeft,
}

impl ControlError {
    pub(super) const fn system(what: &'static str, source: io::Error) -> Self {
        Self::System { what, source }
    }
}
