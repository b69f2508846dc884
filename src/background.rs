//! The thread that drives asynchronous collectives. It starts with the first one.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use unisum_link::Panic;

use crate::turns::{Number, Turns};

type Job = Box<dyn FnOnce() + Send>;

/// How long finishing waits for jobs under way.
const MOMENT: Duration = Duration::from_secs(1);

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
    runs: bool,
    /// Whether the thread is in a job.
    busy: bool,
    closed: bool,
}

impl Background {
    /// Draws the next turn and queues `job` for it. If no thread can be started, the job runs
    /// here and now, later than everything before it.
    pub(crate) fn submit<T>(&self, turns: &Turns<T>, job: impl FnOnce(Number) + Send + 'static) {
        let mut queue = self.shared.lock();
        // Drawn under the lock: the thread must meet the turns in ascending order.
        let turn = turns.draw();
        queue.jobs.push_back(Box::new(move || job(turn)));
        if !queue.runs {
            match self.start_thread() {
                Ok(()) => queue.runs = true,
                Err(error) => {
                    tracing::warn!("no thread for asynchronous collectives, they block: {error}");
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

    fn start_thread(&self) -> std::io::Result<()> {
        let shared = self.shared.clone();
        thread::Builder::new().name("unisum-async".into()).spawn(move || shared.run()).map(drop)
    }

    /// Runs `last` after all jobs queued so far, and ends the thread: here if the jobs are done
    /// within a moment, so that a process that ends now has run it, else on the thread.
    pub(crate) fn finish(&self, last: impl FnOnce() + Send + 'static) {
        let works = |queue: &mut Queue| queue.busy || !queue.jobs.is_empty();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), MOMENT, works);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        let last: Option<Job> = if works(&mut queue) {
            queue.jobs.push_back(Box::new(last));
            None
        } else {
            Some(Box::new(last))
        };
        drop(queue);
        self.shared.changed.notify_all();
        if let Some(last) = last {
            last();
        }
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            // Jobs tell of panics in the program's code themselves. Were one of ours to panic, the
            // jobs behind it must not be left waiting: each work ends by its promise.
            let _ = Panic::catch(job);
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
