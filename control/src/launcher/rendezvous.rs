//! Where the ranks of a detected job meet.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::conventions::{Convention, Placement};
use super::{LauncherError, LauncherStore, Source, local, pmix, slurm};
use crate::address::Rendezvous;
use crate::environment::Environment;

/// A meeting place and the identity of the run that meets there.
pub(super) struct Meeting {
    pub(super) rendezvous: Option<Rendezvous>,
    pub(super) job: String,
    /// What the launcher passes between its ranks, if they meet by that.
    pub(super) store: Option<LauncherStore>,
}

impl Meeting {
    fn at(rendezvous: Option<Rendezvous>, job: String) -> Self {
        Self { rendezvous, job, store: None }
    }
}

/// Decides where to meet: as told, by a private file if all ranks are on this host, else over TCP,
/// or by what the launcher offers. `pmix` is open if nothing has used it before.
pub(super) fn find(
    environment: &Environment,
    convention: &Convention,
    placement: Placement,
    pmix: Option<Arc<pmix::Session>>,
) -> Result<Meeting, LauncherError> {
    let job = job(environment, convention);
    // One that nobody could use is told also where nothing needs it.
    own_port(environment)?;
    if let Some(told) = explicit(environment)? {
        let job = job.unwrap_or_else(|| told.to_string());
        return Ok(Meeting::at(Some(told), job));
    }
    if placement.world == 1 {
        return Ok(Meeting::at(None, job.unwrap_or_else(|| "single".to_owned())));
    }
    if placement.local_size == Some(placement.world) {
        return on_this_host(environment, convention, job);
    }
    let Some(place) = over_tcp(environment, convention, job.as_deref())? else {
        if let Some(meeting) = by_launcher(environment, convention, job.as_deref(), pmix)? {
            return Ok(meeting);
        }
        return Err(LauncherError::NoMeetingPlace {
            launcher: convention.launcher,
            rank: placement.rank,
            world: placement.world,
            why: match placement.local_size {
                Some(_) => "on several hosts",
                None => "which may be on several hosts",
            },
        });
    };
    let job = job.unwrap_or_else(|| place.to_string());
    Ok(Meeting::at(Some(place), job))
}

/// By what the launcher itself passes between its ranks, or a file in the user's home.
fn by_launcher(
    environment: &Environment,
    convention: &Convention,
    job: Option<&str>,
    pmix: Option<Arc<pmix::Session>>,
) -> Result<Option<Meeting>, LauncherError> {
    let launcher = convention.launcher;
    let by_store = |store, job: &str| {
        let place = Rendezvous::Store { key: "unisum".to_owned(), addresses: Vec::new() };
        Some(Meeting { rendezvous: Some(place), job: job.to_owned(), store: Some(store) })
    };
    if launcher == Source::Pmix {
        let session = pmix.ok_or_else(|| LauncherError::Pmix { why: pmix::ONCE.to_owned() })?;
        return Ok(by_store(LauncherStore::Pmix(session), job.unwrap_or("pmix")));
    }
    if let (Source::Hydra, Some(text)) = (launcher, environment.get("PMI_FD")) {
        let descriptor = text.parse().ok().filter(|descriptor| *descriptor >= 0);
        let descriptor: RawFd = descriptor.ok_or_else(|| {
            LauncherError::malformed(launcher, "PMI_FD", text, "expected an open socket")
        })?;
        // The socket is of this run alone, so that its name is nobody else's business.
        return Ok(by_store(LauncherStore::Pmi(descriptor), job.unwrap_or("pmi")));
    }
    // Only Open MPI's name of the run is known to be different each time.
    let (Source::OpenMpi, Some(job)) = (launcher, job) else { return Ok(None) };
    let path = local::home_file(environment, &format!("{launcher} {job}"))?;
    Ok(path.map(|path| Meeting::at(Some(Rendezvous::File(path)), job.to_owned())))
}

/// The meeting place the user gave in `UNISUM_RENDEZVOUS`.
pub(super) fn explicit(environment: &Environment) -> Result<Option<Rendezvous>, LauncherError> {
    let variable = "UNISUM_RENDEZVOUS";
    let given = environment.get(variable).map(str::parse).transpose();
    given.map_err(|error| LauncherError::Address { variable, error })
}

fn job(environment: &Environment, convention: &Convention) -> Option<String> {
    if let Some(job) = environment.get("UNISUM_JOB") {
        return Some(job.to_owned());
    }
    let parts: Vec<_> = convention.job.iter().filter_map(|name| environment.get(name)).collect();
    (!parts.is_empty()).then(|| parts.join("."))
}

