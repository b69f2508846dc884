//! What a rank has to join with: the job's secret, and where the ranks find each other.

use std::sync::Arc;

use unisum_link::handshake::Secret;

use crate::settings::Settings;
use crate::store::StoreEntry;
use crate::{Error, ErrorKind, Store};
use unisum_control::Environment;
use unisum_control::Publish;
use unisum_control::address::Rendezvous;
use unisum_control::launcher::{Detected, Token};

/// The job's secret, and the entry of the program's store if the ranks meet by that.
#[derive(Debug)]
pub(crate) struct Meeting {
    pub(crate) secret: Secret,
    /// Where the secret is from, in words.
    pub(crate) secret_origin: String,
    /// With the token that rank 0 puts there, if it made one.
    entry: Option<(StoreEntry, Option<Token>)>,
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
        let Some(Rendezvous::Store { key, addresses }) = &mut detected.rendezvous else {
            let token = Token::from_environment(environment).map_err(configuration)?;
            return Ok(Self::new(&token, None));
        };
        let store = store.ok_or_else(|| {
            let text = format!("UNISUM_RENDEZVOUS=store://{key}: the program hands in no store");
            Error::new(ErrorKind::Configuration, text)
        })?;
        let entry = StoreEntry::new(store.clone(), key);
        let given = Token::is_given(environment).then(|| Token::from_environment(environment));
        let given = given.transpose().map_err(configuration)?;
        if detected.rank == 0 {
            let told = given.is_none();
            let token = given.map_or_else(Token::fresh, Ok).map_err(|error| {
                Error::new(ErrorKind::Rendezvous, format!("making a token: {error}"))
            })?;
            let told = told.then(|| token.clone());
            return Ok(Self::new(&token, Some((entry, told))));
        }
        let published = entry.look_up(settings.connect_timeout)?;
        *addresses = published.addresses;
        let token = given.or(published.token).ok_or_else(|| {
            let text = "rank 0 has a token of its own (UNISUM_TOKEN or UNISUM_TOKEN_FILE), and \
                        this rank has none: give it to all ranks or to none";
            Error::new(ErrorKind::Configuration, text).on(detected.rank)
        })?;
        Ok(Self::new(&token, None))
    }

    fn new(token: &Token, entry: Option<(StoreEntry, Option<Token>)>) -> Self {
        tracing::debug!("the job token comes from {}", token.origin());
        let secret = Secret::new(token.as_bytes());
        Self { secret, secret_origin: token.origin().to_owned(), entry }
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

fn configuration(error: impl std::error::Error) -> Error {
    Error::new(ErrorKind::Configuration, error.to_string())
}
