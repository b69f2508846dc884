//! Pairwise steps, compiled: every transfer with the earlier transfers it must wait for.

use std::ops::Range;

use unisum_algorithms::{OnArrival, Rank, Step};

/// What a transfer does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Send { to: Rank },
    Store { from: Rank },
    Reduce { from: Vec<Rank> },
}

/// One transfer of a segment. `bytes` is its range in the region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) work: Work,
    pub(crate) bytes: Range<usize>,
    pub(crate) step: usize,
    /// Earlier transfers of the window that touch the same bytes, at least one of both writing.
    pub(crate) waits_for: u32,
    /// Later transfers that wait for this one.
    pub(crate) followers: Vec<usize>,
}

/// A run of pairwise steps in program order, executed through an in-order window.
///
/// The hazards are those of a processor's scoreboard: a read waits for earlier writes of its
/// range (RAW), a write for earlier reads (WAR) and writes (WAW). Only transfers of the last
/// `window` steps can be unfinished when a step opens, so only those are compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) transfers: Vec<Transfer>,
    /// Where each step's transfers begin; one more entry than there are steps.
    pub(crate) step_starts: Vec<usize>,
    pub(crate) window: usize,
}

impl Segment {
    /// Compiles sliced steps for elements of `element_bytes` bytes.
    pub(crate) fn compile(steps: &[Step], element_bytes: usize, window: usize) -> Self {
        let mut segment = Self { window, step_starts: vec![0], ..Self::default() };
        for (index, step) in steps.iter().enumerate() {
            for (work, elements) in works(step) {
                let bytes = elements.start * element_bytes..elements.end * element_bytes;
                segment.add(Transfer { work, bytes, step: index, waits_for: 0, followers: vec![] });
            }
            segment.step_starts.push(segment.transfers.len());
        }
        segment
    }

    /// Steps of the segment.
    pub(crate) fn steps(&self) -> usize {
        self.step_starts.len() - 1
    }

    fn add(&mut self, mut transfer: Transfer) {
        let index = self.transfers.len();
        let oldest_open = (transfer.step + 1).saturating_sub(self.window);
        for earlier in &mut self.transfers[self.step_starts[oldest_open]..] {
            if conflict(earlier, &transfer) {
                earlier.followers.push(index);
                transfer.waits_for += 1;
            }
        }
        self.transfers.push(transfer);
    }
}

fn works(step: &Step) -> impl Iterator<Item = (Work, &Range<usize>)> {
    let sends = step.outgoing.iter().map(|out| (Work::Send { to: out.to }, &out.elements));
    let arrivals = step.incoming.iter().map(|incoming| {
        let work = match incoming.on_arrival {
            OnArrival::Store => Work::Store { from: incoming.from[0] },
            OnArrival::Reduce => Work::Reduce { from: incoming.from.clone() },
        };
        (work, &incoming.elements)
    });
    sends.chain(arrivals)
}

fn conflict(earlier: &Transfer, later: &Transfer) -> bool {
    let is_read = |transfer: &Transfer| matches!(transfer.work, Work::Send { .. });
    let overlap = earlier.bytes.start < later.bytes.end && later.bytes.start < earlier.bytes.end;
    overlap && !(is_read(earlier) && is_read(later))
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::{Incoming, Outgoing, Pattern};

    use super::*;

    fn step(send: Range<usize>, reduce: Range<usize>) -> Step {
        Step {
            pattern: Pattern::Pairs,
            outgoing: vec![Outgoing { to: 1, elements: send }],
            incoming: vec![Incoming {
                from: vec![1],
                elements: reduce,
                on_arrival: OnArrival::Reduce,
            }],
        }
    }

    fn waits(segment: &Segment) -> Vec<u32> {
        segment.transfers.iter().map(|transfer| transfer.waits_for).collect()
    }

    #[test]
    fn a_reduce_waits_for_the_send_of_the_same_step_and_the_next_send_for_the_reduce() {
        let segment = Segment::compile(&[step(0..4, 0..4), step(0..4, 4..8)], 4, 8);
        // send; reduce after it; second send after the reduce; second reduce is free.
        assert_eq!(waits(&segment), [0, 1, 1, 0]);
        assert_eq!(segment.transfers[1].followers, [2]);
        assert_eq!(segment.transfers[1].bytes, 0..16);
    }

    #[test]
    fn steps_beyond_the_window_are_not_compared() {
        let steps = [step(0..4, 0..4), step(0..4, 0..4), step(0..4, 0..4)];
        let segment = Segment::compile(&steps, 1, 1);
        // Window 1: a step opens when the one before is done, only same-step hazards remain.
        assert_eq!(waits(&segment), [0, 1, 0, 1, 0, 1]);
    }
}
