//! Setting up a communicator in code.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use unisum_link::{Rank, Transport};

use super::elastic::Entered;
use crate::execution::background::Background;
use crate::execution::member::{Core, Member};
use crate::execution::membership::Membership;
use crate::execution::runner::Runner;
use crate::settings::{self, Settings};
use crate::version;
use crate::wiring::{
    self, Bond, Custom, Description, Elasticity, Epoch, Joined, Lineage, Meeting, Position,
    Standing,
};
use crate::{Communicator, Elastic, Error, ErrorKind, Store};
use unisum_control::Environment;
use unisum_control::callers;
use unisum_control::launcher::{self, Detected, Source};

/// Collects settings for a [`Communicator`]: the process environment, overridden by what is set
/// here. Each method corresponds to the variable it names in docs/configuration.md, and accepts the
/// same values.
#[derive(Clone, Default)]
#[must_use = "a builder does nothing until `connect`"]
pub struct Builder {
    overrides: BTreeMap<&'static str, String>,
    store: Option<Arc<dyn Store>>,
    elastic: Option<Elastic>,
    custom: Custom,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// This process's rank (`UNISUM_RANK`); set it together with [`Builder::world`].
    pub fn rank(self, rank: Rank) -> Self {
        self.set("UNISUM_RANK", rank)
    }

    /// The number of ranks (`UNISUM_WORLD`).
    pub fn world(self, world: usize) -> Self {
        self.set("UNISUM_WORLD", world)
    }

    /// Where the ranks meet: `tcp://HOST:PORT` of rank 0, or `file:///PATH` in a file system that
    /// all ranks share (`UNISUM_RENDEZVOUS`).
    pub fn rendezvous(self, address: &str) -> Self {
        self.set(RENDEZVOUS, address)
    }

    /// A key-value store through which the ranks meet, unless the environment or
    /// [`Builder::rendezvous`] says otherwise. Rank 0 writes its addresses and a fresh token under
    /// one key, and the others read it. A token from [`Builder::token`] or the environment is not
    /// written: all ranks must be given it.
    ///
    /// The key is `unisum`, or the KEY of [`Builder::rendezvous`] with `store://KEY`. Starts one
    /// after another may use the same key; concurrent starts need different ones. Rank and world
    /// are set or detected as usual.
    pub fn store(self, store: impl Store + 'static) -> Self {
        Self { store: Some(Arc::new(store)), ..self }
    }

    /// Lets the job outlive ranks that it loses: calls then end with
    /// [`ErrorKind::ViewChanged`] instead of [`ErrorKind::RankLost`], and the ranks that are left
    /// go on with [`Communicator::rebuild`]. All ranks give the same; see docs/elastic.md
    /// (`UNISUM_ELASTIC`, which is the minimum).
    ///
    /// Costs a thread, a port and a connection to every other rank, on which nothing is said while
    /// nobody is lost.
    pub fn elastic(self, elastic: Elastic) -> Self {
        Self { elastic: Some(elastic), ..self }
    }

    /// A file that all hosts see, in which an elastic job says to processes that join it where its
    /// ranks are, if those don't meet by a file or a store (`UNISUM_MEMBERS`).
    pub fn members(self, file: &str) -> Self {
        self.set("UNISUM_MEMBERS", file)
    }

    /// A folder in which each process of an elastic job logs its views, and how steps of gradient
    /// buckets ended that changes of view interrupted (`UNISUM_EPOCH_LOG`).
    pub fn epoch_log(self, folder: &str) -> Self {
        self.set("UNISUM_EPOCH_LOG", folder)
    }

    /// A folder with the logs of an elastic job ([`Builder::epoch_log`]), which this one repeats:
    /// without any loss, ranks end and steps are made again where they were then, and the bits are
    /// the same. Both jobs are [reproducible](Builder::reproducible); see docs/elastic.md
    /// (`UNISUM_REPLAY`).
    ///
    /// # Errors
    /// [`Builder::connect`] reports logs that can't be read or repeated. Calls end with
    /// [`ErrorKind::Mismatch`] if the job strays from the other one, and with
    /// [`ErrorKind::RankLost`] in a process that ended there.
    pub fn replay(self, folder: &str) -> Self {
        self.set("UNISUM_REPLAY", folder)
    }

