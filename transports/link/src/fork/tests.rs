use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::*;

/// A forked child that has run its check and lives on.
struct Child {
    pid: libc::pid_t,
    passed: bool,
}

impl Child {
    /// `check` must be async-signal-safe: other threads' locks may be held in the child.
    fn fork(check: impl FnOnce() -> bool) -> Self {
        let (mut read, mut write) = std::io::pipe().unwrap();
        // SAFETY: the child makes only system calls.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let answer = [u8::from(check())];
            let _ = write.write(&answer);
            // SAFETY: ends the child by and by if its parent doesn't.
            unsafe { libc::alarm(20) };
            loop {
                // SAFETY: sleeps until a signal.
                unsafe { libc::pause() };
            }
        }
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        drop(write);
        let mut child = Self { pid, passed: false };
        let mut answer = [0];
        read.read_exact(&mut answer).unwrap();
        child.passed = answer == [1];
        child
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours and was not waited for.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // SAFETY: as above; the status isn't wanted.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (ours, theirs)
}

#[test]
fn a_connection_ends_with_its_parent_though_a_child_lives() {
    let (ours, mut theirs) = connection();
    let mut ours = ParentOnly::new(ours);
    let is_dead = || {
        let error = |result: std::io::Result<_>| result.map_err(|error| error.kind()).err();
        error(ours.peer_addr().map(drop)) == Some(ErrorKind::NotConnected)
            && rustix::io::fcntl_getfd(&*ours) == Ok(rustix::io::FdFlags::CLOEXEC)
    };
    let child = Child::fork(is_dead);
    assert!(child.passed, "the child has the connection");
    ours.write_all(&[7]).unwrap();
    let mut byte = [0];
    theirs.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [7], "the parent's connection works");
    drop(ours);
    assert_eq!(theirs.read(&mut byte).unwrap(), 0, "the peer sees the end");
}

#[test]
fn what_has_a_number_after_an_owner_is_dropped_stays_in_children() {
    // High enough that no other test's descriptor gets it.
    let high = |stream: &TcpStream| rustix::io::fcntl_dupfd_cloexec(stream, 800).unwrap();
    let (ours, _theirs) = connection();
    let owner: ParentOnly<OwnedFd> = ParentOnly::new(high(&ours));
    let number = owner.as_raw_fd();
    drop(owner);
    let stranger = TcpStream::from(high(&ours));
    assert_eq!(stranger.as_raw_fd(), number, "the number is used again");
    assert!(Child::fork(|| stranger.peer_addr().is_ok()).passed, "the child has the stranger");
}

#[test]
fn a_child_has_another_generation_and_may_note_descriptors_of_its_own() {
    let ours = generation();
    assert_eq!(current(), ours);
    let (stream, _theirs) = connection();
    let check = || {
        let note = Note::new(stream.as_raw_fd());
        // SAFETY: the grandchild only looks, and ends at once.
        let grandchild = unsafe { libc::fork() };
        if grandchild == 0 {
            let is_dead = stream.peer_addr().is_err() && current() == ours + 2;
            // SAFETY: ends this process.
            unsafe { libc::_exit(i32::from(!is_dead)) };
        }
        let mut status = -1;
        // SAFETY: waits for the grandchild; `status` is valid.
        unsafe { libc::waitpid(grandchild, &raw mut status, 0) };
        drop(note);
        status == 0 && stream.peer_addr().is_ok() && current() == ours + 1
    };
    assert!(Child::fork(check).passed);
    assert_eq!(current(), ours);
}
