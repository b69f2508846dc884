//! The rendezvous file: how ranks find rank 0 through a file system they share.
//!
//! One line, `unisum2 MARK ADDRESS…`, the best address first. The mark is a random number in hex by
//! which a job knows its own file: the session would open listeners' doors to who reads it
//! ([`unisum_link::secure::Preamble`]). The final
//! newline shows that it is whole, on file systems that show others a file before it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake;

use crate::ControlError;
use crate::interface::{ADDRESSES_MAX, without_scope};
use crate::leftovers;

/// Longest line; what is longer is no rendezvous file.
const LINE_BYTES_MAX: u64 = 2048;
const MAGIC: &str = "unisum2";
/// How all that jobs publish begins.
const WRITTEN: &[u8] = b"unisum";

/// The file that this process has published, removed when dropped.
#[derive(Debug)]
pub(super) struct Published {
    path: PathBuf,
    text: String,
    /// Tells others that its process lives.
    _file: Option<ParentOnly<File>>,
}

/// Publishes where rank 0 listens, in place of what the file said before, unless `look` finds that
/// a process of the job is at the addresses there. Others see the old content or the new, never a
/// part.
///
/// # Errors
/// The system's, and what `look` says.
pub(super) fn publish(
    path: &Path,
    mark: [u8; 16],
    addresses: &[SocketAddr],
    look: impl Fn(&[SocketAddr]) -> Result<(), ControlError>,
) -> Result<Published, ControlError> {
    let mut line = format!("{MAGIC} ");
    mark.iter().for_each(|byte| line.push_str(&format!("{byte:02x}")));
    addresses.iter().for_each(|&address| line.push_str(&format!(" {}", without_scope(address))));
    line.push('\n');
    let failed = |source| ControlError::File { path: path.to_owned(), source };
    let _kept = path.parent().map(leftovers::keep).transpose().map_err(failed)?;
    let draft = Draft::write(path, line).map_err(failed)?;
    for _ in 0..REPLACEMENTS_MAX {
        // Of two that find no file, one makes it, and the other one finds it.
        match fs::hard_link(&draft.path, path) {
            Ok(()) => return Ok(draft.into_published(path)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // The file system has no links.
            Err(_) => return draft.replace(path).map_err(failed),
        }
        let found = read_text(path, LINE_BYTES_MAX).ok();
        if found.as_ref() == Some(&draft.text) {
            // What was said of the link got lost on the network.
            return Ok(draft.into_published(path));
        }
        if let Some(addresses) = found.as_deref().and_then(parse) {
            look(&addresses)?;
        }
        // Unless somebody has published something else meanwhile.
        if read_text(path, LINE_BYTES_MAX).ok() == found {
            return draft.replace(path).map_err(failed);
        }
    }
    Err(failed(io::Error::other("other processes keep replacing it")))
}

/// How often others may take the place of what was there.
const REPLACEMENTS_MAX: usize = 10;

/// Publishes a text, in place of what a job said there before.
///
/// # Errors
/// The system's, with what was tried; if the file has something else, which somebody may miss.
pub(super) fn publish_text(path: &Path, text: String) -> io::Result<Published> {
    let _kept = path.parent().map(leftovers::keep).transpose()?;
    Draft::write(path, text)?.replace(path)
}

/// A whole file beside the one that it is to become, removed when dropped.
struct Draft {
    path: PathBuf,
    text: String,
    file: Option<ParentOnly<File>>,
}

impl Draft {
    fn write(path: &Path, text: String) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
        let suffix = u64::from_le_bytes(handshake::random()?);
        let draft = path.with_file_name(format!(".{}.{suffix:016x}", name.to_string_lossy()));
        refuse_others_file(path)?;
        let mut draft = Self { path: draft, text, file: None };
        draft.file = Some(write(&draft.path, &draft.text)?);
        Ok(draft)
    }

    fn replace(self, path: &Path) -> io::Result<Published> {
        fs::rename(&self.path, path).map_err(|error| whose(path, error))?;
        Ok(self.into_published(path))
    }

    fn into_published(mut self, path: &Path) -> Published {
        let (text, file) = (std::mem::take(&mut self.text), self.file.take());
        Published { path: path.to_owned(), text, _file: file }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // There may be none: it was not written, or has another name now.
        let _ = fs::remove_file(&self.path);
    }
}

