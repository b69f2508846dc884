use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A stream from which all reads together wait so long at most: the time-out of a socket is for
/// each of them, and a peer that says one byte at a time would be waited for without an end.
///
/// The socket's time-out for reads is that time again once this is dropped.
#[derive(Debug)]
pub struct Within<'a> {
    stream: &'a TcpStream,
    time: Duration,
    until: Instant,
}

impl<'a> Within<'a> {
    /// From now on.
    pub fn new(stream: &'a TcpStream, time: Duration) -> Self {
        Self { stream, time, until: Instant::now() + time }
    }
}

impl Read for Within<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // As of a socket whose time is up.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        stream.read(into)
    }
}

impl Write for Within<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Within<'_> {
    fn drop(&mut self) {
        // A socket that refuses is told of when it is read.
        let _ = self.stream.set_read_timeout(Some(self.time));
    }
}
