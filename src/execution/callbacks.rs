//! The thread that runs the program's callbacks, so that they delay no collective. It starts with
//! the first of them, and the whole process has one.

use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use unisum_kernels::Panic;
use unisum_link::fork;

use crate::{Error, ErrorKind};

type Callback = Box<dyn FnOnce() + Send>;

/// Gives callbacks to the thread.
#[derive(Clone, Debug)]
pub(crate) struct Callbacks(Sender<Callback>);

/// The thread's queue, and the process that it is of: a forked child has no such thread.
static THREAD: Mutex<Option<(u32, Callbacks)>> = Mutex::new(None);

impl Callbacks {
    /// The process's thread, which starts if it must.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] if the system gives no thread.
    pub(crate) fn of_process() -> Result<Self, Error> {
        // Nothing of the program's runs under the lock.
        let mut thread = THREAD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((generation, callbacks)) = &*thread
            && *generation == fork::current()
        {
            return Ok(callbacks.clone());
        }
        let callbacks = Self::start()?;
        // That of a parent is left as it is: its queue may be locked in this child for ever.
        if let Some(parents) = thread.replace((fork::current(), callbacks.clone())) {
            std::mem::forget(parents);
        }
        Ok(callbacks)
    }

    fn start() -> Result<Self, Error> {
        let (sender, receiver) = mpsc::channel::<Callback>();
        let run = move || {
            for callback in receiver {
                if let Err(panic) = Panic::catch(callback) {
                    let text = panic.text();
                    unisum_link::warning!("a callback of a work panicked: {text}");
                }
            }
        };
        let spawned = thread::Builder::new().name("unisum-callback".into()).spawn(run);
        spawned.map(|_| Self(sender)).map_err(|error| {
            Error::new(ErrorKind::Memory, format!("starting the thread for callbacks: {error}"))
        })
    }

    /// Has the thread run a callback, after those that it was given before.
    pub(crate) fn run(&self, callback: Callback) {
        // The thread ends only with the process.
        let _ = self.0.send(callback);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn callbacks_run_in_order_on_one_thread_and_outlive_a_panic() {
        let callbacks = Callbacks::of_process().unwrap();
        let (sender, receiver) = mpsc::channel();
        for number in 0..3 {
            let sender = sender.clone();
            callbacks.run(Box::new(move || {
                sender.send((number, thread::current().id())).unwrap();
                panic!("this panic is part of a test");
            }));
        }
        let ran = [(); 3].map(|()| receiver.recv_timeout(Duration::from_secs(60)).unwrap());
        assert_eq!(ran.map(|(number, _)| number), [0, 1, 2]);
        assert!(ran.iter().all(|(_, id)| *id == ran[0].1 && *id != thread::current().id()));
    }
}
