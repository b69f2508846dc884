//! The rendezvous file: how ranks find rank 0 through a file system they share.
//!
//! One line, `unisum1 SESSION ADDRESS`, the session in hex. The final newline shows that it is
//! whole, on file systems that show others a file before it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use unisum_link::handshake;

/// Longest line; what is longer is no rendezvous file.
const LINE_BYTES_MAX: u64 = 256;

/// The file that this process has published, removed when dropped.
#[derive(Debug)]
pub(super) struct Published {
    path: PathBuf,
    line: String,
}

/// Publishes where rank 0 listens, in place of what the file said before. Others see the old
/// content or the new, never a part.
///
/// # Errors
/// The system's, with what was tried.
pub(super) fn publish(
    path: &Path,
    session: [u8; 16],
    address: SocketAddr,
) -> io::Result<Published> {
    let hex: String = session.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = format!("unisum1 {hex} {address}\n");
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    let suffix = u64::from_le_bytes(handshake::random()?);
    let draft = path.with_file_name(format!(".{}.{suffix:016x}", name.to_string_lossy()));
    let published = write(&draft, &line).and_then(|()| fs::rename(&draft, path));
    if let Err(error) = published {
        // There may be no draft to remove; the first error is the one to tell.
        let _ = fs::remove_file(&draft);
        return Err(error);
    }
    Ok(Published { path: path.to_owned(), line })
}

fn write(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(line.as_bytes())?;
    // Network file systems report a full disk only here.
    file.sync_all()
}

/// Where the file says that rank 0 listens.
///
/// # Errors
/// If the file can't be read, or is not (yet) whole.
pub(super) fn read(path: &Path) -> io::Result<SocketAddr> {
    let line = read_line(path)?;
    parse(&line).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "it is not a whole rendezvous file (yet)")
    })
}

fn read_line(path: &Path) -> io::Result<String> {
    let mut line = String::new();
    File::open(path)?.take(LINE_BYTES_MAX).read_to_string(&mut line)?;
    Ok(line)
}

pub(super) fn parse(line: &str) -> Option<SocketAddr> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let (magic, _session, address) = (words.next()?, words.next()?, words.next()?);
    if magic != "unisum1" || words.next().is_some() {
        return None;
    }
    address.parse().ok()
}

impl Drop for Published {
    /// Removes the file, unless a later job has published its own meanwhile.
    fn drop(&mut self) {
        if read_line(&self.path).is_ok_and(|line| line == self.line) {
            // Somebody else may have removed it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::Scratch;

    const ADDRESS: &str = "[fe80::1%3]:4000";

    #[test]
    fn what_is_published_is_read_until_it_is_dropped() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        fs::write(&path, "stale").unwrap();
        assert!(read(&path).is_err());
        let published = publish(&path, [7; 16], ADDRESS.parse().unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), ADDRESS.parse().unwrap());
        drop(published);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn a_later_jobs_file_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path().join("meeting");
        let ours = publish(&path, [1; 16], "127.0.0.1:1".parse().unwrap()).unwrap();
        let theirs = publish(&path, [2; 16], "127.0.0.1:2".parse().unwrap()).unwrap();
        drop(ours);
        assert_eq!(read(&path).unwrap(), "127.0.0.1:2".parse().unwrap());
        drop(theirs);
    }

    #[test]
    fn a_missing_directory_is_an_error() {
        let scratch = Scratch::new();
        let path = scratch.path().join("missing/meeting");
        let error = publish(&path, [1; 16], "127.0.0.1:1".parse().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
