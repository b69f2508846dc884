//! Forked children: what a process has on the network and in shared memory stays its own.
//!
//! A fork copies every descriptor, and a connection ends for the peer only when its last copy is
//! closed. A child that outlives its parent (a data loader's worker, say) would so hide the
//! parent's death from the other ranks, keep its port and its shared memory. So the library's
//! descriptors are noted in a set, and a handler that runs in each child of `fork(3)` puts a dead
//! socket in the place of each: the number stays taken, so that whoever owns it in the child can
//! be dropped without closing a stranger, and every use of it is an error.
//!
//! `exec` is no concern of this module (all descriptors are close-on-exec), nor are `vfork`,
//! `posix_spawn` and a bare `clone`, which run no handlers. Event queues need none of this: they
//! keep no socket open, the child never waits on them, and a wake-up by it is one too many.
//!
//! # A fork while another thread is about it
//!
//! The kernel copies the descriptors first and the memory, with the set, later. Owners add a
//! descriptor after it is opened and remove it before it is closed. So the child may find
//! - a descriptor that isn't in the set, if the fork comes between its opening and adding or
//!   between its removal and closing: then the child keeps it, as if nobody had noted it. That is
//!   a matter of microseconds, and the only loss;
//! - a number in the set whose descriptor was opened after the descriptors were copied: it is
//!   free in the child, or is what the parent closed meanwhile, and becomes a dead socket;
//! - never the number of a descriptor that the parent still uses for something else.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

#[cfg(test)]
mod tests;

/// How many forks lie between the process that first called [`generation`] and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Highest number of open files that Linux allows a process unless told otherwise (`nr_open`).
/// Higher descriptors are not noted.
const DESCRIPTORS_MAX: usize = 1 << 20;
/// The set: one bit per descriptor. Zeroes, so that most of it never becomes memory.
static NOTED: [AtomicU64; DESCRIPTORS_MAX / 64] =
    [const { AtomicU64::new(0) }; DESCRIPTORS_MAX / 64];
/// How many words of [`NOTED`] were ever used.
static WORDS: AtomicUsize = AtomicUsize::new(0);

/// A number that differs between a process and its forked children from the first call on. What
/// was made under another number is the parent's.
///
/// # Panics
/// If there is no memory left.
pub fn generation() -> u32 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: `in_child` does only what is allowed in the forked child of any process.
        let failed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        assert_eq!(failed, 0, "pthread_atfork fails only for want of memory");
    });
    current()
}

/// The number now: one load, for every call.
#[inline]
pub fn current() -> u32 {
    // Relaxed: see `in_child`.
    FORKS.load(Ordering::Relaxed)
}

/// An owner of a descriptor that forked children don't get: theirs is a dead socket, on which
/// every operation fails. Use it as the owner itself; don't replace the owner's descriptor.
///
/// Cost: a few instructions to make and to drop, and 2 µs or so per fork.
#[derive(Debug)]
pub struct ParentOnly<T> {
    // Fields are dropped in this order: a number must leave the set before it may mean something
    // else.
    _note: Note,
    owner: T,
}

impl<T: AsFd> ParentOnly<T> {
    /// Keeps the descriptor of `owner` from children that are forked from now on. Never blocks.
    pub fn new(owner: T) -> Self {
        generation();
        Self { _note: Note::new(owner.as_fd().as_raw_fd()), owner }
    }
}

impl<T> Deref for ParentOnly<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.owner
    }
}

impl<T> DerefMut for ParentOnly<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.owner
    }
}

/// A descriptor's membership in the set.
#[derive(Debug)]
struct Note(RawFd);

impl Note {
    fn new(descriptor: RawFd) -> Self {
        if let Some((word, bit)) = place(descriptor) {
            // Relaxed, here and for the bits: only the single thread of a child reads the set,
            // after the kernel has copied it. The opening and closing system calls come before
            // and after; the kernel's lock on the descriptors orders them against a fork.
            WORDS.fetch_max(word + 1, Ordering::Relaxed);
            NOTED[word].fetch_or(bit, Ordering::Relaxed);
        }
        Self(descriptor)
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Some((word, bit)) = place(self.0) {
            NOTED[word].fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

fn place(descriptor: RawFd) -> Option<(usize, u64)> {
    let descriptor = usize::try_from(descriptor).ok().filter(|&number| number < DESCRIPTORS_MAX)?;
    Some((descriptor / 64, 1 << (descriptor % 64)))
}

/// Runs in each forked child before `fork` returns. Only atomics and async-signal-safe calls.
extern "C" fn in_child() {
    // Relaxed throughout: a child starts with one thread, this one.
    FORKS.fetch_add(1, Ordering::Relaxed);
    for (word, bits) in NOTED.iter().enumerate().take(WORDS.load(Ordering::Relaxed)) {
        // The set is emptied: the dead sockets may pass on to grandchildren.
        let mut bits = bits.swap(0, Ordering::Relaxed);
        while bits != 0 {
            put_dead_socket(word as RawFd * 64 + bits.trailing_zeros() as RawFd);
            bits &= bits - 1;
        }
    }
}

/// Closing comes first, so that there is a free number even at the limit of open files. Of the
/// calls that follow none can fail but for want of kernel memory; then the number stays free.
fn put_dead_socket(descriptor: RawFd) {
    // SAFETY: this process is new, and its copy of the descriptor belongs to this library, whose
    // owners here see errors from now on.
    unsafe { libc::close(descriptor) };
    // SAFETY: makes a new socket, which will never be connected.
    let dead = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if dead != descriptor {
        // SAFETY: the number was just freed, and this is the only thread.
        unsafe { libc::dup3(dead, descriptor, libc::O_CLOEXEC) };
        // SAFETY: `dead` is ours (or -1, which closes nothing).
        unsafe { libc::close(dead) };
    }
}
