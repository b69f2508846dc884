//! What a user can set by environment, in one table, read once and checked.

mod bytes;
mod tls;
mod variables;
mod verbs;

use std::path::PathBuf;
use std::time::Duration;

pub use bytes::{ByteSizeError, parse_bytes};
use tls::TlsSettings;
use unisum_control::Environment;
use variables::VARIABLES;
use verbs::VerbsSettings;

use crate::wiring::{Custom, builtin};

use unisum_control::address::PortRange;
use unisum_control::interface::InterfaceFilter;

/// Everything about a communicator that the environment can set.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    /// How long one operation may take before it ends with an error.
    pub(crate) timeout: Duration,
    /// How long the ranks wait for each other at the start.
    pub(crate) connect_timeout: Duration,
    /// How long another host may give no sign of life before it is lost.
    pub(crate) heartbeat_timeout: Duration,
    /// How long a connection that broke may take to be there again; zero ends the call at once.
    pub(crate) reconnect_timeout: Duration,
    /// How many ranks a job that outlives its ranks needs; `None` if it ends with the first that is
    /// lost.
    pub(crate) elastic: Option<usize>,
    /// The file of an elastic job's members record, if it is not beside the rendezvous.
    pub(crate) members: Option<PathBuf>,
    /// The folder in which an elastic job logs its epochs.
    pub(crate) epoch_log: Option<PathBuf>,
    /// The folder with the logs of the job that this one repeats.
    pub(crate) replay: Option<PathBuf>,
    /// Which process of that job a newcomer is.
    pub(crate) replay_process: Option<u64>,
    /// Name of the algorithm to use for every operation; `None` chooses by size.
    pub(crate) algorithm: Option<String>,
    /// Whether algorithms are chosen by nothing that was measured.
    pub(crate) reproducible: bool,
    /// Where what is measured and tried is kept for later runs.
    pub(crate) tuning: Option<PathBuf>,
    /// Which transport carries the data.
    pub(crate) transport: TransportChoice,
    /// The program's own transports.
    pub(crate) custom: Custom,
    /// Which network interfaces may be used; `None` goes by the route to the rendezvous host.
    pub(crate) interface: Option<InterfaceFilter>,
    /// Ports a rank may listen on; `None` lets the kernel pick.
    pub(crate) port_range: Option<PortRange>,
    /// TCP connections to each peer.
    pub(crate) sockets_per_peer: usize,
    /// Bytes of one pipeline slice.
    pub(crate) slice_bytes: usize,
    /// Slices open at once.
    pub(crate) window: usize,
    /// Bytes of shared memory each rank offers for zero-copy buffers; `None` chooses by need.
    pub(crate) shm_heap: Option<u64>,
    /// Whether ranks of one host may read each other's private memory (`process_vm_readv`).
    pub(crate) cross_memory: bool,
    /// Whether the switch between CUDA devices may add.
    pub(crate) multimem: bool,
    /// RDMA devices.
    pub(crate) verbs: VerbsSettings,
    /// Encryption.
    pub(crate) tls: TlsSettings,
}

/// Which transport carries the data: the one of this name between all ranks, which is an error if
/// one can't; or shared memory between ranks of one host, RDMA between hosts, and TCP where not all
/// ranks have that.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct TransportChoice(Option<String>);

/// A variable that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}=`{value}`: expected {accepted}")]
pub(crate) struct SettingsError {
    variable: &'static str,
    value: String,
    accepted: String,
}

