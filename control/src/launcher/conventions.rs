//! The table of launchers: which variables each sets, innermost first.

use super::{LauncherError, Source, kubernetes, slurm};
use crate::environment::Environment;

/// The variables one launcher sets. Where several names are listed, the first that is set counts.
#[derive(Debug)]
pub(super) struct Convention {
    pub(super) launcher: Source,
    /// Whether the launcher is visible at all; if so, its rank and world must be complete.
    pub(super) at_work: fn(&Environment) -> bool,
    pub(super) rank: &'static [&'static str],
    pub(super) world: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_size: &'static [&'static str],
    /// Variables that together name this run of the job; those that are set are joined.
    pub(super) job: &'static [&'static str],
    /// Whether `job` may name two runs alike, so that the launcher's process must tell them apart.
    pub(super) job_repeats: bool,
}

/// Where a launcher put this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) local_rank: Option<usize>,
    pub(super) local_size: Option<usize>,
}

impl Convention {
    /// Reads the placement from the variables of this convention, which is at work.
    pub(super) fn read(&self, environment: &Environment) -> Result<Placement, LauncherError> {
        kubernetes::check_one_rank_a_pod(self.launcher, environment)?;
        let world = self.required(environment, self.world, self.rank)?;
        let rank = self.required(environment, self.rank, self.world)?;
        if !(1..=MAX_WORLD).contains(&world.number) {
            return Err(world.refused(self, format!("expected a world of 1 to {MAX_WORLD} ranks")));
        }
        if rank.number >= world.number {
            let limit = format!("expected a rank below {}={}", world.name, world.number);
            return Err(rank.refused(self, limit));
        }
        let (local_rank, local_size) = self.read_local(environment, &world)?;
        Ok(Placement { rank: rank.number, world: world.number, local_rank, local_size })
    }

    fn read_local(
        &self,
        environment: &Environment,
        world: &Number<'_>,
    ) -> Result<(Option<usize>, Option<usize>), LauncherError> {
        let local_rank = self.number(environment, self.local_rank)?;
        let listed = self.number(environment, self.local_size)?;
        if let Some(size) = listed.as_ref().filter(|s| !(1..=world.number).contains(&s.number)) {
            let limit = format!("expected 1 to {}={}", world.name, world.number);
            return Err(size.refused(self, limit));
        }
        let local_size = match self.launcher {
            Source::Slurm => slurm::tasks_on_this_node(environment, world.number)?,
            // Flux tells only how many nodes there are.
            Source::Flux if environment.get("FLUX_JOB_NNODES") == Some("1") => Some(world.number),
            _ => listed.map(|size| size.number),
        };
        let limit = local_size.unwrap_or(world.number);
        if let Some(rank) = local_rank.as_ref().filter(|rank| rank.number >= limit) {
            return Err(rank.refused(self, format!("expected a local rank below {limit}")));
        }
        Ok((local_rank.map(|rank| rank.number), local_size))
    }

    /// The first of `names` that is set, as a number; `partner` is what must be set with it.
    fn required<'a>(
        &self,
        environment: &'a Environment,
        names: &[&'static str],
        partner: &[&'static str],
    ) -> Result<Number<'a>, LauncherError> {
        let set = |names: &[&'static str]| {
            names.iter().copied().find(|name| environment.get(name).is_some())
        };
        self.number(environment, names)?.ok_or_else(|| LauncherError::HalfSet {
            launcher: self.launcher,
            set: set(partner).unwrap_or("the launcher's marker"),
            missing: match names {
                [] => "a variable with the size of the world".to_owned(),
                names => names.join(" or "),
            },
        })
    }

    fn number<'a>(
        &self,
        environment: &'a Environment,
        names: &[&'static str],
    ) -> Result<Option<Number<'a>>, LauncherError> {
        let set = |name: &&'static str| environment.get(name).map(|text| (*name, text));
        let Some((name, text)) = names.iter().find_map(set) else {
            return Ok(None);
        };
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|_| digits).ok_or_else(|| {
            LauncherError::malformed(self.launcher, name, text, "expected a whole number")
        })?;
        Ok(Some(Number { name, text, number }))
    }

    /// Whether the launcher answers the PMI calls of the ranks it starts.
    pub(super) fn serves_pmi(&self) -> bool {
        matches!(self.launcher, Source::Pals | Source::Flux | Source::Slurm | Source::OpenMpi)
    }

    /// Whether the variables are PMI's or PMIx's, whoever set them.
    pub(super) fn speaks_pmi(&self) -> bool {
        matches!(self.launcher, Source::Hydra | Source::Pmix)
    }
}

/// A variable that holds a whole number.
struct Number<'a> {
    name: &'static str,
    text: &'a str,
    number: usize,
}

impl Number<'_> {
    fn refused(&self, convention: &Convention, expected: String) -> LauncherError {
        LauncherError::malformed(convention.launcher, self.name, self.text, expected)
    }
}

fn any(environment: &Environment, names: &[&str]) -> bool {
    names.iter().any(|name| environment.get(name).is_some())
}

fn all(environment: &Environment, names: &[&str]) -> bool {
    names.iter().all(|name| environment.get(name).is_some())
}

/// Far above any machine; keeps a garbled size from becoming a huge allocation.
pub(super) const MAX_WORLD: usize = 1 << 20;

