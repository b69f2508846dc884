//! What rank 0 writes to standard output.

mod comparison;
mod progress;
mod records;
mod table;

use std::io::{self, Write as _};

use serde_json::{Value, json};
use unisum::{Dtype, ReduceOp};

pub(crate) use progress::Progress;
pub(crate) use records::Records;

use crate::args::{Args, Format, Memory};
use crate::collective::Case;
use crate::measure::Measurement;
use crate::world::World;

/// A form of the report.
pub(crate) trait Report {
    /// Before the first size.
    ///
    /// # Errors
    /// If it cannot be written.
    fn begin(&mut self, about: &About) -> io::Result<()>;

    /// Before the first size of a series.
    ///
    /// # Errors
    /// If it cannot be written.
    fn series(&mut self, series: &Case) -> io::Result<()>;

    /// One size: a row per algorithm.
    ///
    /// # Errors
    /// If it cannot be written.
    fn size(&mut self, rows: &[Row]) -> io::Result<()>;

    /// After the last size, with the number of wrong elements in all.
    ///
    /// # Errors
    /// If it cannot be written.
    fn end(&mut self, wrong: u64) -> io::Result<()>;
}

/// The report in the form that was asked for.
pub(crate) fn open(args: &Args) -> Box<dyn Report> {
    match args.format {
        Format::Table if args.compares() => Box::new(comparison::Comparison::default()),
        Format::Table => Box::new(table::Table::default()),
        Format::Json | Format::Csv => Box::new(Records::new(args.format, true)),
    }
}

/// What holds for the whole report.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) ranks: usize,
    pub(crate) transport: String,
    memory: Memory,
    checked: bool,
}

impl About {
    pub(crate) fn new(args: &Args, world: &World) -> Self {
        Self {
            ranks: world.comm.world(),
            transport: world.transport(),
            memory: args.place_of_buffers(),
            checked: args.check,
        }
    }

    /// The first line of a table.
    fn headline(&self) -> String {
        format!(
            "# unisum {} ({} kernels): {} ranks, transport {}, {} memory, {}",
            env!("CARGO_PKG_VERSION"),
            unisum::isa(),
            self.ranks,
            self.transport,
            self.memory.name(),
            if self.checked { "every element checked" } else { "NOT checked" },
        )
    }
}

/// The first line of a series.
fn title(series: &Case) -> String {
    let Case { kind, ranks, place, .. } = series;
    let mut title = format!("# {kind}");
    if let Some(root) = series.root() {
        title += &format!(", root {root}");
    }
    if kind.moves_elements() {
        title += &format!(", {} place", place.words());
    }
    match kind.count_unit(*ranks) {
        1 => {}
        unit => title += &format!("; counts are multiples of {unit}"),
    }
    title
}

/// One size, type, operation and algorithm.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) transport: String,
    pub(crate) algorithm: &'static str,
    /// Whether it is the algorithm that is taken if none is named.
    pub(crate) automatic: bool,
    pub(crate) case: Case,
    pub(crate) dtype: Dtype,
    /// If the collective reduces.
    pub(crate) op: Option<ReduceOp>,
    pub(crate) memory: Memory,
    pub(crate) measured: Measurement,
}

impl Row {
    fn bytes(&self) -> usize {
        self.case.count * self.dtype.bytes()
    }

    fn op(&self) -> String {
        self.op.map_or_else(|| "none".into(), |op| op.to_string())
    }

    fn quantile_us(&self, share: f64) -> f64 {
        self.measured.quantile_s(share) * 1e6
    }

    /// Size over the median time, in 10⁹ bytes per second; `None` where nothing is moved, as in
    /// the other rates.
    fn algbw_gbps(&self) -> Option<f64> {
        let bytes = self.bytes() as f64;
        (bytes > 0.0).then(|| bytes / self.measured.quantile_s(0.5) * 1e-9)
    }

