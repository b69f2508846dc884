//! Columns as users of nccl-tests know them, and a few more.

use std::io;

use super::{About, Report, Row, rate, say, significant, title, verdict};
use crate::args::Memory;
use crate::collective::Case;

/// One line per size.
#[derive(Debug, Default)]
pub(super) struct Table {
    checked: bool,
    /// Whether there is the column of times by the hosts' clocks, too.
    has_wall: bool,
}

impl Report for Table {
    fn begin(&mut self, about: &About) -> io::Result<()> {
        self.checked = about.checked;
        self.has_wall = about.memory == Memory::Device;
        say(&about.headline())
    }

    fn series(&mut self, series: &Case) -> io::Result<()> {
        say("#")?;
        say(&title(series))?;
        say(&self.heading(HEADS, "wall"))?;
        say(&self.heading(UNITS, "(us, mean)"))
    }

    fn size(&mut self, rows: &[Row]) -> io::Result<()> {
        rows.iter().try_for_each(|row| {
            let wall_s = row.measured.wall_s.filter(|_| self.has_wall);
            say(&line(cells(row), wall_s.map(|wall_s| significant(wall_s * 1e6))))
        })
    }

    fn end(&mut self, wrong: u64) -> io::Result<()> {
        say(&verdict(wrong, self.checked))
    }
}

const COLUMNS: usize = 15;
const WIDTHS: [usize; COLUMNS] = [12, 11, 5, 5, 18, 9, 7, 7, 6, 9, 9, 9, 7, 8, 6];
const HEADS: [&str; COLUMNS] = [
    "size",
    "count",
    "type",
    "op",
    "algorithm",
    "time",
    "algbw",
    "busbw",
    "#wrong",
    "min",
    "p99",
    "max",
    "CPU",
    "switches",
    "iters",
];
const UNITS: [&str; COLUMNS] = [
    "(B)",
    "(elements)",
    "",
    "",
    "",
    "(us, p50)",
    "(GB/s)",
    "(GB/s)",
    "",
    "(us)",
    "(us)",
    "(us)",
    "(s/GB)",
    "(per op)",
    "",
];

fn cells(row: &Row) -> [String; COLUMNS] {
    let iterations = row.measured.times_s.len();
    let microseconds = |share| significant(row.quantile_us(share));
    [
        row.bytes().to_string(),
        row.case.count.to_string(),
        row.dtype.to_string(),
        row.op(),
        row.algorithm.to_string(),
        microseconds(0.5),
        rate(row.algbw_gbps()),
        rate(row.busbw_gbps()),
        row.measured.wrong.map_or_else(|| "-".into(), |wrong| wrong.to_string()),
        microseconds(0.0),
        microseconds(0.99),
        microseconds(1.0),
        rate(row.cpu_seconds_per_gb()),
        significant(row.measured.voluntary_switches as f64 / iterations as f64),
        iterations.to_string(),
    ]
}

impl Table {
    /// A line that is no data: its first character, always a space, becomes a mark.
    fn heading(&self, names: [&str; COLUMNS], wall: &str) -> String {
        let wall = self.has_wall.then(|| wall.to_owned());
        line(names.map(String::from), wall).replacen(' ', "#", 1)
    }
}

fn line(cells: [String; COLUMNS], wall: Option<String>) -> String {
    let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:>width$}"));
    let wall = wall.map(|wall| format!("{wall:>10}"));
    padded.chain(wall).collect::<Vec<_>>().join(" ")
}