    /// The secret that every connection of the job must prove (`UNISUM_TOKEN`).
    pub fn token(self, token: &str) -> Self {
        self.set("UNISUM_TOKEN", token)
    }

    /// What is encrypted, and by what ranks prove who they are: `auto`, `off`, `token` or `mtls`,
    /// as docs/security.md says (`UNISUM_TLS`).
    pub fn tls(self, level: &str) -> Self {
        self.set("UNISUM_TLS", level)
    }

    /// PEM files for `mtls`: this rank's certificate and those above it, its key, and the CAs that
    /// sign the others' certificates (`UNISUM_TLS_CERT`, `UNISUM_TLS_KEY`, `UNISUM_TLS_CA`). They
    /// are read again when they change.
    pub fn tls_files(self, certificate: &str, key: &str, authorities: &str) -> Self {
        let of_peers = self.set("UNISUM_TLS_CA", authorities);
        of_peers.set("UNISUM_TLS_CERT", certificate).set("UNISUM_TLS_KEY", key)
    }

    /// Whose certificates are accepted: DNS names and SPIFFE IDs with commas between them, or `@`
    /// and a file with one on each line (`UNISUM_TLS_PEERS`).
    pub fn tls_peers(self, names: &str) -> Self {
        self.set("UNISUM_TLS_PEERS", names)
    }

    /// The job's name: ranks of another job are refused (`UNISUM_JOB`).
    pub fn job(self, job: &str) -> Self {
        self.set("UNISUM_JOB", job)
    }

    /// `auto`, `tcp`, `shm`, `verbs`, or the name of a transport of the program's own
    /// ([`Builder::with_transport`]) (`UNISUM_TRANSPORT`).
    pub fn transport(self, transport: &str) -> Self {
        self.set("UNISUM_TRANSPORT", transport)
    }

    /// A transport of the program's own, beside those that are built in: what it has to do is in
    /// [`Transport`], and docs/design/transports.md has an example.
    ///
    /// All ranks give the same ones, in the same order. [`Builder::transport`] and
    /// `UNISUM_TRANSPORT` take its name and then use it between all ranks. With `auto`, one that
    /// reaches the ranks of a host takes the place of shared memory, one that reaches any rank the
    /// place of TCP, and one that all ranks agree on is tried before RDMA
    /// ([`Reach`](unisum_link::Reach)). The value serves all communicators that come from this one,
    /// and lives as long as they.
    ///
    /// # Errors
    /// [`Builder::connect`] reports a name that is malformed or taken.
    pub fn with_transport(mut self, transport: impl Transport + 'static) -> Self {
        self.custom.add(Arc::new(transport));
        self
    }

    /// The algorithm of all calls, or `auto` (`UNISUM_ALGORITHM`).
    pub fn algorithm(self, name: &str) -> Self {
        self.set("UNISUM_ALGORITHM", name)
    }

    /// Whether algorithms are chosen by the model alone, from figures that are not measured: the
    /// same program with the same worlds, placement and sizes then gives the same bits on any
    /// machine. It is slower where the model is wrong (`UNISUM_REPRODUCIBLE`).
    pub fn reproducible(self, reproducible: bool) -> Self {
        self.set("UNISUM_REPRODUCIBLE", u8::from(reproducible))
    }

    /// A file that saves what was measured at the start and tried by first calls, so that the next
    /// run of the same job on the same hosts starts from it and gives the same bits. Rank 0 reads
    /// it, distributes the contents, and writes it; all ranks must set it (`UNISUM_TUNING`).
    pub fn tuning(self, file: &str) -> Self {
        self.set("UNISUM_TUNING", file)
    }

    /// The ports this rank may listen on: `LOW-HIGH` or one port (`UNISUM_PORT_RANGE`).
    pub fn port_range(self, ports: &str) -> Self {
        self.set("UNISUM_PORT_RANGE", ports)
    }

    /// The network interfaces that may be used, as in `eth,ib` or `^docker` (`UNISUM_INTERFACE`).
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

    /// How long another host may show no sign of life before the job ends; a shorter network outage
    /// only delays it (`UNISUM_HEARTBEAT_TIMEOUT`).
    pub fn heartbeat_timeout(self, timeout: Duration) -> Self {
        self.set("UNISUM_HEARTBEAT_TIMEOUT", timeout.as_secs_f64())
    }

