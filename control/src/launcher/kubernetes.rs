//! Kubernetes' controllers: they place pods, so a pod that runs the program itself is one rank.

use super::{LauncherError, Source};
use crate::environment::Environment;

/// Whether this is a pod of an Indexed Job (or JobSet) whose world the user gave.
///
/// The controller sets the index but not how many pods there are.
pub(super) fn is_indexed_world(environment: &Environment) -> bool {
    let set = |name| environment.get(name).is_some();
    set("JOB_COMPLETION_INDEX") && set("UNISUM_WORLD") && !set("UNISUM_RANK")
}

/// Whether Kubeflow Trainer (or an elastic PyTorchJob) placed this pod among several.
pub(super) fn is_trainer(environment: &Environment) -> bool {
    let nodes = environment.get("PET_NNODES");
    environment.get("PET_NODE_RANK").is_some() || nodes.is_some_and(|nodes| nodes != "1")
}

/// Refuses a pod that is meant to start several ranks through torchrun.
pub(super) fn check_one_rank_a_pod(
    launcher: Source,
    environment: &Environment,
) -> Result<(), LauncherError> {
    let per_pod = environment.get(RANKS_PER_POD);
    match per_pod.filter(|count| launcher == Source::KubeflowTrainer && *count != "1") {
        None => Ok(()),
        Some(count) => Err(LauncherError::malformed(
            launcher,
            RANKS_PER_POD,
            count,
            "expected 1, as the program was started without torchrun: start it through torchrun",
        )),
    }
}

/// Why a pod with an index is a world of one, if it is one.
pub(super) fn why_no_world(environment: &Environment) -> Option<String> {
    let index = environment.get("JOB_COMPLETION_INDEX")?;
    Some(format!("JOB_COMPLETION_INDEX={index} is seen: set UNISUM_WORLD to make its pods one job"))
}

const RANKS_PER_POD: &str = "PET_NPROC_PER_NODE";
