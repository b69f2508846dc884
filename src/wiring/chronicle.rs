//! What an elastic job logs of its views, and how it repeats those of an earlier one.

use std::time::Instant;

use unisum_control::elastic::{Member, Record, View};

use super::lineage::{Epoch, Lineage, identities};
use super::standing::{Position, Standing};
use crate::epoch_log::{Change, EpochLog, Head, History, Line, Moment, StepLine, ViewLine};
use crate::settings::Settings;
use crate::{Error, ErrorKind};

/// This process's log, and those of the job that this one repeats.
#[derive(Debug, Default)]
pub(crate) struct Chronicle {
    log: Option<EpochLog>,
    history: Option<History>,
}

impl Chronicle {
    /// Reads the logs of the job that is to be repeated, if one is.
    ///
    /// # Errors
    /// If they can't be read or repeated, or are of a job with other settings.
    pub(super) fn read(settings: &Settings) -> Result<Self, Error> {
        let Some(folder) = &settings.replay else { return Ok(Self::default()) };
        let refused = |why| Error::new(ErrorKind::Configuration, why);
        let history = History::read(folder).map_err(refused)?;
        let (own, theirs) = (super::common_settings(settings), history.settings());
        if own != theirs {
            let text = format!("the job to repeat had {theirs}, this one has {own}");
            return Err(refused(text));
        }
        if !settings.reproducible {
            let text = "a job is repeated only if it had UNISUM_REPRODUCIBLE=1: otherwise, bits \
                        depend on what was measured";
            return Err(refused(text.to_owned()));
        }
        Ok(Self { log: None, history: Some(history) })
    }

    /// Begins the log of this process.
    ///
    /// # Errors
    /// If it can't be written.
    pub(super) fn begin(&mut self, settings: &Settings, process: u64) -> Result<(), Error> {
        let Some(folder) = &settings.epoch_log else { return Ok(()) };
        let head = Head { process, settings: super::common_settings(settings) };
        let log = EpochLog::begin(folder, head);
        self.log = Some(log.map_err(|why| Error::new(ErrorKind::Configuration, why))?);
        Ok(())
    }

    /// That of a process that the job is started with, as a rank of `world`.
    ///
    /// # Errors
    /// As [`Chronicle::read`] and [`Chronicle::begin`]; if the job to repeat had another world.
    pub(super) fn of_founder(
        settings: &Settings,
        rank: usize,
        world: usize,
    ) -> Result<Self, Error> {
        let mut chronicle = Self::read(settings)?;
        if let Some(history) = &chronicle.history
            && history.founders().len() != world
        {
            let theirs = history.founders().len();
            let text =
                format!("the job to repeat began with {theirs} ranks, this one with {world}");
            return Err(Error::new(ErrorKind::Configuration, text));
        }
        chronicle.begin(settings, rank as u64)?;
        Ok(chronicle)
    }

    /// Which newcomer of the job to repeat this process is.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn newcomer(&self, settings: &Settings) -> Result<Option<Member>, Error> {
        let Some(history) = &self.history else { return Ok(None) };
        let refused = |text: String| Error::new(ErrorKind::Configuration, text);
        let own = settings.replay_process.ok_or_else(|| {
            let text = "a newcomer to a job that repeats another one needs UNISUM_REPLAY_PROCESS, \
                        its number there";
            refused(text.to_owned())
        })?;
        match history.entrance(own) {
            Some(_) => Ok(Some(Member(own))),
            None => Err(refused(format!("no process {own} joined the job to repeat"))),
        }
    }

    /// Whether a record is of the view that there was as this newcomer entered.
    ///
    /// # Errors
    /// That they are not.
    pub(super) fn fits(&self, own: Option<Member>, record: Record) -> Result<Record, String> {
        let entrance = own.and_then(|own| self.history.as_ref()?.entrance(own.0));
        let Some(entrance) = entrance else { return Ok(record) };
        match record.epoch == entrance.from {
            true => Ok(record),
            false => Err("the job is not yet in the view that this process entered".to_owned()),
        }
    }

    /// The process has entered a view, from `from`, in which it made so many layers.
    pub(super) fn entered(&self, (from, layer): (&View, u64), view: &View, all: &[Standing]) {
        let Some(log) = &self.log else { return };
        let without = |all: &View, others: &View| -> Vec<u64> {
            all.members.iter().filter(|it| !others.has(**it)).map(|it| it.0).collect()
        };
        log.write(&Line::View(ViewLine {
            epoch: view.epoch,
            processes: identities(view),
            from: from.epoch,
            lost: without(from, view),
            joined: if view.epoch == 1 { Vec::new() } else { without(view, from) },
            layer,
            steps: Standing::decided_steps(all),
            places: all.iter().map(Standing::place).collect(),
        }));
    }
}

impl Lineage {
    /// A step has ended that a change of view interrupted.
    pub(crate) fn log_step(&self, step: StepLine) {
        if let Some(log) = &self.chronicle.log {
            log.write(&Line::Step(step));
        }
    }
}

