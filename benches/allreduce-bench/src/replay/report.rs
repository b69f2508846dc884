//! What a replay reports.

use std::io;

use serde_json::{Value, json};

use super::options::Wire;
use crate::args::Format;
use crate::models::Model;
use crate::report::{Records, say, significant, verdict};

/// What holds for all ways.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) model: Model,
    pub(crate) ranks: usize,
    pub(crate) transport: String,
    pub(crate) parameters: usize,
    pub(crate) elements: usize,
    pub(crate) backward_s: f64,
}

/// What was measured of a way: the same on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) way: &'static str,
    pub(crate) wire: Wire,
    pub(crate) launches: usize,
    /// Of a step whose gradients are ready at once, the median.
    pub(crate) communication_s: f64,
    /// Of each step on its slowest rank, ascending.
    pub(crate) steps_s: Vec<f64>,
    pub(crate) hideable_s: f64,
    /// Elements that came out wrong; `None` if nobody looked.
    pub(crate) wrong: Option<u64>,
}

impl Row {
    /// What a step takes beyond the backward pass.
    fn exposed_s(&self, about: &About) -> f64 {
        median(&self.steps_s) - about.backward_s
    }

    fn hidden_s(&self, about: &About) -> f64 {
        self.communication_s - self.exposed_s(about)
    }

    /// The hidden share of what could be hidden, in percent, if that is anything. Times that vary
    /// more than there is to hide don't take it beyond 0 and 100.
    fn overlap_percent(&self, about: &About) -> Option<f64> {
        let share = self.hidden_s(about) / self.hideable_s;
        (self.hideable_s > 0.0).then_some(100.0 * share.clamp(0.0, 1.0))
    }

    /// All there is, by name; the machine-readable forms.
    fn fields(&self, about: &About) -> Vec<(&'static str, Value)> {
        let ms = |seconds: f64| json!(seconds * 1e3);
        vec![
            ("model", json!(about.model.name())),
            ("way", json!(self.way)),
            ("wire", json!(self.wire.name())),
            ("transport", json!(about.transport)),
            ("ranks", json!(about.ranks)),
            ("parameters", json!(about.parameters)),
            ("elements", json!(about.elements)),
            ("launches", json!(self.launches)),
            ("steps", json!(self.steps_s.len())),
            ("backward_ms", ms(about.backward_s)),
            ("communication_ms", ms(self.communication_s)),
            ("step_ms", ms(median(&self.steps_s))),
            ("step_min_ms", ms(self.steps_s[0])),
            ("step_max_ms", ms(self.steps_s[self.steps_s.len() - 1])),
            ("exposed_ms", ms(self.exposed_s(about))),
            ("hideable_ms", ms(self.hideable_s)),
            ("hidden_ms", ms(self.hidden_s(about))),
            ("overlap_percent", json!(self.overlap_percent(about))),
            ("wrong", json!(self.wrong)),
        ]
    }
}

/// Writes a row for each way as it is measured.
#[derive(Debug)]
pub(crate) struct Report {
    about: About,
    /// Unless it is a table.
    records: Option<Records>,
}

impl Report {
    /// # Errors
    /// If the head of a table cannot be written.
    pub(crate) fn begin(format: Format, about: About) -> io::Result<Self> {
        if format != Format::Table {
            return Ok(Self { about, records: Some(Records::new(format, true)) });
        }
        let About { model, ranks, transport, parameters, elements, backward_s } = &about;
        say(&format!(
            "# unisum {}: {}, {parameters} parameters, {elements} elements, {} MB of f32; \
             {ranks} ranks, transport {transport}",
            env!("CARGO_PKG_VERSION"),
            model.name(),
            significant(*elements as f64 * 4e-6),
        ))?;
        let backward = significant(backward_s * 1e3);
        say(&format!("# medians in ms; a backward pass takes {backward}"))?;
        let columns = ["communication", "step", "exposed", "hideable", "hidden"].map(String::from);
        say(&line("#way", "wire", "launches", columns, "overlap", "#wrong"))?;
        Ok(Self { about, records: None })
    }

    /// # Errors
    /// If it cannot be written.
    pub(crate) fn row(&mut self, row: &Row) -> io::Result<()> {
        if let Some(records) = &mut self.records {
            return records.write(&row.fields(&self.about));
        }
        let about = &self.about;
        let times_s = [
            row.communication_s,
            median(&row.steps_s),
            row.exposed_s(about),
            row.hideable_s,
            row.hidden_s(about),
        ];
        let overlap = row.overlap_percent(about).map(|percent| format!("{percent:.1}%"));
        let wrong = row.wrong.map(|wrong| wrong.to_string());
        let dash = || "-".to_owned();
        say(&line(
            row.way,
            row.wire.name(),
            &row.launches.to_string(),
            times_s.map(|seconds| significant(seconds * 1e3)),
            &overlap.unwrap_or_else(dash),
            &wrong.unwrap_or_else(dash),
        ))
    }

    /// # Errors
    /// If the last line of a table cannot be written.
    pub(crate) fn end(&self, wrong: Option<u64>) -> io::Result<()> {
        match &self.records {
            Some(_) => Ok(()),
            None => say(&verdict(wrong.unwrap_or(0), wrong.is_some())),
        }
    }
}

fn line(
    way: &str,
    wire: &str,
    launches: &str,
    times: [String; 5],
    overlap: &str,
    wrong: &str,
) -> String {
    let times: String = times.iter().map(|time| format!(" {time:>13}")).collect();
    format!("{way:<11} {wire:>6} {launches:>8}{times} {overlap:>8} {wrong:>6}")
}

/// Of ascending times.
pub(crate) fn median(times_s: &[f64]) -> f64 {
    times_s[times_s.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_exposed_is_hidden() {
        let about = About {
            model: Model::Resnet50,
            ranks: 2,
            transport: "tcp".into(),
            parameters: 161,
            elements: 25_557_032,
            backward_s: 10.0,
        };
        let mut row = Row {
            way: "buckets",
            wire: Wire::F32,
            launches: 7,
            communication_s: 4.0,
            steps_s: vec![10.5, 11.0, 20.0],
            hideable_s: 3.75,
            wrong: Some(0),
        };
        assert_eq!((row.exposed_s(&about), row.hidden_s(&about)), (1.0, 3.0));
        assert_eq!(row.overlap_percent(&about), Some(80.0));
        // Times vary: more may seem hidden than there is, or less than nothing.
        row.hideable_s = 0.3;
        assert_eq!(row.overlap_percent(&about), Some(100.0));
        row.steps_s = vec![90.0];
        assert_eq!(row.overlap_percent(&about), Some(0.0));
        row.hideable_s = 0.0;
        assert_eq!(row.overlap_percent(&about), None);
    }
}
