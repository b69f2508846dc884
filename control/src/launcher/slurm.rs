//! What Slurm says beyond rank and size: whether there is a step, its nodes, tasks on each.

use super::{LauncherError, Source, hostlist};
use crate::environment::Environment;

/// The variables that name a job step; the last one tells runs of a requeued job apart.
pub(super) const JOB: &[&str] = &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"];

/// Whether this process is a task of a step that `srun` started.
///
/// Inside `sbatch` and `salloc` the variables describe the allocation: `SLURM_NTASKS` is then what
/// a step *could* have. The batch, interactive and external steps have ids at the top of the range
/// (`SLURM_MAX_NORMAL_STEP_ID` and up in `slurm/slurm.h`) and run one process, not the tasks.
pub(super) fn in_step(environment: &Environment) -> bool {
    let step = environment.get("SLURM_STEP_ID").or_else(|| environment.get("SLURM_STEPID"));
    // A garbled id is taken for a step, so that what follows is an error and not a world of one.
    step.is_some_and(|id| id.parse().map_or(true, |id: u32| id < FIRST_SPECIAL_STEP))
}

/// Why a process in an allocation is a world of one, if it is one.
pub(super) fn why_no_step(environment: &Environment) -> Option<String> {
    let job = environment.get("SLURM_JOB_ID")?;
    Some(format!("in Slurm job {job} but in no step: start it with srun to get its tasks"))
}

/// How many tasks of the step run on this node; `None` if Slurm does not say.
pub(super) fn tasks_on_this_node(
    environment: &Environment,
    world: usize,
) -> Result<Option<usize>, LauncherError> {
    if environment.get("SLURM_STEP_NUM_NODES") == Some("1") {
        return Ok(Some(world));
    }
    let tasks = environment.get(TASKS_PER_NODE).zip(environment.get("SLURM_NODEID"));
    let Some((counts, node)) = tasks else {
        return Ok(None);
    };
    let malformed = |variable, value, expected| {
        Err(LauncherError::malformed(Source::Slurm, variable, value, expected))
    };
    let Ok(node) = node.parse() else {
        return malformed("SLURM_NODEID", node, "expected a whole number");
    };
    match nth_count(counts, node) {
        Some(tasks) if (1..=world).contains(&tasks) => Ok(Some(tasks)),
        _ => malformed(TASKS_PER_NODE, counts, "expected tasks for each node, as in 2(x3),1"),
    }
}

/// The first host of the step, which runs rank 0 in every distribution but plane and arbitrary.
///
/// `SLURM_LAUNCH_NODE_IPADDR` is no substitute: it names the host where `srun` was typed, often a
/// login node.
pub(super) fn first_host(environment: &Environment) -> Result<Option<String>, LauncherError> {
    let listed = |name: &'static str| environment.get(name).map(|list| (name, list));
    let Some((name, list)) = NODE_LISTS.into_iter().find_map(listed) else {
        return Ok(None);
    };
    let malformed = |problem| LauncherError::malformed(Source::Slurm, name, list, problem);
    Ok(hostlist::expand(list, 1).map_err(malformed)?.into_iter().next())
}

/// The count for `node` in a list like `2(x3),1`: two tasks on each of three nodes, then one.
fn nth_count(counts: &str, node: usize) -> Option<usize> {
    let mut left = node;
    for item in counts.split(',') {
        let (count, times) = match item.split_once("(x") {
            Some((count, rest)) => (count, rest.strip_suffix(')')?.parse().ok()?),
            None => (item, 1),
        };
        let count = count.parse().ok()?;
        match left.checked_sub(times) {
            Some(rest) => left = rest,
            None => return Some(count),
        }
    }
    None
}

const TASKS_PER_NODE: &str = "SLURM_STEP_TASKS_PER_NODE";
const NODE_LISTS: [&str; 3] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
/// A little below the lowest of Slurm's special step ids, 0xfffffffa and up.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_counts_are_found_by_node() {
        for (counts, node, tasks) in [
            ("4", 0, Some(4)),
            ("4", 1, None),
            ("2(x3),1", 0, Some(2)),
            ("2(x3),1", 2, Some(2)),
            ("2(x3),1", 3, Some(1)),
            ("2(x3),1", 4, None),
            ("1(x4294967295)", 4_000_000_000, Some(1)),
            ("2(x", 0, None),
            ("2x3", 0, None),
            ("", 0, None),
        ] {
            assert_eq!(nth_count(counts, node), tasks, "{counts} {node}");
        }
    }
}
