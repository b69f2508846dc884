//! Who started this process: the rank, the world and the meeting place, from what launchers set.
//!
//! [`detect`] reads an [`Environment`] and answers with one [`Detected`]. The innermost launcher
//! wins (`srun torchrun` is torchrun's), the answer says in one line what else was seen, and
//! variables that are half set or malformed are errors: a launcher that is visible never ends as a
//! world of one.

mod conventions;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod hostlist;
mod kubernetes;
mod local;
mod pmi;
mod pmix;
mod rendezvous;
mod slurm;
mod token;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

pub use error::LauncherError;
pub use token::{Token, TokenError};

use crate::address::Rendezvous;
use crate::environment::Environment;
use conventions::{CONVENTIONS, Convention};

/// What the environment says about this process and its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// This process's rank, below `world`.
    pub rank: usize,
    /// How many ranks there are, at least 1.
    pub world: usize,
    /// This process's place among the ranks of its host, if the launcher says.
    pub local_rank: Option<usize>,
    /// How many ranks this host has, if the launcher says.
    pub local_size: Option<usize>,
    /// Which launcher's variables were taken.
    pub source: Source,
    /// Where the ranks meet; `None` only in a world of 1.
    pub rendezvous: Option<Rendezvous>,
    /// Identity of this run of the job, the same on all ranks.
    pub job: String,
    /// What the launcher passes between its ranks, where they meet by that.
    pub store: Option<LauncherStore>,
    /// What else a reader of the log should know: other launchers seen, why the world is 1.
    pub note: Option<String>,
}

/// What a launcher passes between the ranks that it starts: one value, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LauncherStore {
    /// The socket to mpiexec, for PMI-1.
    Pmi(RawFd),
    /// A PMIx server, by its library.
    Pmix(Arc<pmix::Session>),
}

impl LauncherStore {
    /// Puts `value` for all ranks, as rank 0 does, or gets what it puts if `value` is `None`.
    ///
    /// Blocks until all ranks have called it, for little more than `timeout` at most. It serves
    /// once: after this call the connection to the launcher is closed.
    ///
    /// # Errors
    /// In words: there is no such connection, the program uses it for MPI, the launcher's refusal,
    /// or the time is up.
    pub fn share(
        &self,
        value: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<Option<Vec<u8>>, String> {
        match self {
            Self::Pmi(descriptor) => pmi::share(*descriptor, value, timeout),
            Self::Pmix(session) => session.share(value, timeout),
        }
    }
}

impl Detected {
    /// What may help ranks that do not find each other: those that different processes started go
    /// by different files if the job is named after the process that started them.
    pub fn hint(&self) -> Option<String> {
        if self.source == Source::OpenMpi && self.local_size != Some(self.world) {
            let Some(Rendezvous::File(path)) = &self.rendezvous else { return None };
            return Some(format!(
                "ranks on several hosts meet by {}, which all have to see: if homes are not \
                 shared, set UNISUM_RENDEZVOUS=tcp://HOST:PORT with rank 0's host (mpirun -x)",
                path.display()
            ));
        }
        let Some(Rendezvous::File(path)) = &self.rendezvous else { return None };
        if !matches!(self.source, Source::Own | Source::Program) {
            return None;
        }
        if self.job.ends_with(&local::launcher_process("UNISUM_RANK")) {
            let text = "ranks that one process has started meet there: set UNISUM_JOB to the same \
                        name for all if several have, as subshells";
            return Some(text.to_owned());
        }
        local::is_named_after(path, &format!("{} {}", Source::Own, self.job)).then(|| {
            format!(
                "ranks of one UNISUM_JOB meet there, here `{:.120}`: it must be the same on all \
                 ranks",
                self.job
            )
        })
    }
}

/// Whose variables gave the rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// The user, by `UNISUM_RANK` and `UNISUM_WORLD`.
    Own,
    /// The program, in code.
    Program,
    /// torchrun, or what sets the same variables (Ray Train, DeepSpeed, Accelerate).
    Torchrun,
    /// horovodrun.
    Horovod,
    /// Open MPI's mpirun.
    OpenMpi,
    /// Hydra: MPICH's and Intel MPI's mpiexec.
    Hydra,
    /// MVAPICH's launchers.
    Mvapich,
    /// HPE Cray's PALS.
    Pals,
    /// Flux.
    Flux,
    /// IBM's jsrun.
    Jsrun,
    /// A Slurm job step.
    Slurm,
    /// A PMIx server that is none of the above.
    Pmix,
    /// A Kubeflow PyTorchJob whose pods are one rank each.
    Kubeflow,
    /// A Kubeflow Trainer job (version 2) whose pods are one rank each.
    KubeflowTrainer,
    /// A Kubernetes LeaderWorkerSet whose pods are one rank each.
    LeaderWorkerSet,
    /// A Kubernetes Indexed Job or JobSet with `UNISUM_WORLD` set.
    IndexedJob,
    /// Nobody: a world of one.
    Single,
}

