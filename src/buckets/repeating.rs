//! Steps of an elastic job that logs what becomes of them, or repeats what became of those of an
//! earlier one: there the view changes between two steps, where nobody notices that no rank died.

use super::elastic::Attempt;
use super::flight::InFlightStep;
use super::worker::Core;
use crate::epoch_log::{Moment, StepLine};
use crate::wiring::Epoch;
use crate::{Error, ErrorKind};

impl Core {
    /// The epoch, in a job that repeats another one, if the layer goes on in the next.
    fn repeated_epoch(&self) -> Option<Epoch> {
        let continuity = self.continuity.as_ref().filter(|it| it.goes_on())?;
        let epoch = continuity.epoch();
        (epoch.repeats() && !self.has_ended()).then_some(epoch)
    }

    /// Changes the view as often as it changed in this step before any rank saw all votes.
    ///
    /// # Errors
    /// [`ErrorKind::RankLost`] if this process ended there, [`ErrorKind::Mismatch`] if this job
    /// strays from the other one.
    pub(super) fn repeat_before(
        &self,
        flight: &InFlightStep,
        attempt: &mut Attempt,
    ) -> Result<(), Error> {
        while attempt.ballot.is_none() && self.repeat(flight, attempt, Moment::Before)? {}
        Ok(())
    }

    /// Changes the view if it changed before this rank saw all votes; whether it did.
    ///
    /// # Errors
    /// As [`Core::repeat_before`].
    pub(super) fn repeat_after(
        &self,
        flight: &InFlightStep,
        attempt: &mut Attempt,
    ) -> Result<bool, Error> {
        Ok(attempt.ballot.is_some() && self.repeat(flight, attempt, Moment::After)?)
    }

    fn repeat(
        &self,
        flight: &InFlightStep,
        attempt: &mut Attempt,
        moment: fn(u64) -> Moment,
    ) -> Result<bool, Error> {
        let Some(epoch) = self.repeated_epoch() else { return Ok(false) };
        let repeated = epoch.is_due(moment(attempt.step)).and_then(|is_due| {
            if is_due {
                self.change_together(flight, attempt, &epoch)?;
            }
            Ok(is_due)
        });
        repeated.inspect_err(|error| self.ended.by(error))
    }

    fn change_together(
        &self,
        flight: &InFlightStep,
        attempt: &mut Attempt,
        epoch: &Epoch,
    ) -> Result<(), Error> {
        // All are where they have to be, also those that end here. The first that know that may
        // have changed the view already.
        match self.communicator().barrier() {
            Err(error) if !epoch.ends_here() && !self.outlives(&error) => return Err(error),
            _ => {}
        }
        let cause = Error::new(ErrorKind::ViewChanged, "the job repeats a change of view");
        self.recover(flight, attempt, cause)
    }

    /// Whether newcomers enter behind the step; `None` if the job repeats no other one.
    pub(super) fn turns_after(&self, attempt: &Attempt) -> Option<bool> {
        self.repeated_epoch()?.turns_after(attempt.step)
    }

    /// The step is tried in this view.
    pub(super) fn is_tried_here(&self, attempt: &mut Attempt) {
        if let Some(continuity) = &self.continuity {
            attempt.voters = continuity.view().processes;
        }
    }

    /// The step has ended.
    pub(super) fn log_end(&self, attempt: &Attempt) {
        if let (Some(continuity), Some(change)) = (&self.continuity, &attempt.change) {
            continuity.epoch().lineage.log_step(StepLine {
                step: attempt.step,
                epoch: change.view.epoch,
                redone: change.redone,
                divisor: attempt.participants as u64,
                processes: attempt.voters.clone(),
            });
        }
    }
}
