//! How every two processes of an elastic job come to be connected, and how a newcomer comes to ask.
//!
//! Of two processes, the one with the larger number dials: newcomers have larger numbers than those
//! that the job was started with. A newcomer dials one member by the members record, says where it
//! listens, and is told who is in the view, who else asks to be let in, and where they all are. It
//! asks to be let in once it is connected to every member of the view. Whoever is told of a
//! newcomer tells those with larger numbers, which have to dial it. Two newcomers may enter a view
//! before they are connected: what one has to say to the other then waits for the connection, and
//! they lose each other if none comes about.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bytes::Bytes;
use unisum_views::{Member, Message, Standing, Timer, View};

use super::super::dialing::Dials;
use super::super::joining::FIRST_NEWCOMER;
use super::super::words::Word;
use super::ViewsThread;
use crate::dial::Again;

/// Most entries of one word, so that it fits into a message.
const ENTRIES_MAX: usize = 64;
/// How long two members of a view may be without a connection, at least.
const UNMET_MIN: Duration = Duration::from_secs(5);

/// What this process does to be connected with all others.
pub(in crate::elastic) struct Mesh {
    dials: Dials,
    /// What all members have to have alike.
    terms: String,
    /// Those with whom there is a connection, or was.
    met: BTreeSet<Member>,
    dialled: BTreeSet<Member>,
    /// What is to be said to members of the view that are not connected yet.
    waiting: BTreeMap<Member, Vec<Bytes>>,
    /// The latest view of the job that this process was told of while it is outside.
    seen: View,
    /// In which epoch it asked to be let in.
    asked_in: u64,
    /// The view that was followed last.
    followed: View,
    /// Until when all members of the view have to be connected.
    unmet_until: Option<Instant>,
}

impl Mesh {
    pub(in crate::elastic) fn new(dials: Dials, terms: String, view: View) -> Self {
        Self {
            dials,
            terms,
            met: BTreeSet::new(),
            dialled: BTreeSet::new(),
            waiting: BTreeMap::new(),
            seen: View::default(),
            asked_in: 0,
            followed: view,
            unmet_until: None,
        }
    }

    /// Dials a process again, whose connection was cut after so many messages were taken.
    pub(super) fn again(
        &self,
        member: Member,
        addresses: Vec<SocketAddr>,
        (attempt, taken): (u64, u64),
        until: Instant,
    ) -> Option<Receiver<Again>> {
        self.dials.again(member, addresses, (attempt, taken), until)
    }

    pub(super) const fn deadline(&self) -> Option<Instant> {
        self.unmet_until
    }
}

impl ViewsThread {
    fn is_outside(&self) -> bool {
        self.participant.standing() == Standing::Outside
    }

    fn is_connected(&self, member: Member) -> bool {
        self.connections.values().any(|(it, _)| *it == member)
    }

    /// There is a connection with another process.
    pub(super) fn meet(&mut self, token: usize, member: Member) {
        self.mesh.met.insert(member);
        let own = self.identity.own;
        if own.0 >= FIRST_NEWCOMER {
            // Also inside: two newcomers that enter at once may meet there, and whoever joins later
            // is told by either where the other listens.
            let entry = (own, self.shared.addresses(own));
            self.send(member, &Word::Directory(vec![entry]));
        }
        if !self.is_outside() && !self.participant.view().has(member) {
            self.tell_outsider(member);
        }
        let waiting = self.mesh.waiting.remove(&member).unwrap_or_default();
        if let Some((_, connection)) = self.connections.get_mut(&token) {
            waiting.into_iter().for_each(|bytes| connection.queue(bytes));
        }
        self.ask();
        self.serve(token);
    }

    /// Keeps what is to be said to a member of the view until it is connected.
    pub(super) fn keep_for(&mut self, member: Member, encoded: Bytes) {
        let mesh = &mut self.mesh;
        let is_coming = member != self.identity.own && !mesh.met.contains(&member);
        if is_coming && self.participant.view().has(member) {
            mesh.waiting.entry(member).or_default().push(encoded);
        }
    }

    /// Tells a process that is outside what it needs to ask to be let in.
    fn tell_outsider(&mut self, member: Member) {
        self.send(member, &Word::Terms(self.mesh.terms.clone()));
        let view = self.participant.view().clone();
        let mut entries = self.shared.directory();
        entries.retain(|(it, _)| view.has(*it) || self.is_connected(*it));
        for entries in entries.chunks(ENTRIES_MAX) {
            self.send(member, &Word::Directory(entries.to_vec()));
        }
        self.send(member, &Word::Agreement(Message::Decided(view)));
    }

    /// Another process says where some listen.
    pub(super) fn learn(&mut self, from: Member, entries: Vec<(Member, Vec<SocketAddr>)>) {
        if self.participant.standing() == Standing::Excluded {
            return;
        }
        let new = self.shared.learn(entries);
        if !self.is_outside() {
            for entry in new {
                let view = self.participant.view();
                let is_inside = view.has(entry.0);
                let others = self.connections.values().map(|(member, _)| *member);
                // Members of a view know each other's addresses, or tell them as they meet.
                let are_to_dial =
                    |it: &Member| *it > entry.0 && *it != from && !(is_inside && view.has(*it));
                let told: BTreeSet<Member> = others.filter(are_to_dial).collect();
                told.into_iter()
                    .for_each(|it| self.send(it, &Word::Directory(vec![entry.clone()])));
            }
        }
        self.dial_missing();
    }