    /// How long a TCP connection that broke may take to be restored before the call fails; zero,
    /// the default, fails it at once. The same on all ranks (`UNISUM_RECONNECT_TIMEOUT`).
    pub fn reconnect_timeout(self, timeout: Duration) -> Self {
        self.set("UNISUM_RECONNECT_TIMEOUT", timeout.as_secs_f64())
    }

    /// Sets any variable of docs/configuration.md by its name.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such variable. [`Builder::connect`] reports an
    /// invalid value.
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
    /// Collective: every rank of the job calls it. Blocks until all ranks have joined.
    ///
    /// # Errors
    /// As [`Communicator::from_environment`].
    pub fn connect(mut self) -> Result<Communicator, Error> {
        let is_placed = ["UNISUM_RANK", "UNISUM_WORLD"].map(|it| self.overrides.contains_key(it));
        let (environment, settings) = self.read();
        let settings = settings.inspect_err(|error| wiring::tell_that_not(&environment, error))?;
        let mut detected = launcher::detect(&environment).map_err(configuration)?;
        if detected.source == Source::Own && is_placed == [true; 2] {
            detected.source = Source::Program;
        }
        tracing::info!("{detected}");
        if settings.replay.is_some() && self.elasticity(&settings).is_none() {
            let text = "UNISUM_REPLAY is for elastic jobs: `Builder::elastic` or UNISUM_ELASTIC is \
                        needed";
            return Err(Error::new(ErrorKind::Configuration, text).on(detected.rank));
        }
        if detected.world == 1 {
            if let Some(note) = &detected.note {
                unisum_link::warning!("each such process trains alone, a world of one: {note}");
            }
            let origin = format!("a world of one rank ({})", detected.source);
            let alone = Communicator::new(0, 1, None, Description::alone(origin));
            let elastic = self.elasticity(&settings).filter(|_| detected.rendezvous.is_some());
            let Some(elastic) = elastic else {
                return Ok(alone);
            };
            let known = (&environment, &settings);
            let meeting = Meeting::prepare(&mut detected, known, self.store.as_ref())?;
            let epoch = Lineage::found_alone(&elastic, &settings, &detected, &meeting)?;
            return Ok(alone.in_epoch(Some(epoch)));
        }
        let elastic = self.elasticity(&settings);
        if detected.rank == 0 {
            warn_of_no_use(&settings, elastic.as_ref(), detected.world);
        }
        let known = (&environment, &settings);
        let meeting = Meeting::prepare(&mut detected, known, self.store.as_ref())?;
        let elasticity = elastic.as_ref().map_or(Elasticity::None, Elasticity::Founded);
        let (membership, joined) = wiring::join(&detected, &settings, &meeting, elasticity)?;
        Ok(communicator(&detected, &settings, membership, joined))
    }

    /// Joins an elastic job that runs ([`Builder::elastic`], with what the job's ranks give), as a
    /// new rank behind the others. The job is found by the members record beside its rendezvous (a
    /// rendezvous file or a store), or by that of [`Builder::members`], the same as its ranks were
    /// given. Rank and world, if they are set, count for nothing.
    ///
    /// Waits until the job lets this process in, which its program decides
    /// ([`Communicator::admit`]). Blocks until then, `UNISUM_CONNECT_TIMEOUT` at most.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] without [`Builder::elastic`], without such a rendezvous, or if
    /// variables are malformed. [`ErrorKind::Rendezvous`] if there is no such job, it has ended or
    /// ends meanwhile, it refuses this process (another token, job or build, other settings), or
    /// nobody lets it in in time. [`ErrorKind::RankLost`] if it is lost as it enters.
    pub fn join(mut self) -> Result<Communicator, Error> {
        let (environment, settings) = self.read();
        let settings = settings?;
        let elastic = self.elasticity(&settings).ok_or_else(|| {
            let text = "joining a job that runs is for elastic jobs: `Builder::elastic` or \
                        UNISUM_ELASTIC is needed";
            Error::new(ErrorKind::Configuration, text)
        })?;
        let detected = launcher::detect_job(&environment).map_err(configuration)?;
        let known = (&environment, &settings);
        let epoch = Lineage::join(&elastic, detected, known, self.store.as_ref())?;
        epoch.enter(Position::Program).and_then(Entered::in_program)
    }

