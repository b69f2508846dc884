//! What the acceptor of a rank knows of those who come.

use std::cell::Cell;
use std::collections::BTreeMap;

use unisum_link::Rank;
use unisum_link::handshake::{Hello, Purpose, Refusal};
use unisum_link::secure::{Credentials, Preamble};

use super::{Identity, Shared};
use crate::acceptor::Host;
use crate::connection::Connection;
use crate::coordinator::Coordinator;

pub(super) struct Reception<'a> {
    pub(super) identity: &'a Identity,
    pub(super) shared: &'a Shared,
    pub(super) coordinator: Option<&'a Coordinator>,
    pub(super) connections: &'a BTreeMap<usize, (Rank, Connection)>,
    pub(super) processes: &'a BTreeMap<Rank, String>,
    /// Whether connections go on in others after they were cut.
    pub(super) goes_on: bool,
    /// Whether this rank has said goodbye: nobody joins any more.
    pub(super) has_left: bool,
    /// Whether somebody has proven the token.
    pub(super) is_proven: Cell<bool>,
}

impl Host for Reception<'_> {
    fn credentials(&self) -> &Credentials {
        &self.identity.credentials
    }

    fn knows(&self, preamble: Preamble) -> bool {
        preamble == self.identity.preamble || self.shared.awaits(preamble)
    }

    /// Ranks that have yet to join do not know the session.
    fn awaits_unknown(&self) -> bool {
        self.coordinator.is_some_and(|coordinator| !coordinator.all_came())
    }

    /// Only who has proven the token is looked at more closely.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        self.is_proven.set(true);
        let is_connected =
            |rank| self.connections.values().any(|(connected, _)| *connected == rank);
        let taken = |rank: &Rank| self.processes.get(rank).cloned();
        let is_open = match hello.purpose {
            Purpose::Resume => self.goes_on,
            Purpose::Control => !self.has_left,
            Purpose::Data | Purpose::Pulse | Purpose::View => true,
        };
        if !is_open && hello.purpose == Purpose::Control {
            self.identity.is_of_the_job(hello)?;
            let why = "the job has started, and the rank that listens here has left it";
            return Err(Refusal::Late { rank: hello.from, why });
        }
        if !is_open {
            return Err(Refusal::Rank { from: hello.from, to: hello.to });
        }
        self.identity.admit(hello, self.coordinator, self.shared, (is_connected, taken))
    }
}

/// Whether it expects as many ranks.
fn is_of_the_size(hello: &Hello, world: usize) -> Result<(), Refusal> {
    let ours = world as u32;
    if hello.world == ours { Ok(()) } else { Err(Refusal::World { theirs: hello.world, ours }) }
}

impl Identity {
    /// Whether it is of this job and, if it wants to join it, of the same build and size.
    fn is_of_the_job(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.job != self.job {
            return Err(Refusal::Job);
        }
        if hello.purpose != Purpose::Control {
            return Ok(());
        }
        if hello.build != self.build {
            let Hello { from, to, build: theirs, .. } = *hello;
            return Err(Refusal::Build { from, to, theirs, ours: self.build });
        }
        is_of_the_size(hello, self.world)
    }

    /// Whether a connection that has proven the token may come in.
    pub(super) fn admit(
        &self,
        hello: &Hello,
        coordinator: Option<&Coordinator>,
        shared: &Shared,
        (is_connected, taken): (impl Fn(Rank) -> bool, impl Fn(&Rank) -> Option<String>),
    ) -> Result<(), Refusal> {
        let Hello { from, to, .. } = *hello;
        self.is_of_the_job(hello)?;
        // Data connections belong to a communicator, in which ranks have numbers of their own.
        let (rank, world) = match hello.purpose {
            Purpose::Data => shared.channel(&hello.session).ok_or(Refusal::Session)?,
            Purpose::Pulse | Purpose::Resume if hello.session != self.session => {
                return Err(Refusal::Session);
            }
            Purpose::Pulse | Purpose::Resume | Purpose::Control => (self.rank, self.world),
            // Members of an elastic job have another port for that.
            Purpose::View => return Err(Refusal::Rank { from, to }),
        };
        let dialer = from as Rank;
        is_of_the_size(hello, world)?;
        let is_same = hello.purpose == Purpose::Control && dialer == rank && to == from;
        if is_same && coordinator.is_some() {
            let first = format!("process {}", std::process::id());
            return Err(Refusal::RankTaken { rank: from, first, second: hello.process() });
        }
        if dialer >= world || dialer == rank || to as Rank != rank {
            return Err(Refusal::Rank { from, to });
        }
        match (hello.purpose, coordinator) {
            (Purpose::Data | Purpose::View, _) => Ok(()),
            (Purpose::Pulse | Purpose::Resume, Some(_)) if is_connected(dialer) => Ok(()),
            (Purpose::Pulse | Purpose::Resume, _) | (Purpose::Control, None) => {
                Err(Refusal::Rank { from, to })
            }
            (Purpose::Control, Some(coordinator)) if coordinator.is_vacant(dialer) => Ok(()),
            (Purpose::Control, Some(coordinator)) => Err(match coordinator.too_late(dialer) {
                Some(why) => Refusal::Late { rank: from, why },
                None => Refusal::RankTaken {
                    rank: from,
                    first: taken(&dialer).unwrap_or_else(|| "another process".into()),
                    second: hello.process(),
                },
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use unisum_link::handshake::Build;

    use super::*;
    use crate::tests::{BUILD, hello, with_token};

    #[test]
    fn who_is_of_another_job_hears_that_and_not_that_it_comes_too_late() {
        let (session, credentials) = ([1; 16], with_token(b"token"));
        let Hello { job, .. } = hello(2, 3);
        let identity = Identity {
            rank: 0,
            world: 3,
            session,
            preamble: Preamble::of(credentials.secret(), &session),
            job,
            build: BUILD,
            credentials,
            secret_origin: String::new(),
        };
        let (shared, connections, processes) =
            (Shared::new(0, 3), BTreeMap::new(), BTreeMap::new());
        let host = Reception {
            identity: &identity,
            shared: &shared,
            coordinator: None,
            connections: &connections,
            processes: &processes,
            goes_on: true,
            has_left: true,
            is_proven: Cell::new(false),
        };
        let refusal = |hello: Hello| host.admit(&hello).unwrap_err();
        assert!(matches!(refusal(hello(2, 3)), Refusal::Late { rank: 2, .. }));
        assert!(matches!(refusal(Hello { job: [9; 16], ..hello(2, 3) }), Refusal::Job));
        assert!(matches!(refusal(hello(2, 4)), Refusal::World { theirs: 4, ours: 3 }));
        let other_build = Hello { build: Build::default(), ..hello(2, 3) };
        assert!(matches!(refusal(other_build), Refusal::Build { .. }));
    }
}
