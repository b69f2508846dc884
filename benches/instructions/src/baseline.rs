//! The stored counts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Result;
use crate::callgrind::Count;

/// What was counted, and with which compiler: another one makes other instructions.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Baseline {
    pub(crate) compiler: String,
    pub(crate) counts: BTreeMap<String, Count>,
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("baseline.json")
}

/// The compiler that is called in this package's folder, which is the one that cargo calls there.
pub(crate) fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("-V").current_dir(env!("CARGO_MANIFEST_DIR")).output()?;
    Ok(format!("{} {}", String::from_utf8(output.stdout)?.trim(), std::env::consts::ARCH))
}

impl Baseline {
    pub(crate) fn read() -> Result<Self> {
        let text = match std::fs::read_to_string(path()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            text => text?,
        };
        let value: Value = serde_json::from_str(&text)?;
        let compiler = value["compiler"].as_str().ok_or("the baseline names no compiler")?.into();
        let jobs = value["jobs"].as_object().ok_or("the baseline has no jobs")?;
        let count = |(name, job): (&String, &Value)| {
            let number = |field: &str| {
                job[field].as_f64().ok_or_else(|| format!("the baseline of {name} has no {field}"))
            };
            let count = Count {
                instructions: number("instructions")?,
                allocations: number("allocations")?,
            };
            Ok((name.clone(), count))
        };
        Ok(Self { compiler, counts: jobs.iter().map(count).collect::<Result<_>>()? })
    }

    pub(crate) fn write(&self) -> Result<()> {
        let round = |number: f64| (number * 100.0).round() / 100.0;
        let job = |(name, count): (&String, &Count)| {
            let Count { instructions, allocations } = *count;
            let job = json!({
                "instructions": round(instructions),
                "allocations": round(allocations),
            });
            (name.clone(), job)
        };
        let jobs: serde_json::Map<String, Value> = self.counts.iter().map(job).collect();
        let text =
            serde_json::to_string_pretty(&json!({ "compiler": self.compiler, "jobs": jobs }))?;
        Ok(std::fs::write(path(), text + "\n")?)
    }
}
