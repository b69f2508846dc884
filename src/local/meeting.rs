//! The directory where the ranks of a local job find each other.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::process::geteuid;

use super::random_hex;

/// A fresh directory that nobody but this user can enter, removed when dropped. A launcher that is
/// killed leaves it to the next one: the kernel gives its lock back however a process ends.
#[derive(Debug)]
pub(super) struct Meeting {
    path: PathBuf,
    _lock: File,
}

const PREFIX: &str = "unisum-local-";
const DIGITS: usize = 16;

impl Meeting {
    /// Makes one among the temporary files, and removes those that killed launchers left there.
    pub(super) fn new() -> io::Result<Self> {
        let parent = std::path::absolute(std::env::temp_dir())?;
        remove_left(&parent);
        loop {
            let path = parent.join(format!("{PREFIX}{}", &random_hex()?[..DIGITS]));
            DirBuilder::new().mode(0o700).create(&path).map_err(|error| {
                let text = "is there a folder that can be written (TMPDIR)?";
                io::Error::new(error.kind(), format!("making {}: {error}; {text}", path.display()))
            })?;
            // Before it is locked, another launcher may take it for one that was left. Shared, as
            // ranks that publish a file there lock it, too.
            if let Some(lock) = lock(&path, FlockOperation::NonBlockingLockShared)? {
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        // Nobody is left to tell, and what stays behind is removed by the next launcher.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Locks a directory, which this process then holds as long as the file; `None` if another's lock
/// is in the way, or if it was removed meanwhile.
fn lock(path: &Path, operation: FlockOperation) -> io::Result<Option<File>> {
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let directory = match File::options().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match flock(&directory, operation) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    // What was removed before it was locked is no directory of that name any more.
    let locked = directory.metadata()?;
    let is_there = |named: fs::Metadata| (named.dev(), named.ino()) == (locked.dev(), locked.ino());
    Ok(fs::symlink_metadata(path).is_ok_and(is_there).then_some(directory))
}

/// Removes what launchers of this user left that were killed. What can't be removed stays.
fn remove_left(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|entry| is_name(&entry.file_name().to_string_lossy())) {
        let is_own = entry.metadata().is_ok_and(|it| it.uid() == geteuid().as_raw());
        // Alone, so not while its launcher lives; and held until it is removed, so that two
        // launchers don't remove one directory.
        let alone = |path: &Path| lock(path, FlockOperation::NonBlockingLockExclusive).ok();
        if let Some(_lock) = is_own.then(|| alone(&entry.path()).flatten()).flatten() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_name(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|it| it.len() == DIGITS && it.bytes().all(|it| it.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_is_in_use_stays_and_what_was_left_is_removed() {
        let used = Meeting::new().unwrap();
        // As a rank does that publishes a file there.
        drop(unisum_control::leftovers::keep(used.path()).unwrap().unwrap());
        fs::write(used.path().join("world"), "here").unwrap();
        // As a killed launcher leaves it: without a lock.
        let left = used.path().with_file_name(format!("{PREFIX}{}", &random_hex().unwrap()[..16]));
        fs::create_dir(&left).unwrap();
        fs::write(left.join("world"), "there").unwrap();
        let strange = used.path().with_file_name(format!("{PREFIX}not-{}", std::process::id()));
        fs::create_dir(&strange).unwrap();
        drop(Meeting::new().unwrap());
        // Another test may be the one that removes it, at this moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        while left.exists() {
            assert!(Instant::now() < deadline, "what was left stays");
            std::thread::yield_now();
        }
        assert!(used.path().join("world").exists() && strange.exists());
        fs::remove_dir(&strange).unwrap();
        let path = used.path().to_owned();
        drop(used);
        assert!(!path.exists());
    }

    #[test]
    fn launchers_that_start_at_once_take_nothing_away_from_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let meeting = Meeting::new().unwrap();
                        fs::write(meeting.path().join("world"), "here").unwrap();
                        assert!(meeting.path().join("world").exists());
                    }
                });
            }
        });
    }
}
