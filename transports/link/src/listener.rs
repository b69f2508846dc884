//! Listening sockets that strangers cost little.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// How long the kernel keeps a connection on which nothing was said to itself.
const SILENT_FOR_S: libc::c_int = 1;

/// Has the kernel show the listener those connections only on which something was said, or that
/// have stood for a second or so: ranks speak first, and who resets at once, or holds on and says
/// nothing, wakes nobody meanwhile. If very many do that at a time, the kernel shows them at
/// once (SYN cookies).
///
/// # Errors
/// If the kernel can't: then the listener has to look at all of them.
pub fn defer_silent(listener: &impl AsFd) -> io::Result<()> {
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT);
    let seconds = SILENT_FOR_S;
    let (value, bytes) = (&raw const seconds, size_of::<libc::c_int>());
    let socket = listener.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open as long as it is borrowed, and the value is an `int`, as the
    // option's is.
    let set = unsafe { libc::setsockopt(socket, level, option, value.cast(), bytes as u32) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::{Duration, Instant};

    use socket2::SockRef;

    use super::*;

    #[test]
    fn who_says_nothing_is_not_shown_at_once_and_who_resets_never() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        defer_silent(&listener).unwrap();
        let come = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accept_until = |until: Instant| {
            while Instant::now() < until {
                match listener.accept() {
                    Ok((_, address)) => return Some(address),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
                thread::sleep(Duration::from_millis(1));
            }
            None
        };
        let begun = Instant::now();
        SockRef::from(&come()).set_linger(Some(Duration::ZERO)).unwrap();
        let silent = come();
        let mut speaker = come();
        speaker.write_all(b"x").unwrap();
        let first = accept_until(begun + Duration::from_secs(30));
        assert_eq!(first, Some(speaker.local_addr().unwrap()));
        // The silent one is shown some time: it may have been told not to speak first.
        let second = accept_until(begun + Duration::from_secs(30));
        assert_eq!(second, Some(silent.local_addr().unwrap()));
        assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
    }
}