/// A file in the user's private directory. Its name must differ from an earlier run's, so where the
/// launcher's variables repeat, the launcher's own process is part of it.
fn on_this_host(
    environment: &Environment,
    convention: &Convention,
    job: Option<String>,
) -> Result<Meeting, LauncherError> {
    let told = environment.get("UNISUM_JOB").is_some();
    let job = match job {
        Some(job) if told || !convention.job_repeats => job,
        Some(job) => format!("{job}.{}", local::launcher_process(convention.rank[0])),
        None => local::launcher_process(convention.rank[0]),
    };
    let path = local::meeting_file(environment, &format!("{} {job}", convention.launcher))?;
    Ok(Meeting::at(Some(Rendezvous::File(path)), job))
}

fn over_tcp(
    environment: &Environment,
    convention: &Convention,
    job: Option<&str>,
) -> Result<Option<Rendezvous>, LauncherError> {
    let launcher = convention.launcher;
    let derived = |variable, host: &str| {
        let port = own_port(environment)?.unwrap_or_else(|| derived_port(job.unwrap_or(host)));
        tcp(launcher, variable, host, port).map(Some)
    };
    match launcher {
        Source::KubeflowTrainer => {
            master(environment, launcher, "PET_MASTER_ADDR", "PET_MASTER_PORT")
        }
        Source::LeaderWorkerSet => match environment.get("LWS_LEADER_ADDRESS") {
            Some(host) => derived("LWS_LEADER_ADDRESS", host),
            None => Err(LauncherError::HalfSet {
                launcher,
                set: "LWS_WORKER_INDEX",
                missing: "LWS_LEADER_ADDRESS".to_owned(),
            }),
        },
        _ => {
            let told = master(environment, launcher, "MASTER_ADDR", "MASTER_PORT")?;
            if told.is_some() || launcher != Source::Slurm {
                return Ok(told);
            }
            match slurm::first_host(environment)? {
                Some(host) => derived("SLURM_STEP_NODELIST", &host),
                None => Ok(None),
            }
        }
    }
}

/// The address of rank 0's host as torch names it.
fn master(
    environment: &Environment,
    launcher: Source,
    host_name: &'static str,
    port_name: &'static str,
) -> Result<Option<Rendezvous>, LauncherError> {
    let half_set = |set, missing: &str| {
        Err(LauncherError::HalfSet { launcher, set, missing: missing.to_owned() })
    };
    let (host, port) = match (environment.get(host_name), environment.get(port_name)) {
        (None, None) => return Ok(None),
        (None, Some(_)) => return half_set(port_name, host_name),
        (Some(host), port) => (host, port),
    };
    if let Some(port) = own_port(environment)? {
        return tcp(launcher, host_name, host, port).map(Some);
    }
    let Some(text) = port else {
        return half_set(host_name, port_name);
    };
    // torchrun's own store listens on MASTER_PORT if this says so; the next port is then ours.
    let taken = launcher == Source::Torchrun
        && environment.get("TORCHELASTIC_USE_AGENT_STORE") == Some("True");
    let port = text.parse::<u16>().ok().filter(|port| *port > 0);
    match port.and_then(|port| port.checked_add(taken.into())) {
        Some(port) => tcp(launcher, host_name, host, port).map(Some),
        None => Err(LauncherError::malformed(launcher, port_name, text, EXPECTED_PORT)),
    }
}

/// The port the user gave in `UNISUM_PORT`.
fn own_port(environment: &Environment) -> Result<Option<u16>, LauncherError> {
    let Some(text) = environment.get("UNISUM_PORT") else {
        return Ok(None);
    };
    let port =
        text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
            LauncherError::malformed(Source::Own, "UNISUM_PORT", text, EXPECTED_PORT)
        })?;
    Ok(Some(port))
}

fn tcp(
    launcher: Source,
    variable: &'static str,
    host: &str,
    port: u16,
) -> Result<Rendezvous, LauncherError> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    Rendezvous::tcp(bare, port).map_err(|error| {
        let expected = format!("expected rank 0's host, a name or an address: {}", error.problem());
        LauncherError::malformed(launcher, variable, host, expected)
    })
}

const EXPECTED_PORT: &str = "expected a port, 1 to 65535";

/// A port all ranks compute alike from the identity of the run.
///
/// The range lies below the ports Linux hands out by itself (`ip_local_port_range`, from 32768), so
/// that no outgoing connection sits on it. Two runs on one host collide once in 12,000 pairs; the
/// loser then reports that the port is taken.
fn derived_port(job: &str) -> u16 {
    let spread = local::fnv1a(job) % u64::from(PORT_COUNT);
    FIRST_PORT + u16::try_from(spread).expect("a remainder of a u16 fits a u16")
}

const FIRST_PORT: u16 = 20_000;
const PORT_COUNT: u16 = 12_000;
