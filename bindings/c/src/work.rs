//! Asynchronous collectives.

use std::ffi::c_void;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use unisum::{Dtype, Error, Outcome as Told, OwnedRaw, RawBuffers, Work};

use crate::collective::{self, Asked, Lent, lent_batch, unisum_buffers, unisum_collective};
use crate::communicator::{Comm, unisum_comm};
use crate::handles::{self, Object};
use crate::memory::{check_place, list, put};
use crate::reduction::Own;
use crate::status::{Failure, Outcome, guard, guard_status, invalid, unisum_status};
use crate::types::dtype;

/// A collective under way.
#[derive(Debug)]
pub struct unisum_work {
    _private: [u8; 0],
}

/// Called when a work has ended, well or not, with what was given with it.
pub type unisum_callback = Option<unsafe extern "C" fn(user: *mut c_void)>;

struct Started {
    work: Mutex<Box<dyn Pending>>,
    result: OnceLock<Result<Told, Error>>,
    end: Arc<End>,
    /// What the work calls must be there until it has ended, whatever the program frees.
    _reduction: Option<Arc<Own>>,
}

impl Object for Started {
    const KIND: usize = 3;
    const NAME: &'static str = "work";
}

/// Whether a work has ended, for those who wait.
#[derive(Default)]
struct End {
    has_come: Mutex<bool>,
    changed: Condvar,
}

/// A [`Work`] of whatever buffers.
trait Pending: Send {
    fn take(&mut self) -> Option<Result<Told, Error>>;
    fn is_ended(&self) -> bool;
    fn on_end(&self, callback: Box<dyn FnOnce() + Send>) -> Result<(), Error>;
}

impl<B: Send> Pending for Work<(B, Told)> {
    fn take(&mut self) -> Option<Result<Told, Error>> {
        let result = self.wait_timeout(Duration::ZERO)?;
        Some(result.map(|(_, told)| told))
    }

    fn is_ended(&self) -> bool {
        Self::is_ended(self)
    }

    fn on_end(&self, callback: Box<dyn FnOnce() + Send>) -> Result<(), Error> {
        Self::on_end(self, callback)
    }
}

// SAFETY: it is addresses of memory of C's, which stays where it is, and their element type.
unsafe impl OwnedRaw for Lent {
    fn dtype(&self) -> Dtype {
        Self::dtype(self)
    }

    fn lend(&mut self) -> RawBuffers<'_> {
        // SAFETY: C promises the memory until the work has ended.
        unsafe { Self::lend(*self) }
    }
}

/// A pointer of C's, for its own functions on other threads.
struct User(*mut c_void);

// SAFETY: it is C's business which threads may use it: it is told which will.
unsafe impl Send for User {}

/// Starts a collective, and returns at once. As unisum_run, but the buffers must stay and nobody
/// may use them until the work has ended. Calls start in the order in which they are made, blocking
/// or not; a thread of the communicator does the work. The work is freed by unisum_work_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_start(
    comm: *const unisum_comm,
    collective: *const unisum_collective,
    dtype: u32,
    buffers: *const unisum_buffers,
    work: *mut *mut unisum_work,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(work, "the work")?;
        // SAFETY: C promises counts.
        let asked = unsafe { collective::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises one.
        let buffers = unsafe { list(buffers, 1, "the buffers") }?;
        let (lent, _) = Lent::new(self::dtype(dtype)?, &buffers[0])?;
        let Asked { collective, reduction } = asked;
        let started = Started::new(comm.communicator.start_raw(collective, lent), reduction);
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(started, work) };
        Ok(())
    })
}

/// Starts a batch, as unisum_run_batch, and returns at once, as unisum_start.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_start_batch(
    comm: *const unisum_comm,
    collective: *const unisum_collective,
    dtype: u32,
    tensors: *const unisum_buffers,
    count: usize,
    work: *mut *mut unisum_work,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(work, "the work")?;
        // SAFETY: C promises counts.
        let asked = unsafe { collective::collective(collective, comm.communicator.world()) }?;
        // SAFETY: C promises so many.
        let tensors = unsafe { list(tensors, count, "the tensors") }?;
        let dtype = self::dtype(dtype)?;
        let lent = lent_batch(dtype, tensors)?;
        let Asked { collective, reduction } = asked;
        let begun = comm.communicator.start_batch_raw(collective, dtype, lent);
        let started = Started::new(begun, reduction);
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(started, work) };
        Ok(())
    })
}

