//! What a communicator consists of, as data; what it shows is text for people.

use std::fmt;
use std::time::Duration;

use unisum_algorithms::LinkCost;

use super::calibrate;
use crate::autotuning::selector::AlgorithmRange;

/// What a communicator consists of: where its ranks are, what its links cost, and which algorithms
/// it chooses. Its text, in several lines, is for people.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Description {
    /// Which launcher started the ranks and how they found each other, or what the communicator was
    /// made from.
    pub origin: String,
    /// The transports in use, such as "tcp", "shm" or "shm+tcp"; "none" in a world of one.
    pub transport: String,
    /// How long joining took on this rank; only of a job's own communicator.
    pub joined_in: Option<Duration>,
    /// By rank; only of a job's own communicator with several ranks.
    pub ranks: Vec<RankDescription>,
    /// How the transport is protected from others, in words.
    pub protection: Option<String>,
    /// What the links say of themselves, such as the RDMA devices in use.
    pub links: Vec<String>,
    /// What was measured when the job started: what algorithms are chosen by.
    pub costs: Vec<MeasuredCost>,
    /// Where the costs come from if they were not measured, and which file keeps what is settled.
    pub notes: Vec<String>,
    /// The algorithms of an all-reduce of `f32`, by size in ascending order.
    pub algorithms: Vec<AlgorithmRange>,
}

/// A rank of a [`Description`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RankDescription {
    /// Ranks of the same node share memory.
    pub node: usize,
    /// Its process, in its own PID namespace.
    pub pid: u32,
    /// Where others reach it, the preferred address first.
    pub addresses: Vec<String>,
}

/// What was measured when a job started.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MeasuredCost {
    /// What it is of, such as "inside a node".
    pub what: String,
    /// What it takes.
    pub rates: Rates,
    /// By whom it was measured.
    pub source: String,
}

/// The cost of moving or reducing bytes: a time however few there are, and a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rates {
    /// Seconds before the first byte.
    pub latency_s: f64,
    /// `None` if it is too fast to be told.
    pub bytes_per_second: Option<f64>,
    /// The same for bytes that are in a cache, where that makes a difference.
    pub bytes_per_second_in_cache: Option<f64>,
}

impl Description {
    pub(crate) fn of(origin: String, transport: &str) -> Self {
        Self { origin, transport: transport.to_owned(), ..Self::default() }
    }

    /// Of a world of one.
    pub(crate) fn alone(origin: String) -> Self {
        Self::of(origin, "none")
    }

    /// The number of nodes that the ranks are on.
    fn nodes(&self) -> usize {
        self.ranks.iter().map(|rank| rank.node + 1).max().unwrap_or(1)
    }

    /// In one line, which launcher started the ranks and how they found each other, how many nodes
    /// they are on, and over which transports: the first line of the text.
    pub fn summary(&self) -> String {
        let Self { origin, transport, .. } = self;
        match (self.joined_in, self.nodes(), &transport[..]) {
            (None, _, "none") => origin.clone(),
            (None, ..) => format!("{origin}, over {transport}"),
            (Some(time), nodes, _) => {
                let plural = if nodes == 1 { "" } else { "s" };
                let seconds = time.as_secs_f64();
                format!(
                    "{origin}; {nodes} node{plural}, over {transport}, joined in {seconds:.3} s"
                )
            }
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary())?;
        for (rank, RankDescription { node, pid, addresses }) in self.ranks.iter().enumerate() {
            let address = match &addresses[..] {
                [] => "-".to_owned(),
                addresses => addresses.join(" or "),
            };
            writeln!(f, "  rank {rank}: node {node}, pid {pid}, {address}")?;
        }
        for line in self.protection.iter().chain(&self.links) {
            writeln!(f, "{line}")?;
        }
        for cost in &self.costs {
            writeln!(f, "{cost}")?;
        }
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        if !self.algorithms.is_empty() {
            writeln!(f, "algorithms of an all-reduce (by modelled time until tried, float32):")?;
        }
        for AlgorithmRange { above, up_to, algorithm, seconds } in &self.algorithms {
            write!(f, "  above {above:>10} up to {up_to:>10} B: {algorithm} ")?;
            match seconds.map(|seconds| seconds * 1e6) {
                Some(micros) => writeln!(f, "({micros:.1} us there)")?,
                None => writeln!(f, "(not modelled)")?,
            }
        }
        Ok(())
    }
}

impl Rates {
    pub(super) fn new(latency_s: f64, s_per_byte: f64) -> Self {
        let bytes_per_second = rate(s_per_byte);
        Self { latency_s, bytes_per_second, bytes_per_second_in_cache: None }
    }

    pub(super) fn of_link(cost: &LinkCost) -> Self {
        let LinkCost { alpha_s, beta_s_per_byte, beta_cached_s_per_byte } = *cost;
        let bytes_per_second_in_cache = rate(beta_cached_s_per_byte);
        Self { bytes_per_second_in_cache, ..Self::new(alpha_s, beta_s_per_byte) }
    }
}

fn rate(s_per_byte: f64) -> Option<f64> {
    (s_per_byte > calibrate::S_PER_BYTE_MIN).then_some(1.0 / s_per_byte)
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.latency_s > 0.0 {
            write!(f, "{:.1} us + ", self.latency_s * 1e6)?;
        }
        match self.bytes_per_second {
            Some(rate) => write!(f, "bytes at {:.2} GB/s", rate * 1e-9)?,
            None => f.write_str("bytes at ? GB/s")?,
        }
        self.bytes_per_second_in_cache
            .map_or(Ok(()), |rate| write!(f, ", {:.2} in cache", rate * 1e-9))
    }
}

impl fmt::Display for MeasuredCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.what, self.rates, self.source)
    }
}
