//! Collectives run one at a time, in the order in which they were called.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A queue of callers: each draws a number and runs when it is served.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    served: Condvar,
}

#[derive(Debug, Default)]
struct State {
    drawn: u64,
    serving: u64,
}

/// The right to run now; the next caller is served when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Draws the next number. Every number drawn must be waited for, or all later ones wait too.
    pub(crate) fn draw(&self) -> u64 {
        let mut state = self.lock();
        state.drawn += 1;
        state.drawn - 1
    }

    /// Waits until `number` is served.
    pub(crate) fn wait(&self, number: u64) -> Turn<'_> {
        let mut state = self.lock();
        while state.serving != number {
            state = self.served.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Two counters can't be left half-changed by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.serving += 1;
        let waiting = state.drawn > state.serving;
        drop(state);
        if waiting {
            self.0.served.notify_all();
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
