//! Jobs that outlive their ranks: what survivors of a loss do.

use std::thread;
use std::time::{Duration, Instant};

use unisum_link::Rank;

use super::builder;
use crate::wiring::{Epoch, Position, Standing, identities};
use crate::{Communicator, Error, ErrorKind};

/// How a job goes on when it loses ranks, see [`Builder::elastic`](crate::Builder::elastic). All
/// ranks give the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elastic {
    /// How many ranks the job needs: if fewer are left, it ends with
    /// [`ErrorKind::RankLost`] on all of them.
    pub minimum: usize,
}

impl Default for Elastic {
    /// A job that goes on while there is anybody.
    fn default() -> Self {
        Self { minimum: 1 }
    }
}

/// Who is in an elastic job during an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// 1 at the start of the job; each change adds 1.
    pub epoch: u64,
    /// By rank, which process it is: the same process has the same number in all epochs, and no
    /// other has it.
    pub processes: Vec<u64>,
}

/// What a rank has once it has entered a view.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) communicator: Communicator,
    pub(crate) epoch: Epoch,
    /// By rank.
    pub(crate) standings: Vec<Standing>,
}

/// The pauses between attempts at what may have failed because connections were cut: whatever it
/// was, ranks that try again do not spin.
#[derive(Debug)]
pub(crate) struct Pauses {
    next: Duration,
}

impl Pauses {
    /// The first one, which a cut that is over costs hardly anything.
    const FIRST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_millis(500);

    pub(crate) const fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Each is twice the one before, up to a limit.
    pub(crate) fn next(&mut self) -> Duration {
        let next = (self.next * 2).min(Self::LONGEST);
        std::mem::replace(&mut self.next, next)
    }
}

impl Epoch {
    /// Enters the view after this one. If the view has not changed yet, it does now. All ranks that
    /// are left call it, wherever they are. Blocks until they have; if ranks are lost meanwhile, it
    /// goes on with those that are left then.
    ///
    /// # Errors
    /// As [`Communicator::rebuild`].
    pub(crate) fn enter_next(&self, position: Position) -> Result<Entered, Error> {
        // This process may be in a later view already, by a step of gradient buckets.
        let last = self.last();
        let _all = last.need_all();
        if last.repeats() {
            let view = last.repeat_change(position)?;
            return Self { view, ..last }.enter(position);
        }
        // Does nothing if the view has changed.
        last.change(&[]);
        let view = last.await_next()?;
        Self { view, ..last }.enter(position)
    }

