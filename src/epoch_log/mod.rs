//! The epoch log of an elastic job: its views, and how the steps ended that changes of view
//! interrupted. A job that is given the logs repeats them ([`History`]).
//!
//! Each process writes a file of its own, a line of JSON at a time, before its program goes on: a
//! process that is killed leaves all that its program has seen, and what all have written together
//! is what the job has done.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod history;
mod line;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub(crate) use history::{Change, History, Moment};
pub(crate) use line::{Head, Line, StepLine, ViewLine};

/// What the names of the files end with.
const EXTENSION: &str = "jsonl";

/// The file of this process.
#[derive(Debug)]
pub(crate) struct EpochLog {
    path: PathBuf,
    /// `None` once a line could not be written.
    file: Mutex<Option<File>>,
}

impl EpochLog {
    /// Begins the log of a process in a folder, which is made if need be.
    ///
    /// # Errors
    /// If the file can't be written, or is there already.
    pub(crate) fn begin(folder: &Path, head: Head) -> Result<Self, String> {
        let path = folder.join(format!("{}.{EXTENSION}", head.process));
        let failed = |error| format!("beginning the epoch log {}: {error}", path.display());
        std::fs::create_dir_all(folder).map_err(failed)?;
        let mut file = File::create_new(&path).map_err(failed)?;
        write(&mut file, &Line::Head(head)).map_err(failed)?;
        Ok(Self { path, file: Mutex::new(Some(file)) })
    }

    /// Writes a line: the kernel has it when this returns. If that fails, the log ends with a
    /// warning, and the job goes on.
    pub(crate) fn write(&self, line: &Line) {
        let mut place = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = &mut *place else { return };
        if let Err(error) = write(file, line) {
            *place = None;
            let path = self.path.display();
            unisum_link::fault!("the epoch log {path} ends here: {error}");
        }
    }
}

/// By one call, so that a process that is killed leaves whole lines or a last one without an end.
fn write(file: &mut File, line: &Line) -> std::io::Result<()> {
    file.write_all((line.encode() + "\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let name = format!("unisum-epoch-log-{}-{name}", std::process::id());
        std::env::temp_dir().join(name)
    }

    #[test]
    fn a_log_is_begun_once() {
        let folder = folder("once");
        let head = || Head { process: 3, settings: "s".into() };
        let log = EpochLog::begin(&folder.join("below"), head()).unwrap();
        log.write(&Line::View(ViewLine { epoch: 1, processes: vec![3], ..ViewLine::default() }));
        let again = EpochLog::begin(&folder.join("below"), head()).unwrap_err();
        assert!(again.contains("3.jsonl: File exists"), "{again}");
        let text = std::fs::read_to_string(folder.join("below/3.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 2);
        let file = EpochLog::begin(&folder.join("below/3.jsonl"), head()).unwrap_err();
        assert!(file.starts_with("beginning the epoch log"), "{file}");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_full_disk_ends_the_log_and_nothing_else() {
        let file = File::options().write(true).open("/dev/full").unwrap();
        let log = EpochLog { path: "/dev/full".into(), file: Mutex::new(Some(file)) };
        let line = Line::Head(Head { process: 0, settings: String::new() });
        log.write(&line);
        assert!(log.file.lock().unwrap().is_none());
        log.write(&line);
    }
}
