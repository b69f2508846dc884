//! Runs a job under callgrind and reads what it counted.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::jobs::Outcome;

/// Instructions and allocations of one repetition of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Count {
    /// Executed in this program, its libraries excluded.
    pub(crate) instructions: f64,
    pub(crate) allocations: f64,
}

/// What valgrind calls itself, or why it can't be used.
pub(crate) fn version() -> Result<String> {
    let output = Command::new("valgrind").arg("--version").output();
    let output = output.map_err(|error| format!("valgrind does not start: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Counts one job.
pub(crate) fn count(job: &str) -> Result<Count> {
    let program = std::env::current_exe()?;
    let name: String = job.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let file = std::env::temp_dir().join(format!("instructions-{}-{name}", std::process::id()));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", "--compress-pos=no", "--toggle-collect=*::measured"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(&program)
        .args(["run", job])
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{job}: {}: {}", output.status, said.trim()).into());
    }
    let profile = std::fs::read_to_string(&file)?;
    std::fs::remove_file(&file)?;
    let outcome: Outcome = String::from_utf8(output.stdout)?.parse()?;
    let instructions = instructions_in(&profile, &program)?;
    if instructions == 0 {
        return Err(format!("{job}: callgrind counted nothing").into());
    }
    let repetitions = outcome.repetitions as f64;
    Ok(Count {
        instructions: instructions as f64 / repetitions,
        allocations: outcome.allocations as f64 / repetitions,
    })
}

/// The instructions that a profile gives to the functions of `program` themselves.
///
/// The format: `ob=(number) path` names the object of the lines after it, the path only the first
/// time; lines of a position and a cost follow, and `calls=` announces one that belongs to the
/// callee.
///
/// Source: "Callgrind Format Specification", Valgrind documentation, chapter 6 of the technical
/// documentation.
fn instructions_in(profile: &str, program: &Path) -> Result<u64> {
    let mut objects: HashMap<&str, &str> = HashMap::new();
    let mut is_ours = false;
    let mut is_of_callee = false;
    let mut instructions = 0;
    for line in profile.lines() {
        if let Some(object) = line.strip_prefix("ob=").or_else(|| line.strip_prefix("cob=")) {
            let (number, path) = object.split_once(' ').unwrap_or((object, ""));
            if !path.is_empty() {
                objects.insert(number, path);
            }
            if line.starts_with("ob=") {
                let path = objects.get(number).ok_or("an object without a name")?;
                is_ours = Path::new(path) == program;
            }
        } else if line.starts_with("calls=") {
            is_of_callee = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit()) {
            if is_ours && !is_of_callee {
                let cost = line.split_whitespace().nth(1).ok_or("a line without a cost")?;
                instructions += cost.parse::<u64>()?;
            }
            is_of_callee = false;
        }
    }
    Ok(instructions)
}