    /// Enters this view, in which all ranks are about to do so, or a later one if ranks are lost
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Communicator::rebuild`].
    pub(crate) fn enter(self, position: Position) -> Result<Entered, Error> {
        let _all = self.need_all();
        let (mut epoch, since, mut pauses) = (self, Instant::now(), Pauses::new());
        loop {
            match builder::of_view(&epoch, epoch.lineage.standing(position)) {
                Ok((communicator, standings)) => {
                    epoch.entered(&standings);
                    return Ok(Entered { communicator, epoch, standings });
                }
                // Ranks were lost while it was made: those that are left begin again.
                Err(_) if epoch.is_left_soon() => {}
                // Nobody was: all begin again, in another view of the same.
                Err(error) if epoch.was_cut(&error, since) => {
                    thread::sleep(pauses.next());
                    epoch.change(&[]);
                }
                // Some are stopped, or late: those that are there begin again.
                Err(error) if epoch.go_on_without_absent(&error) => {}
                Err(error) => return Err(error),
            }
            epoch.may_pass()?;
            let view = epoch.await_next()?;
            epoch = Self { view, ..epoch };
        }
    }
}

impl Entered {
    /// The communicator of a view in which all ranks are in the program: steps can't go on without
    /// this rank, so those that are in one end it, and all meet again.
    ///
    /// # Errors
    /// As [`Communicator::rebuild`].
    pub(crate) fn in_program(self) -> Result<Communicator, Error> {
        let mut entered = self;
        while entered.standings.iter().any(|it| it.position != Position::Program) {
            entered = entered.epoch.enter_next(Position::Program)?;
        }
        Ok(entered.communicator)
    }
}

impl Communicator {
    /// The view that this communicator was made of; `None` if the job is not elastic, and for
    /// groups.
    pub fn view(&self) -> Option<View> {
        let Epoch { view, .. } = self.epoch.as_ref()?;
        Some(View { epoch: view.epoch, processes: identities(view) })
    }

    /// The communicator of those that are left, after [`ErrorKind::ViewChanged`]: of the job's next
    /// view, in which ranks are numbered anew, in the same order. Links and memory are its own;
    /// messengers, buckets and groups of all ranks of the old communicator have to be made again,
    /// and buffers of [`Communicator::allocate`] go on as memory that others reach with a copy.
    /// Groups of some ranks go on if all of these do ([`Communicator::split`]).
    ///
    /// Collective: every rank that is left calls it. Blocks until all have, or another change of
    /// view. If ranks are lost meanwhile, it goes on with those that are left then. If the view has
    /// not changed since this communicator was made, this makes it change, with the same ranks:
    /// calls of others on the old communicator end with [`ErrorKind::ViewChanged`].
    ///
    /// Cost: that of joining, about 0.1 s for 8 ranks.
    ///
    /// # Errors
    /// [`ErrorKind::RankLost`] if too few are left: less than [`Elastic::minimum`], or no quorum
    /// (more than half of the view before, or half of it with its rank 0), or if the others went on
    /// without this rank. [`ErrorKind::Configuration`] if the job is not elastic, or this is a
    /// group; and as [`Communicator::from_environment`].
    pub fn rebuild(&self) -> Result<Self, Error> {
        let epoch = self.elastic_epoch()?;
        // Its steps end with this epoch, on this rank at least.
        epoch.lineage.release(None);
        let entered = epoch.enter_next(Position::Program).and_then(Entered::in_program);
        entered.map_err(|error| error.on(self.rank()))
    }

    /// How many processes ask to be let into the job ([`Builder::join`](crate::Builder::join)), as
    /// far as this rank knows: other ranks may know of more, or of fewer. 0 in a job that is not
    /// elastic, and in groups. Never blocks.
    pub fn newcomers(&self) -> usize {
        self.epoch.as_ref().map_or(0, |epoch| epoch.lineage.newcomers())
    }

    /// The communicator of the next view, into which the processes are let that ask for it
    /// ([`Communicator::newcomers`]): their ranks follow those that there are. As
    /// [`Communicator::rebuild`] otherwise: also if nobody asks, or if those that ask are lost
    /// meanwhile, there is another view.
    ///
    /// Collective: every rank calls it, for example after a step in which an all-reduce has told
    /// all ranks that there are newcomers ([`StepReport::newcomers`]). Calls of others on this
    /// communicator end with [`ErrorKind::ViewChanged`], and they may call
    /// [`Communicator::rebuild`] as well: the newcomers enter. Those have a communicator in the
    /// same state, and nothing else: [`Communicator::share_state`] gives them the program's.
    ///
    /// [`StepReport::newcomers`]: crate::buckets::StepReport::newcomers
    ///
    /// # Errors
    /// As [`Communicator::rebuild`].
    pub fn admit(&self) -> Result<Self, Error> {
        let epoch = self.elastic_epoch()?;
        if epoch.last().await_repeated_newcomers()? {
            self.barrier()?;
        }
        epoch.admit();
        self.rebuild()
    }

    /// The communicator of all ranks but those in `exclude`, which need not take part: a rank that
    /// is stuck or slow can be left behind. Their calls, and whatever they call later, end with
    /// [`ErrorKind::RankLost`]. Groups that they are in end with [`ErrorKind::ViewChanged`], other
    /// groups of some ranks go on.
    ///
    /// Collective: every other rank calls it, with the same list; see [`Communicator::rebuild`].
    /// More than half of the ranks have to be there to agree, or half with rank 0; excluded ranks
    /// whose processes live count.
    ///
    /// # Errors
    /// As [`Communicator::rebuild`]; [`ErrorKind::Configuration`] if `exclude` names this rank, or
    /// one that does not exist.
    pub fn shrink(&self, exclude: &[Rank]) -> Result<Self, Error> {
        let epoch = self.elastic_epoch()?;
        if let Some(&rank) = exclude.iter().find(|&&it| it == self.rank() || it >= self.world()) {
            let text = format!("shrink {exclude:?} of {} ranks: not rank {rank}", self.world());
            return Err(Error::new(ErrorKind::Configuration, text).on(self.rank()));
        }
        epoch.change(exclude);
        self.rebuild()
    }

    /// Ends all calls on this communicator, on all ranks, with [`ErrorKind::ViewChanged`]; all
    /// ranks then [`rebuild`](Communicator::rebuild). The job's processes stay the same. Groups of
    /// some ranks go on.
    ///
    /// Not collective: any thread of any rank may call it. Returns at once.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the job is not elastic, or this is a group.
    pub fn revoke(&self) -> Result<(), Error> {
        self.elastic_epoch()?.change(&[]);
        Ok(())
    }

    fn elastic_epoch(&self) -> Result<&Epoch, Error> {
        self.epoch.as_ref().ok_or_else(|| {
            let text = "only the job's own communicator can be rebuilt, and only if it was made \
                        with `Builder::elastic` or UNISUM_ELASTIC";
            Error::new(ErrorKind::Configuration, text).on(self.rank())
        })
    }

    /// The epoch of the job's own communicator, if the job is elastic.
    pub(crate) const fn epoch(&self) -> Option<&Epoch> {
        self.epoch.as_ref()
    }

    /// This communicator as that of an elastic job's view.
    pub(crate) fn in_epoch(self, epoch: Option<Epoch>) -> Self {
        let mut communicator = self;
        communicator.epoch = epoch;
        communicator
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_fail_at_once_are_few_in_any_time() {
        for (seconds, most) in [(0.0, 1), (0.1, 5), (1.0, 8), (30.0, 66)] {
            let (mut pauses, mut now, mut attempts) = (Pauses::new(), Duration::ZERO, 0);
            while now <= Duration::from_secs_f64(seconds) {
                attempts += 1;
                now += pauses.next();
            }
            assert!(attempts <= most && attempts * 2 >= most, "{attempts} in {seconds} s");
        }
    }
}
