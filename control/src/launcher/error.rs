//! What can be wrong with what a launcher set.

use std::io;
use std::path::PathBuf;

use super::Source;
use crate::address::AddressError;

/// Why the rank, the world or the meeting place is not known. Every text names the variable at
/// fault.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// A variable holds something else than it must.
    #[error("{variable}=`{value}`{}: {expected}", if_others(*launcher))]
    Malformed {
        /// Whose convention the variable belongs to.
        launcher: Source,
        /// The variable at fault.
        variable: &'static str,
        /// Its value, cut if long.
        value: String,
        /// What was expected instead.
        expected: String,
    },
    /// A variable is set, but not the one that belongs to it.
    #[error("{set} is set but {missing} is not{}", half_set(*launcher, set))]
    HalfSet {
        /// Whose convention the variables belong to.
        launcher: Source,
        /// The variable that is set.
        set: &'static str,
        /// The variable, or variables, of which one is needed.
        missing: String,
    },
    /// Ranks are on several hosts, or may be, and nothing says where they meet.
    #[error(
        "rank {rank} of {world} by {launcher}, {why}: set UNISUM_RENDEZVOUS=tcp://HOST:PORT with \
         the host of rank 0 and a free port there (or MASTER_ADDR and MASTER_PORT){}",
        if_local(*launcher, *world)
    )]
    NoMeetingPlace {
        /// Whose convention gave the rank.
        launcher: Source,
        /// This process's rank.
        rank: usize,
        /// The size of the world.
        world: usize,
        /// What is missing.
        why: &'static str,
    },
    /// An address variable holds no address.
    #[error("{variable}: {error}")]
    Address {
        /// The variable at fault.
        variable: &'static str,
        /// What is wrong with it.
        #[source]
        error: AddressError,
    },
    /// PMIx does not say what only it knows.
    #[error(
        "PMIX_RANK is set, so that the size of the world is PMIx's to tell, but {why} (set \
         UNISUM_RANK to PMIX_RANK's value, UNISUM_WORLD and UNISUM_RENDEZVOUS=tcp://HOST:PORT \
         instead)"
    )]
    Pmix {
        /// What keeps it from that.
        why: String,
    },
    /// The private directory for local meeting files cannot be made or trusted.
    #[error(
        "private directory {}: {error} (repair or remove it, or set UNISUM_RENDEZVOUS)",
        path.display()
    )]
    PrivateDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: io::Error,
    },
}

/// The easier way for ranks that the user started by hand.
fn if_local(launcher: Source, world: usize) -> String {
    match launcher {
        Source::Own | Source::Program => {
            format!(", or UNISUM_LOCAL_SIZE={world} if all ranks are on this host")
        }
        _ => String::new(),
    }
}

/// Whose variable it is, unless its name says so.
fn if_others(launcher: Source) -> String {
    match launcher {
        Source::Own | Source::Program => String::new(),
        launcher => format!(" ({launcher})"),
    }
}

/// Whose variables these are, and what to set.
fn half_set(launcher: Source, set: &str) -> String {
    match launcher {
        Source::Own if set == "UNISUM_WORLD" => ": unset UNISUM_WORLD if a launcher (torchrun, \
            srun, mpirun) starts the ranks; if you do, set UNISUM_RANK to another number for each"
            .to_owned(),
        Source::Own => ": set UNISUM_WORLD to the number of ranks, the same for all of them, or \
            unset UNISUM_RANK if a launcher (torchrun, srun, mpirun) starts the ranks"
            .to_owned(),
        Source::LeaderWorkerSet => format!(
            " ({launcher}): set both or neither, or set UNISUM_RENDEZVOUS=tcp://HOST:PORT with \
             the leader's host"
        ),
        launcher => format!(
            " ({}): set both or neither, or set UNISUM_RANK and UNISUM_WORLD",
            whose(launcher)
        ),
    }
}

/// Some variables are of several launchers.
fn whose(launcher: Source) -> String {
    match launcher {
        Source::Kubeflow => "as torchrun or a Kubeflow PyTorchJob sets them".into(),
        other => other.to_string(),
    }
}

impl LauncherError {
    pub(super) fn malformed(
        launcher: Source,
        variable: &'static str,
        value: &str,
        expected: impl Into<String>,
    ) -> Self {
        let mut shown: String = value.chars().take(MAX_SHOWN_CHARS).collect();
        if shown.len() < value.len() {
            shown.push('…');
        }
        Self::Malformed { launcher, variable, value: shown, expected: expected.into() }
    }
}

/// Node lists can be kilobytes long; an error line must stay readable.
const MAX_SHOWN_CHARS: usize = 120;
