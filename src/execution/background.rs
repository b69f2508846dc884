//! The thread that drives asynchronous collectives. It starts with the first one.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use unisum_kernels::Panic;
use unisum_link::{Backoff, Patience, Pause};

use crate::execution::ticket_lock::{Ticket, TicketLock};
use unisum_control::callers::Caller;

type Job = Box<dyn FnOnce() + Send>;

/// A yield that takes longer gave the core to a thread that computes.
const LONG_YIELD: Duration = Duration::from_micros(200);
/// So many waits sleep at once after one.
const WAITS_ASLEEP: u32 = 256;

thread_local! {
    /// How many of the next waits sleep at once; `None` on threads that run no jobs.
    static ASLEEP: Cell<Option<u32>> = const { Cell::new(None) };
}

/// As [`Backoff::pause`]. While an asynchronous collective waits, the program computes: on a core
/// that a thread of the program wants, each yield costs a time slice, and the scheduler lets a
/// thread that slept run sooner than one that yielded. If yields are found to be long, this
/// thread's next waits sleep at once.
pub(crate) fn pause(backoff: &mut Backoff, patience: Patience) -> Pause {
    match ASLEEP.get() {
        None => backoff.pause(patience),
        Some(0) => {
            let begun = Instant::now();
            let pause = backoff.pause(patience);
            if pause == Pause::Yielded && begun.elapsed() > LONG_YIELD {
                ASLEEP.set(Some(WAITS_ASLEEP));
            }
            pause
        }
        Some(left) => {
            let pause = backoff.pause(Patience { yields: 0, spell: Duration::ZERO, ..patience });
            if pause == Pause::Park {
                ASLEEP.set(Some(left - 1));
            }
            pause
        }
    }
}

/// A queue of jobs and the thread that runs them in order.
#[derive(Default)]
pub(crate) struct Background {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// The thread, if it runs.
    thread: Option<ThreadId>,
    /// Whether the thread is in a job.
    busy: bool,
    closed: bool,
}

impl Background {
    /// Draws the next turn and queues `job` for it. If no thread can be started, the job runs
    /// here and now, later than everything before it.
    pub(crate) fn submit<T>(
        &self,
        turns: &TicketLock<T>,
        job: impl FnOnce(Ticket) + Send + 'static,
    ) {
        let mut queue = self.shared.lock();
        // Drawn under the lock: the thread must meet the turns in ascending order.
        let turn = turns.draw();
        queue.jobs.push_back(Box::new(move || job(turn)));
        if queue.thread.is_none() {
            match self.start_thread() {
                Ok(thread) => queue.thread = Some(thread),
                Err(error) => {
                    unisum_link::warning!(
                        "no thread for asynchronous collectives, they block: {error}"
                    );
                    let jobs = std::mem::take(&mut queue.jobs);
                    drop(queue);
                    jobs.into_iter().for_each(|job| job());
                    return;
                }
            }
        }
        drop(queue);
        // All: who finishes may wait as well.
        self.shared.changed.notify_all();
    }

    fn start_thread(&self) -> std::io::Result<ThreadId> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new().name("unisum-async".into());
        thread.spawn(move || shared.run()).map(|handle| handle.thread().id())
    }

    /// Runs `last` after all jobs queued so far, and ends the thread. Blocks until then, so that a
    /// process that ends now has run it; but not in a job of the thread, such as a callback that
    /// drops what the thread works for.
    pub(crate) fn finish(&self, last: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.lock();
        if queue.thread == Some(thread::current().id()) {
            queue.closed = true;
            queue.jobs.push_back(Box::new(last));
            return;
        }
        let works = |queue: &mut Queue| queue.busy || !queue.jobs.is_empty();
        let waited = self.shared.changed.wait_while(queue, works);
        queue = waited.unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        drop(queue);
        self.shared.changed.notify_all();
        last();
    }
}

impl Shared {
    fn run(&self) {
        ASLEEP.set(Some(0));
        while let Some(job) = self.next() {
            // Jobs tell of panics in the program's code themselves. Were one of ours to panic, the
            // jobs behind it must not be left waiting: each work ends by its promise.
            let caller = Caller::begin();
            let _ = Panic::catch(job);
            drop(caller);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        queue.busy = false;
        self.changed.notify_all();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.busy = true;
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock: a panic in one leaves the queue consistent.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("queued", &self.shared.lock().jobs.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// As after a yield that took long.
    #[test]
    fn a_thread_whose_yields_are_long_sleeps_at_once_for_some_waits() {
        let looks = || {
            let (mut backoff, mut looks) = (Backoff::new(), 0);
            while pause(&mut backoff, Patience::CROWDED) != Pause::Park {
                looks += 1;
            }
            looks
        };
        thread::spawn(move || {
            ASLEEP.set(Some(2));
            assert_eq!([looks(), looks()], [0, 0]);
            assert_eq!(ASLEEP.get(), Some(0));
            // And then it tries again whether yields are long.
            assert!(looks() >= 1);
            ASLEEP.set(None);
            assert!(looks() >= Patience::CROWDED.yields as usize, "threads that run no jobs");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn finishing_waits_for_what_was_queued() {
        let (background, turns) = (Background::default(), TicketLock::new(()));
        let (sender, receiver) = mpsc::channel();
        for number in 0..3 {
            let sender = sender.clone();
            background.submit(&turns, move |_| {
                thread::sleep(Duration::from_millis(20));
                sender.send(number).unwrap();
            });
        }
        background.finish(move || sender.send(3).unwrap());
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[test]
    fn a_job_may_finish_what_it_runs_on() {
        let (background, turns) = (Arc::new(Background::default()), TicketLock::new(()));
        let (sender, receiver) = mpsc::channel();
        let own = background.clone();
        background.submit(&turns, move |_| own.finish(move || sender.send(()).unwrap()));
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