/// Refuses a file with contents that no job has written. Between this and the renaming somebody may
/// still write one: it protects from a wrong name, not from a race.
fn refuse_others_file(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    // What can't be opened or read is no loss, or the renaming says why.
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()).map(File::from) else {
        return Ok(());
    };
    let mut start = Vec::new();
    let is_file = file.metadata().is_ok_and(|it| it.is_file());
    if !is_file || file.take(WRITTEN.len() as u64).read_to_end(&mut start).is_err() {
        return Ok(());
    }
    if WRITTEN.starts_with(&start) {
        return Ok(());
    }
    let why = "it has contents that no job has written: name a file of its own for that";
    Err(io::Error::new(io::ErrorKind::AlreadyExists, why))
}

/// Why a name could not be taken: in a folder for all (as /tmp is), nobody replaces what is
/// another user's.
fn whose(path: &Path, error: io::Error) -> io::Error {
    use std::os::unix::fs::MetadataExt as _;
    let own = rustix::process::geteuid().as_raw();
    match fs::symlink_metadata(path) {
        Ok(there) if error.kind() == io::ErrorKind::PermissionDenied && there.uid() != own => {
            let why = format!("what is there is of user {}, this rank's is {own}", there.uid());
            io::Error::new(error.kind(), why)
        }
        _ => error,
    }
}

fn write(path: &Path, text: &str) -> io::Result<ParentOnly<File>> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut file = ParentOnly::new(file);
    leftovers::mark(&file);
    file.write_all(text.as_bytes())?;
    // Network file systems report a full disk only here.
    file.sync_all()?;
    Ok(file)
}

/// Where the file says that rank 0 listens.
///
/// # Errors
/// If the file can't be read, or is not (yet) whole.
pub(super) fn read(path: &Path) -> io::Result<Vec<SocketAddr>> {
    let line = read_text(path, LINE_BYTES_MAX).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            io::ErrorKind::NotFound,
            "it is not there: rank 0 has not started, or has failed (see its own output)",
        ),
        _ => error,
    })?;
    let why = match line.split(' ').next() {
        Some(word) if word.starts_with("unisum") && word != MAGIC => {
            "another version of unisum has written it"
        }
        _ => "it is not a whole rendezvous file (yet)",
    };
    parse(&line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, why))
}

/// At most `bytes` of what the file says. Blocks for no writer of a pipe that somebody has put
/// there.
///
/// # Errors
/// If the file can't be read, or is not a regular one.
pub(super) fn read_text(path: &Path, bytes: u64) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut text = String::new();
    file.take(bytes).read_to_string(&mut text)?;
    Ok(text)
}

pub(super) fn parse(line: &str) -> Option<Vec<SocketAddr>> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let (magic, _mark) = (words.next()?, words.next()?);
    let addresses: Vec<SocketAddr> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let is_known = magic == MAGIC && (1..=ADDRESSES_MAX).contains(&addresses.len());
    is_known.then_some(addresses)
}

