//! An elastic job as this process knows it, from view to view: what outlives communicators.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unisum_control::address::Rendezvous;
use unisum_control::elastic::{Member, Prospect, Record, View, Views, ViewsConfig};
use unisum_control::launcher::Detected;
use unisum_control::{Control, IsMoot, Verdict, VerdictKind};
use unisum_link::Rank;

use super::Elasticity;
use super::chronicle::Chronicle;
use super::joining::{Published, RecordPlace};
use super::meeting::Meeting;
use super::standing::{Decided, Position, Standing};
use super::store::{Store, StoreEntry};
use crate::error::ViewChange;
use crate::settings::Settings;
use crate::version::BUILD;
use crate::{Elastic, Error, ErrorKind};

/// How much longer than silence may last the others may take to agree on the next view.
const AGREEMENT_SPARE: Duration = Duration::from_secs(3);
/// How long a failure waits for a loss that explains it.
pub(super) const EXPLAINED_WITHIN: Duration = Duration::from_secs(1);

/// An elastic job: its views, and what making a communicator of one takes.
#[derive(Debug)]
pub(crate) struct Lineage {
    pub(super) views: Views,
    elastic: Elastic,
    settings: Settings,
    detected: Detected,
    pub(super) credentials: (unisum_link::secure::Credentials, String),
    layer: Mutex<Layer>,
    /// The last view that this process has made a communicator of.
    entered: Mutex<View>,
    pub(super) place: RecordPlace,
    /// While this process is the first rank.
    published: Mutex<Option<Published>>,
    pub(super) chronicle: Chronicle,
}

/// The gradient buckets whose steps outlive a change of view: one layer at a time.
#[derive(Debug, Default)]
struct Layer {
    /// Counts the layers that there were.
    number: u64,
    /// Counts those of the epoch that this process is in.
    in_epoch: u64,
    is_there: bool,
    /// The last step of the last layer that this rank saw decided.
    decided: Option<Decided>,
}

/// The view that a communicator was made of.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    pub(crate) lineage: Arc<Lineage>,
    pub(crate) view: View,
}

impl Lineage {
    /// Founds the views of a job whose ranks have just met. All ranks call it. Blocks for all.
    pub(crate) fn found(
        elastic: &Elastic,
        settings: &Settings,
        detected: &Detected,
        meeting: &Meeting,
        control: &Arc<Control>,
    ) -> Result<Epoch, Error> {
        let chronicle = Chronicle::of_founder(settings, detected.rank, detected.world)?;
        let config = config(elastic, settings, detected, meeting);
        let failed = |error: unisum_control::ControlError| super::rendezvous_error(error);
        // By the network that data goes by.
        let towards = control.addresses().first().copied();
        let prospect = Prospect::listen(config, towards).map_err(failed)?;
        let own: Vec<_> = prospect.addresses().iter().map(ToString::to_string).collect();
        let blobs = control.exchange(own.join(" ").into_bytes()).map_err(failed)?;
        let addresses = blobs.iter().enumerate().map(|(rank, blob)| {
            parse_addresses(blob).ok_or_else(|| {
                let text = format!("rank {rank} told no address for the elastic job");
                Error::new(ErrorKind::Rendezvous, text).caused_by(vec![rank])
            })
        });
        let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
        let (session, verdict) = (control.session(), || control.verdict());
        let views = prospect.found(session, detected.rank, addresses, &verdict).map_err(failed)?;
        // When all have come so far, every two are connected.
        control.exchange(Vec::new()).map_err(failed)?;
        // That of the communicator, though ranks may have been lost since: another view may be
        // decided already, in which ranks have other numbers.
        let view = View::first((0..detected.world as u64).map(Member).collect());
        let lineage = Self::new(views, elastic, (settings, detected), (meeting, chronicle));
        let epoch = Epoch { lineage: Arc::new(lineage), view };
        epoch.bind(control);
        epoch.entered(&[]);
        Ok(epoch)
    }

