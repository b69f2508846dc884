//! What the emulator does, by variables of the environment. README.md lists them.

use std::str::FromStr;

/// How leaks are reported when the process exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeakReport {
    None,
    /// On standard error.
    Report,
    /// On standard error, and the process exits with [`super::leaks::EXIT_CODE`].
    Fail,
}

/// An error that is not the caller's fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Injection {
    /// An entry point, or `kernel` or `copy` for the execution of one.
    pub call: String,
    /// Which call fails, counted from 1.
    pub nth: u64,
    pub code: i32,
}

/// Launches of a kernel that do nothing, or in which a thread of each block waits for nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Skip {
    pub kernel: String,
    /// Which of each `of` launches, counted from 1.
    pub nth: u64,
    pub of: u64,
    /// If only its waits are left out.
    pub thread: Option<u32>,
}

/// The settings of this process.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The physical devices that this process sees, in order of their ordinals.
    pub devices: Vec<u32>,
    /// How many the host has.
    pub device_count: u32,
    pub delay_us: u64,
    pub seed: u64,
    pub has_pools: bool,
    pub has_fabric: bool,
    pub has_multicast: bool,
    /// Whether the driver tells of mappings side by side as one range.
    pub is_merged: bool,
    pub has_peer_access: bool,
    /// Pairs of physical devices without peer access.
    pub pairs_apart: Vec<(u32, u32)>,
    /// Bytes of memory of each device.
    pub memory: u64,
    /// Compute capability, times ten.
    pub compute: u32,
    pub injections: Vec<Injection>,
    pub skips: Vec<Skip>,
    pub leaks: LeakReport,
    pub reports_counts: bool,
}

impl Settings {
    /// Reads the settings; a value that can't be read ends the process, since a test that runs with
    /// other settings than it asked for shows nothing.
    pub(crate) fn read() -> Self {
        for (name, value) in std::env::vars() {
            let name = name.strip_prefix(PREFIX).filter(|name| !name.starts_with("TEST_"));
            if let Some(name) = name.filter(|name| !NAMES.contains(name)) {
                refuse(name, &value);
            }
        }
        let count: u32 = number("DEVICES", 2);
        Self {
            devices: visible(count.min(super::DEVICES_MAX)),
            device_count: count.min(super::DEVICES_MAX),
            delay_us: number("DELAY_US", 0),
            seed: number("SEED", default_seed()),
            has_pools: number::<u32>("POOLS", 1) != 0,
            has_fabric: number::<u32>("FABRIC", 0) != 0,
            has_multicast: number::<u32>("MULTICAST", 0) != 0,
            is_merged: number::<u32>("MERGED", 0) != 0,
            has_peer_access: number::<u32>("PEER_ACCESS", 1) != 0,
            pairs_apart: list("NO_PEER", pair),
            memory: number("MEMORY", 8 << 30),
            compute: number("COMPUTE", 80),
            injections: list("FAIL", injection),
            skips: [list("SKIP", skip), list("HASTY", hasty)].concat(),
            leaks: match value("LEAKS").as_deref() {
                None | Some("" | "0") => LeakReport::None,
                Some("report") => LeakReport::Report,
                Some("fail") => LeakReport::Fail,
                Some(other) => refuse("LEAKS", other),
            },
            reports_counts: number::<u32>("COUNTS", 0) != 0,
        }
    }

    /// Whether two physical devices may access each other's memory.
    pub(crate) fn are_peers(&self, one: u32, other: u32) -> bool {
        let apart = |pair: &(u32, u32)| *pair == (one, other) || *pair == (other, one);
        self.has_peer_access && one != other && !self.pairs_apart.iter().any(apart)
    }
}

/// How the names of all variables begin.
const PREFIX: &str = "CUDA_EMULATOR_";

/// The variables that there are. Those of the emulator's own tests begin with `TEST_`.
const NAMES: [&str; 16] = [
    "DEVICES",
    "DELAY_US",
    "SEED",
    "POOLS",
    "FABRIC",
    "MULTICAST",
    "MERGED",
    "PEER_ACCESS",
    "NO_PEER",
    "MEMORY",
    "COMPUTE",
    "FAIL",
    "SKIP",
    "HASTY",
    "LEAKS",
    "COUNTS",
];

/// The devices that `CUDA_VISIBLE_DEVICES` names, up to the first that does not exist.
fn visible(count: u32) -> Vec<u32> {
    let Ok(text) = std::env::var("CUDA_VISIBLE_DEVICES") else { return (0..count).collect() };
    let numbers = text.split(',').map(|word| word.trim().parse().ok());
    numbers.map_while(|number| number.filter(|device| *device < count)).collect()
}

fn value(name: &str) -> Option<String> {
    std::env::var(format!("{PREFIX}{name}")).ok()
}

fn refuse(name: &str, value: &str) -> ! {
    super::report(&format!("{PREFIX}{name}={value} can't be read"));
    std::process::abort()
}

fn number<N: FromStr>(name: &str, default: N) -> N {
    match value(name) {
        None => default,
        Some(text) => text.parse().unwrap_or_else(|_| refuse(name, &text)),
    }
}

fn list<T>(name: &str, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
    let text = value(name).unwrap_or_default();
    let words = text.split(',').filter(|word| !word.is_empty());
    words.map(|word| parse(word).unwrap_or_else(|| refuse(name, &text))).collect()
}

/// `0:1`
fn pair(word: &str) -> Option<(u32, u32)> {
    let (one, other) = word.split_once(':')?;
    Some((one.parse().ok()?, other.parse().ok()?))
}

/// `cuMemAlloc_v2:3:2`
fn injection(word: &str) -> Option<Injection> {
    let mut parts = word.split(':');
    let call = parts.next()?.to_owned();
    let (nth, code) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(Injection { call, nth, code })
}

/// `store:3:4`
fn skip(word: &str) -> Option<Skip> {
    let mut parts = word.split(':');
    let kernel = parts.next()?.to_owned();
    let (nth, of) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let is_one = parts.next().is_none() && (1..=of).contains(&nth);
    is_one.then_some(Skip { kernel, nth, of, thread: None })
}

/// `store:7:3:4`
fn hasty(word: &str) -> Option<Skip> {
    let mut parts = word.splitn(3, ':');
    let (kernel, thread, launches) = (parts.next()?, parts.next()?, parts.next()?);
    let of_launches = skip(&format!("{kernel}:{launches}"))?;
    Some(Skip { thread: Some(thread.parse().ok()?), ..of_launches })
}

fn default_seed() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let time = time.map_or(0, |time| u64::from(time.subsec_nanos()));
    time << 32 | u64::from(std::process::id())
}