    /// A member says what all have alike.
    pub(super) fn compare(&self, terms: &str) {
        if self.is_outside() && terms != self.mesh.terms {
            // All members would say the same.
            self.shared.was_told(&self.mesh.seen);
            let both = self.mesh.terms.split(' ').zip(terms.split(' '));
            let (ours, theirs): (Vec<&str>, Vec<&str>) = both.filter(|(a, b)| a != b).unzip();
            self.shared.end(&format!(
                "settings that must be the same on all ranks differ: this process has {}, the job \
                 has {}",
                ours.join(" "),
                theirs.join(" ")
            ));
        }
    }

    /// A member says what view was decided, while this process is outside.
    pub(super) fn see(&mut self, view: &View) {
        if !self.is_outside() || view.has(self.identity.own) || view.epoch <= self.mesh.seen.epoch {
            return;
        }
        let gone = std::mem::replace(&mut self.mesh.seen, view.clone());
        self.shared.was_told(view);
        self.shared.forget(|it| gone.has(it) && !view.has(it));
        self.dial_missing();
        self.ask();
    }

    /// Asks to be let in, once in each epoch, as soon as this process is connected with all
    /// members.
    fn ask(&mut self) {
        let Mesh { seen, asked_in, .. } = &self.mesh;
        if !self.is_outside() || seen.epoch == *asked_in {
            return;
        }
        if !seen.members.iter().all(|&it| self.is_connected(it)) {
            return;
        }
        let View { epoch, members } = seen.clone();
        self.mesh.asked_in = epoch;
        let own = self.identity.own;
        members.into_iter().for_each(|it| self.send(it, &Word::Agreement(Message::Join(own))));
    }

    /// Has those dialled that this process is to dial and has not yet.
    fn dial_missing(&mut self) {
        let own = self.identity.own;
        for (member, addresses) in self.shared.directory() {
            let mesh = &mut self.mesh;
            if member < own && !mesh.met.contains(&member) && mesh.dialled.insert(member) {
                mesh.dials.add(member, addresses);
            }
        }
    }

    /// A process could not be dialled.
    pub(super) fn unreached(&mut self, member: Member, why: &str) {
        if self.mesh.met.contains(&member) {
            return;
        }
        tracing::info!(?member, why, "a process of the elastic job is not reached");
        if self.participant.view().has(member) {
            self.lose(member);
        } else if self.is_outside() && self.mesh.seen.has(member) {
            let rank = self.mesh.seen.rank(member).unwrap_or_default();
            self.shared.end(&format!("rank {rank} of the job is not reached: {why}"));
        } else {
            self.shared.forget(|it| it == member);
        }
    }

    /// The connection with another process has ended.
    pub(super) fn part_from(&mut self, member: Member) {
        self.mesh.waiting.remove(&member);
        if !self.participant.view().has(member) && !self.mesh.seen.has(member) {
            self.shared.forget(|it| it == member);
        }
    }

    /// Does what a change of view calls for.
    pub(super) fn follow_view(&mut self, now: Instant) {
        let is_new = self.participant.view().epoch != self.mesh.followed.epoch;
        if is_new && self.linger_until.is_none() {
            let view = self.participant.view().clone();
            let before = std::mem::replace(&mut self.mesh.followed, view.clone());
            let connected: BTreeSet<Member> =
                self.connections.values().map(|(member, _)| *member).collect();
            let seen = std::mem::take(&mut self.mesh.seen);
            self.shared.forget(|it| (before.has(it) || seen.has(it)) && !view.has(it));
            if self.participant.standing() == Standing::Inside {
                let outside = connected.iter().filter(|it| !view.has(**it));
                outside.for_each(|it| self.tell_outsider(*it));
            }
            self.mesh.waiting.retain(|&it, _| view.has(it));
            self.mesh.unmet_until =
                Some(now + self.identity.silence_of(Timer::Silence).max(UNMET_MIN));
            self.dial_missing();
        }
        let Some(until) = self.mesh.unmet_until else { return };
        let is_unmet = |it: &Member| *it != self.identity.own && !self.mesh.met.contains(it);
        let members = self.participant.view().members.iter().copied();
        let unmet: Vec<Member> = members.filter(is_unmet).collect();
        if unmet.is_empty() || until <= now {
            self.mesh.unmet_until = None;
            unmet.into_iter().for_each(|it| self.lose(it));
        }
    }

    /// A process that is outside waits for nobody in vain.
    pub(super) fn check_abandoned(&self) {
        let Mesh { seen, dials, met, .. } = &self.mesh;
        let is_waiting = self.is_outside() && self.linger_until.is_none() && !met.is_empty();
        let has_members = match seen.epoch {
            // Whoever it has reached has not told it yet.
            0 => !self.connections.is_empty(),
            _ => seen.members.iter().any(|&it| self.is_connected(it)),
        };
        // Those that dial are asked first: what they did is a command before they are idle.
        if is_waiting && !has_members && dials.are_idle() && !self.shared.has_commands() {
            self.shared.end(
                "the job ended while this process waited to be let in, or lost its connections",
            );
        }
    }
}
