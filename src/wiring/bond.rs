//! What a communicator of an elastic job ends with: the view that it was made of, or, if it is a
//! group of some of the ranks, the membership of its own members.

use std::sync::Arc;
use std::time::Instant;

use unisum_control::elastic::{Member, View};
use unisum_control::{Control, Verdict, VerdictKind};
use unisum_link::Rank;

use super::lineage::{EXPLAINED_WITHIN, Epoch, Lineage, NeedsAll, is_loss};
use crate::error::ViewChange;
use crate::{Error, ErrorKind};

/// What a communicator of an elastic job ends with.
#[derive(Clone, Debug)]
pub(crate) enum Bond {
    /// With the view that it was made of, whatever comes next.
    Epoch(Epoch),
    /// With the first of these that the job loses, in whatever view.
    Members(Members),
}

/// The members of a group, which go on together while none of them is lost.
#[derive(Clone, Debug)]
pub(crate) struct Members {
    lineage: Arc<Lineage>,
    /// By rank of the group.
    all: Arc<[Member]>,
}

impl Bond {
    /// The view that it ends with, if so.
    pub(crate) const fn epoch(&self) -> Option<&Epoch> {
        match self {
            Self::Epoch(epoch) => Some(epoch),
            Self::Members(_) => None,
        }
    }

    /// The members that have these ranks, as a group of their own.
    pub(super) fn members(&self, ranks: &[Rank]) -> Members {
        let (lineage, known) = match self {
            Self::Epoch(Epoch { lineage, view }) => (lineage, &view.members[..]),
            Self::Members(Members { lineage, all }) => (lineage, &all[..]),
        };
        let all = ranks.iter().map(|&rank| known[rank]).collect();
        Members { lineage: lineage.clone(), all }
    }

    /// What an error is in an elastic job: see [`Epoch::explain`].
    pub(crate) fn explain(&self, error: Error, verdict: Option<&Verdict>) -> Error {
        match self {
            Self::Epoch(epoch) => epoch.explain(error, verdict),
            Self::Members(members) => members.explain(error, verdict),
        }
    }
}

impl Members {
    pub(super) const fn lineage(&self) -> &Arc<Lineage> {
        &self.lineage
    }

    /// Ends `control` when one of them is lost.
    pub(super) fn bind(&self, control: &Arc<Control>) {
        self.lineage.views.bind_members(self.all.to_vec(), control);
    }

    /// By their ranks in the group, those that are not in a view.
    fn lost_in(&self, view: &View) -> Vec<Rank> {
        (0..self.all.len()).filter(|&rank| !view.has(self.all[rank])).collect()
    }

    /// What an error of the group is: if the job has lost one of them, or does now, that is a
    /// change of view, which this waits for. Who has only left the group is not lost.
    fn explain(&self, error: Error, verdict: Option<&Verdict>) -> Error {
        if !is_loss(&error, verdict) {
            return error;
        }
        let noticed = Instant::now();
        // A process that has ended in order is missed now.
        let may_have_left = verdict.is_some_and(|it| it.kind == VerdictKind::Left);
        let _all = may_have_left.then(|| NeedsAll::new(self.lineage.clone()));
        let (out, limit) = match may_have_left {
            true => (Vec::new(), EXPLAINED_WITHIN),
            false => {
                let out = self.lineage.to_leave_behind(&error, verdict);
                let members = out.iter().filter_map(|&rank| self.all.get(rank).copied());
                (members.collect(), self.lineage.patience())
            }
        };
        let rank = error.rank();
        let on = |it: Error| rank.map_or_else(|| it.clone(), |rank| it.clone().on(rank));
        match self.await_loss(&out, noticed + limit) {
            Ok(Some(view)) => on(self.changed(&view, &error, noticed)),
            Ok(None) => error,
            Err(end) => {
                let lost = match end.failed_ranks() {
                    [] => error.failed_ranks().to_vec(),
                    lost => lost.to_vec(),
                };
                on(Error::new(end.kind(), format!("{end} ({error})")).caused_by(lost))
            }
        }
    }

    /// Has the job leave those in `out` behind, and waits until it is in a view without one of the
    /// group. `None` if all are still there at `until`.
    ///
    /// # Errors
    /// If this process is no longer in the job, or too few are.
    fn await_loss(&self, out: &[Member], until: Instant) -> Result<Option<View>, Error> {
        let views = &self.lineage.views;
        loop {
            let now = views.membership();
            let lost = self.lost_in(&now.view);
            if !lost.is_empty() {
                self.lineage.check_minimum(&now.view).map_err(|it| it.caused_by(lost.clone()))?;
            }
            if let Some(end) = now.end {
                return Err(Error::new(ErrorKind::RankLost, end).caused_by(lost));
            }
            if !now.is_changing && !lost.is_empty() {
                return Ok(Some(now.view));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            if !now.is_changing && !out.is_empty() {
                // Does nothing if the view changes before.
                views.change(now.view.epoch, out.to_vec(), false);
            }
            views.await_other(&now, until);
        }
    }

    /// The error of calls of the group once the job is in this view, without one of its members.
    fn changed(&self, view: &View, cause: &Error, noticed: Instant) -> Error {
        let (lost, joined) = (self.lost_in(view), Vec::new());
        let (epoch, world) = (view.epoch, view.members.len());
        let text = format!(
            "ranks {lost:?} of the group are lost, and the job goes on in epoch {epoch}, of \
             {world} ranks: {cause}"
        );
        let change = ViewChange { epoch, lost: lost.clone(), joined, noticed };
        Error::new(ErrorKind::ViewChanged, text).caused_by(lost).changing(change)
    }
}