impl Settings {
    /// Reads the settings from `environment`, for a program with these transports of its own; what
    /// is not set has its default.
    ///
    /// Warns, once a call, of `UNISUM_` variables that do not exist, as they are likely misspelt.
    ///
    /// # Errors
    /// [`SettingsError`] for the first variable whose value is malformed or out of range.
    pub(crate) fn read(environment: &Environment, custom: Custom) -> Result<Self, SettingsError> {
        let unknown = unknown_variables(environment);
        if !unknown.is_empty() {
            unisum_link::warning!("unknown variables, misspelt? {}", unknown.join(", "));
        }
        refuse_other_than_text(environment)?;
        let defaults = Self::default();
        let read = Reader(environment);
        let reproducible = read.switch("UNISUM_REPRODUCIBLE")?.unwrap_or(defaults.reproducible);
        let heartbeat_timeout = read
            .seconds_from(1.0, "UNISUM_HEARTBEAT_TIMEOUT")?
            .unwrap_or(defaults.heartbeat_timeout);
        let reconnect_timeout =
            read.seconds_or_none("UNISUM_RECONNECT_TIMEOUT")?.unwrap_or(defaults.reconnect_timeout);
        Ok(Self {
            timeout: read.seconds("UNISUM_TIMEOUT")?.unwrap_or(defaults.timeout),
            connect_timeout: read
                .seconds("UNISUM_CONNECT_TIMEOUT")?
                .unwrap_or(defaults.connect_timeout),
            heartbeat_timeout,
            reconnect_timeout,
            elastic: read.number("UNISUM_ELASTIC", 0..=1 << 16)?.filter(|&minimum| minimum > 0),
            members: read.path("UNISUM_MEMBERS")?,
            epoch_log: read.path("UNISUM_EPOCH_LOG")?,
            replay: read.path("UNISUM_REPLAY")?,
            replay_process: read.read("UNISUM_REPLAY_PROCESS", |text| {
                text.parse().map_err(|_| "the number of a process, as its log says".to_owned())
            })?,
            algorithm: read.algorithm("UNISUM_ALGORITHM")?,
            reproducible,
            tuning: read.tuning("UNISUM_TUNING", reproducible)?,
            transport: read.transport("UNISUM_TRANSPORT", &custom)?.unwrap_or_default(),
            custom,
            interface: read.interface()?,
            port_range: read.parsed("UNISUM_PORT_RANGE")?,
            sockets_per_peer: read
                .number("UNISUM_TCP_SOCKETS", 1..=16)?
                .unwrap_or(defaults.sockets_per_peer),
            slice_bytes: read
                .bytes("UNISUM_SLICE_BYTES", 4 << 10..=1 << 30)?
                .map_or(defaults.slice_bytes, |bytes| {
                    usize::try_from(bytes).expect("1 GiB fits a usize")
                }),
            window: read.number("UNISUM_WINDOW", 1..=1024)?.unwrap_or(defaults.window),
            shm_heap: read.bytes("UNISUM_SHM_HEAP", 1..=1 << 46)?,
            cross_memory: read.switch("UNISUM_CMA")?.unwrap_or(defaults.cross_memory),
            multimem: read.switch("UNISUM_MULTIMEM")?.unwrap_or(defaults.multimem),
            verbs: VerbsSettings::read(&read, heartbeat_timeout.max(reconnect_timeout))?,
            tls: TlsSettings::read(&read)?,
        })
    }
}

impl Settings {
    /// The same for a program without transports of its own.
    ///
    /// # Errors
    /// As [`Settings::read`].
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_environment(environment: &Environment) -> Result<Self, SettingsError> {
        Self::read(environment, Custom::default())
    }

    /// The defaults, but for what meeting the others needs: to tell them what can't be read. `None`
    /// if it is not known where this rank may listen, and it `listens`.
    pub(crate) fn only_to_meet(environment: &Environment, listens: bool) -> Option<Self> {
        let read = Reader(environment);
        let tls = TlsSettings::read(&read).unwrap_or_default();
        let settings = Self { tls, ..Self::default() };
        if !listens {
            return Some(settings);
        }
        let interface = read.interface().ok()?;
        let port_range = read.parsed("UNISUM_PORT_RANGE").ok()?;
        // For so long rank 0 waits for a name of its own, too.
        let connect_timeout = Duration::from_secs(5);
        Some(Self { interface, port_range, connect_timeout, ..settings })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(120),
            heartbeat_timeout: Duration::from_secs(10),
            reconnect_timeout: Duration::ZERO,
            elastic: None,
            members: None,
            epoch_log: None,
            replay: None,
            replay_process: None,
            algorithm: None,
            reproducible: false,
            tuning: None,
            transport: TransportChoice::default(),
            custom: Custom::default(),
            interface: None,
            port_range: None,
            sockets_per_peer: 1,
            slice_bytes: 256 << 10,
            window: 4,
            shm_heap: None,
            cross_memory: true,
            multimem: false,
            verbs: VerbsSettings::default(),
            tls: TlsSettings::default(),
        }
    }
}

impl TransportChoice {
    pub(crate) const fn is_auto(&self) -> bool {
        self.0.is_none()
    }

    /// Whether this transport was asked for.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.0.as_deref() == Some(name)
    }

    /// The choice that a text names.
    ///
    /// # Errors
    /// What is accepted, where these transports can be asked for.
    fn parse(text: &str, known: &[&'static str]) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self(None)),
            name if known.contains(&name) => Ok(Self(Some(name.into()))),
            _ => {
                let (last, others) = known.split_last().unwrap_or((&"auto", &[]));
                let others: String = others.iter().map(|name| format!(", {name}")).collect();
                Err(format!("auto{others} or {last}"))
            }
        }
    }
}

impl std::fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("auto"))
    }
}

/// The variable of this name, if it exists.
pub(crate) fn variable(name: &str) -> Option<&'static str> {
    VARIABLES.iter().map(|variable| variable.name).find(|known| *known == name)
}

/// The `UNISUM_` variables that are set but do not exist.
fn unknown_variables(environment: &Environment) -> Vec<String> {
    let known = |name: &str| VARIABLES.iter().any(|variable| variable.name == name);
    // Those of the project's own tests and programs are not for the library.
    let is_elsewhere = |name: &str| name.starts_with("UNISUM_TEST_") || name == "UNISUM_LOG";
    let ours = environment.names().filter(|name| name.starts_with("UNISUM_"));
    ours.filter(|name| !known(name) && !is_elsewhere(name)).map(str::to_owned).collect()
}

