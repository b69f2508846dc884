//! A coordinator that leaves stays for the others, as long as its process lives. When that has
//! ended, the lowest rank that is left takes its place, and the others dial it.
//!
//! Which rank that is need not be agreed on: all know who has left, as they heard it in the same
//! order. If an heir's process has ended as well, in order or not, nobody listens at its address,
//! and the next one is tried.

use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use unisum_link::Rank;
use unisum_link::handshake::{Hello, Purpose};

use super::{COORDINATOR, ControlThread, encode};
use crate::coordinator::Coordinator;
use crate::dial::{self, Heir};

/// How long a thread tries to reach an heir. One that is there, and stopped, is tried again:
/// another one in its place would be a second coordinator when it goes on.
const HEIR_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look whether an heir has been reached.
const LOOK: Duration = Duration::from_millis(10);

/// An attempt to reach the rank that is to coordinate.
pub(super) struct Dialing {
    heir: Rank,
    reached: Receiver<Heir>,
}

impl ControlThread {
    /// Finds out who coordinates from now on.
    pub(super) fn succeed(&mut self, now: Instant) {
        let addresses = self.shared.addresses();
        while let Some(heir) = self.member.heir().filter(|_| !addresses.is_empty()) {
            if heir == self.identity.rank {
                return self.take_over(now);
            }
            let hello = self.hello(Purpose::Control, heir);
            let credentials = self.identity.credentials.clone();
            let addresses = addresses[heir].clone();
            let (sender, reached) = mpsc::channel();
            let dial = move || {
                let reached = dial::heir(&addresses, &hello, &credentials, now + HEIR_TIMEOUT);
                // Nobody waits for it any more if this rank has left.
                let _ = sender.send(reached);
            };
            if thread::Builder::new().name("unisum-heir".into()).spawn(dial).is_ok() {
                self.dialing = Some(Dialing { heir, reached });
                return;
            }
            self.member.is_unreachable(heir);
        }
        self.member.is_alone();
    }

    /// What this rank says first to another one of its session.
    pub(super) fn hello(&self, purpose: Purpose, to: Rank) -> Hello {
        Hello {
            purpose,
            socket: 0,
            from: self.identity.rank as u32,
            to: to as u32,
            world: self.identity.world as u32,
            session: self.identity.session,
            job: self.identity.job,
            build: self.identity.build,
        }
    }

    fn take_over(&mut self, now: Instant) {
        let (session, own) = (self.identity.session, self.identity.rank);
        let mut coordinator = Coordinator::heir(session, own, self.member.gone(), now);
        let said = self.member.coordinated_by(own, now);
        said.into_iter().for_each(|message| coordinator.heard(own, message, now));
        self.coordinator = Some(coordinator);
        self.deliver(now);
    }

    /// Goes on when the dialled rank was reached, or was not.
    pub(super) fn look_for_heir(&mut self, now: Instant) {
        let Some(Dialing { heir, reached }) = &self.dialing else { return };
        let (heir, reached) = (*heir, reached.try_recv());
        if matches!(reached, Err(TryRecvError::Empty)) {
            return;
        }
        self.dialing = None;
        let joined = match reached.unwrap_or(Heir::Gone) {
            Heir::Waits => return self.succeed(now),
            Heir::Reached(it) if it.session == self.identity.session => {
                self.join(heir, it.connection, it.pulse).is_ok()
            }
            Heir::Reached(_) | Heir::Gone => false,
        };
        if joined {
            let said = self.member.coordinated_by(heir, now);
            self.send(COORDINATOR, encode(&said));
        } else {
            self.member.is_unreachable(heir);
            self.succeed(now);
        }
    }

    /// When to look again.
    pub(super) fn look_at(&self, now: Instant) -> Option<Instant> {
        self.dialing.as_ref().map(|_| now + LOOK)
    }
}
