//! What every function returns, and what is kept of what went wrong.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use unisum::{Error, ErrorKind};

/// What a function returns. All but UNISUM_OK and UNISUM_IN_PROGRESS are failures, of which
/// unisum_last_error tells more.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum unisum_status {
    /// It went well.
    UNISUM_OK = 0,
    /// A wait timed out: what is waited for is still under way. No failure.
    UNISUM_IN_PROGRESS = 1,
    /// A pointer is NULL, a number or a size makes no sense, buffers overlap. Nothing was done.
    UNISUM_INVALID_ARGUMENT = 2,
    /// A handle is NULL, was freed, is of another kind, or none at all. Nothing was done.
    UNISUM_INVALID_HANDLE = 3,
    /// An argument that the library found wrong, an environment variable, a launcher's setting.
    UNISUM_CONFIGURATION = 10,
    /// The job could not be joined: an address, the token, a rank that never came.
    UNISUM_RENDEZVOUS = 11,
    /// A rank's process ended, or its host or network went away.
    UNISUM_RANK_LOST = 12,
    /// The deadline passed: a rank is stopped, too late, too slow, or never called.
    UNISUM_TIMEOUT = 13,
    /// Ranks called different things, or the same with different arguments.
    UNISUM_MISMATCH = 14,
    /// A training step can't be used, on no rank. The next one can be begun.
    UNISUM_STEP_FAILED = 15,
    /// Code of the program failed where the library called it.
    UNISUM_CALLBACK_FAILED = 16,
    /// Memory, or another resource of the system, could not be had.
    UNISUM_MEMORY = 17,
    /// An earlier error aborted the communicator, or the program did.
    UNISUM_ABORTED = 18,
    /// The process was forked after the handle was made: only the parent may use it.
    UNISUM_FORKED = 19,
    /// What came from a rank makes no sense: a bug of the library, or bytes that were altered.
    UNISUM_PROTOCOL = 20,
    /// A device or its driver failed.
    UNISUM_DEVICE = 21,
    /// An elastic job has lost ranks, or has taken some in: unisum_comm_rebuild gives the
    /// communicator of those that are there now.
    UNISUM_VIEW_CHANGED = 22,
    /// A bug of the library.
    UNISUM_INTERNAL = 99,
}

/// What went wrong last on a thread. Fields may be added at the end.
#[repr(C)]
#[derive(Debug)]
pub struct unisum_error {
    /// What the function returned; UNISUM_OK if none has failed on this thread.
    pub status: unisum_status,
    /// What went wrong, for people. Never NULL.
    pub text: *const c_char,
    /// The rank of the job that found it, or -1 where that is not known.
    pub rank: i64,
    /// The ranks of the job that caused it, the same on every rank that reports it, where that is
    /// known.
    pub ranks: *const u32,
    /// How many of them are known.
    pub rank_count: usize,
    /// The call that failed, in words, if it was one that had begun; else NULL.
    pub operation: *const c_char,
    /// The step that the call was at on this rank.
    pub step: u64,
    /// How many steps it has; 0 if there is no operation.
    pub steps: u64,
    /// The epoch that an elastic job is in now, of UNISUM_VIEW_CHANGED; else 0.
    pub epoch: u64,
    /// The ranks that are not in that epoch any more, as they were numbered before.
    pub lost: *const u32,
    /// How many.
    pub lost_count: usize,
    /// The ranks that are new in that epoch, as they are numbered there.
    pub joined: *const u32,
    /// How many.
    pub joined_count: usize,
}

