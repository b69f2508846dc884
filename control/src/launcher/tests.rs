use super::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A private directory that goes when the test ends.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        use std::os::unix::fs::DirBuilderExt;
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only the count itself must be distinct.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("unisum-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `A=1 B=2` as an environment, with a private session directory.
fn environment(scratch: &Scratch, text: &str) -> Environment {
    let session = format!("XDG_RUNTIME_DIR={}", scratch.path().display());
    let pairs = text.split_whitespace().chain([session.as_str()]);
    pairs.map(|pair| pair.split_once('=').unwrap()).collect()
}

fn detected(text: &str) -> Result<Detected, LauncherError> {
    detect(&environment(&Scratch::new(), text))
}

/// Rank, world, local rank, local size and where to meet, in short.
fn summary(found: &Detected) -> String {
    let or_dash = |number: Option<usize>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let meeting = match &found.rendezvous {
        None => "nowhere".to_owned(),
        Some(Rendezvous::File(_)) => "file".to_owned(),
        Some(tcp) => tcp.to_string(),
    };
    let local = (or_dash(found.local_rank), or_dash(found.local_size));
    format!("{}/{} {}/{} {meeting}", found.rank, found.world, local.0, local.1)
}

const TORCHRUN: &str = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 \
                        MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0";
const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 \
                        OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=prterun-h-7@1 PMIX_RANK=1";
const HYDRA: &str = "PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3 PMI_FD=5";
const SLURM: &str = "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=7 \
                     SLURM_NTASKS=7 SLURM_LOCALID=1 SLURM_NODEID=2 SLURM_STEP_NUM_NODES=4 \
                     SLURM_STEP_TASKS_PER_NODE=2(x3),1 SLURM_STEP_NODELIST=node[09-11],gpu1";
const KUBEFLOW: &str = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=job-master-0 MASTER_PORT=23456";

const LOCAL_SLURM: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=1 SLURM_NTASKS=2 \
                       SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=1";

const LAUNCHERS: &[(&str, Source, &str)] = &[
    ("", Source::Single, "0/1 0/1 nowhere"),
    ("UNISUM_RANK=1 UNISUM_WORLD=2 UNISUM_RENDEZVOUS=tcp://a:1", Source::Own, "1/2 -/- tcp://a:1"),
    ("UNISUM_RANK=0 UNISUM_WORLD=1", Source::Own, "0/1 -/- nowhere"),
    ("UNISUM_RANK=1 UNISUM_WORLD=2 UNISUM_LOCAL_SIZE=2", Source::Own, "1/2 -/2 file"),
    (TORCHRUN, Source::Torchrun, "3/8 1/2 tcp://10.0.0.1:29500"),
    (
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_PORT=1",
        Source::Torchrun,
        "1/2 1/2 file",
    ),
    (
        "HOROVOD_RANK=0 HOROVOD_SIZE=2 HOROVOD_LOCAL_RANK=0 HOROVOD_LOCAL_SIZE=2 \
          HOROVOD_GLOO_RENDEZVOUS_PORT=4",
        Source::Horovod,
        "0/2 0/2 file",
    ),
    (OPEN_MPI, Source::OpenMpi, "1/4 1/4 file"),
    (HYDRA, Source::Hydra, "2/3 2/3 file"),
    (
        "PMI_RANK=1 PMI_SIZE=2 PMI_LOCAL_RANK=0 PMI_LOCAL_SIZE=1 MASTER_ADDR=fd00::1 \
          MASTER_PORT=5",
        Source::Hydra,
        "1/2 0/1 tcp://[fd00::1]:5",
    ),
    ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALNRANKS=1 PMI_FD=5", Source::Hydra, "1/2 -/1 store://unisum"),
    (
        "MV2_COMM_WORLD_RANK=0 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=0 \
          MV2_COMM_WORLD_LOCAL_SIZE=2",
        Source::Mvapich,
        "0/2 0/2 file",
    ),
    (
        "PALS_RANKID=1 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=2 PALS_APID=a PMI_SIZE=2 PMI_RANK=1",
        Source::Pals,
        "1/2 1/2 file",
    ),
    (
        "FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 FLUX_JOB_NNODES=1 FLUX_JOB_ID=f",
        Source::Flux,
        "1/2 1/2 file",
    ),
    (
        "JSM_NAMESPACE_RANK=0 JSM_NAMESPACE_SIZE=2 JSM_NAMESPACE_LOCAL_RANK=0 \
          JSM_NAMESPACE_LOCAL_SIZE=2 PMIX_RANK=0",
        Source::Jsrun,
        "0/2 0/2 file",
    ),
    (SLURM, Source::Slurm, "5/7 1/2 tcp://node09:24373"),
    (LOCAL_SLURM, Source::Slurm, "1/2 1/2 file"),
    (KUBEFLOW, Source::Kubeflow, "1/2 -/- tcp://job-master-0:23456"),
    (
        "PET_NODE_RANK=1 PET_NNODES=2 PET_NPROC_PER_NODE=1 PET_MASTER_ADDR=m PET_MASTER_PORT=9",
        Source::KubeflowTrainer,
        "1/2 -/- tcp://m:9",
    ),
    (
        "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=lws-0.lws UNISUM_PORT=7000",
        Source::LeaderWorkerSet,
        "1/2 -/- tcp://lws-0.lws:7000",
    ),
    (
        "JOB_COMPLETION_INDEX=2 UNISUM_WORLD=4 UNISUM_RENDEZVOUS=tcp://j-0-0.s:1",
        Source::IndexedJob,
        "2/4 -/- tcp://j-0-0.s:1",
    ),
];

#[test]
fn every_launcher_is_read() {
    for &(text, source, expected) in LAUNCHERS {
        let found = detected(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((found.source, summary(&found).as_str()), (source, expected), "{text}");
    }
}

#[test]
fn the_innermost_launcher_wins_and_the_others_are_named() {
    let own = "UNISUM_RANK=0 UNISUM_WORLD=2 UNISUM_RENDEZVOUS=tcp://a:1";
    for (text, source, note) in [
        (format!("{SLURM} {TORCHRUN}"), Source::Torchrun, Some("inside: Slurm step")),
        (format!("{SLURM} {OPEN_MPI}"), Source::OpenMpi, Some("inside: Slurm step")),
        (format!("{OPEN_MPI} {TORCHRUN}"), Source::Torchrun, Some("inside: Open MPI, PMIx")),
        (format!("{KUBEFLOW} {OPEN_MPI}"), Source::OpenMpi, None),
        (format!("{TORCHRUN} {own}"), Source::Own, Some("inside: torchrun")),
        (format!("{SLURM} {HYDRA}"), Source::Hydra, Some("inside: Slurm step")),
        (format!("{SLURM} PMI_RANK=5 PMI_SIZE=7 PMIX_RANK=5"), Source::Slurm, None),
    ] {
        let found = detected(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let named = found.note.as_deref();
        match note {
            Some(note) => assert!(named.is_some_and(|n| n.starts_with(note)), "{found}"),
            None => assert!(named.is_none_or(|n| !n.contains("PMI")), "{found}"),
        }
        assert_eq!(found.source, source, "{found}");
    }
}

const MISTAKES: &[(&str, &[&str])] = &[
    ("UNISUM_RANK=0", &["UNISUM_RANK", "UNISUM_WORLD is not", "set UNISUM_WORLD to the number"]),
    ("UNISUM_WORLD=2", &["UNISUM_WORLD is set", "UNISUM_RANK is not", "unset UNISUM_WORLD if"]),
    ("UNISUM_RANK=x UNISUM_WORLD=2", &["UNISUM_RANK=`x`", "whole number"]),
    ("UNISUM_RANK=+1 UNISUM_WORLD=2", &["UNISUM_RANK=`+1`"]),
    ("UNISUM_RANK=2 UNISUM_WORLD=2", &["UNISUM_RANK=`2`", "below UNISUM_WORLD=2"]),
    ("UNISUM_RANK=0 UNISUM_WORLD=0", &["UNISUM_WORLD=`0`"]),
    ("UNISUM_RANK=0 UNISUM_WORLD=4000000000", &["UNISUM_WORLD=`4000000000`"]),
    ("UNISUM_RANK=0 UNISUM_WORLD=2 UNISUM_LOCAL_SIZE=3", &["UNISUM_LOCAL_SIZE=`3`"]),
    (
        "UNISUM_RANK=0 UNISUM_WORLD=4 UNISUM_LOCAL_RANK=2 UNISUM_LOCAL_SIZE=2",
        &["UNISUM_LOCAL_RANK=`2`", "below 2"],
    ),
    (
        "UNISUM_RANK=0 UNISUM_WORLD=2",
        &["UNISUM_RENDEZVOUS=tcp://HOST:PORT", "or UNISUM_LOCAL_SIZE=2 if all"],
    ),
    ("UNISUM_RENDEZVOUS=tcp:/x", &["UNISUM_RENDEZVOUS: `tcp:/x`"]),
    ("RANK=abc WORLD_SIZE=2 LOCAL_RANK=0", &["RANK=`abc`", "torchrun"]),
    ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0", &["RANK=`2`", "WORLD_SIZE=2"]),
    ("RANK=0", &["RANK is set but WORLD_SIZE is not"]),
    ("WORLD_SIZE=2 LOCAL_RANK=0", &["WORLD_SIZE is set but RANK is not"]),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", &["torchrun", "MASTER_ADDR"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", &["MASTER_PORT"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1", &["MASTER_ADDR"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0", &["MASTER_PORT=`0`"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=99999", &["=`99999` (", "1 to 65535"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=tcp://a MASTER_PORT=1", &["=`tcp://a` (", "has `://`"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a:1 MASTER_PORT=1", &["=`a:1` (", "not even a port"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=0.0.0.0 MASTER_PORT=1", &["=`0.0.0.0` (", "for all"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=:: MASTER_PORT=1", &["=`::` (", "for all"]),
    (
        "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 UNISUM_PORT=x",
        &["UNISUM_PORT=`x`: expected a port, 1 to 65535"],
    ),
    (
        "UNISUM_RANK=0 UNISUM_WORLD=2 UNISUM_RENDEZVOUS=file:///a/b UNISUM_PORT=0",
        &["UNISUM_PORT=`0`: expected"],
    ),
    ("UNISUM_RANK=0 UNISUM_WORLD=x", &["UNISUM_WORLD=`x`: expected"]),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a,b MASTER_PORT=1", &["MASTER_ADDR", "no host name"]),
    ("OMPI_COMM_WORLD_SIZE=2", &["OMPI_COMM_WORLD_RANK is not", "Open MPI"]),
    (
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2",
        &["Open MPI", "on several hosts", "UNISUM_RENDEZVOUS"],
    ),
    ("PMI_RANK=0 PMI_SIZE=2", &["Hydra", "may be on several hosts"]),
    ("PMI_RANK=0 PMI_SIZE=2 PMI_FD=five", &["PMI_FD=`five`", "socket"]),
    ("PMIX_RANK=0 PMIX_NAMESPACE=n", &["PMIX_RANK is set", "size of the world"]),
    ("PALS_RANKID=0", &["PMI_SIZE is not", "PALS"]),
    ("SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2", &["Slurm", "UNISUM_REND"]),
    ("SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=0", &["SLURM_STEP_NUM_TASKS or"]),
    ("SLURM_STEP_ID=x SLURM_NTASKS=2", &["SLURM_PROCID"]),
    (
        "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=n[1-",
        &["SLURM_STEP_NODELIST=`n[1-`", "not closed"],
    ),
    (
        "SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_NODEID=0 \
          SLURM_STEP_TASKS_PER_NODE=?",
        &["SLURM_STEP_TASKS_PER_NODE=`?`"],
    ),
    ("PET_NODE_RANK=0 PET_NNODES=2 PET_NPROC_PER_NODE=auto", &["PET_NPROC", "torchrun"]),
    ("PET_NODE_RANK=0 PET_NNODES=1:4", &["PET_NNODES=`1:4`"]),
    (
        "LWS_WORKER_INDEX=0 LWS_GROUP_SIZE=2",
        &["LeaderWorkerSet", "LWS_LEADER_ADDRESS is not", "UNISUM_RENDEZVOUS=tcp://HOST:PORT"],
    ),
    (
        "LWS_WORKER_INDEX=0 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=a UNISUM_PORT=0",
        &["UNISUM_PORT=`0`"],
    ),
    ("JOB_COMPLETION_INDEX=4 UNISUM_WORLD=4", &["JOB_COMPLETION_INDEX=`4`"]),
];

#[test]
fn what_is_half_set_or_malformed_is_an_error_that_names_it() {
    for &(text, words) in MISTAKES {
        let error = match detected(text) {
            Ok(found) => panic!("{text}: {found}"),
            Err(error) => error.to_string(),
        };
        assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
    }
}

#[test]
fn an_allocation_without_a_step_is_one_process_and_says_so() {
    for step in ["", "SLURM_STEP_ID=4294967291", "SLURM_STEP_ID=4294967290"] {
        let found = detected(&format!("SLURM_JOB_ID=9 SLURM_NTASKS=8 SLURM_PROCID=0 {step}"));
        let found = found.unwrap();
        assert_eq!((found.source, found.world), (Source::Single, 1), "{step}");
        assert!(found.to_string().contains("start it with srun"), "{found}");
    }
    let indexed = detected("JOB_COMPLETION_INDEX=3").unwrap();
    assert!(indexed.to_string().contains("set UNISUM_WORLD"), "{indexed}");
}

#[test]
fn open_mpi_on_several_hosts_meets_in_the_home_or_says_what_to_set() {
    let scratch = Scratch::new();
    let home = format!("HOME={}", scratch.path().display());
    let several = OPEN_MPI.replace("LOCAL_SIZE=4", "LOCAL_SIZE=2");
    let found = detected(&format!("{several} {home}")).unwrap();
    let Some(Rendezvous::File(path)) = &found.rendezvous else { panic!("{found}") };
    assert!(path.starts_with(scratch.path()), "{found}");
    let hint = found.hint().unwrap();
    assert!(hint.contains("if homes are not shared") && hint.contains("mpirun -x"), "{hint}");
    let told = detected(&format!("{several} {home} MASTER_ADDR=h MASTER_PORT=9")).unwrap();
    assert_eq!(told.rendezvous.unwrap().to_string(), "tcp://h:9");
    // A run without a name could meet what an earlier one left.
    let nameless = several.replace("PMIX_NAMESPACE=prterun-h-7@1", "");
    assert!(detected(&format!("{nameless} {home}")).is_err());
}

#[test]
fn torchruns_own_store_keeps_its_port() {
    let found = detected(&format!("{TORCHRUN} TORCHELASTIC_USE_AGENT_STORE=True")).unwrap();
    assert_eq!(found.rendezvous.unwrap().to_string(), "tcp://10.0.0.1:29501");
    let found = detected(&format!("{TORCHRUN} UNISUM_PORT=7")).unwrap();
    assert_eq!(found.rendezvous.unwrap().to_string(), "tcp://10.0.0.1:7");
}

#[test]
fn runs_that_differ_meet_in_different_files() {
    let scratch = Scratch::new();
    let place = |text: &str| detect(&environment(&scratch, text)).unwrap().rendezvous.unwrap();
    let base = "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_PORT=1";
    let first = place(&format!("{base} TORCHELASTIC_RESTART_COUNT=0"));
    assert_eq!(first, place(&format!("{base} TORCHELASTIC_RESTART_COUNT=0")));
    assert_ne!(first, place(&format!("{base} TORCHELASTIC_RESTART_COUNT=1")));
    assert_eq!(place(OPEN_MPI), place(&OPEN_MPI.replace("RANK=1", "RANK=2")));
    assert_ne!(place(OPEN_MPI), place(&OPEN_MPI.replace("h-7", "h-8")));
}

#[test]
fn the_user_names_the_job_and_the_place_over_any_launcher() {
    let told = "UNISUM_JOB=mine UNISUM_RENDEZVOUS=file:///shared/x";
    for launcher in ["", TORCHRUN, OPEN_MPI, HYDRA, SLURM, KUBEFLOW] {
        let found = detected(&format!("{launcher} {told}")).unwrap();
        assert_eq!(found.job, "mine", "{launcher}");
        assert_eq!(found.rendezvous.unwrap().to_string(), "file:///shared/x", "{launcher}");
    }
}

#[test]
fn all_ranks_of_a_slurm_step_agree_on_job_and_place() {
    let first = detected(SLURM).unwrap();
    let other = SLURM.replace("PROCID=5", "PROCID=6").replace("LOCALID=1", "LOCALID=0");
    let other = detected(&other.replace("NODEID=2", "NODEID=3")).unwrap();
    assert_eq!((&first.job, &first.rendezvous), (&other.job, &other.rendezvous));
    assert_eq!(first.job, "77.0");
}

#[test]
fn ranks_that_meet_by_the_name_of_their_job_are_told_it() {
    let hint = |text: &str| detected(text).unwrap().hint();
    let own = "UNISUM_RANK=1 UNISUM_WORLD=2 UNISUM_LOCAL_SIZE=2";
    let told = hint(&format!("{own} UNISUM_JOB=b")).unwrap();
    assert!(told.contains("UNISUM_JOB meet there, here `b`"), "{told}");
    assert!(hint(own).unwrap().contains("set UNISUM_JOB"));
    // The place is the user's own, or the launcher's.
    assert_eq!(hint(&format!("{own} UNISUM_JOB=b UNISUM_RENDEZVOUS=file:///shared/x")), None);
    assert_eq!(hint(&format!("{OPEN_MPI} UNISUM_JOB=b")), None);
}

#[test]
fn a_newcomer_finds_the_job_whatever_is_said_of_rank_and_world() {
    let told = "UNISUM_RENDEZVOUS=file:///shared/x";
    let job = detected(&format!("UNISUM_RANK=1 UNISUM_WORLD=4 {told}")).unwrap().job;
    for said in [
        "",
        "UNISUM_WORLD=4",
        "UNISUM_RANK=9",
        "UNISUM_RANK=1 UNISUM_WORLD=4",
        "UNISUM_RANK=4 UNISUM_WORLD=4",
        "UNISUM_RANK=x UNISUM_WORLD=0",
        "UNISUM_RANK=7 UNISUM_WORLD=4 UNISUM_LOCAL_RANK=7 UNISUM_LOCAL_SIZE=8",
    ] {
        let text = format!("{said} {told}");
        let found = detect_job(&environment(&Scratch::new(), &text)).unwrap();
        assert_eq!(found.job, job, "{said}");
        assert_eq!(found.rendezvous.unwrap().to_string(), "file:///shared/x", "{said}");
    }
}

#[test]
fn a_newcomer_whose_rank_the_world_lacks_finds_the_file_of_its_host() {
    let scratch = Scratch::new();
    let find = |said: &str| {
        let text = format!("{said} UNISUM_WORLD=2 UNISUM_LOCAL_SIZE=2");
        detect_job(&environment(&scratch, &text)).unwrap()
    };
    let (first, newcomer) = (find("UNISUM_RANK=1 UNISUM_LOCAL_RANK=1"), find("UNISUM_RANK=2"));
    assert!(matches!(newcomer.rendezvous, Some(Rendezvous::File(_))), "{newcomer}");
    assert_eq!((first.rendezvous, first.job), (newcomer.rendezvous, newcomer.job));
}