    /// How the job goes on when it loses ranks, if it does.
    fn elasticity(&self, settings: &Settings) -> Option<Elastic> {
        let by_variable = || settings.elastic.map(|minimum| Elastic { minimum });
        self.elastic.clone().or_else(by_variable)
    }

    /// The environment, and the settings in it.
    fn read(&mut self) -> (Environment, Result<Settings, Error>) {
        let overrides = std::mem::take(&mut self.overrides);
        let mut environment = Environment::from_process().with(overrides);
        if self.store.is_some() && environment.get(RENDEZVOUS).is_none() {
            environment = environment.with([(RENDEZVOUS, STORE_RENDEZVOUS.to_owned())].into());
        }
        callers::calls();
        let custom = std::mem::take(&mut self.custom);
        let settings = match custom.check() {
            Ok(()) => Settings::read(&environment, custom).map_err(configuration),
            Err(error) => Err(error),
        };
        (environment, settings)
    }
}

/// Warns of what is asked for and has no use, or not yet.
fn warn_of_no_use(settings: &Settings, elastic: Option<&Elastic>, world: usize) {
    if version::IS_UNOPTIMISED {
        unisum_link::warning!("{UNOPTIMISED}");
    }
    let of_elastic = [
        ("UNISUM_MEMBERS", settings.members.is_some()),
        ("UNISUM_EPOCH_LOG", settings.epoch_log.is_some()),
    ];
    for (name, _) in of_elastic.iter().filter(|(_, is_set)| *is_set && elastic.is_none()) {
        unisum_link::warning!("{name} is for elastic jobs, and this is none: set UNISUM_ELASTIC");
    }
    if let Some(Elastic { minimum }) = elastic.filter(|elastic| elastic.minimum > world) {
        unisum_link::warning!(
            "an elastic job that needs {minimum} ranks has {world}: the first loss ends it, unless \
             others have joined"
        );
    }
}

const UNOPTIMISED: &str = "compiled without optimisation, which makes collectives hundreds of \
    times slower: put [profile.dev.package.\"*\"] with opt-level = 3 into Cargo.toml, or build \
    with --release";

/// The communicator of an elastic job's view, and how far its ranks are. All its ranks call it.
/// Blocks until they have.
pub(super) fn of_view(
    epoch: &Epoch,
    standing: Standing,
) -> Result<(Communicator, Vec<Standing>), Error> {
    let settings = epoch.lineage.settings();
    if epoch.view.members.len() == 1 {
        let origin = format!("one rank is left, in epoch {}", epoch.view.epoch);
        let communicator = Communicator::new(0, 1, None, Description::alone(origin));
        return Ok((communicator.in_epoch(Some(epoch.clone())), vec![standing]));
    }
    let (detected, meeting) = epoch.lineage.meet(&epoch.view)?;
    let elasticity = Elasticity::Continued(epoch, &standing);
    let (membership, mut joined) = wiring::join(&detected, settings, &meeting, elasticity)?;
    let standings = std::mem::take(&mut joined.standings);
    if standings.len() != detected.world {
        let text = "a rank did not say how far it is".to_owned();
        return Err(Error::new(ErrorKind::Rendezvous, text).on(detected.rank));
    }
    Ok((communicator(&detected, settings, membership, joined), standings))
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
        debug.field("overrides", &overrides).field("has_store", &self.store.is_some());
        let custom: Vec<_> = self.custom.names().collect();
        debug.field("elastic", &self.elastic).field("transports", &custom).finish()
    }
}

fn communicator(
    detected: &Detected,
    settings: &Settings,
    membership: Membership,
    joined: Joined,
) -> Communicator {
    let Joined { job, engine, choice, tuning, description, .. } = joined;
    let (rank, world) = (detected.rank, detected.world);
    let epoch = membership.bond().and_then(Bond::epoch).cloned();
    let runner = Runner::new(rank, settings.timeout, membership, engine, choice, tuning);
    let core = Core { runner, job, rank, world, restores: epoch.is_some() }.into();
    let member = Member { core, background: Background::default() };
    Communicator::new(rank, world, Some(member), description).in_epoch(epoch)
}

fn configuration(error: impl std::error::Error) -> Error {
    Error::new(ErrorKind::Configuration, error.to_string())
}