impl Drop for Published {
    /// Removes the file, unless a later job has published its own meanwhile.
    fn drop(&mut self) {
        let is_own = |text: String| text == self.text;
        if read_text(&self.path, self.text.len() as u64 + 1).is_ok_and(is_own) {
            // Somebody else may have removed it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Scratch;

    /// Nobody is anywhere.
    fn publish(
        path: &Path,
        mark: [u8; 16],
        addresses: &[SocketAddr],
    ) -> Result<Published, ControlError> {
        super::publish(path, mark, addresses, |_| Ok(()))
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_published_is_read_until_it_is_dropped() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        fs::write(&path, "unisum2 stale").unwrap();
        assert!(read(&path).is_err());
        let told = addresses(&["10.0.0.1:4000", "[2001:db8::1]:4000", "[fe80::1%3]:4000"]);
        let published = publish(&path, [7; 16], &told).unwrap();
        // The number of an interface is the writer's.
        let expected = addresses(&["10.0.0.1:4000", "[2001:db8::1]:4000", "[fe80::1]:4000"]);
        assert_eq!(read(&path).unwrap(), expected);
        drop(published);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn the_most_addresses_fit() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let long = "[2001:db8:1111:2222:3333:4444:5555:6666]:40000";
        let told = addresses(&[long; ADDRESSES_MAX]);
        let _published = publish(&path, [7; 16], &told).unwrap();
        assert_eq!(read(&path).unwrap(), told);
    }

    #[test]
    fn a_later_jobs_file_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let ours = publish(&path, [1; 16], &addresses(&["127.0.0.1:1"])).unwrap();
        let theirs = publish(&path, [2; 16], &addresses(&["127.0.0.1:2"])).unwrap();
        drop(ours);
        assert_eq!(read(&path).unwrap(), addresses(&["127.0.0.1:2"]));
        drop(theirs);
    }

    /// As in /tmp. Only root can be somebody else.
    #[test]
    fn what_another_user_has_put_there_is_named() {
        use std::os::unix::fs::PermissionsExt as _;
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let scratch = Scratch::new();
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let path = scratch.path().join("meeting");
        fs::write(&path, "").unwrap();
        let told = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let user = rustix::process::Uid::from_raw(64_001);
                rustix::thread::set_thread_res_uid(user, user, user).unwrap();
                publish(&path, [1; 16], &addresses(&["127.0.0.1:1"])).unwrap_err().to_string()
            });
            other.join().unwrap()
        });
        assert!(told.ends_with("what is there is of user 0, this rank's is 64001"), "{told}");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let scratch = Scratch::new();
        let path = scratch.path().join("missing/meeting");
        let error = publish(&path, [1; 16], &addresses(&["127.0.0.1:1"])).unwrap_err();
        let ControlError::File { source, .. } = error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn where_a_process_of_the_job_is_the_file_stays_as_it_is() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let theirs = addresses(&["127.0.0.1:1"]);
        let _published = publish(&path, [1; 16], &theirs).unwrap();
        let look = |found: &[SocketAddr]| {
            assert_eq!(found, theirs);
            Err(ControlError::HasLeft)
        };
        let error = super::publish(&path, [2; 16], &addresses(&["127.0.0.1:2"]), look);
        assert!(matches!(error, Err(ControlError::HasLeft)), "{error:?}");
        assert_eq!(read(&path).unwrap(), theirs);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no draft is left");
    }

    /// However many begin at once, all but one find one that is there.
    #[test]
    fn of_many_that_publish_at_once_one_finds_nobody() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        for stale in [false, true] {
            if stale {
                fs::write(&path, "unisum2 00 127.0.0.1:9\n").unwrap();
            }
            let look = |found: &[SocketAddr]| match found[0].port() {
                9 => Ok(()),
                _ => Err(ControlError::HasLeft),
            };
            let start = std::sync::Barrier::new(8);
            let publish = |number: u8| {
                let own = addresses(&["127.0.0.1:1"]);
                start.wait();
                super::publish(&path, [number; 16], &own, look)
            };
            let published: Vec<_> = std::thread::scope(|scope| {
                let all: Vec<_> =
                    (0..8).map(|number| scope.spawn(move || publish(number))).collect();
                all.into_iter().map(|each| each.join().unwrap()).collect()
            });
            let done = published.iter().filter(|each| each.is_ok()).count();
            // Of those that find the same old file, two may replace it within a moment.
            assert!(done == 1 || stale && done > 0, "{published:?}");
            drop(published);
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_somebody_else_has_written_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path().join("results.csv");
        for contents in [&b"loss,step\n"[..], b"x", b"unisu", b"\xff\xfe\0"] {
            fs::write(&path, contents).unwrap();
            let published = publish(&path, [1; 16], &addresses(&["127.0.0.1:1"]));
            if WRITTEN.starts_with(contents) {
                assert!(published.is_ok(), "a part of what a job has written");
                continue;
            }
            let error = published.unwrap_err();
            assert!(error.to_string().contains("no job has written"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), contents);
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no draft is left");
        }
    }

    /// Each of them has held a reader for ever, or is read in vain.
    #[test]
    fn what_is_no_rendezvous_file_is_an_error_at_once() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let check = |why: &str| {
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            // Whoever publishes takes its place.
            drop(publish(&path, [1; 16], &addresses(&["127.0.0.1:1"])));
        };
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RWXU).unwrap();
        check("not a regular file");
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        check("not a regular file");
        for (line, why) in [
            ("unisum1 00 127.0.0.1:1\n", "another version"),
            ("unisum2 00 127.0.0.1:1", "not a whole"),
            ("unisum2 00\n", "not a whole"),
            ("unisum2 00 127.0.0.1:1 x\n", "not a whole"),
            ("", "not a whole"),
        ] {
            fs::write(&path, line).unwrap();
            check(why);
        }
    }
}
