//! Collectives run one at a time, in the order in which they were called.

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// A queue of callers for a thing that one at a time has: each draws a number and has it when that
/// is served. Who need not wait takes no lock.
///
/// Serving and waiting race like this (Dekker): a caller adds to `drawn` and then loads `serving`;
/// who is done stores `serving` and then loads `drawn`. All four are `SeqCst`, so one of the two
/// sees the other: the caller its turn, or who is done the caller, whom it then wakes.
pub(crate) struct TicketLock<T> {
    drawn: AtomicU64,
    serving: AtomicU64,
    sleeping: Mutex<()>,
    served: Condvar,
    thing: UnsafeCell<T>,
}

// SAFETY: whoever has the turn has the thing, and nobody else; it may be another thread each time.
unsafe impl<T: Send> Sync for TicketLock<T> {}

/// A number that was drawn, of these turns and no others. There is only one of each.
#[derive(Debug)]
#[must_use = "all later callers wait until it was waited for"]
pub(crate) struct Ticket {
    number: u64,
    /// The address of what it was drawn from.
    of: usize,
}

/// The right to the thing; the next caller is served when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a, T>(&'a TicketLock<T>);

impl<T> TicketLock<T> {
    pub(crate) fn new(thing: T) -> Self {
        let (drawn, serving) = (AtomicU64::new(0), AtomicU64::new(0));
        let (sleeping, served) = (Mutex::new(()), Condvar::new());
        Self { drawn, serving, sleeping, served, thing: UnsafeCell::new(thing) }
    }

    /// Draws the next number.
    pub(crate) fn draw(&self) -> Ticket {
        // SeqCst: see above.
        Ticket { number: self.drawn.fetch_add(1, Ordering::SeqCst), of: self.address() }
    }

    /// Waits until `number` is served.
    ///
    /// # Panics
    /// If it was drawn elsewhere.
    pub(crate) fn wait(&self, number: Ticket) -> Turn<'_, T> {
        assert_eq!(number.of, self.address(), "a number of other turns");
        // SeqCst: see above; acquires what was done in the turns before.
        let is_served = || self.serving.load(Ordering::SeqCst) == number.number;
        if !is_served() {
            let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
            // Looked at under the lock that `drop` takes before it wakes: no wake-up is lost.
            while !is_served() {
                sleeping = self.served.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Turn(self)
    }

    /// The thing, of which nobody else can have a turn.
    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.thing.get_mut()
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: each number is served once, one at a time, and its owner spent it on this turn:
        // nobody else has the thing until this is dropped.
        unsafe { &*self.0.thing.get() }
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` makes it exclusive within the turn.
        unsafe { &mut *self.0.thing.get() }
    }
}

impl<T> Drop for Turn<'_, T> {
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

impl<T> fmt::Debug for TicketLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { drawn, serving, .. } = self;
        f.debug_struct("TicketLock").field("drawn", drawn).field("serving", serving).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn numbers_are_served_in_the_order_drawn_whoever_waits_first() {
        let turns = Arc::new(TicketLock::new(Vec::new()));
        let numbers: Vec<_> = (0..8).map(|_| turns.draw()).collect();
        std::thread::scope(|scope| {
            for number in numbers.into_iter().rev() {
                let turns = turns.clone();
                scope.spawn(move || {
                    let which = number.number;
                    turns.wait(number).push(which);
                });
            }
        });
        assert_eq!(*turns.wait(turns.draw()), (0..8).collect::<Vec<_>>());
    }

    #[test]
    #[should_panic(expected = "other turns")]
    fn numbers_of_others_are_refused() {
        let (turns, others) = (TicketLock::new(()), TicketLock::new(()));
        turns.wait(others.draw());
    }
}
