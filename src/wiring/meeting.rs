//! What a rank has to join with: its credentials, and where the ranks find each other.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use unisum_link::handshake::Secret;
use unisum_link::secure::Credentials;

use super::joining::RecordPlace;
use crate::settings::Settings;
use crate::wiring::store::StoreEntry;
use crate::{Error, ErrorKind, Store};
use unisum_control::Environment;
use unisum_control::address::Rendezvous;
use unisum_control::launcher::{Detected, LauncherStore, Token};
use unisum_control::{IsMoot, Publish};

/// The rank's credentials, and the entry of the program's store if the ranks meet by that.
#[derive(Debug)]
pub(crate) struct Meeting {
    pub(crate) credentials: Credentials,
    /// Where the token is from, in words.
    pub(crate) secret_origin: String,
    /// With the token that rank 0 puts there, if it made one.
    entry: Option<(StoreEntry, Option<Token>)>,
    /// Where the members record of an elastic job goes.
    pub(super) place: RecordPlace,
    /// Whether joining has no purpose any more.
    is_moot: Mutex<Option<IsMoot>>,
    /// Towards what rank 0 listens, if that is known.
    pub(super) towards: Option<SocketAddr>,
}

impl Meeting {
    /// Gets the token: that of the environment, the user's own, or the one in the store. There the
    /// addresses of rank 0 are looked up as well, for `detected` to have. Blocks in the store until
    /// rank 0 has written them.
    pub(crate) fn prepare(
        detected: &mut Detected,
        (environment, settings): (&Environment, &Settings),
        store: Option<&Arc<dyn Store>>,
    ) -> Result<Self, Error> {
        let launcher = detected.store.clone().map(|store| ByLauncher::new(store, settings));
        let launcher: Option<Arc<dyn Store>> = launcher.map(|store| Arc::new(store) as _);
        let store = launcher.as_ref().or(store);
        let Some(Rendezvous::Store { key, addresses }) = &mut detected.rendezvous else {
            let place = RecordPlace::given_or_beside(settings, detected.rendezvous.as_ref());
            return Ok(Self { place, ..Self::by_token(environment, settings)? });
        };
        let entry = StoreEntry::new(given_store(key, store)?.clone(), key);
        let place = |token: Option<Token>| match launcher {
            _ if settings.members.is_some() => RecordPlace::given_or_beside(settings, None),
            // It serves once.
            Some(_) => RecordPlace::Nowhere,
            None => RecordPlace::Store(entry.of_members(), token),
        };
        let given = Token::is_given(environment).then(|| Token::from_environment(environment));
        let given = given.transpose().map_err(configuration)?;
        if detected.rank == 0 {
            let told = given.is_none();
            let token = given.map_or_else(Token::fresh, Ok).map_err(|error| {
                Error::new(ErrorKind::Rendezvous, format!("making a token: {error}"))
            })?;
            let told = told.then(|| token.clone());
            let place = place(told.clone());
            return Ok(Self { place, ..Self::new(&token, Some((entry, told)), settings)? });
        }
        let published = entry.look_up(settings.connect_timeout)?;
        *addresses = published.addresses;
        let place = place(published.token.clone());
        let token = given.or(published.token).ok_or_else(|| {
            let text = "rank 0 has a token of its own (UNISUM_TOKEN or UNISUM_TOKEN_FILE), and \
                        this rank has none: give it to all ranks or to none";
            Error::new(ErrorKind::Configuration, text).on(detected.rank)
        })?;
        Ok(Self { place, ..Self::new(&token, None, settings)? })
    }

    /// What a process needs to join a job that runs. Blocks in the store until the job has written
    /// its record there.
    pub(super) fn of_newcomer(
        detected: &Detected,
        (environment, settings): (&Environment, &Settings),
        store: Option<&Arc<dyn Store>>,
    ) -> Result<Self, Error> {
        let by_store = detected.rendezvous.as_ref().filter(|_| settings.members.is_none());
        let Some(Rendezvous::Store { key, .. }) = by_store else {
            let place = RecordPlace::given_or_beside(settings, detected.rendezvous.as_ref());
            return Ok(Self { place, ..Self::by_token(environment, settings)? });
        };
        let entry = StoreEntry::new(given_store(key, store)?.clone(), key).of_members();
        if Token::is_given(environment) {
            let place = RecordPlace::Store(entry, None);
            return Ok(Self { place, ..Self::by_token(environment, settings)? });
        }
        let found = entry.look_up_record(settings.connect_timeout);
        let (token, _) = found.map_err(|why| Error::new(ErrorKind::Rendezvous, why))?;
        let token = token.ok_or_else(|| {
            let text = "rank 0 has a token of its own (UNISUM_TOKEN or UNISUM_TOKEN_FILE), and \
                        this process has none: give it to all or to none";
            Error::new(ErrorKind::Configuration, text)
        })?;
        let place = RecordPlace::Store(entry, Some(token.clone()));
        Ok(Self { place, ..Self::new(&token, None, settings)? })
    }

