//! The calls that no safe crate wraps well.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Copies `bytes` bytes at address `from` of process `pid` to `into` (`process_vm_readv(2)`).
///
/// # Errors
/// `EPERM` or `ENOSYS` where the kernel forbids it, `ESRCH` if the process is gone, `EFAULT` if
/// the range is not (any more) mapped there; `into` is then partly written.
///
/// # Safety
/// `into` is valid for writing `bytes` bytes.
pub(crate) unsafe fn read_process(
    pid: u32,
    from: u64,
    into: *mut u8,
    bytes: usize,
) -> io::Result<()> {
    let pid = pid.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut copied = 0;
    while copied < bytes {
        let len = bytes - copied;
        let local = libc::iovec { iov_base: into.wrapping_add(copied).cast(), iov_len: len };
        let address = (from as usize).wrapping_add(copied);
        let theirs = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: len };
        // SAFETY: one iovec each; the local one lies in the caller's range, and the kernel checks
        // the address of the other process.
        let read = unsafe { libc::process_vm_readv(pid, &local, 1, &theirs, 1, 0) };
        match usize::try_from(read) {
            // The kernel moves at most 2 GiB at a time, and stops at the first bad page.
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(read) => copied += read,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// The user at the other end of a connected Unix socket, as this process's user namespace knows it
/// (`SO_PEERCRED`). Its process id is not looked at: it is 0 for a process that has none here,
/// which rustix takes for impossible.
pub(crate) fn peer_user(socket: &UnixStream) -> io::Result<u32> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    let into = (&raw mut found).cast();
    // SAFETY: `found` has `bytes` bytes, and any bytes are a `ucred`.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, into, &mut bytes) };
    if done == 0 { Ok(found.uid) } else { Err(io::Error::last_os_error()) }
}

/// The core that this thread runs on; by the C library, which knows it without a system call, also
/// under tools where rustix, which looks for the kernel's own function, ends the process.
pub(crate) fn current_core() -> Option<u32> {
    // SAFETY: it takes nothing and has no preconditions.
    let core = unsafe { libc::sched_getcpu() };
    u32::try_from(core).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_read_and_bad_addresses_are_errors() {
        let (from, mut into) = ([7u8; 100_000], [0u8; 100_000]);
        let pid = std::process::id();
        // SAFETY: `into` has that many bytes.
        unsafe { read_process(pid, from.as_ptr() as u64, into.as_mut_ptr(), into.len()) }.unwrap();
        assert_eq!(from, into);
        // SAFETY: as above; nothing is mapped at the first page.
        let error = unsafe { read_process(pid, 8, into.as_mut_ptr(), 1) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
