//! How a process joins an elastic job that runs: by the members record that the job keeps beside
//! its rendezvous.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisum_control::Environment;
use unisum_control::address::Rendezvous;
use unisum_control::elastic::{PublishedRecord, Record, Views, ViewsConfig};
use unisum_control::launcher::{Detected, Token};

use super::chronicle::Chronicle;
use super::lineage::{Epoch, Lineage};
use super::meeting::Meeting;
use super::store::StoreEntry;
use crate::settings::Settings;
use crate::{Elastic, Error, ErrorKind, Store};

/// How long a look into a store may take that has answered before.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Where an elastic job keeps its members record.
#[derive(Clone, Debug)]
pub(crate) enum RecordPlace {
    File(PathBuf),
    /// With the job's token, if the store has it.
    Store(StoreEntry, Option<Token>),
    /// The ranks meet where nothing can be kept.
    Nowhere,
}

/// A members record that this process has written, as the first rank of its view.
#[derive(Debug)]
pub(super) enum Published {
    File(#[expect(dead_code, reason = "dropped, not read")] PublishedRecord),
    /// What was written where, unless it has been replaced.
    Store(Option<(StoreEntry, String)>),
}

impl RecordPlace {
    /// Where the user has said, or beside a rendezvous that is no store's.
    pub(super) fn given_or_beside(settings: &Settings, rendezvous: Option<&Rendezvous>) -> Self {
        match (&settings.members, rendezvous) {
            (Some(path), _) => Self::File(path.clone()),
            (None, Some(Rendezvous::File(path))) => Self::File(members_of(path)),
            (None, Some(Rendezvous::Tcp { .. } | Rendezvous::Store { .. }) | None) => Self::Nowhere,
        }
    }

    fn find(&self) -> Result<Record, String> {
        match self {
            Self::File(path) => {
                let read = Record::read(path);
                read.map_err(|error| format!("reading {}: {error}", path.display()))
            }
            Self::Store(entry, _) => entry.look_up_record(LOOK_TIMEOUT).map(|(_, record)| record),
            Self::Nowhere => Err(NOWHERE.to_owned()),
        }
    }

    fn publish(&self, record: &Record) -> Result<Option<Published>, String> {
        match self {
            Self::File(path) => match record.publish(path) {
                Ok(published) => Ok(Some(Published::File(published))),
                Err(error) => Err(format!("writing {}: {error}", path.display())),
            },
            Self::Store(entry, token) => {
                let written = entry.publish_record(token.as_ref(), record)?;
                Ok(Some(Published::Store(Some((entry.clone(), written)))))
            }
            Self::Nowhere => Ok(None),
        }
    }
}

const NOWHERE: &str = "a process can join a job whose ranks meet by a file or by a store: \
    expected UNISUM_RENDEZVOUS=file:///PATH, or store://KEY, or UNISUM_MEMBERS=PATH, the same as \
    the job's";

/// The file of the members record, beside the rendezvous file.
fn members_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".members");
    name.into()
}

impl Published {
    /// Another record is there now, in the same place.
    pub(super) fn forget(mut self) {
        if let Self::Store(written) = &mut self {
            *written = None;
        }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if let Self::Store(Some((entry, written))) = self {
            entry.retract(written, LOOK_TIMEOUT);
        }
    }
}

impl Lineage {
    /// Writes the members record of a view, if this process is the first rank there.
    pub(super) fn publish(&self, epoch: &Epoch) {
        if epoch.view.rank(self.own()) != Some(0) {
            return;
        }
        match self.place.publish(&self.record(&epoch.view)) {
            // The one before is no longer there to be removed.
            Ok(published) => self.keep_published(published),
            // The job itself needs none.
            Err(why) => unisum_link::fault!("no process can join the job: {why}"),
        }
    }

    /// Joins a job that runs. Blocks until this process is in a view, `UNISUM_CONNECT_TIMEOUT` at
    /// most.
    ///
    /// # Errors
    /// As [`Views::join`].
    pub(crate) fn join(
        elastic: &Elastic,
        detected: Detected,
        (environment, settings): (&Environment, &Settings),
        store: Option<&Arc<dyn Store>>,
    ) -> Result<Epoch, Error> {
        let until = Instant::now() + settings.connect_timeout;
        let meeting = Meeting::of_newcomer(&detected, (environment, settings), store)?;
        if matches!(meeting.place, RecordPlace::Nowhere) {
            return Err(Error::new(ErrorKind::Configuration, NOWHERE));
        }
        let mut chronicle = Chronicle::read(settings)?;
        let newcomer = chronicle.newcomer(settings)?;
        let config = super::lineage::config(elastic, settings, &detected, &meeting);
        let config = ViewsConfig { newcomer, ..config };
        let mut find = || chronicle.fits(newcomer, meeting.place.find()?);
        let views = Views::join(&config, &mut find, until);
        let views = views.map_err(super::rendezvous_error)?;
        let view = views.await_change(0, until).view;
        chronicle.begin(settings, views.own().0)?;
        let lineage = Self::new(views, elastic, (settings, &detected), (&meeting, chronicle));
        Ok(Epoch { lineage: Arc::new(lineage), view })
    }
}
