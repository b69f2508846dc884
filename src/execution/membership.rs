//! A communicator as the control plane sees it: whose calls they are, and who takes part.

use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::time::Duration;
use std::time::Instant;

use unisum_kernels::Dtype;
use unisum_link::{Call, LinkError, Rank, Wake};

use crate::wiring::{Bond, Epoch};
use unisum_control::{Control, Inbox, Report, StalledCall, Status, Verdict, Waiting, describe};

/// This rank's membership in one communicator of the job. The job's control connection ends with
/// the last of them.
#[derive(Debug)]
pub(crate) struct Membership {
    control: Arc<Control>,
    communicator: u32,
    /// The job's number of each rank; where a group has a control of its own, the group's.
    ranks: Arc<[Rank]>,
    rank: Rank,
    status: Arc<Status>,
    /// In an elastic job, what the communicator ends with.
    bond: Option<Bond>,
}

impl Membership {
    /// In the job's own communicator, whose ranks are the job's.
    pub(crate) fn of_job(control: Arc<Control>, rank: Rank, world: usize) -> Self {
        let status = control.status().clone();
        let ranks = (0..world).collect();
        Self { control, communicator: 0, ranks, rank, status, bond: None }
    }

    /// In a group: its number, its session, and the numbers of its ranks in `control`, of which
    /// this rank is number `rank`.
    pub(crate) fn of_group(
        control: Arc<Control>,
        communicator: u32,
        session: [u8; 16],
        ranks: Arc<[Rank]>,
        rank: Rank,
        bond: Option<Bond>,
    ) -> Self {
        let status = control.enroll(communicator, session, (rank, ranks.clone()));
        Self { control, communicator, ranks, rank, status, bond }
    }

    /// The job is elastic, and in this epoch.
    pub(crate) fn enter(&mut self, epoch: Epoch) {
        self.bond = Some(Bond::Epoch(epoch));
    }

    /// What the communicator ends with, if the job is elastic.
    pub(crate) const fn bond(&self) -> Option<&Bond> {
        self.bond.as_ref()
    }

    pub(crate) const fn control(&self) -> &Arc<Control> {
        &self.control
    }

    pub(crate) const fn communicator(&self) -> u32 {
        self.communicator
    }

    /// The job's numbers of the ranks.
    pub(crate) const fn ranks(&self) -> &Arc<[Rank]> {
        &self.ranks
    }

    /// The job's number of this rank.
    pub(crate) fn job_rank(&self) -> Rank {
        self.ranks[self.rank]
    }

    /// The job's numbers of these ranks.
    pub(crate) fn job_ranks(&self, ranks: &[Rank]) -> Vec<Rank> {
        ranks.iter().map(|&rank| self.ranks[rank]).collect()
    }

    /// A link's error with the job's number of the rank it blames.
    pub(crate) fn in_job(&self, error: LinkError) -> LinkError {
        LinkError { peer: self.ranks.get(error.peer).copied().unwrap_or(error.peer), ..error }
    }

    /// A call of this communicator as the program knows it.
    pub(crate) fn describe(&self, call: &Call) -> String {
        describe(call, self.status.uncounted())
    }

    /// Where the engine says what this rank is doing.
    pub(crate) const fn status(&self) -> &Arc<Status> {
        &self.status
    }

    /// Has data connections of the communicator handed to `inbox`.
    pub(crate) fn set_inbox(&self, inbox: Inbox) {
        self.control.set_inbox(self.communicator, inbox);
    }

    pub(crate) fn add_waker(&self, waker: Arc<dyn Wake>) {
        self.control.add_waker(self.communicator, waker);
    }

