//! The machine-readable forms, and a plain table for the side experiments.

use std::io;

use serde_json::Value;

use super::{About, Report, Row, say, significant};
use crate::args::Format;
use crate::collective::Case;

/// Writes records of named fields, which are the same in each record.
#[derive(Debug)]
pub(crate) struct Records {
    format: Format,
    /// Whether the names of the fields are to come first.
    heads: bool,
}

impl Records {
    /// A writer; `heads` says whether the first record begins the output.
    pub(crate) const fn new(format: Format, heads: bool) -> Self {
        Self { format, heads }
    }

    /// Writes one record as a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(&mut self, fields: &[(&'static str, Value)]) -> io::Result<()> {
        if std::mem::take(&mut self.heads) {
            match self.format {
                Format::Json => {}
                Format::Csv => say(&joined(fields, ",", |name, _| name.to_string()))?,
                Format::Table => say(&joined(fields, "  ", |name, _| name.to_string()))?,
            }
        }
        match self.format {
            // In the order of the fields, which a `serde_json::Map` would lose.
            Format::Json => {
                let member = |name: &str, value: &Value| format!("\"{name}\":{}", brief(value));
                let members = joined(fields, ",", member);
                say(&format!("{{{members}}}"))
            }
            Format::Csv => say(&joined(fields, ",", |_, value| plain(&brief(value)))),
            Format::Table => say(&joined(fields, "  ", |name, value| {
                format!("{:>width$}", rounded(value), width = name.len())
            })),
        }
    }
}

impl Report for Records {
    fn begin(&mut self, _: &About) -> io::Result<()> {
        Ok(())
    }

    fn series(&mut self, _: &Case) -> io::Result<()> {
        Ok(())
    }

    fn size(&mut self, rows: &[Row]) -> io::Result<()> {
        rows.iter().try_for_each(|row| self.write(&row.fields()))
    }

    fn end(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn joined(
    fields: &[(&'static str, Value)],
    between: &str,
    cell: impl Fn(&str, &Value) -> String,
) -> String {
    fields.iter().map(|(name, value)| cell(name, value)).collect::<Vec<_>>().join(between)
}

/// No value holds a comma or a quote: they are numbers, and names without either.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// With six digits that count: no measurement has more.
fn brief(value: &Value) -> Value {
    let number = value.as_f64().filter(|_| value.is_f64());
    let short = number.and_then(|number| format!("{number:.5e}").parse::<f64>().ok());
    short.map_or_else(|| value.clone(), Value::from)
}

fn rounded(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if value.is_f64() => significant(number),
        _ => plain(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_six_digits_that_count() {
        let short = |number: f64| brief(&number.into()).to_string();
        assert_eq!([1.0 / 3.0, 0.1 + 0.2, 2.0 / 3e-7].map(short), ["0.333333", "0.3", "6666670.0"]);
        assert_eq!(brief(&12_345_678.into()).to_string(), "12345678", "counts are whole");
    }
}
