//! The rendezvous file: how ranks find rank 0 through a file system they share.
//!
//! One line, `unisum2 SESSION ADDRESS…`, the session in hex, the best address first. The final
//! newline shows that it is whole, on file systems that show others a file before it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use unisum_link::fork::ParentOnly;
use unisum_link::handshake;

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
    _file: ParentOnly<File>,
}

/// Publishes where rank 0 listens, in place of what the file said before. Others see the old
/// content or the new, never a part.
///
/// # Errors
/// The system's, with what was tried.
pub(super) fn publish(
    path: &Path,
    session: [u8; 16],
    addresses: &[SocketAddr],
) -> io::Result<Published> {
    let mut line = format!("{MAGIC} ");
    session.iter().for_each(|byte| line.push_str(&format!("{byte:02x}")));
    addresses.iter().for_each(|&address| line.push_str(&format!(" {}", without_scope(address))));
    line.push('\n');
    publish_text(path, line)
}

/// Publishes a text, in place of what a job said there before.
///
/// # Errors
/// As [`publish`]; if the file has something else, which somebody may miss.
pub(super) fn publish_text(path: &Path, text: String) -> io::Result<Published> {
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    let suffix = u64::from_le_bytes(handshake::random()?);
    let draft = path.with_file_name(format!(".{}.{suffix:016x}", name.to_string_lossy()));
    refuse_others_file(path)?;
    let _kept = path.parent().map(leftovers::keep).transpose()?;
    let published = write(&draft, &text).and_then(|file| fs::rename(&draft, path).map(|()| file));
    match published {
        Ok(file) => Ok(Published { path: path.to_owned(), text, _file: file }),
        Err(error) => {
            // There may be no draft to remove; the first error is the one to tell.
            let _ = fs::remove_file(&draft);
            Err(error)
        }
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
    let line = read_text(path, LINE_BYTES_MAX)?;
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
    let (magic, _session) = (words.next()?, words.next()?);
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

    #[test]
    fn a_missing_directory_is_an_error() {
        let scratch = Scratch::new();
        let path = scratch.path().join("missing/meeting");
        let error = publish(&path, [1; 16], &addresses(&["127.0.0.1:1"])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
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
