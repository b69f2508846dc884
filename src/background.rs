//! The thread that drives asynchronous collectives. It starts with the first one.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use unisum_kernels::Panic;

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
    /// The thread, if it runs.
    thread: Option<ThreadId>,
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
        if queue.thread.is_none() {
            match self.start_thread() {
                Ok(thread) => queue.thread = Some(thread),
                Err(error) => {
                    crate::warning::warning!(
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn finishing_waits_for_what_was_queued() {
        let (background, turns) = (Background::default(), Turns::new(()));
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
        let (background, turns) = (Arc::new(Background::default()), Turns::new(()));
        let (sender, receiver) = mpsc::channel();
        let own = background.clone();
        background.submit(&turns, move |_| own.finish(move || sender.send(()).unwrap()));
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
