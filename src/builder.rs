//! How a communicator is set up in code.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use unisum_link::Rank;

use crate::background::Background;
use crate::member::{Core, Member};
use crate::membership::Membership;
use crate::runner::Runner;
use crate::settings::{self, Settings};
use crate::wiring::{self, Joined, Meeting};
use crate::{Communicator, Error, ErrorKind, Store};
use unisum_control::Environment;
use unisum_control::launcher::{self, Detected};

/// Collects settings for a [`Communicator`]: the process environment, with what is said here on
/// top. Each method stands for the variable it names in docs/configuration.md, and takes what
/// that variable takes.
#[derive(Clone, Default)]
#[must_use = "a builder does nothing until `connect`"]
pub struct Builder {
    overrides: BTreeMap<&'static str, String>,
    store: Option<Arc<dyn Store>>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// This process's rank (`UNISUM_RANK`); give it together with [`Builder::world`].
    pub fn rank(self, rank: Rank) -> Self {
        self.set("UNISUM_RANK", rank)
    }

    /// How many ranks there are (`UNISUM_WORLD`).
    pub fn world(self, world: usize) -> Self {
        self.set("UNISUM_WORLD", world)
    }

    /// Where the ranks meet: `tcp://HOST:PORT` of rank 0, or `file:///PATH` on a file system that
    /// all ranks see (`UNISUM_RENDEZVOUS`).
    pub fn rendezvous(self, address: &str) -> Self {
        self.set(RENDEZVOUS, address)
    }

    /// A key-value store by which the ranks meet, unless the environment or
    /// [`Builder::rendezvous`] says where: rank 0 writes its addresses and a fresh token under one
    /// key, the others read it. A token that is given, by [`Builder::token`] or the environment, is
    /// not written: all ranks have to be given it.
    ///
    /// The key is `unisum`, or the KEY of [`Builder::rendezvous`] with `store://KEY`. Starts one
    /// after another may use the same key, starts at the same time need different ones. Rank and
    /// world are given or detected as ever.
    pub fn store(self, store: impl Store + 'static) -> Self {
        Self { store: Some(Arc::new(store)), ..self }
    }

    /// The secret that every connection of the job has to prove (`UNISUM_TOKEN`).
    pub fn token(self, token: &str) -> Self {
        self.set("UNISUM_TOKEN", token)
    }

    /// The job's name: ranks of another job are refused (`UNISUM_JOB`).
    pub fn job(self, job: &str) -> Self {
        self.set("UNISUM_JOB", job)
    }

    /// `auto`, `tcp`, `shm` or `verbs` (`UNISUM_TRANSPORT`).
    pub fn transport(self, transport: &str) -> Self {
        self.set("UNISUM_TRANSPORT", transport)
    }

    /// The algorithm of all calls, or `auto` (`UNISUM_ALGORITHM`).
    pub fn algorithm(self, name: &str) -> Self {
        self.set("UNISUM_ALGORITHM", name)
    }

    /// Whether algorithms are chosen by the model alone, from figures that do not come from clocks:
    /// so the same program with the same worlds, placement and sizes gives the same bits on any
    /// machines. It is slower where the model is wrong (`UNISUM_REPRODUCIBLE`).
    pub fn reproducible(self, reproducible: bool) -> Self {
        self.set("UNISUM_REPRODUCIBLE", u8::from(reproducible))
    }

    /// A file that keeps what was measured at the start and tried by first calls, so that the next
    /// run of the same job on the same hosts begins with it and gives the same bits. Rank 0 reads
    /// it, tells all ranks, and writes it; all ranks name one (`UNISUM_TUNING`).
    pub fn tuning(self, file: &str) -> Self {
        self.set("UNISUM_TUNING", file)
    }

    /// Which ports this rank may listen on: `LOW-HIGH` or one (`UNISUM_PORT_RANGE`).
    pub fn port_range(self, ports: &str) -> Self {
        self.set("UNISUM_PORT_RANGE", ports)
    }