    /// Founds the views of a job that has one rank as yet.
    pub(crate) fn found_alone(
        elastic: &Elastic,
        settings: &Settings,
        detected: &Detected,
        meeting: &Meeting,
    ) -> Result<Epoch, Error> {
        let failed = |error: unisum_control::ControlError| super::rendezvous_error(error);
        let chronicle = Chronicle::of_founder(settings, detected.rank, detected.world)?;
        let config = config(elastic, settings, detected, meeting);
        let prospect = Prospect::listen(config, None).map_err(failed)?;
        let session = unisum_link::handshake::random().map_err(|error| {
            Error::new(ErrorKind::Rendezvous, format!("choosing a session: {error}"))
        })?;
        let addresses = vec![prospect.addresses().to_vec()];
        let views = prospect.found(session, 0, addresses, &|| None).map_err(failed)?;
        let view = views.membership().view;
        let lineage = Self::new(views, elastic, (settings, detected), (meeting, chronicle));
        let epoch = Epoch { lineage: Arc::new(lineage), view };
        epoch.entered(&[]);
        Ok(epoch)
    }

    pub(super) fn new(
        views: Views,
        elastic: &Elastic,
        (settings, detected): (&Settings, &Detected),
        (meeting, chronicle): (&Meeting, Chronicle),
    ) -> Self {
        Self {
            views,
            elastic: elastic.clone(),
            settings: settings.clone(),
            detected: detected.clone(),
            credentials: (meeting.credentials.clone(), meeting.secret_origin.clone()),
            layer: Mutex::default(),
            entered: Mutex::default(),
            place: meeting.place.clone(),
            published: Mutex::default(),
            chronicle,
        }
    }

    /// Who this process is, in all views.
    pub(super) const fn own(&self) -> Member {
        self.views.own()
    }

    /// Where others reach this process first: in later epochs and groups, too.
    pub(super) const fn towards(&self) -> Option<SocketAddr> {
        self.views.listens_at()
    }

    /// Where the members of a view are.
    pub(super) fn record(&self, view: &View) -> Record {
        self.views.record(view)
    }

