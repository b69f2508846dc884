//! What this rank is doing right now, written by the thread that drives a collective and read by
//! the control thread at any moment.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use unisum_link::Call;

/// The words of an encoded call.
const CALL_WORDS: usize = Call::ENCODED / 8;

/// This rank's progress, as others are told it when a deadline expires.
///
/// One thread at a time writes: the one that drives the collective. Nobody ever waits: a call is
/// written into the slot that is not current and then made current, so that a writer which is
/// preempted half-way leaves the current slot whole.
#[derive(Debug, Default)]
pub(crate) struct Status {
    /// How many calls have begun; its lowest bit chooses the slot.
    begun: AtomicU64,
    /// How many calls have ended.
    ended: AtomicU64,
    slots: [Slot; 2],
}

#[derive(Debug, Default)]
struct Slot {
    call: [AtomicU64; CALL_WORDS],
    /// Steps done in the upper half, all steps in the lower.
    steps: AtomicU64,
    bytes: AtomicU64,
}

/// A [`Status`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// The newest call, if there was any.
    pub(crate) call: Option<Call>,
    /// Whether the rank is still in it.
    pub(crate) inside: bool,
    /// Steps done.
    pub(crate) step: u32,
    /// All steps.
    pub(crate) steps: u32,
    /// Bytes moved in this call.
    pub(crate) bytes: u64,
}

impl Status {
    /// A collective begins. A handful of plain stores.
    pub(crate) fn begin(&self, call: &Call) {
        // Relaxed: only this thread writes it, and threads take turns under the engine's lock.
        let begun = self.begun.load(Ordering::Relaxed);
        let slot = self.slot(begun + 1);
        // Pairs with the Acquire fence in `snapshot`: who sees one of the stores below sees that
        // `begun` has moved past this slot's former call.
        fence(Ordering::Release);
        for (place, word) in slot.call.iter().zip(call.words()) {
            place.store(word, Ordering::Relaxed);
        }
        slot.steps.store(0, Ordering::Relaxed);
        slot.bytes.store(0, Ordering::Relaxed);
        // Release: pairs with the Acquire load in `snapshot`, which then sees the slot.
        self.begun.store(begun + 1, Ordering::Release);
    }

    /// `done` of all `steps` are done, and so many bytes were moved in this call. Two plain
    /// stores.
    pub(crate) fn step(&self, done: usize, steps: usize, bytes: u64) {
        let half = |steps: usize| u64::from(u32::try_from(steps).unwrap_or(u32::MAX));
        // Relaxed, all: numbers for people, on which nothing depends; and `begun` is this
        // thread's own.
        let slot = self.slot(self.begun.load(Ordering::Relaxed));
        slot.steps.store(half(done) << 32 | half(steps), Ordering::Relaxed);
        slot.bytes.store(bytes, Ordering::Relaxed);
    }

    /// The collective has ended, well or not. One plain store.
    pub(crate) fn end(&self) {
        // Relaxed, twice: `begun` is this thread's own, and `ended` stands for itself.
        self.ended.store(self.begun.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// What the rank is doing. From any thread; never waits for the writer.
    pub(crate) fn snapshot(&self) -> Snapshot {
        loop {
            // Acquire: pairs with the Release store in `begin`.
            let begun = self.begun.load(Ordering::Acquire);
            let snapshot = self.read(begun);
            // Pairs with the Release fence in `begin`: if the slot was overwritten while it was
            // read, the load below sees a newer `begun`.
            fence(Ordering::Acquire);
            // Another round means that the rank has begun a call meanwhile: it makes progress.
            if self.begun.load(Ordering::Relaxed) == begun {
                return snapshot;
            }
        }
    }

    fn read(&self, begun: u64) -> Snapshot {
        if begun == 0 {
            return Snapshot::default();
        }
        let slot = self.slot(begun);
        // Relaxed, all: the fences in `begin` and `snapshot` order them.
        let call = slot.call.each_ref().map(|word| word.load(Ordering::Relaxed));
        let steps = slot.steps.load(Ordering::Relaxed);
        Snapshot {
            call: Call::from_words(&call),
            inside: self.ended.load(Ordering::Relaxed) < begun,
            step: (steps >> 32) as u32,
            steps: steps as u32,
            bytes: slot.bytes.load(Ordering::Relaxed),
        }
    }

    fn slot(&self, begun: u64) -> &Slot {
        &self.slots[(begun & 1) as usize]
    }
}

impl Snapshot {
    /// Orders ranks by how far they are in the sequence of calls: even numbers wait outside call
    /// `position / 2`, odd ones are inside it.
    pub(super) fn position(&self) -> u64 {
        let Some(call) = &self.call else { return 0 };
        let inside = call.number.saturating_mul(2).saturating_add(1);
        if self.inside { inside } else { inside.saturating_add(1) }
    }

    /// Whether the rank is less far in the same call than `other`.
    pub(super) fn is_behind(&self, other: &Self) -> bool {
        let scaled = |a: &Self, b: &Self| u64::from(a.step) * u64::from(b.steps.max(1));
        let (ours, theirs) = (scaled(self, other), scaled(other, self));
        (ours, self.bytes) < (theirs, other.bytes)
    }
}

impl std::fmt::Display for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { call, inside, step, steps, bytes } = self;
        match call {
            None => f.write_str("has called nothing yet"),
            Some(call) if *inside => {
                write!(f, "in {call}, step {step} of {steps}, {bytes} bytes moved")
            }
            Some(call) => write!(f, "outside; its last call was {call}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::control::tests::call;

    #[test]
    fn a_snapshot_tells_call_and_progress() {
        let status = Status::default();
        assert_eq!(status.snapshot(), Snapshot::default());
        status.begin(&call(0));
        status.step(3, 9, 100);
        let inside = Snapshot { call: Some(call(0)), inside: true, step: 3, steps: 9, bytes: 100 };
        assert_eq!(status.snapshot(), inside);
        assert_eq!(inside.position(), 1);
        status.end();
        assert_eq!(status.snapshot(), Snapshot { inside: false, ..inside });
        assert_eq!(status.snapshot().position(), 2);
    }

    #[test]
    fn snapshots_are_whole_while_a_rank_calls_in_a_hurry() {
        let status = Status::default();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200_000 {
                    status.begin(&Call { count: number * 3, ..call(number) });
                    status.end();
                }
                over.store(true, Ordering::Release);
            });
            while !over.load(Ordering::Acquire) {
                if let Some(call) = status.snapshot().call {
                    assert_eq!(call.count, call.number * 3);
                }
            }
        });
    }
}