    /// With the token of the environment, or the user's own.
    pub(super) fn by_token(environment: &Environment, settings: &Settings) -> Result<Self, Error> {
        let token = Token::from_environment(environment).map_err(configuration)?;
        Self::new(&token, None, settings)
    }

    fn new(
        token: &Token,
        entry: Option<(StoreEntry, Option<Token>)>,
        settings: &Settings,
    ) -> Result<Self, Error> {
        tracing::debug!("the job token comes from {}", token.origin());
        let secret = Secret::new(token.as_bytes());
        let credentials = credentials(secret, settings)?;
        let secret_origin = token.origin().to_owned();
        let (place, is_moot) = (RecordPlace::Nowhere, Mutex::new(None));
        Ok(Self { credentials, secret_origin, entry, place, is_moot, towards: None })
    }

    /// In an elastic job's view, whose first rank has an `entry` to tell the others where it
    /// listens, towards an address if that is known.
    pub(super) fn of_view(
        credentials: Credentials,
        secret_origin: String,
        entry: Option<StoreEntry>,
        (is_moot, towards): (IsMoot, Option<SocketAddr>),
    ) -> Self {
        let entry = entry.map(|entry| (entry, None));
        let (place, is_moot) = (RecordPlace::Nowhere, Mutex::new(Some(is_moot)));
        Self { credentials, secret_origin, entry, place, is_moot, towards }
    }

    /// Says, to who asks first, whether joining has no purpose any more.
    pub(super) fn is_moot(&self) -> Option<IsMoot> {
        self.is_moot.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How rank 0 says where it listens, if by a store.
    pub(super) fn publish(&self) -> Option<Publish> {
        let (entry, token) = self.entry.clone()?;
        Some(Publish(Box::new(move |addresses| entry.publish(token.as_ref(), addresses))))
    }

    /// Rank 0 could not start: nobody is to wait for it.
    pub(super) fn failed(&self, error: &Error) {
        if let Some((entry, _)) = &self.entry {
            entry.fail(&error.to_string());
        }
    }

    /// All ranks have found rank 0, or the start has failed.
    pub(super) fn close(&self) {
        if let Some((entry, _)) = &self.entry {
            entry.close();
        }
    }
}

fn given_store<'a>(
    key: &str,
    store: Option<&'a Arc<dyn Store>>,
) -> Result<&'a Arc<dyn Store>, Error> {
    store.ok_or_else(|| {
        let text = format!("UNISUM_RENDEZVOUS=store://{key}: the program hands in no store");
        Error::new(ErrorKind::Configuration, text)
    })
}

/// The launcher's own store, which serves once: the first value that is set is told to all ranks.
struct ByLauncher {
    store: LauncherStore,
    timeout: Duration,
    told: Mutex<Option<Vec<u8>>>,
}

impl ByLauncher {
    fn new(store: LauncherStore, settings: &Settings) -> Self {
        Self { store, timeout: settings.connect_timeout, told: Mutex::default() }
    }
}

impl Store for ByLauncher {
    fn set(&self, _key: &str, value: &[u8]) -> Result<(), String> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        // What comes later is that the value is not needed any more.
        if told.is_none() {
            *told = Some(value.to_vec());
            self.store.share(Some(value), self.timeout)?;
        }
        Ok(())
    }

    fn get(&self, _key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none() {
            *told = self.store.share(None, timeout)?;
        }
        told.clone().ok_or_else(|| "the launcher gave no value".to_owned())
    }
}

#[cfg(feature = "tls")]
fn credentials(secret: Secret, settings: &Settings) -> Result<Credentials, Error> {
    let Some(sealing) = settings.tls.sealing() else { return Ok(Credentials::clear(secret)) };
    if let Some(files) = settings.tls.files() {
        return Credentials::certified(secret, sealing, files).map_err(configuration);
    }
    Credentials::token(secret, sealing).map_err(|error| {
        Error::new(ErrorKind::Rendezvous, format!("making keys for encryption: {error}"))
    })
}

#[cfg(not(feature = "tls"))]
fn credentials(secret: Secret, _settings: &Settings) -> Result<Credentials, Error> {
    Ok(Credentials::clear(secret))
}

fn configuration(error: impl std::error::Error) -> Error {
    Error::new(ErrorKind::Configuration, error.to_string())
}