    /// Keeps the members record that this process has written until there is another one.
    pub(super) fn keep_published(&self, published: Option<Published>) {
        let mut place = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, published);
        drop(place);
        before.into_iter().for_each(Published::forget);
    }

    /// How many processes ask to be let in, as far as this one knows.
    pub(crate) fn newcomers(&self) -> usize {
        self.views.membership().newcomers
    }

    /// Waits until so many do, or `until`; how many do then.
    pub(super) fn await_newcomers(&self, count: usize, until: Instant) -> usize {
        self.views.await_newcomers(count, until).newcomers
    }

    pub(crate) const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The number of a new layer of gradient buckets, unless there is one.
    pub(crate) fn claim(&self) -> Option<u64> {
        let mut layer = self.layer();
        if layer.is_there {
            return None;
        }
        let (number, in_epoch) = (layer.number + 1, layer.in_epoch + 1);
        *layer = Layer { number, in_epoch, is_there: true, decided: None };
        Some(number)
    }

    /// How many layers this process has made in the epoch that it is in.
    pub(super) fn layers_in_epoch(&self) -> u64 {
        self.layer().in_epoch
    }

    /// Whether the layer of this number goes on in later views.
    pub(crate) fn has(&self, number: u64) -> bool {
        let layer = self.layer();
        layer.is_there && layer.number == number
    }

    /// The layer of this number ends, or whichever there is: it goes on in no later view.
    pub(crate) fn release(&self, number: Option<u64>) {
        let mut layer = self.layer();
        if number.is_none_or(|number| number == layer.number) {
            layer.is_there = false;
        }
    }

    /// This rank saw a step of the layer decided.
    pub(crate) fn decide(&self, number: u64, decided: Decided) {
        let mut layer = self.layer();
        if layer.number == number {
            layer.decided = Some(decided);
        }
    }

    /// How far this rank is, there.
    pub(crate) fn standing(&self, position: Position) -> Standing {
        Standing { position, decided: self.layer().decided.clone() }
    }

    fn layer(&self) -> MutexGuard<'_, Layer> {
        // Every critical section leaves it whole.
        self.layer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether connections go on after they were cut.
    pub(super) const fn survives_cuts(&self) -> bool {
        !self.settings.reconnect_timeout.is_zero()
    }

    /// Whether something that ranks have made together since then may have failed because
    /// connections were cut, and is worth another attempt within `limit`: ranks that meet can't yet
    /// tell that from a death, but nobody is lost.
    pub(super) fn may_be_cut(&self, error: &Error, since: Instant, limit: Duration) -> bool {
        self.survives_cuts()
            && matches!(error.kind(), ErrorKind::Rendezvous | ErrorKind::RankLost)
            && since.elapsed() < limit
            && self.views.membership().end.is_none()
    }

    /// How long the others may take to agree on a view.
    pub(super) fn patience(&self) -> Duration {
        let Settings { heartbeat_timeout, reconnect_timeout, .. } = self.settings;
        (heartbeat_timeout + reconnect_timeout) * 4 + AGREEMENT_SPARE
    }

    /// The job's name, which outlives its views.
    pub(super) fn job(&self) -> &str {
        &self.detected.job
    }

    /// Whether the job goes on in a view.
    ///
    /// # Errors
    /// [`ErrorKind::RankLost`] if too few are left.
    pub(super) fn check_minimum(&self, view: &View) -> Result<(), Error> {
        let (left, minimum) = (view.members.len(), self.elastic.minimum);
        if left >= minimum {
            return Ok(());
        }
        let text = format!("{left} ranks are left, and the job needs {minimum}");
        Err(Error::new(ErrorKind::RankLost, text))
    }

    /// Whom the job leaves behind because of an error that is a loss.
    pub(super) fn to_leave_behind<'a>(
        &self,
        error: &'a Error,
        verdict: Option<&Verdict>,
    ) -> &'a [Rank] {
        let skipped = match verdict.map(|it| it.kind) {
            // Of two that do not reach each other, one can stay.
            Some(VerdictKind::Cut) => 1,
            // Who has died is lost anyway; where only its control connection was cut as ranks met,
            // it is not.
            Some(VerdictKind::Died) if self.survives_cuts() => error.failed_ranks().len(),
            _ => 0,
        };
        error.failed_ranks().get(skipped..).unwrap_or_default()
    }

    /// What this process joins a view with: its rank there, and where its ranks meet.
    pub(crate) fn meet(self: &Arc<Self>, view: &View) -> Result<(Detected, Meeting), Error> {
        let rank = view.rank(self.views.own()).ok_or_else(|| {
            let text = format!("this process is not in epoch {}", view.epoch);
            Error::new(ErrorKind::RankLost, text)
        })?;
        let job = format!("{} epoch {}", self.detected.job, view.epoch);
        let mut detected =
            Detected { rank, world: view.members.len(), job, ..self.detected.clone() };
        (detected.local_rank, detected.local_size, detected.store) = (None, None, None);
        let store = ViewStore { lineage: self.clone(), epoch: view.epoch };
        let entry = StoreEntry::new(Arc::new(store), "the next epoch");
        let mut addresses = Vec::new();
        if rank > 0 && view.members.len() > 1 {
            addresses = entry.look_up(self.settings.connect_timeout)?.addresses;
        }
        let key = format!("epoch {}", view.epoch);
        detected.rendezvous = Some(Rendezvous::Store { key, addresses });
        let (credentials, origin) = self.credentials.clone();
        let (lineage, epoch) = (self.clone(), view.epoch);
        let is_moot = IsMoot(Box::new(move || lineage.views.is_left(epoch)));
        let entry = (rank == 0).then_some(entry);
        let by = (is_moot, self.towards());
        Ok((detected, Meeting::of_view(credentials, origin, entry, by)))
    }
}

/// What a process is a member of an elastic job with.
pub(super) fn config(
    elastic: &Elastic,
    settings: &Settings,
    detected: &Detected,
    meeting: &Meeting,
) -> ViewsConfig {
    ViewsConfig {
        job: detected.job.clone(),
        credentials: meeting.credentials.clone(),
        interface: settings.interface.clone(),
        port_range: settings.port_range,
        silence: settings.heartbeat_timeout,
        connect_timeout: settings.connect_timeout,
        reconnect_timeout: settings.reconnect_timeout,
        build: BUILD,
        terms: super::told_settings(settings, Elasticity::Founded(elastic)),
        newcomer: None,
    }
}