/// All launchers known, in the order in which they are asked: inner before outer.
///
/// Sources: torch/distributed/run.py; Open MPI, MPICH, Slurm and Flux manuals; Kubeflow
/// training-operator `envvar.go`; LeaderWorkerSet documentation.
pub(super) const CONVENTIONS: &[Convention] = &[
    Convention {
        launcher: Source::Own,
        at_work: |e| any(e, &["UNISUM_RANK", "UNISUM_WORLD"]) && !kubernetes::is_indexed_world(e),
        rank: &["UNISUM_RANK"],
        world: &["UNISUM_WORLD"],
        local_rank: &["UNISUM_LOCAL_RANK"],
        local_size: &["UNISUM_LOCAL_SIZE"],
        job: &[],
        job_repeats: true,
    },
    Convention {
        launcher: Source::IndexedJob,
        at_work: kubernetes::is_indexed_world,
        rank: &["JOB_COMPLETION_INDEX"],
        world: &["UNISUM_WORLD"],
        local_rank: &[],
        local_size: &[],
        job: &[],
        job_repeats: false,
    },
    Convention {
        launcher: Source::Torchrun,
        // Kubeflow's pods have the first two as well; only torchrun and its like set the third.
        at_work: |e| all(e, &["RANK", "WORLD_SIZE", "LOCAL_RANK"]),
        rank: &["RANK"],
        world: &["WORLD_SIZE"],
        local_rank: &["LOCAL_RANK"],
        local_size: &["LOCAL_WORLD_SIZE"],
        job: &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"],
        // The run id is "none" unless the user gives one.
        job_repeats: true,
    },
    Convention {
        launcher: Source::Horovod,
        at_work: |e| any(e, &["HOROVOD_RANK", "HOROVOD_SIZE"]),
        rank: &["HOROVOD_RANK"],
        world: &["HOROVOD_SIZE"],
        local_rank: &["HOROVOD_LOCAL_RANK"],
        local_size: &["HOROVOD_LOCAL_SIZE"],
        job: &["HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"],
        // Each rank has a forked parent of its own; the driver's random port tells runs apart.
        job_repeats: false,
    },
    Convention {
        launcher: Source::OpenMpi,
        at_work: |e| any(e, &["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]),
        rank: &["OMPI_COMM_WORLD_RANK"],
        world: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::Hydra,
        at_work: |e| any(e, &["PMI_RANK", "PMI_SIZE"]),
        rank: &["PMI_RANK"],
        world: &["PMI_SIZE"],
        local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
        local_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
        job: &["PMI_JOBID"],
        job_repeats: true,
    },
    Convention {
        launcher: Source::Mvapich,
        at_work: |e| any(e, &["MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"]),
        rank: &["MV2_COMM_WORLD_RANK"],
        world: &["MV2_COMM_WORLD_SIZE"],
        local_rank: &["MV2_COMM_WORLD_LOCAL_RANK"],
        local_size: &["MV2_COMM_WORLD_LOCAL_SIZE"],
        job: &[],
        job_repeats: true,
    },
    Convention {
        launcher: Source::Pals,
        at_work: |e| any(e, &["PALS_RANKID"]),
        rank: &["PALS_RANKID"],
        world: &["PMI_SIZE"],
        local_rank: &["PALS_LOCAL_RANKID"],
        local_size: &["PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"],
        job: &["PALS_APID"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::Flux,
        at_work: |e| any(e, &["FLUX_TASK_RANK"]),
        rank: &["FLUX_TASK_RANK"],
        world: &["FLUX_JOB_SIZE"],
        local_rank: &["FLUX_TASK_LOCAL_ID"],
        local_size: &[],
        job: &["FLUX_JOB_ID"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::Jsrun,
        at_work: |e| any(e, &["JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"]),
        rank: &["JSM_NAMESPACE_RANK"],
        world: &["JSM_NAMESPACE_SIZE"],
        local_rank: &["JSM_NAMESPACE_LOCAL_RANK"],
        local_size: &["JSM_NAMESPACE_LOCAL_SIZE"],
        job: &["LSB_JOBID", "PMIX_NAMESPACE"],
        job_repeats: true,
    },
    Convention {
        launcher: Source::Slurm,
        at_work: slurm::in_step,
        rank: &["SLURM_PROCID"],
        world: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"],
        local_rank: &["SLURM_LOCALID"],
        local_size: &[],
        job: slurm::JOB,
        job_repeats: false,
    },
    Convention {
        launcher: Source::Pmix,
        at_work: |e| any(e, &["PMIX_RANK"]),
        rank: &["PMIX_RANK"],
        // PMIx tells the size to its library only, see `pmix`.
        world: &[],
        local_rank: &[],
        local_size: &[],
        job: &["PMIX_NAMESPACE"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::Kubeflow,
        at_work: |e| any(e, &["RANK", "WORLD_SIZE"]),
        rank: &["RANK"],
        world: &["WORLD_SIZE"],
        local_rank: &[],
        local_size: &[],
        job: &["MASTER_ADDR", "MASTER_PORT"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::KubeflowTrainer,
        at_work: kubernetes::is_trainer,
        rank: &["PET_NODE_RANK"],
        world: &["PET_NNODES"],
        local_rank: &[],
        local_size: &[],
        job: &["PET_MASTER_ADDR", "PET_MASTER_PORT"],
        job_repeats: false,
    },
    Convention {
        launcher: Source::LeaderWorkerSet,
        at_work: |e| any(e, &["LWS_WORKER_INDEX", "LWS_GROUP_SIZE"]),
        rank: &["LWS_WORKER_INDEX"],
        world: &["LWS_GROUP_SIZE"],
        local_rank: &[],
        local_size: &[],
        job: &["LWS_LEADER_ADDRESS"],
        job_repeats: false,
    },
];