/// Finds the rank, world and meeting place that `environment` gives this process.
///
/// Where all ranks are on this host and no address is given, this makes the user's private
/// directory that the meeting file goes to; nothing else is written. Never blocks on other ranks.
/// Where only PMIx knows the size of the world, this opens its library, for 30 s at most.
///
/// # Errors
/// [`LauncherError`] if variables are half set, malformed or contradict each other, if a launcher
/// with several ranks is visible but nothing says where they can meet, if PMIx is needed and can't
/// be used, or if the private directory cannot be made or is not private.
pub fn detect(environment: &Environment) -> Result<Detected, LauncherError> {
    let Some(convention) = innermost(environment)? else {
        return single(environment);
    };
    let (placement, pmix) = match convention.launcher {
        Source::Pmix => pmix::find(environment)?,
        _ => (convention.read(environment)?, None),
    };
    let meeting = rendezvous::find(environment, convention, placement, pmix)?;
    Ok(Detected {
        rank: placement.rank,
        world: placement.world,
        local_rank: placement.local_rank,
        local_size: placement.local_size,
        source: convention.launcher,
        rendezvous: meeting.rendezvous,
        job: meeting.job,
        store: meeting.store,
        note: others(environment, convention),
    })
}

/// Whether a launcher is visible in `environment`, or anything of one. Opens and writes nothing.
pub fn is_launched(environment: &Environment) -> bool {
    // What is malformed is told when the rank joins.
    !matches!(innermost(environment), Ok(None))
}

/// Whether PMIx is all that says where ranks meet: it is opened once, so that nothing is asked of
/// it before that is needed. Opens and writes nothing.
pub fn meets_by_pmix(environment: &Environment) -> bool {
    let is_pmix = |it: &Convention| it.launcher == Source::Pmix;
    environment.get("UNISUM_RENDEZVOUS").is_none()
        && matches!(innermost(environment), Ok(Some(convention)) if is_pmix(convention))
}

/// Finds the job that a process is to join while it runs: its meeting place and its name.
/// `UNISUM_RANK` and `UNISUM_WORLD` say nothing then, whatever they hold: a template that starts
/// ranks and newcomers alike may set them. Without a launcher, the name is that of ranks that were
/// told the same meeting place.
///
/// # Errors
/// As [`detect`].
pub fn detect_job(environment: &Environment) -> Result<Detected, LauncherError> {
    let is_set = |name| environment.get(name).is_some();
    let [rank, world, local_rank, local_size] =
        ["UNISUM_RANK", "UNISUM_WORLD", "UNISUM_LOCAL_RANK", "UNISUM_LOCAL_SIZE"];
    let own: &[(&'static str, &str)] = match (is_set(rank), is_set(world)) {
        // Both say that the user has started the job's ranks, and nothing else.
        (true, true) if is_set("UNISUM_RENDEZVOUS") => {
            &[(rank, "0"), (world, "1"), (local_rank, ""), (local_size, "")]
        }
        // Whether all are on this host says where to meet.
        (true, true) => &[(rank, "0"), (local_rank, "")],
        _ => &[(rank, ""), (world, "")],
    };
    let own = own.iter().map(|(name, value)| (*name, (*value).to_owned()));
    let environment = &environment.clone().with(own.collect());
    let detected = detect(environment)?;
    let is_named = environment.get("UNISUM_JOB").is_some() || detected.source != Source::Single;
    Ok(match &detected.rendezvous {
        Some(told) if !is_named => Detected { job: told.to_string(), ..detected },
        _ => detected,
    })
}

/// The first convention at work, in the order of the table.
///
/// Slurm, Flux and PALS speak PMI to the ranks they start themselves. If the PMI variables say the
/// same as theirs, they are the launcher; if not, an mpiexec runs inside the allocation.
fn innermost(environment: &Environment) -> Result<Option<&'static Convention>, LauncherError> {
    let mut at_work = CONVENTIONS.iter().filter(|convention| (convention.at_work)(environment));
    let Some(first) = at_work.next() else {
        return Ok(None);
    };
    if first.launcher != Source::Hydra {
        return Ok(Some(first));
    }
    let pmi = first.read(environment)?;
    let is_pmi_server = |outer: &&Convention| {
        matches!(outer.launcher, Source::Pals | Source::Flux | Source::Slurm)
            && outer.read(environment).is_ok_and(|o| (o.rank, o.world) == (pmi.rank, pmi.world))
    };
    Ok(at_work.find(is_pmi_server).or(Some(first)))
}

