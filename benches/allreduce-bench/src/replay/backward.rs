//! The backward pass, imitated, and how much communication it could hide.

use std::thread;
use std::time::{Duration, Instant};

use crate::Result;

/// When the gradients of a model become ready: in reverse order of registration, at times in
/// proportion to their element counts.
#[derive(Clone, Debug)]
pub(crate) struct Backward {
    /// Parameters in the order of readiness, each with the share of all elements that is then
    /// ready.
    ready: Vec<(usize, f64)>,
}

impl Backward {
    /// Of parameters with so many elements, in the order of registration.
    pub(crate) fn new(counts: &[usize]) -> Self {
        let total: usize = counts.iter().sum();
        let mut before = 0;
        let ready = counts.iter().enumerate().rev().map(|(parameter, count)| {
            before += count;
            (parameter, before as f64 / total as f64)
        });
        Self { ready: ready.collect() }
    }

    /// Calls `ready` for each gradient when it is, and returns after `length`.
    ///
    /// Sleeps meanwhile: on a GPU the pass would leave the processor's cores to communication.
    /// Each sleep ends at a time that counts from `start`, so that overlong ones do not add up.
    ///
    /// # Errors
    /// What `ready` returns.
    pub(crate) fn run(
        &self,
        start: Instant,
        length: Duration,
        mut ready: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        for &(parameter, share) in &self.ready {
            let then = start + length.mul_f64(share);
            thread::sleep(then.saturating_duration_since(Instant::now()));
            ready(parameter)?;
        }
        Ok(())
    }

    /// How much of a communication time the best schedule hides behind a pass of a length, both in
    /// seconds.
    ///
    /// What is not ready can't travel: after a tensor is ready, it and all that come later have
    /// to. The schedule that sends each tensor at once, in the order of readiness, is as late as
    /// the worst of these bounds, and no other is earlier.
    pub(crate) fn hideable_s(&self, communication_s: f64, length_s: f64) -> f64 {
        let mut before = 0.0;
        let ends_s = self.ready.iter().map(|&(_, share)| {
            share * length_s + (1.0 - std::mem::replace(&mut before, share)) * communication_s
        });
        communication_s - (ends_s.fold(length_s, f64::max) - length_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_ready_backwards_and_not_before_their_time() {
        let backward = Backward::new(&[30, 60, 10]);
        let (start, length) = (Instant::now(), Duration::from_millis(50));
        let mut seen = Vec::new();
        let note = |parameter| {
            seen.push((parameter, start.elapsed()));
            Ok(())
        };
        backward.run(start, length, note).unwrap();
        let order: Vec<_> = seen.iter().map(|(parameter, _)| *parameter).collect();
        assert_eq!(order, [2, 1, 0]);
        for ((_, at), due_ms) in seen.iter().zip([5, 35, 50]) {
            assert!(*at >= Duration::from_millis(due_ms), "{at:?}, due after {due_ms} ms");
        }
    }

    #[test]
    fn the_best_schedule_hides_all_but_what_is_ready_late() {
        let is = |counts: &[usize], communication_s, length_s, expected: f64| {
            let hideable_s = Backward::new(counts).hideable_s(communication_s, length_s);
            assert!((hideable_s - expected).abs() < 1e-9, "{hideable_s}, not {expected}");
        };
        // A single tensor is ready at the end.
        is(&[7], 2.0, 5.0, 0.0);
        // Two halves, a slow network: the second half waits for the first until 3.
        is(&[1, 1], 2.0, 2.0, 1.0);
        // A fast one: the first half is there when the second is ready.
        is(&[1, 1], 1.0, 2.0, 0.5);
        // Nothing to hide behind.
        is(&[1, 1], 1.0, 0.0, 0.0);
        // Many small tensors: nearly all, or the whole pass if that is shorter.
        is(&[1; 1000], 1.0, 1.0, 0.999);
        is(&[1; 1000], 4.0, 1.0, 0.999);
    }
}