    /// What some rank must send or receive at least, over the median time.
    fn busbw_gbps(&self) -> Option<f64> {
        Some(self.algbw_gbps()? * self.case.kind.bus_factor(self.case.ranks))
    }

    /// Processor time of all ranks, per 10⁹ bytes of the size.
    fn cpu_seconds_per_gb(&self) -> Option<f64> {
        let moved = self.bytes() as f64 * self.measured.times_s.len() as f64;
        (moved > 0.0).then(|| self.measured.cpu_seconds / (moved * 1e-9))
    }

    /// All there is, by name; the machine-readable forms.
    fn fields(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("collective", json!(self.case.kind.to_string())),
            ("root", json!(self.case.root())),
            ("place", json!(self.case.place.name())),
            ("transport", json!(self.transport)),
            ("algorithm", json!(self.algorithm)),
            ("automatic", json!(self.automatic)),
            ("ranks", json!(self.case.ranks)),
            ("bytes", json!(self.bytes())),
            ("count", json!(self.case.count)),
            ("dtype", json!(self.dtype.to_string())),
            ("op", json!(self.op())),
            ("memory", json!(self.memory.name())),
            ("iterations", json!(self.measured.times_s.len())),
            ("min_us", json!(self.quantile_us(0.0))),
            ("p50_us", json!(self.quantile_us(0.5))),
            ("p99_us", json!(self.quantile_us(0.99))),
            ("max_us", json!(self.quantile_us(1.0))),
            ("algbw_GBps", json!(self.algbw_gbps())),
            ("busbw_GBps", json!(self.busbw_gbps())),
            ("wrong", json!(self.measured.wrong)),
            ("cpu_seconds", json!(self.measured.cpu_seconds)),
            ("cpu_seconds_per_GB", json!(self.cpu_seconds_per_gb())),
            ("voluntary_switches", json!(self.measured.voluntary_switches)),
            ("wall_us", json!(self.measured.wall_s.map(|wall_s| wall_s * 1e6))),
        ]
    }
}

/// Writes a line; a closed pipe is an error, not a panic.
pub(crate) fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{}", line.trim_end())
}

/// About three significant digits.
pub(crate) fn significant(value: f64) -> String {
    match value.abs() {
        none if none < 5e-5 => format!("{value:.0}"),
        tiny if tiny < 0.1 => format!("{value:.4}"),
        small if small < 1.0 => format!("{value:.3}"),
        middle if middle < 100.0 => format!("{value:.2}"),
        large if large < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// About three significant digits, or a dash.
fn rate(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), significant)
}

/// The last line of a table.
pub(crate) fn verdict(wrong: u64, checked: bool) -> String {
    match (wrong, checked) {
        (_, false) => "# Results were not checked".into(),
        (0, _) => "# Wrong elements: 0 OK".into(),
        (wrong, _) => format!("# Wrong elements: {wrong} FAILED"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::{Kind, Place};

    #[test]
    fn bandwidths_are_those_of_nccl_tests() {
        let measured = Measurement {
            times_s: vec![1e-3],
            wrong: Some(0),
            cpu_seconds: 0.5,
            voluntary_switches: 0,
            wall_s: None,
        };
        let kind = Kind::ALL_REDUCE;
        let mut row = Row {
            transport: "tcp".into(),
            algorithm: "ring",
            automatic: true,
            case: Case { kind, root: 0, place: Place::In, ranks: 4, count: 250_000 },
            dtype: Dtype::F32,
            op: Some(ReduceOp::Sum),
            memory: Memory::Private,
            measured,
        };
        let is = |rate: Option<f64>, expected: f64| (rate.unwrap() - expected).abs() < 1e-6;
        assert!(is(row.algbw_gbps(), 1.0));
        assert!(is(row.busbw_gbps(), 1.5));
        assert!(is(row.cpu_seconds_per_gb(), 500.0));
        row.case.count = 0;
        assert_eq!((row.busbw_gbps(), row.cpu_seconds_per_gb()), (None, None));
    }
}