impl Epoch {
    /// Whether the job repeats another one.
    pub(crate) fn repeats(&self) -> bool {
        self.lineage.chronicle.history.is_some()
    }

    /// The change of view that ends this epoch in the job that this one repeats.
    fn repeated(&self) -> Option<&Change> {
        self.lineage.chronicle.history.as_ref()?.next(self.view.epoch)
    }

    /// Whether the view changes at this moment in the job that this one repeats.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if it changed before.
    pub(crate) fn is_due(&self, moment: Moment) -> Result<bool, Error> {
        let Some(history) = &self.lineage.chronicle.history else { return Ok(false) };
        let at = (self.view.epoch, self.lineage.layers_in_epoch());
        history.is_due(at, self.lineage.own().0, moment).map_err(|why| strays(&why))
    }

    /// Whether newcomers were let in behind a step; `None` if the job repeats none.
    pub(crate) fn turns_after(&self, step: u64) -> Option<bool> {
        let history = self.lineage.chronicle.history.as_ref()?;
        Some(history.turns_after((self.view.epoch, self.lineage.layers_in_epoch()), step))
    }

    /// Whether this process is not in the next view of the job that this one repeats.
    pub(crate) fn ends_here(&self) -> bool {
        let own = self.lineage.own().0;
        self.repeated().is_some_and(|next| !next.processes.contains(&own))
    }

    /// Waits until as many newcomers ask to be let in as entered in the job that this one repeats;
    /// whether it repeats one.
    ///
    /// # Errors
    /// If they don't come in time.
    pub(crate) fn await_repeated_newcomers(&self) -> Result<bool, Error> {
        let Some(next) = self.repeated() else { return Ok(self.repeats()) };
        let count = next.joined().count();
        let timeout = self.lineage.settings().connect_timeout;
        let now = self.lineage.await_newcomers(count, Instant::now() + timeout);
        if now < count {
            let (epoch, seconds) = (next.epoch, timeout.as_secs_f64());
            let text = format!(
                "{count} processes entered epoch {epoch} there, and {now} came within {seconds} s"
            );
            return Err(strays(&text));
        }
        Ok(true)
    }

    /// Whether this view may be left before a communicator was made of it.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if it was not in the job that this one repeats.
    pub(crate) fn may_pass(&self) -> Result<(), Error> {
        let Some(history) = &self.lineage.chronicle.history else { return Ok(()) };
        let entrance = history.entrance(self.lineage.own().0);
        match entrance.is_some_and(|it| it.epoch > self.view.epoch) {
            true => Ok(()),
            false => Err(strays(&format!("a rank was lost as epoch {} began", self.view.epoch))),
        }
    }

    /// Leaves this epoch as the job that this one repeats did, and gives the view that it entered.
    ///
    /// # Errors
    /// [`ErrorKind::RankLost`] if this process ended there. [`ErrorKind::Mismatch`] if this job has
    /// strayed from the other one: a rank is lost, or the program makes other calls.
    pub(crate) fn repeat_change(&self, position: Position) -> Result<View, Error> {
        let Some(next) = self.repeated() else {
            return Err(strays("it ended in this epoch, or its log does"));
        };
        let own = self.lineage.own().0;
        if self.ends_here() {
            // The others leave it behind.
            let end = self.await_next().err();
            let end = end.map_or_else(|| "they did not".to_owned(), |error| error.to_string());
            let text = format!("the log that this job repeats has process {own} end here ({end})");
            return Err(Error::new(ErrorKind::RankLost, text));
        }
        let place = match position {
            Position::Program => None,
            Position::Step(step) => Some(step),
        };
        if place != next.place(own) {
            let text = format!(
                "process {own} enters epoch {} in {}, and here in {}",
                next.epoch,
                in_words(next.place(own)),
                in_words(place)
            );
            return Err(strays(&text));
        }
        let mut epoch = self.clone();
        match next.joined().count() {
            0 => epoch.change(&next.lost_ranks()),
            _ => epoch.admit(),
        }
        loop {
            let view = epoch.await_next()?;
            if view.epoch == next.epoch && identities(&view) == next.processes {
                return Ok(view);
            }
            if view.epoch >= next.epoch {
                let (theirs, ours) = (&next.processes, identities(&view));
                let (number, now) = (next.epoch, view.epoch);
                let text = format!("epoch {number} had processes {theirs:?}, here {now} {ours:?}");
                return Err(strays(&text));
            }
            // There, views were left before a communicator was made of them.
            epoch = Self { view, ..epoch };
            epoch.change(&[]);
        }
    }
}

fn in_words(place: Option<u64>) -> String {
    place.map_or_else(|| "no step".to_owned(), |step| format!("step {step}"))
}

/// The error of a job that does not repeat the other one.
pub(super) fn strays(why: &str) -> Error {
    let text = format!("this job strays from the one that it repeats: {why}");
    Error::new(ErrorKind::Mismatch, text)
}
