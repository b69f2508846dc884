//! Which transports a job uses for whom: those of the program and those that are built in.

use std::net::SocketAddr;
use std::sync::Arc;

use unisum_link::handshake::Secret;
use unisum_link::secure::Credentials;
use unisum_link::{Reach, Refusal, Transport};

use super::builtin::{self, Barred};
use crate::settings::Settings;
use crate::{Error, ErrorKind};

/// Transports that the program gave to its builder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Custom(Vec<Arc<dyn Transport>>);

/// Equal if the names are.
impl PartialEq for Custom {
    fn eq(&self, other: &Self) -> bool {
        self.names().eq(other.names())
    }
}

impl Custom {
    pub(crate) fn add(&mut self, transport: Arc<dyn Transport>) {
        self.0.push(transport);
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|transport| transport.name())
    }

    /// Checks that each can be asked for by its name.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] with the name.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |name: &str, why: &str| {
            let text = format!("a transport can't be called {name:?}: {why}");
            Err(Error::new(ErrorKind::Configuration, text))
        };
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        for (index, name) in self.names().enumerate() {
            if name.is_empty() || !name.bytes().all(fits) {
                return refuse(name, "names have lower-case letters, digits and `-`");
            }
            let is_taken = |other: &str| other == name;
            if name == "auto" || builtin::names().any(is_taken) {
                return refuse(name, "unisum has one of that name");
            }
            if self.names().take(index).any(is_taken) {
                return refuse(name, "another one that was given is");
            }
        }
        Ok(())
    }

    fn of(&self, reach: Reach) -> impl Iterator<Item = &Arc<dyn Transport>> {
        self.0.iter().filter(move |transport| transport.reach() == reach)
    }
}

/// The transport of the ranks of a host: what the user asked for, or the program's first, or shared
/// memory.
pub(super) fn within_hosts(settings: &Settings, secret: &Secret) -> Arc<dyn Transport> {
    let sharing = builtin::sharing(settings, secret);
    let choice = &settings.transport;
    let mut all = settings.custom.of(Reach::Host).chain([&sharing]);
    let chosen = all.find(|transport| choice.is_auto() || choice.is(transport.name()));
    chosen.cloned().unwrap_or_else(|| {
        Barred::new(
            "shm",
            Reach::Host,
            Refusal::NotWanted(format!("transport {choice} was asked for")),
        )
    })
}

/// The transports that all ranks agree on, for those that share no memory, the best first.
pub(super) fn unanimous(settings: &Settings) -> Vec<Arc<dyn Transport>> {
    let choice = &settings.transport;
    let all = settings.custom.of(Reach::Unanimous).cloned().chain([rdma(settings)]);
    all.filter(|transport| choice.is_auto() || choice.is(transport.name())).collect()
}

/// RDMA, if the settings allow it.
fn rdma(settings: &Settings) -> Arc<dyn Transport> {
    let rdma = builtin::rdma(settings);
    if !settings.verbs.allowed && !settings.transport.is(rdma.name()) {
        let why = "RDMA is switched off (UNISUM_VERBS or NCCL_IB_DISABLE)".into();
        return Barred::new(rdma.name(), rdma.reach(), Refusal::NotWanted(why));
    }
    if let Some(why) = settings.tls.refuses_rdma() {
        return Barred::instead_of(rdma, why);
    }
    rdma
}

/// The transport for all ranks that are not reached otherwise: what the user asked for, or the
/// program's first, or TCP.
pub(super) fn to_any(
    settings: &Settings,
    credentials: &Credentials,
    addresses: (Vec<Vec<SocketAddr>>, Option<SocketAddr>),
    job: &str,
) -> Arc<dyn Transport> {
    let internet = builtin::internet(settings, credentials, addresses, job);
    let choice = &settings.transport;
    let all = || settings.custom.of(Reach::Any).chain([&internet]);
    let asked_for = all().find(|transport| choice.is(transport.name()));
    asked_for.or_else(|| all().next()).cloned().unwrap_or(internet)
}
