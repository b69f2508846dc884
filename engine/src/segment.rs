//! Pairwise steps, compiled: every transfer with the earlier transfers it must wait for.

use std::ops::Range;
use std::sync::OnceLock;

use unisum_algorithms::{OnArrival, Rank, Step};

use super::placement::{Located, Overlay, Place};

/// What a transfer does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Send {
        to: Rank,
    },
    Store {
        from: Rank,
    },
    Reduce {
        from: Vec<Rank>,
    },
    /// Fold what all members of the group have put in, times the factor if it `scales`.
    Fold {
        scales: bool,
    },
    /// Store at all members of the group, divided by the number of ranks if it `divides`.
    Push {
        divides: bool,
    },
}

/// One transfer of a segment: its length, and the bytes it touches in this rank's memories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) work: Work,
    pub(crate) bytes: usize,
    /// What a send sends, or the own operand of a reduction.
    pub(crate) reads: Option<Place>,
    /// Where an arrival ends up.
    pub(crate) writes: Option<Place>,
    pub(crate) step: usize,
    /// Earlier transfers of the window that touch the same bytes, at least one of both writing.
    pub(crate) waits_for: u32,
    /// Later transfers that wait for this one.
    pub(crate) followers: Vec<usize>,
}

impl Transfer {
    /// Whether it needs no message.
    pub(crate) const fn is_local(&self) -> bool {
        matches!(self.work, Work::Fold { .. } | Work::Push { .. })
    }
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
    /// See [`Segment::traffic`].
    pub(crate) traffic: OnceLock<Vec<Traffic>>,
}

/// Payload bytes that are sent to a peer and received from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) peer: Rank,
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

fn with(all: &mut Vec<Traffic>, peer: Rank) -> &mut Traffic {
    let known = all.iter().position(|traffic| traffic.peer == peer);
    let at = known.unwrap_or_else(|| {
        all.push(Traffic { peer, sent: 0, received: 0 });
        all.len() - 1
    });
    &mut all[at]
}

impl Segment {
    /// A segment without steps.
    pub(crate) fn new(window: usize) -> Self {
        Self { window, step_starts: vec![0], ..Self::default() }
    }

    /// What moves between this rank and each peer; found out when it is first asked for.
    pub(crate) fn traffic(&self) -> &[Traffic] {
        self.traffic.get_or_init(|| {
            let mut all = Vec::new();
            for transfer in &self.transfers {
                let bytes = transfer.bytes as u64;
                match &transfer.work {
                    Work::Send { to } => with(&mut all, *to).sent += bytes,
                    Work::Store { from } => with(&mut all, *from).received += bytes,
                    Work::Reduce { from } => {
                        from.iter().for_each(|&peer| with(&mut all, peer).received += bytes);
                    }
                    Work::Fold { .. } | Work::Push { .. } => {}
                }
            }
            all
        })
    }

    /// Adds sliced steps for elements of `element_bytes` bytes, each transfer with its entry of
    /// `located`.
    pub(crate) fn compile(
        &mut self,
        steps: &[Step],
        located: &[Located],
        element_bytes: usize,
        overlay: Overlay,
    ) {
        let before = self.steps();
        let mut located = located.iter();
        for (index, step) in (before..).zip(steps) {
            for ((work, elements), located) in works(step).zip(&mut located) {
                let place = |place: Option<Place>| place.map(|it| it.in_bytes(element_bytes));
                let transfer = Transfer {
                    work,
                    bytes: elements.len() * element_bytes,
                    reads: place(located.reads),
                    writes: place(located.writes),
                    step: index,
                    waits_for: 0,
                    followers: vec![],
                };
                self.add(transfer, overlay);
            }
            self.step_starts.push(self.transfers.len());
        }
    }

    /// Steps of the segment.
    pub(crate) fn steps(&self) -> usize {
        self.step_starts.len() - 1
    }

    /// Adds a transfer to the last step, which `step_starts` does not end yet.
    pub(super) fn add(&mut self, mut transfer: Transfer, overlay: Overlay) {
        let index = self.transfers.len();
        let oldest_open = (transfer.step + 1).saturating_sub(self.window);
        for earlier in &mut self.transfers[self.step_starts[oldest_open]..] {
            if conflict(earlier, &transfer, overlay) {
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

fn conflict(earlier: &Transfer, later: &Transfer, overlay: Overlay) -> bool {
    let meet = |a: Option<Place>, b: Option<Place>| match (a, b) {
        (Some(a), Some(b)) => {
            let ((a_memory, a_start), (b_memory, b_start)) = (overlay.of(a), overlay.of(b));
            let ends = (a_start + earlier.bytes as isize, b_start + later.bytes as isize);
            a_memory == b_memory && a_start < ends.1 && b_start < ends.0
        }
        _ => false,
    };
    meet(earlier.writes, later.writes)
        || meet(earlier.writes, later.reads)
        || meet(earlier.reads, later.writes)
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::{Incoming, Outgoing, Pattern};

    use super::super::placement::Memory;
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

    /// In place: everything lies in the output.
    fn compile(steps: &[Step], window: usize) -> Segment {
        let at = |elements: &Range<usize>| Some(Place::new(Memory::Output, elements.start));
        let located = |step: &Step| {
            let sends = step.outgoing.iter().map(|out| (at(&out.elements), None));
            let arrivals = step.incoming.iter().map(|it| (at(&it.elements), at(&it.elements)));
            sends.chain(arrivals).map(|(reads, writes)| Located { reads, writes }).collect()
        };
        let located: Vec<Located> =
            steps.iter().flat_map(|step| -> Vec<_> { located(step) }).collect();
        let mut segment = Segment::new(window);
        segment.compile(steps, &located, 4, Overlay::APART);
        segment
    }

    fn waits(segment: &Segment) -> Vec<u32> {
        segment.transfers.iter().map(|transfer| transfer.waits_for).collect()
    }

    #[test]
    fn a_reduce_waits_for_the_send_of_the_same_step_and_the_next_send_for_the_reduce() {
        let segment = compile(&[step(0..4, 0..4), step(0..4, 4..8)], 8);
        // send; reduce after it; second send after the reduce; second reduce is free.
        assert_eq!(waits(&segment), [0, 1, 1, 0]);
        assert_eq!(segment.transfers[1].followers, [2]);
        assert_eq!(segment.transfers[1].bytes, 16);
    }

    #[test]
    fn steps_beyond_the_window_are_not_compared() {
        let steps = [step(0..4, 0..4), step(0..4, 0..4), step(0..4, 0..4)];
        let segment = compile(&steps, 1);
        // Window 1: a step opens when the one before is done, only same-step hazards remain.
        assert_eq!(waits(&segment), [0, 1, 0, 1, 0, 1]);
    }
}