impl Epoch {
    /// This process has made a communicator of the view, whose ranks were so far; none in the
    /// first. The first rank says to those that want to join where its members are.
    pub(crate) fn entered(&self, standings: &[Standing]) {
        let mut entered = self.lineage.entered.lock().unwrap_or_else(PoisonError::into_inner);
        let from = std::mem::replace(&mut *entered, self.view.clone());
        drop(entered);
        let layer = std::mem::take(&mut self.lineage.layer().in_epoch);
        self.lineage.chronicle.entered((&from, layer), &self.view, standings);
        self.lineage.publish(self);
    }

    /// The last epoch that this process has made a communicator of, or this one.
    pub(crate) fn last(&self) -> Self {
        let entered = self.lineage.entered.lock().unwrap_or_else(PoisonError::into_inner);
        let is_later = entered.epoch > self.view.epoch;
        let view = if is_later { entered.clone() } else { self.view.clone() };
        Self { lineage: self.lineage.clone(), view }
    }

    /// Has the job leave this epoch, and those enter the next one that ask to be let in.
    pub(crate) fn admit(&self) {
        let last = self.last().view.epoch;
        self.lineage.views.change(last, Vec::new(), true);
    }

    /// Ends `control` when the job leaves this epoch.
    pub(crate) fn bind(&self, control: &Arc<Control>) {
        self.lineage.views.bind(self.view.epoch, control);
    }

    /// Has the job leave this epoch, without these of its ranks.
    pub(crate) fn change(&self, out: &[Rank]) {
        let member = |&rank: &Rank| self.view.members.get(rank).copied();
        self.lineage.views.change(self.view.epoch, out.iter().filter_map(member).collect(), false);
    }

    /// Has the job leave ranks behind that did not come to enter this epoch, or do not answer, if
    /// the others may go on without them: whether they may.
    pub(crate) fn go_on_without_absent(&self, error: &Error) -> bool {
        let absent = error.failed_ranks();
        let is_there = |it| self.view.rank(it).is_some_and(|rank| !absent.contains(&rank));
        let may = error.is_absence() && self.view.is_quorum(is_there);
        if may {
            self.change(absent);
        }
        may
    }

    /// Waits until the job has left this epoch for another one. Blocks for as long as silence may
    /// last, and for a few seconds more.
    ///
    /// # Errors
    /// If this process is no longer in the job, or too few are, or no view is agreed on.
    pub(crate) fn await_next(&self) -> Result<View, Error> {
        let until = Instant::now() + self.lineage.patience();
        let now = self.lineage.views.await_change(self.view.epoch, until);
        let is_later = now.view.epoch > self.view.epoch;
        // First: the others of so small a view may have ended already, and that ends it, too.
        if is_later {
            let lost = |error: Error| error.caused_by(self.lost_in(&now.view));
            self.lineage.check_minimum(&now.view).map_err(lost)?;
        }
        if let Some(end) = now.end {
            return Err(Error::new(ErrorKind::RankLost, end));
        }
        if !is_later || now.is_changing {
            let seconds = self.lineage.patience().as_secs_f64();
            let text = format!("the ranks did not agree on who is left within {seconds} s");
            return Err(Error::new(ErrorKind::Timeout, text));
        }
        Ok(now.view)
    }

    /// Until what is returned is dropped, ranks that leave in order are lost like others: every one
    /// of them is needed to make a communicator.
    pub(crate) fn need_all(&self) -> NeedsAll {
        NeedsAll::new(self.lineage.clone())
    }

    /// Whether the job leaves this epoch within about a second: a loss is seen as soon, but not at
    /// once.
    pub(crate) fn is_left_soon(&self) -> bool {
        let until = Instant::now() + EXPLAINED_WITHIN;
        self.lineage.views.await_left(self.view.epoch, until)
    }

    /// Whether making a communicator of this epoch, begun at `since`, may have failed because
    /// connections were cut, and is worth another attempt.
    pub(crate) fn was_cut(&self, error: &Error, since: Instant) -> bool {
        let limit = self.lineage.settings.reconnect_timeout;
        self.lineage.may_be_cut(error, since, limit)
    }

