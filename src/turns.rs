//! Collectives run one at a time, in the order in which they were called.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// A queue of callers: each draws a number and runs when it is served. Who need not wait takes no
/// lock.
///
/// Serving and waiting race like this (Dekker): a caller adds to `drawn` and then loads `serving`;
/// who is done stores `serving` and then loads `drawn`. All four are `SeqCst`, so one of the two
/// sees the other: the caller its turn, or who is done the caller, whom it then wakes.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    drawn: AtomicU64,
    serving: AtomicU64,
    sleeping: Mutex<()>,
    served: Condvar,
}

/// The right to run now; the next caller is served when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Draws the next number. Every number drawn must be waited for, or all later ones wait too.
    pub(crate) fn draw(&self) -> u64 {
        // SeqCst: see above.
        self.drawn.fetch_add(1, Ordering::SeqCst)
    }

    /// Waits until `number` is served.
    pub(crate) fn wait(&self, number: u64) -> Turn<'_> {
        // SeqCst: see above; acquires what was done in the turns before.
        let is_served = || self.serving.load(Ordering::SeqCst) == number;
        if !is_served() {
            let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            // Looked at under the lock that `drop` takes before it wakes: no wake-up is lost.
            while !is_served() {
                sleeping = self.served.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let turns = self.0;
        // Relaxed: only whose turn it is stores it.
        let next = turns.serving.load(Ordering::Relaxed) + 1;
        // SeqCst, twice: see above; releases what was done in this turn.
        turns.serving.store(next, Ordering::SeqCst);
        if turns.drawn.load(Ordering::SeqCst) > next {
            drop(turns.sleeping.lock().unwrap_or_else(PoisonError::into_inner));
            turns.served.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn numbers_are_served_in_the_order_drawn_whoever_waits_first() {
        let turns = Arc::new(Turns::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        let numbers: Vec<u64> = (0..8).map(|_| turns.draw()).collect();
        std::thread::scope(|scope| {
            for number in numbers.into_iter().rev() {
                let (turns, order) = (turns.clone(), order.clone());
                scope.spawn(move || {
                    let _turn = turns.wait(number);
                    order.lock().unwrap().push(number);
                });
            }
        });
        assert_eq!(*order.lock().unwrap(), (0..8).collect::<Vec<_>>());
    }
}