/// Whether a work has ended. Never blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_work_test(
    work: *const unisum_work,
    ended: *mut bool,
) -> unisum_status {
    guard(|| {
        let work = handles::get::<Started, _>(work)?;
        // SAFETY: C promises that it may be written.
        unsafe { put(ended, work.is_ended(), "`ended`") }
    })
}

/// Waits until a work has ended, `timeout_s` seconds at most, or for ever if that is negative.
/// Gives UNISUM_IN_PROGRESS when the time is up: the work goes on. Else what unisum_run would give,
/// to everybody who waits, however often; `nonfinite`, which may be NULL, as there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_work_wait(
    work: *const unisum_work,
    timeout_s: f64,
    nonfinite: *mut bool,
) -> unisum_status {
    guard_status(|| {
        let work = handles::get::<Started, _>(work)?;
        let until = deadline(timeout_s)?;
        // A callback may come before those who wait are told.
        if !work.is_ended() && !work.end.wait(until) {
            return Ok(unisum_status::UNISUM_IN_PROGRESS);
        }
        let told = work.result().map_err(Failure::Unisum)?;
        // SAFETY: C promises that it may be written.
        unsafe { collective::tell(told, nonfinite) }?;
        Ok(unisum_status::UNISUM_OK)
    })
}

/// Has `callback` called with `user` when the work has ended, well or not; at once if it has. A
/// thread of its own calls all callbacks of the process, one after another, never the one that
/// calls this or one that makes progress: a callback may call anything, and free the work. It must
/// not throw C++ exceptions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_work_on_end(
    work: *const unisum_work,
    callback: unisum_callback,
    user: *mut c_void,
) -> unisum_status {
    guard(|| {
        let work = handles::get::<Started, _>(work)?;
        let Some(callback) = callback else { return invalid("the callback is NULL") };
        let user = User(user);
        let call = move || {
            let User(user) = { user };
            // SAFETY: C promises a function that takes this.
            unsafe { callback(user) };
        };
        Ok(work.lock().on_end(Box::new(call))?)
    })
}

/// Frees a work. Blocks until it has ended: then the buffers are the program's again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_work_free(work: *const unisum_work) -> unisum_status {
    guard(|| {
        let work = handles::remove::<Started, _>(work)?;
        work.end.wait(None);
        Ok(())
    })
}

impl Started {
    fn new<B: Send + 'static>(mut work: Work<(B, Told)>, reduction: Option<Arc<Own>>) -> Self {
        let end = Arc::new(End::default());
        let result = OnceLock::new();
        let waker = Waker::from(end.clone());
        if let Poll::Ready(ended) = Pin::new(&mut work).poll(&mut Context::from_waker(&waker)) {
            let _first = result.set(ended.map(|(_, told)| told));
            end.come();
        }
        Self { work: Mutex::new(Box::new(work)), result, end, _reduction: reduction }
    }

    /// What an ended work gives.
    fn result(&self) -> Result<Told, Error> {
        let take = || self.lock().take().expect("it has ended, and only this takes its result");
        self.result.get_or_init(take).clone()
    }

    fn is_ended(&self) -> bool {
        self.result.get().is_some() || self.lock().is_ended()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Box<dyn Pending>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    fn come(&self) {
        *self.has_come.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Whether it has come, at the latest then.
    fn wait(&self, until: Option<Instant>) -> bool {
        let mut has_come = self.has_come.lock().unwrap_or_else(PoisonError::into_inner);
        while !*has_come {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            has_come = match left {
                None => self.changed.wait(has_come).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    let waited = self.changed.wait_timeout(has_come, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }
}

impl Wake for End {
    fn wake(self: Arc<Self>) {
        self.come();
    }
}

/// When a wait of so many seconds ends; never if that is negative or longer than clocks go.
fn deadline(timeout_s: f64) -> Outcome<Option<Instant>> {
    if timeout_s.is_nan() {
        return invalid("the time-out is NaN");
    }
    if timeout_s < 0.0 {
        return Ok(None);
    }
    let timeout = Duration::try_from_secs_f64(timeout_s).ok();
    Ok(timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
}