    /// This epoch's ranks that are not in a later view.
    fn lost_in(&self, later: &View) -> Vec<Rank> {
        let members = self.view.members.iter().enumerate();
        members.filter(|(_, it)| !later.has(**it)).map(|(rank, _)| rank).collect()
    }

    /// What an error is in an elastic job: if ranks are lost, that is a change of view, which this
    /// waits for. `verdict` is what all ranks were told, if they were.
    pub(crate) fn explain(&self, error: Error, verdict: Option<&Verdict>) -> Error {
        if !is_loss(&error, verdict) {
            return error;
        }
        let noticed = Instant::now();
        self.change(self.lineage.to_leave_behind(&error, verdict));
        let rank = error.rank();
        let on = |it: Error| rank.map_or_else(|| it.clone(), |rank| it.clone().on(rank));
        match self.await_next() {
            Ok(view) => on(self.changed(&view, &error, noticed)),
            Err(end) => {
                let text = format!("{end} ({error})");
                let lost = match end.failed_ranks() {
                    [] => error.failed_ranks().to_vec(),
                    lost => lost.to_vec(),
                };
                on(Error::new(end.kind(), text).caused_by(lost))
            }
        }
    }

    /// The error of calls on a communicator of this epoch once the job is in a later one.
    fn changed(&self, view: &View, cause: &Error, noticed: Instant) -> Error {
        let lost = self.lost_in(view);
        let joined = view.members.iter().enumerate().filter(|(_, it)| !self.view.has(**it));
        let joined: Vec<Rank> = joined.map(|(rank, _)| rank).collect();
        let (epoch, world) = (view.epoch, view.members.len());
        let what = match (&lost[..], &joined[..]) {
            ([], []) => "the same ranks".to_owned(),
            ([], joined) => format!("{} more", joined.len()),
            (lost, []) => format!("without ranks {lost:?}"),
            (lost, joined) => format!("without ranks {lost:?} and {} more", joined.len()),
        };
        let text = format!("the job goes on in epoch {epoch}, of {world} ranks, {what}: {cause}");
        Error::new(ErrorKind::ViewChanged, text).caused_by(lost.clone()).changing(ViewChange {
            epoch,
            lost,
            joined,
            noticed,
        })
    }
}

/// Whether an error means that ranks are lost: `verdict` is what all ranks were told, if they were.
pub(super) fn is_loss(error: &Error, verdict: Option<&Verdict>) -> bool {
    match verdict.map(|it| it.kind) {
        Some(VerdictKind::Superseded | VerdictKind::Unresponsive) => true,
        _ => error.kind() == ErrorKind::RankLost,
    }
}

/// While every rank of the view is needed.
pub(crate) struct NeedsAll(Arc<Lineage>);

impl NeedsAll {
    pub(super) fn new(lineage: Arc<Lineage>) -> Self {
        lineage.views.need_all(true);
        Self(lineage)
    }
}

impl Drop for NeedsAll {
    fn drop(&mut self) {
        self.0.views.need_all(false);
    }
}

/// How the ranks of a view meet: the first tells the others by the connections that there are.
struct ViewStore {
    lineage: Arc<Lineage>,
    epoch: u64,
}

impl Store for ViewStore {
    fn set(&self, _: &str, value: &[u8]) -> Result<(), String> {
        self.lineage.views.tell(self.epoch, value);
        Ok(())
    }

    fn get(&self, _: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let told = self.lineage.views.told(self.epoch, Instant::now() + timeout);
        told.ok_or_else(|| match self.lineage.views.is_left(self.epoch) {
            true => "the view has changed again".to_owned(),
            false => "its first rank has not said where it listens".to_owned(),
        })
    }
}

pub(super) fn parse_addresses(blob: &[u8]) -> Option<Vec<SocketAddr>> {
    let text = std::str::from_utf8(blob).ok()?;
    let addresses: Vec<_> = text.split(' ').map(|it| it.parse().ok()).collect::<Option<_>>()?;
    (!addresses.is_empty()).then_some(addresses)
}

/// Who a member is, for programs: the same process has the same number in all views.
pub(crate) fn identities(view: &View) -> Vec<u64> {
    view.members.iter().map(|&Member(identity)| identity).collect()
}