/// Why a function fails.
#[derive(Debug)]
pub(crate) enum Failure {
    Here(unisum_status, String),
    Unisum(Error),
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// What the thread's last error points to.
struct Last {
    error: unisum_error,
    text: CString,
    operation: CString,
    ranks: Vec<u32>,
    lost: Vec<u32>,
    joined: Vec<u32>,
}

thread_local! {
    static LAST: RefCell<Option<Box<Last>>> = const { RefCell::new(None) };
}

/// What went wrong last on the calling thread. Valid until another call fails on this thread, or
/// the thread ends. Never NULL; UNISUM_OK if nothing has failed.
#[unsafe(no_mangle)]
pub extern "C" fn unisum_last_error() -> *const unisum_error {
    let kept = LAST.try_with(|last| {
        let last = last.try_borrow().ok()?;
        last.as_ref().map(|last| ptr::from_ref(&last.error))
    });
    kept.ok().flatten().unwrap_or(&raw const NOTHING.0)
}

/// The name of a status, as in "UNISUM_TIMEOUT". Never NULL, never freed.
#[unsafe(no_mangle)]
pub extern "C" fn unisum_status_name(status: i32) -> *const c_char {
    let known = NAMES.iter().find(|(known, _)| *known as i32 == status);
    known.map_or(c"no status of unisum", |(_, name)| name).as_ptr()
}

struct Nothing(unisum_error);

// SAFETY: what it points to is constant.
unsafe impl Sync for Nothing {}

static NOTHING: Nothing = Nothing(unisum_error {
    status: unisum_status::UNISUM_OK,
    text: c"nothing has failed on this thread".as_ptr(),
    rank: -1,
    ranks: ptr::null(),
    rank_count: 0,
    operation: ptr::null(),
    step: 0,
    steps: 0,
    epoch: 0,
    lost: ptr::null(),
    lost_count: 0,
    joined: ptr::null(),
    joined_count: 0,
});

fn number(rank: usize) -> u32 {
    u32::try_from(rank).unwrap_or(u32::MAX)
}

/// Ranks as C has them.
pub(crate) fn numbers(ranks: &[usize]) -> Vec<u32> {
    ranks.iter().map(|&rank| number(rank)).collect()
}

/// Runs what a function of the interface does. No panic leaves it; failures are kept.
pub(crate) fn guard(code: impl FnOnce() -> Outcome) -> unisum_status {
    guard_status(|| code().map(|()| unisum_status::UNISUM_OK))
}

/// As [`guard`], where there is more than one way to go well.
pub(crate) fn guard_status(code: impl FnOnce() -> Outcome<unisum_status>) -> unisum_status {
    // What a panic left half done belongs to a handle that the facade has aborted.
    let failure = match catch_unwind(AssertUnwindSafe(code)) {
        Ok(Ok(status)) => return status,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload.downcast_ref::<&str>().copied();
            let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
            let text = format!("a bug of unisum: {}", text.unwrap_or("a panic without a text"));
            // Its destructor could panic, too.
            std::mem::forget(payload);
            Failure::Here(unisum_status::UNISUM_INTERNAL, text)
        }
    };
    let status = failure.status();
    keep(failure, status);
    status
}

fn keep(failure: Failure, status: unisum_status) {
    let text =
        |text: String| CString::new(text.replace('\0', "�")).expect("a text without NUL bytes");
    let (error, words) = match failure {
        Failure::Here(_, words) => (None, words),
        Failure::Unisum(error) => (Some(error.clone()), error.to_string()),
    };
    let error = error.as_ref();
    let operation = error.and_then(Error::operation);
    let (step, steps) = error.and_then(Error::step).unwrap_or_default();
    let [ranks, lost, joined] = [Error::failed_ranks, Error::lost, Error::joined]
        .map(|of: fn(&Error) -> &[usize]| numbers(error.map_or(&[], of)));
    let mut last = Box::new(Last {
        error: unisum_error {
            status,
            rank: error.and_then(Error::rank).map_or(-1, |rank| i64::from(number(rank))),
            rank_count: ranks.len(),
            step: step as u64,
            steps: steps as u64,
            epoch: error.and_then(Error::epoch).unwrap_or_default(),
            lost_count: lost.len(),
            joined_count: joined.len(),
            ..NOTHING.0
        },
        text: text(words),
        operation: text(operation.unwrap_or_default().to_owned()),
        ranks,
        lost,
        joined,
    });
    last.error.text = last.text.as_ptr();
    last.error.ranks = last.ranks.as_ptr();
    last.error.lost = last.lost.as_ptr();
    last.error.joined = last.joined.as_ptr();
    if operation.is_some() {
        last.error.operation = last.operation.as_ptr();
    }
    // A thread that ends has nobody who asks.
    let _ = LAST.try_with(|kept| kept.replace(Some(last)));
}