/// Names the launchers that are visible around the one taken.
fn others(environment: &Environment, taken: &Convention) -> Option<String> {
    let outer = CONVENTIONS.iter().filter(|convention| {
        (convention.at_work)(environment)
            && convention.launcher != taken.launcher
            && !convention.rank.iter().any(|name| taken.rank.contains(name))
            && !(taken.serves_pmi() && convention.speaks_pmi())
    });
    let names: Vec<_> = outer.map(|convention| convention.launcher.to_string()).collect();
    (!names.is_empty()).then(|| format!("inside: {}", names.join(", ")))
}

fn single(environment: &Environment) -> Result<Detected, LauncherError> {
    let note = slurm::why_no_step(environment).or_else(|| kubernetes::why_no_world(environment));
    Ok(Detected {
        rank: 0,
        world: 1,
        local_rank: Some(0),
        local_size: Some(1),
        source: Source::Single,
        rendezvous: rendezvous::explicit(environment)?,
        job: environment.get("UNISUM_JOB").unwrap_or("single").to_owned(),
        store: None,
        note,
    })
}

impl fmt::Display for Detected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} by {}", self.rank, self.world, self.source)?;
        if let (Some(rank), Some(size)) = (self.local_rank, self.local_size) {
            write!(f, ", local rank {rank} of {size}")?;
        }
        match (&self.rendezvous, &self.store) {
            (_, Some(LauncherStore::Pmi(_))) => f.write_str(", rendezvous by mpiexec (PMI)")?,
            (_, Some(LauncherStore::Pmix(_))) => f.write_str(", rendezvous by PMIx")?,
            (Some(rendezvous), None) => write!(f, ", rendezvous {rendezvous}")?,
            (None, None) => {}
        }
        self.note.as_ref().map_or(Ok(()), |note| write!(f, " ({note})"))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "UNISUM_RANK and UNISUM_WORLD",
            Self::Program => "the program",
            Self::Torchrun => "torchrun",
            Self::Horovod => "horovodrun",
            Self::OpenMpi => "Open MPI",
            Self::Hydra => "Hydra PMI (MPICH, Intel MPI)",
            Self::Mvapich => "MVAPICH",
            Self::Pals => "PALS",
            Self::Flux => "Flux",
            Self::Jsrun => "jsrun",
            Self::Slurm => "Slurm step",
            Self::Pmix => "PMIx",
            Self::Kubeflow => "Kubeflow PyTorchJob (one rank a pod)",
            Self::KubeflowTrainer => "Kubeflow Trainer (one rank a pod)",
            Self::LeaderWorkerSet => "LeaderWorkerSet (one rank a pod)",
            Self::IndexedJob => "Kubernetes Indexed Job (one rank a pod)",
            Self::Single => "no launcher (single process)",
        })
    }
}

#[cfg(test)]
mod tests;
