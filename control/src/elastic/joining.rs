//! How a process joins a job that runs.

use std::thread;
use std::time::{Duration, Instant};

use unisum_link::handshake;
use unisum_views::Member;

use super::super::ControlError;
use super::super::error::Reasons;
use super::dialing::{Dialer, Missed};
use super::shared::Command;
use super::{Prospect, Record, Views, ViewsConfig};

/// Finds the members record, as it is now; an error says why there is none.
pub type Find<'a> = dyn FnMut() -> Result<Record, String> + 'a;

/// The numbers of newcomers begin here; below are those that the job was started with.
pub(super) const FIRST_NEWCOMER: u64 = 1 << 31;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// How long none of a record's members may answer before the record is one of a job that has ended:
/// another start of the job may be about to replace it.
const STALE_AFTER: Duration = Duration::from_secs(3);

impl Views {
    /// Joins a job that runs: finds a member by its record, is connected with all members, and
    /// waits to be let in, which the job's program decides. Blocks until this process is in a view,
    /// `until` at most.
    ///
    /// # Errors
    /// If there is no record, no member answers, all that answer refuse this process, or the job
    /// ends or lets nobody in.
    pub fn join(
        config: &ViewsConfig,
        find: &mut Find<'_>,
        until: Instant,
    ) -> Result<Self, ControlError> {
        let started = Instant::now();
        let (mut reasons, mut stale) = (Reasons::default(), None);
        loop {
            match find() {
                Ok(record) => match Attempt::new(config, record)?.make(until)? {
                    Outcome::Joined(views) => return Ok(*views),
                    Outcome::Missed(record, why) => {
                        reasons.add(why);
                        let met = || (record.clone(), Instant::now());
                        let (known, since) = stale.get_or_insert_with(met);
                        if *known != record {
                            stale = None;
                        } else if since.elapsed() >= STALE_AFTER {
                            let text = format!(
                                "none of the {} members that its record names answers, so it has \
                                 ended",
                                record.members.len()
                            );
                            return Err(failed(started, &format!("{text}: {reasons}")));
                        }
                    }
                },
                Err(why) => reasons.add(why),
            }
            let now = Instant::now();
            if now >= until {
                return Err(failed(started, &reasons.to_string()));
            }
            thread::sleep(PAUSE.min(until - now));
        }
    }
}

/// An attempt, under a number of its own: a process that comes back is another member.
struct Attempt<'a> {
    config: &'a ViewsConfig,
    own: Member,
    dialer: Dialer,
    record: Record,
    started: Instant,
}

enum Outcome {
    Joined(Box<Views>),
    /// No member was reached, or none for long enough.
    Missed(Record, String),
}

impl<'a> Attempt<'a> {
    fn new(config: &'a ViewsConfig, record: Record) -> Result<Self, ControlError> {
        let own = loop {
            if let Some(given) = config.newcomer {
                break given;
            }
            let random = handshake::random().map_err(|error| {
                ControlError::system("choosing a number for this process", error)
            })?;
            let own = Member(FIRST_NEWCOMER | u64::from(u32::from_le_bytes(random)));
            if record.members.iter().all(|(it, _)| *it != own) {
                break own;
            }
        };
        let dialer = Dialer::new(config, own, record.session);
        Ok(Self { config, own, dialer, record, started: Instant::now() })
    }

    fn make(self, until: Instant) -> Result<Outcome, ControlError> {
        let Self { config, own, dialer, record, started } = self;
        let (mut reasons, mut telling) = (Reasons::default(), None::<Missed>);
        for (member, addresses) in &record.members {
            let time = until.saturating_duration_since(Instant::now());
            let missed = match dialer.try_once(*member, addresses, time) {
                Ok((proven, at)) => {
                    // By the network that leads there.
                    let prospect = Prospect::listen(config.clone(), Some(at))?;
                    let directory = vec![(own, prospect.addresses().to_vec())];
                    let views = prospect.spawn(own, None, record.session, (directory, dialer))?;
                    views.command(Command::Connected(*member, proven, at));
                    return wait(views, record, (started, until));
                }
                Err(missed) => missed,
            };
            reasons.add(missed.why.clone());
            // Of those that know as much, the first.
            if telling.as_ref().is_none_or(|it| it.how < missed.how) {
                telling = Some(missed);
            }
        }
        // Whoever has a lost member's port now may refuse this process as well, so none is believed
        // before all were asked.
        match telling {
            Some(missed) if missed.how.is_refusal() => Err(failed(started, &missed.why)),
            _ => Ok(Outcome::Missed(record, reasons.to_string())),
        }
    }
}

/// Waits to be let in.
fn wait(
    views: Views,
    record: Record,
    (started, until): (Instant, Instant),
) -> Result<Outcome, ControlError> {
    let now = views.shared.wait(until, |it| it.is_over() || it.view.epoch > 0);
    let seen = views.shared.seen();
    match (now.end, seen) {
        (None, _) if now.view.epoch > 0 => Ok(Outcome::Joined(Box::new(views))),
        (Some(why), Some(_)) => Err(failed(started, &why)),
        // The member that it reached was about to leave, or did not know the view itself.
        (Some(why), None) => Ok(Outcome::Missed(record, why)),
        (None, Some(view)) => {
            let (epoch, world) = (view.epoch, view.members.len());
            let text = format!(
                "its {world} ranks, in epoch {epoch}, have not let this process in: their program \
                 calls `admit` for that"
            );
            Err(failed(started, &text))
        }
        (None, None) => Err(failed(started, "a member answered, and said nothing more")),
    }
}

fn failed(started: Instant, why: &str) -> ControlError {
    ControlError::NotJoined { waited: started.elapsed(), why: why.to_owned() }
}