/// Values of other bytes than text would all look the same: of two jobs one would have the other's
/// name. That of the token is told by whoever reads it, without its value.
///
/// # Errors
/// For the first such variable.
fn refuse_other_than_text(environment: &Environment) -> Result<(), SettingsError> {
    let is_text = |value: &str| !value.contains(char::REPLACEMENT_CHARACTER);
    let named = VARIABLES.iter().map(|it| it.name).filter(|name| *name != "UNISUM_TOKEN");
    let mut set = named.filter_map(|name| Some((name, environment.get(name)?)));
    match set.find(|(_, value)| !is_text(value)) {
        Some((variable, value)) => {
            Err(SettingsError { variable, value: value.to_owned(), accepted: "UTF-8".to_owned() })
        }
        None => Ok(()),
    }
}

/// Reads single variables; what is not set is `None`.
struct Reader<'a>(&'a Environment);

type Read<T> = Result<Option<T>, SettingsError>;

impl Reader<'_> {
    fn read<T>(
        &self,
        variable: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Read<T> {
        let Some(value) = self.0.get(variable) else {
            return Ok(None);
        };
        let refused = |accepted| SettingsError { variable, value: value.to_owned(), accepted };
        parse(value.trim()).map(Some).map_err(refused)
    }

    fn seconds(&self, variable: &'static str) -> Read<Duration> {
        self.seconds_from(MIN_SECONDS, variable)
    }

    fn seconds_from(&self, min: f64, variable: &'static str) -> Read<Duration> {
        self.read(variable, |text| {
            let seconds = text.parse().ok().filter(|s| (min..=MAX_SECONDS).contains(s));
            let accepted = || format!("{min} to {MAX_SECONDS} seconds");
            seconds.map(Duration::from_secs_f64).ok_or_else(accepted)
        })
    }

    /// Zero stands for what is not done at all.
    fn seconds_or_none(&self, variable: &'static str) -> Read<Duration> {
        self.read(variable, |text| {
            let fits = |s: &f64| *s == 0.0 || (MIN_SECONDS..=MAX_SECONDS).contains(s);
            let accepted = || format!("0, or {MIN_SECONDS} to {MAX_SECONDS} seconds");
            text.parse().ok().filter(fits).map(Duration::from_secs_f64).ok_or_else(accepted)
        })
    }

    fn number(
        &self,
        variable: &'static str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Read<usize> {
        self.read(variable, |text| {
            let number = text.parse().ok().filter(|number| range.contains(number));
            number.ok_or_else(|| format!("{} to {}", range.start(), range.end()))
        })
    }

    fn bytes(&self, variable: &'static str, range: std::ops::RangeInclusive<u64>) -> Read<u64> {
        self.read(variable, |text| {
            let bytes = parse_bytes(text).ok().filter(|bytes| range.contains(bytes));
            let (low, high) = range.into_inner();
            bytes.ok_or_else(|| format!("{low} to {high} bytes, optionally with K, M, G or T"))
        })
    }

    fn switch(&self, variable: &'static str) -> Read<bool> {
        self.read(variable, |text| match text.to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Ok(true),
            "0" | "false" | "no" | "off" => Ok(false),
            _ => Err("1 or 0".to_owned()),
        })
    }

    /// The error is what is accepted.
    fn parsed<T: std::str::FromStr<Err: ToString>>(&self, variable: &'static str) -> Read<T> {
        self.read(variable, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }

    fn transport(&self, variable: &'static str, custom: &Custom) -> Read<TransportChoice> {
        let known: Vec<&str> = builtin::names().chain(custom.names()).collect();
        self.read(variable, |text| TransportChoice::parse(text, &known))
    }

    /// The name's form only: which names exist is the selection's to know.
    fn algorithm(&self, variable: &'static str) -> Read<String> {
        let name = self.read(variable, |text| {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            match text.bytes().all(fits) {
                true => Ok(text.to_ascii_lowercase()),
                false => Err("auto or the name of an algorithm".to_owned()),
            }
        })?;
        Ok(name.filter(|name| name != "auto"))
    }

    fn path(&self, variable: &'static str) -> Read<PathBuf> {
        self.read(variable, |path| Ok(path.into()))
    }

    fn tuning(&self, variable: &'static str, reproducible: bool) -> Read<PathBuf> {
        self.read(variable, |path| match reproducible {
            false => Ok(path.into()),
            true => {
                Err("nothing beside UNISUM_REPRODUCIBLE, which measures and tries nothing".into())
            }
        })
    }

    /// Users of NCCL and Gloo have said once already which network to use.
    fn interface(&self) -> Read<InterfaceFilter> {
        for variable in ["UNISUM_INTERFACE", "NCCL_SOCKET_IFNAME"] {
            if let Some(filter) = self.parsed(variable)? {
                return Ok(Some(filter));
            }
        }
        self.read("GLOO_SOCKET_IFNAME", |names| {
            InterfaceFilter::exact(names).map_err(|error| error.to_string())
        })
    }
}

/// A millisecond; anything shorter is a mistake of units.
const MIN_SECONDS: f64 = 0.001;
/// Eleven days; longer waits are better found by a person.
const MAX_SECONDS: f64 = 1_000_000.0;

#[cfg(test)]
mod tests;