impl Failure {
    fn status(&self) -> unisum_status {
        use unisum_status::*;
        match self {
            Self::Here(status, _) => *status,
            Self::Unisum(error) => match error.kind() {
                ErrorKind::Configuration => UNISUM_CONFIGURATION,
                ErrorKind::Rendezvous => UNISUM_RENDEZVOUS,
                ErrorKind::RankLost => UNISUM_RANK_LOST,
                ErrorKind::ViewChanged => UNISUM_VIEW_CHANGED,
                ErrorKind::Timeout => UNISUM_TIMEOUT,
                ErrorKind::Mismatch => UNISUM_MISMATCH,
                ErrorKind::StepFailed => UNISUM_STEP_FAILED,
                ErrorKind::Panicked => UNISUM_CALLBACK_FAILED,
                ErrorKind::Memory | ErrorKind::Resources => UNISUM_MEMORY,
                ErrorKind::Aborted => UNISUM_ABORTED,
                ErrorKind::Forked => UNISUM_FORKED,
                ErrorKind::Protocol => UNISUM_PROTOCOL,
                ErrorKind::Device => UNISUM_DEVICE,
                _ => UNISUM_INTERNAL,
            },
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Unisum(error)
    }
}

/// An argument is wrong.
pub(crate) fn invalid<T>(text: impl Into<String>) -> Outcome<T> {
    Err(Failure::Here(unisum_status::UNISUM_INVALID_ARGUMENT, text.into()))
}

const NAMES: [(unisum_status, &std::ffi::CStr); 18] = {
    use unisum_status::*;
    [
        (UNISUM_OK, c"UNISUM_OK"),
        (UNISUM_IN_PROGRESS, c"UNISUM_IN_PROGRESS"),
        (UNISUM_INVALID_ARGUMENT, c"UNISUM_INVALID_ARGUMENT"),
        (UNISUM_INVALID_HANDLE, c"UNISUM_INVALID_HANDLE"),
        (UNISUM_CONFIGURATION, c"UNISUM_CONFIGURATION"),
        (UNISUM_RENDEZVOUS, c"UNISUM_RENDEZVOUS"),
        (UNISUM_RANK_LOST, c"UNISUM_RANK_LOST"),
        (UNISUM_VIEW_CHANGED, c"UNISUM_VIEW_CHANGED"),
        (UNISUM_TIMEOUT, c"UNISUM_TIMEOUT"),
        (UNISUM_MISMATCH, c"UNISUM_MISMATCH"),
        (UNISUM_STEP_FAILED, c"UNISUM_STEP_FAILED"),
        (UNISUM_CALLBACK_FAILED, c"UNISUM_CALLBACK_FAILED"),
        (UNISUM_MEMORY, c"UNISUM_MEMORY"),
        (UNISUM_ABORTED, c"UNISUM_ABORTED"),
        (UNISUM_FORKED, c"UNISUM_FORKED"),
        (UNISUM_PROTOCOL, c"UNISUM_PROTOCOL"),
        (UNISUM_DEVICE, c"UNISUM_DEVICE"),
        (UNISUM_INTERNAL, c"UNISUM_INTERNAL"),
    ]
};

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_text() -> &'static str {
        // SAFETY: it points to what this thread keeps, which is a text with a NUL byte at its end.
        let error = unsafe { &*unisum_last_error() };
        // SAFETY: as above.
        unsafe { CStr::from_ptr(error.text) }.to_str().unwrap()
    }

    #[test]
    fn what_c_can_not_tell_is_told_otherwise_and_not_cut() {
        let long = "\u{e9}".repeat(1 << 20);
        let odd = ["before\0after", "\0", "", "one\r\ntwo \u{1b}[31m", long.as_str()];
        for text in odd {
            assert_eq!(guard(|| invalid(text)), unisum_status::UNISUM_INVALID_ARGUMENT);
            assert_eq!(last_text(), text.replace('\0', "\u{fffd}"));
            let status = guard(|| std::panic::panic_any(text.to_owned()));
            assert_eq!(status, unisum_status::UNISUM_INTERNAL);
            assert!(last_text().ends_with(&text.replace('\0', "\u{fffd}")));
        }
        assert_eq!(guard(|| std::panic::panic_any(7)), unisum_status::UNISUM_INTERNAL);
        assert!(last_text().ends_with("a panic without a text"), "{}", last_text());
    }
}