    /// See [`Control::verdict`].
    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.control.verdict()
    }

    /// See [`Control::verdict_that_comes`].
    pub(crate) fn verdict_that_comes(&self) -> Option<Verdict> {
        self.control.verdict_that_comes()
    }

    /// See [`Control::is_over`].
    pub(crate) fn is_over(&self) -> bool {
        self.control.is_over()
    }

    /// See [`Control::await_verdict`].
    pub(crate) fn await_verdict(&self, until: Instant) -> Option<Verdict> {
        self.control.await_verdict(until)
    }

    /// Whether one of the ranks has left the job in order, or the communicator, as far as this rank
    /// has been told since it waits for a message ([`Membership::ask_after`]).
    pub(crate) fn has_left(&self, rank: Rank) -> bool {
        let rank = self.ranks[rank];
        self.control.has_left_job(rank) || self.control.has_left_group(self.communicator, rank)
    }

    /// See [`Control::accuse`]; the report names ranks by the job's numbers.
    pub(crate) fn accuse(&self, report: Report) {
        self.control.accuse(report);
    }

    /// See [`Control::overdue`].
    pub(crate) fn overdue(&self, call: &Call) {
        self.control.overdue(self.stalled_call(call));
    }

    /// Tells the coordinator that the deadline of a message expired, as [`Control::overdue`] does.
    pub(crate) fn overdue_message(&self, waiting: &Waiting) {
        self.control.overdue(self.stalled_call(&waiting.call()));
    }

    /// Asks whether a rank whose message takes long is still here; [`Membership::has_left`] says so
    /// some time after.
    pub(crate) fn ask_after(&self, rank: Rank) {
        let (communicator, peer) = (self.communicator, self.ranks[rank]);
        let (dtype, bytes, tag) = (Dtype::U8, 0, 0);
        let message = Waiting { communicator, peer, receives: true, dtype, bytes, tag };
        self.control.stalled(self.stalled_call(&message.call()));
    }

    /// By which this rank finds out, once it has left the communicator, when the others have.
    #[cfg(feature = "cuda")]
    pub(crate) fn farewell(&self) -> Farewell {
        let Self { control, communicator, ranks, rank, .. } = self;
        Farewell {
            control: control.clone(),
            communicator: *communicator,
            ranks: ranks.clone(),
            rank: *rank,
        }
    }

    /// See [`Control::stalled`].
    pub(crate) fn stalled(&self, call: &Call) {
        self.control.stalled(self.stalled_call(call));
    }

    /// See [`Control::stalled`].
    pub(crate) fn stalled_message(&self, waiting: &Waiting) {
        self.control.stalled(self.stalled_call(&waiting.call()));
    }

    fn stalled_call(&self, call: &Call) -> StalledCall {
        let ranks = if self.communicator == 0 { Vec::new() } else { self.ranks.to_vec() };
        StalledCall { call: *call, uncounted: self.status.uncounted(), ranks }
    }
}

/// A communicator that this rank has left, and others may not have.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct Farewell {
    control: Arc<Control>,
    communicator: u32,
    ranks: Arc<[Rank]>,
    rank: Rank,
}

#[cfg(feature = "cuda")]
impl Farewell {
    /// Waits until all ranks have left the communicator, or the job has ended; says whether that
    /// came in time.
    pub(crate) fn await_others(&self, until: Instant) -> bool {
        let mut left: Vec<Rank> = self.ranks.to_vec();
        left.swap_remove(self.rank);
        let mut nap = Duration::from_micros(100);
        loop {
            let has_left = |rank: Rank| self.control.has_left_job(rank);
            left.retain(|&rank| {
                !has_left(rank) && !self.control.has_left_group(self.communicator, rank)
            });
            // Rank 0 of the job, who knows of the others, has waited for them as well.
            let knows_all = self.ranks.contains(&0) && has_left(0);
            if left.is_empty() || knows_all || self.control.is_over() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            for &peer in &left {
                let communicator = self.communicator;
                let (dtype, bytes, tag) = (Dtype::U8, 0, 0);
                let asked = Waiting { communicator, peer, receives: true, dtype, bytes, tag };
                let ranks = self.ranks.to_vec();
                self.control.stalled(StalledCall { call: asked.call(), uncounted: 0, ranks });
            }
            std::thread::sleep(nap);
            nap = (2 * nap).min(Duration::from_millis(5));
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.control.withdraw(self.communicator);
    }
}
