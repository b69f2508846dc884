//! All algorithms side by side: who is fastest at each size, and what the automatic choice costs
//! against it.

use std::io;

use super::{About, Report, Row, say, significant, title, verdict};
use crate::collective::Case;

/// One line per size, a column per algorithm.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    algorithms: Vec<&'static str>,
    checked: bool,
}

impl Report for Comparison {
    fn begin(&mut self, about: &About) -> io::Result<()> {
        self.checked = about.checked;
        say(&about.headline())?;
        say("# median time in us; * is the automatic choice, regret its time over the best's")
    }

    fn series(&mut self, series: &Case) -> io::Result<()> {
        self.algorithms = series.kind.algorithms();
        say("#")?;
        say(&title(series))?;
        let heads = self.algorithms.iter().map(|name| (*name).to_string()).collect();
        let names = ["size", "type", "op"].map(String::from);
        // The line begins with a space, which becomes the mark of a line that is no data.
        say(&self.line(names, heads, "best", "regret", "#wrong").replacen(' ', "#", 1))
    }

    fn size(&mut self, rows: &[Row]) -> io::Result<()> {
        let best = rows.iter().min_by(|a, b| a.quantile_us(0.5).total_cmp(&b.quantile_us(0.5)));
        let Some(best) = best else {
            return Ok(());
        };
        let chosen = rows.iter().find(|row| row.automatic);
        let regret = chosen.map_or_else(
            || "-".into(),
            |row| format!("{:.0}%", (row.quantile_us(0.5) / best.quantile_us(0.5) - 1.0) * 100.0),
        );
        let wrong: Option<u64> = rows.iter().map(|row| row.measured.wrong).sum();
        let wrong = wrong.map_or_else(|| "-".into(), |wrong| wrong.to_string());
        let head = [best.bytes().to_string(), best.dtype.to_string(), best.op()];
        say(&self.line(head, self.times(rows), best.algorithm, &regret, &wrong))
    }

    fn end(&mut self, wrong: u64) -> io::Result<()> {
        say(&verdict(wrong, self.checked))
    }
}

impl Comparison {
    /// A cell per algorithm.
    fn times(&self, rows: &[Row]) -> Vec<String> {
        let cell = |name| match rows.iter().find(|row| row.algorithm == name) {
            Some(row) if row.automatic => format!("*{}", significant(row.quantile_us(0.5))),
            Some(row) => significant(row.quantile_us(0.5)),
            None => "-".into(),
        };
        self.algorithms.iter().map(|name| cell(*name)).collect()
    }

    fn line(
        &self,
        [size, dtype, op]: [String; 3],
        times: Vec<String>,
        best: &str,
        regret: &str,
        wrong: &str,
    ) -> String {
        let widths = self.algorithms.iter().map(|name| name.len().max(9));
        let cells = times.iter().zip(widths).map(|(time, width)| format!(" {time:>width$}"));
        let times: String = cells.collect();
        let best_width = self.algorithms.iter().map(|name| name.len()).max().unwrap_or(0);
        format!("{size:>12} {dtype:>5} {op:>5}{times}  {best:>best_width$} {regret:>7} {wrong:>6}")
    }
}
