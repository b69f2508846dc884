//! The thread that drives asynchronous collectives. It starts with the first one.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::turns::{Number, Turns};

type Job = Box<dyn FnOnce() + Send>;

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
        self.shared.changed.notify_one();
    }

    fn start_thread(&self) -> std::io::Result<()> {
        let shared = self.shared.clone();
        thread::Builder::new().name("unisum-async".into()).spawn(move || shared.run()).map(drop)
    }

    /// Runs `last` after all jobs queued so far, and ends the thread; does not wait for either
    /// unless there is no thread.
    pub(crate) fn finish(&self, last: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        if queue.runs {
            queue.jobs.push_back(Box::new(last));
            drop(queue);
            self.shared.changed.notify_one();
        } else {
            drop(queue);
            last();
        }
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
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
