//! Which threads of this process call, and which of those are held in a call: if all are, the
//! process begins no other call before one of them ends. Nobody is asked; threads are counted.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that have ever called and live, and those of the library's that have a call to make.
static CALLING: AtomicUsize = AtomicUsize::new(0);
/// Of these, those that have waited in a call for a while.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// Whether the process's first thread is one of those (0 or 1).
static FIRST_HELD: AtomicUsize = AtomicUsize::new(0);
/// How often a thread was ever held.
static HOLDS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static THREAD: Caller = Caller::begin();
}

/// Says that this thread of the program calls. It counts until it ends.
#[inline]
pub fn calls() {
    // Fails while the thread ends: it will not call much more.
    let _ = THREAD.try_with(|_| ());
}

/// A thread that may begin calls.
#[derive(Debug)]
pub struct Caller(());

impl Caller {
    /// A thread of the library has calls to make, until this is dropped.
    pub fn begin() -> Self {
        // SeqCst, here and below: the counts are compared with each other.
        CALLING.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        CALLING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A thread that waits in a call, and begins no other one before this is dropped: that must come
/// before the call counts as ended.
#[derive(Debug)]
pub struct Held {
    is_first: bool,
}

impl Held {
    /// This thread has waited in a call for a while.
    pub fn begin() -> Self {
        let is_first = rustix::thread::gettid() == rustix::process::getpid();
        FIRST_HELD.fetch_add(usize::from(is_first), Ordering::SeqCst);
        HOLDS.fetch_add(1, Ordering::SeqCst);
        HELD.fetch_add(1, Ordering::SeqCst);
        Self { is_first }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
        FIRST_HELD.fetch_sub(usize::from(self.is_first), Ordering::SeqCst);
    }
}

/// How much of a process is held in calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Hold {
    /// A thread may come that begins another call.
    #[default]
    Free = 0,
    /// All threads that ever called wait in calls. Another one of a pool may yet come.
    Callers = 1,
    /// And the process's first thread is among them: it is one that lets no pool call for it.
    Process = 2,
}

impl Hold {
    /// The hold with this wire code.
    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Free,
            1 => Self::Callers,
            2 => Self::Process,
            _ => return None,
        })
    }
}

/// How much of this process is held, while `look` looks at what it does.
pub(crate) fn while_held<T>(look: impl FnOnce() -> T) -> (Hold, T) {
    let now = || {
        let holds = HOLDS.load(Ordering::SeqCst);
        let (held, first) = (HELD.load(Ordering::SeqCst), FIRST_HELD.load(Ordering::SeqCst));
        let is_all = held > 0 && held == CALLING.load(Ordering::SeqCst);
        let hold = match (is_all, first > 0) {
            (false, _) => Hold::Free,
            (true, false) => Hold::Callers,
            (true, true) => Hold::Process,
        };
        (holds, hold)
    };
    let before = now();
    let seen = look();
    let hold = if before == now() { before.1 } else { Hold::Free };
    (hold, seen)
}
