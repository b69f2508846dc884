//! The socket to mpiexec that a rank was started with.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Exchange, Step};

/// Puts `value` for all ranks, or gets what another one puts if `value` is `None`.
///
/// Blocks until all ranks have called it, `timeout` at most. The connection serves once: after this
/// call mpiexec has closed it.
///
/// # Errors
/// In words: there is no such socket, the program uses it for MPI, mpiexec's refusal, or the time
/// is up.
pub(in crate::launcher) fn share(
    descriptor: RawFd,
    value: Option<&[u8]>,
    timeout: Duration,
) -> Result<Option<Vec<u8>>, String> {
    if let Some(library) = loaded_mpi() {
        return Err(format!(
            "the program has loaded {library}, whose connection to mpiexec this is: set \
             UNISUM_RENDEZVOUS=tcp://HOST:PORT, with rank 0's host and a free port there"
        ));
    }
    let mut stream = connection(descriptor)
        .map_err(|error| format!("the connection to mpiexec, PMI_FD={descriptor}: {error}"))?;
    let until = Instant::now() + timeout;
    let mut exchange = Exchange::new(value);
    let mut line = exchange.begin();
    loop {
        let failed = |error: io::Error| explain(&error, &line);
        stream.write_all(line.as_bytes()).map_err(failed)?;
        let answer = read_line(&mut stream, until).map_err(failed)?;
        match exchange.answer(&answer)? {
            Step::Send(next) => line = next,
            Step::Done(value) => return Ok(value),
        }
    }
}

fn explain(error: &io::Error, line: &str) -> String {
    let is_barrier = line.starts_with("cmd=barrier_in");
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if is_barrier => {
            "mpiexec: not all ranks came in time, one has not started or does not join".to_owned()
        }
        io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            "mpiexec has closed the connection: it serves one start of a process, and an earlier \
             one, or MPI, has used it (set UNISUM_RENDEZVOUS for the others)"
                .to_owned()
        }
        _ => format!("the connection to mpiexec, at `{}`: {error}", line.trim_end()),
    }
}

/// A descriptor of our own for the socket.
fn connection(descriptor: RawFd) -> io::Result<UnixStream> {
    let target = fs::read_link(format!("/proc/self/fd/{descriptor}"))?;
    if !target.to_string_lossy().starts_with("socket:") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket"));
    }
    // SAFETY: the descriptor was open a moment ago, and whoever started this process promises in
    // PMI_FD that it stays so; it is borrowed for the next call only, which fails if it is not.
    let socket = unsafe { BorrowedFd::borrow_raw(descriptor) };
    Ok(UnixStream::from(rustix::io::fcntl_dupfd_cloexec(socket, 0)?))
}

/// Reads a line, and nothing that comes after it.
fn read_line(stream: &mut UnixStream, until: Instant) -> io::Result<String> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() >= MAX_LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end"));
        }
        let left = until.saturating_duration_since(Instant::now());
        // Zero would mean no limit.
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    String::from_utf8(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The MPI library that this process has mapped, if any.
pub(in crate::launcher) fn loaded_mpi() -> Option<String> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let names = maps.lines().filter_map(|line| line.rsplit_once('/').map(|(_, name)| name));
    let is_mpi = |name: &&str| name.starts_with("libmpi") && name.contains(".so");
    names.into_iter().find(is_mpi).map(str::to_owned)
}

/// Far above any answer to what is asked.
const MAX_LINE_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader};
    use std::os::fd::AsRawFd as _;
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    fn answer(stream: &UnixStream, answers: &[&str]) {
        let mut lines = BufReader::new(stream).lines();
        for answer in answers {
            lines.next().unwrap().unwrap();
            (&*stream).write_all(answer.as_bytes()).unwrap();
        }
    }

    #[test]
    fn a_value_is_got_over_the_inherited_socket() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            answer(
                &theirs,
                &[
                    "cmd=response_to_init rc=0\n",
                    "cmd=maxes\n",
                    "cmd=my_kvsname kvsname=k\n",
                    "cmd=barrier_out\n",
                    "cmd=get_result rc=0 value=a%20b\n",
                    "cmd=finalize_ack\n",
                ],
            );
        });
        assert_eq!(share(ours.as_raw_fd(), None, LONG), Ok(Some(b"a b".to_vec())));
        server.join().unwrap();
        let error = share(ours.as_raw_fd(), None, LONG).unwrap_err();
        assert!(error.contains("has closed the connection"), "{error}");
    }

    #[test]
    fn ranks_that_do_not_come_are_told_in_time() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            answer(
                &theirs,
                &["cmd=response_to_init\n", "cmd=maxes\n", "cmd=my_kvsname kvsname=k\n"],
            );
            theirs
        });
        let error = share(ours.as_raw_fd(), None, Duration::from_millis(300)).unwrap_err();
        assert!(error.contains("not all ranks came in time"), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn what_is_no_socket_is_an_error() {
        let file = fs::File::open("/proc/self/status").unwrap();
        for descriptor in [file.as_raw_fd(), 1 << 20] {
            let error = share(descriptor, None, LONG).unwrap_err();
            assert!(error.contains(&format!("PMI_FD={descriptor}: ")), "{error}");
        }
    }
}