    /// Which network interfaces may be used, as in `eth,ib` or `^docker` (`UNISUM_INTERFACE`).
    pub fn interface(self, names: &str) -> Self {
        self.set("UNISUM_INTERFACE", names)
    }

    /// How long a collective may wait for other ranks (`UNISUM_TIMEOUT`).
    pub fn timeout(self, timeout: Duration) -> Self {
        self.set("UNISUM_TIMEOUT", timeout.as_secs_f64())
    }

    /// How long joining may take (`UNISUM_CONNECT_TIMEOUT`).
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        self.set("UNISUM_CONNECT_TIMEOUT", timeout.as_secs_f64())
    }

    /// How long another host may give no sign of life before the job ends: an outage of the network
    /// that is shorter only delays it (`UNISUM_HEARTBEAT_TIMEOUT`).
    pub fn heartbeat_timeout(self, timeout: Duration) -> Self {
        self.set("UNISUM_HEARTBEAT_TIMEOUT", timeout.as_secs_f64())
    }

    /// Sets any variable of docs/configuration.md by its name.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such variable. What is wrong with the value is
    /// told by [`Builder::connect`].
    pub fn variable(self, name: &str, value: &str) -> Result<Self, Error> {
        let known = settings::variable(name);
        let known = known.ok_or_else(|| {
            Error::new(ErrorKind::Configuration, format!("there is no variable `{name}`"))
        })?;
        Ok(self.set(known, value))
    }

    fn set(mut self, name: &'static str, value: impl ToString) -> Self {
        self.overrides.insert(name, value.to_string());
        self
    }

    /// Joins the job.
    ///
    /// Collective: every rank of the job calls it. Blocks until all have come.
    ///
    /// # Errors
    /// As [`Communicator::from_environment`].
    pub fn connect(self) -> Result<Communicator, Error> {
        let mut environment = Environment::from_process().with(self.overrides);
        if self.store.is_some() && environment.get(RENDEZVOUS).is_none() {
            environment = environment.with([(RENDEZVOUS, STORE_RENDEZVOUS.to_owned())].into());
        }
        let settings = Settings::from_environment(&environment).map_err(configuration)?;
        let mut detected = launcher::detect(&environment).map_err(configuration)?;
        tracing::info!("{detected}");
        if detected.world == 1 {
            if let Some(note) = &detected.note {
                crate::warning::warning!("each such process trains alone, a world of one: {note}");
            }
            let description = format!("a world of one rank ({})\n", detected.source);
            return Ok(Communicator::new(0, 1, None, "none".into(), description));
        }
        let known = (&environment, &settings);
        let meeting = Meeting::prepare(&mut detected, known, self.store.as_ref())?;
        let (membership, joined) = wiring::join(&detected, &settings, &meeting)?;
        Ok(communicator(&detected, &settings, membership, joined))
    }
}

const RENDEZVOUS: &str = "UNISUM_RENDEZVOUS";
const STORE_RENDEZVOUS: &str = "store://unisum";

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut overrides = self.overrides.clone();
        if let Some(token) = overrides.get_mut("UNISUM_TOKEN") {
            "(hidden)".clone_into(token);
        }
        let mut debug = f.debug_struct("Builder");
        debug.field("overrides", &overrides).field("has_store", &self.store.is_some()).finish()
    }
}

fn communicator(
    detected: &Detected,
    settings: &Settings,
    membership: Membership,
    joined: Joined,
) -> Communicator {
    let Joined { job, engine, choice, tuning, transport, description } = joined;
    let (rank, world) = (detected.rank, detected.world);
    let runner = Runner::new(rank, settings.timeout, membership, engine, choice, tuning);
    let core = Core { runner, job, rank, world }.into();
    let member = Member { core, background: Background::default() };
    Communicator::new(rank, world, Some(member), transport, description)
}

fn configuration(error: impl std::error::Error) -> Error {
    Error::new(ErrorKind::Configuration, error.to_string())
}
