//! Rendezvous files in this user's own directory, and what killed jobs left of them there.
//!
//! Whoever publishes a file keeps it locked, draft or not, for as long as it may be needed: the
//! kernel gives the lock back however a process ends. A directory is locked as well, shared by
//! those who put a file there and alone by who removes what is left. So nobody removes a file
//! before its owner has locked it, or one that has taken the place of what was to be removed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::geteuid;
use unisum_link::fork::ParentOnly;

/// Removing takes a moment; who holds a directory for so long is stopped.
const PATIENCE: Duration = Duration::from_secs(5);

/// Keeps others from removing what is left in `directory` until dropped. Only this user's own
/// directories are locked: nobody removes anything from others, and in those that others can open
/// they could stand in the way.
///
/// # Errors
/// If a process that removes does not come to an end.
pub fn keep(directory: &Path) -> io::Result<Option<ParentOnly<File>>> {
    let Ok(file) = open(directory, OFlags::DIRECTORY) else { return Ok(None) };
    let metadata = file.metadata()?;
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        return Ok(None);
    }
    let until = Instant::now() + PATIENCE;
    loop {
        match flock(&*file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            // Where there are no locks nobody removes anything.
            _ => return Ok(Some(file)),
        }
        if Instant::now() > until {
            let why = "a process that removes old files there does not go on: is it stopped?";
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Marks a file as one of a process that lives, for as long as it is open.
pub fn mark(file: &File) {
    // Where there are no locks nobody removes anything.
    let _ = flock(file, FlockOperation::NonBlockingLockExclusive);
}

/// Removes the files in `directory`, which is this user's own, that `is_name` finds to be
/// rendezvous files or drafts of them, and whose processes are gone. What can't be removed stays.
pub fn remove(directory: &Path, is_name: impl Fn(&str) -> bool) {
    let Ok(lock) = open(directory, OFlags::DIRECTORY) else { return };
    // Whoever publishes now, or removes, is not waited for: there will be a next time.
    if flock(&*lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|entry| is_name(&entry.file_name().to_string_lossy())) {
        let path = entry.path();
        let is_left = open(&path, OFlags::NONBLOCK).is_ok_and(|file| {
            file.metadata().is_ok_and(|it| it.is_file())
                && flock(&*file, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        if is_left {
            // Its owner may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes the files in `directory`, which is this user's own, that `is_name` finds to be
/// rendezvous files, and that are older than `age`: where other hosts write, locks say nothing.
pub fn remove_old(directory: &Path, age: Duration, is_name: impl Fn(&str) -> bool) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|entry| is_name(&entry.file_name().to_string_lossy())) {
        let is_old = entry.metadata().is_ok_and(|it| {
            let written = it.modified().ok().and_then(|time| time.elapsed().ok());
            it.is_file() && written.is_some_and(|elapsed| elapsed > age)
        });
        if is_old {
            // Another rank may have removed it.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<ParentOnly<File>> {
    let flags = (flags | OFlags::NOFOLLOW).bits() as i32;
    File::options().read(true).custom_flags(flags).open(path).map(ParentOnly::new)
}
