//! What the thread of an elastic job and the process's other threads share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use unisum_link::secure::Proven;
use unisum_views::{Member, Standing, View};

use super::super::Superseder;

/// What this process knows of the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The last view that is decided.
    pub view: View,
    /// Where this process stands.
    pub standing: Standing,
    /// Whether another view is being agreed on.
    pub is_changing: bool,
    /// How many processes ask to be let in.
    pub newcomers: usize,
    /// Why this process is no longer in the job, if it is not.
    pub end: Option<String>,
}

impl Membership {
    /// Whether this process is no longer in the job.
    pub const fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// Whether `epoch` is over, or about to be.
    pub const fn has_left(&self, epoch: u64) -> bool {
        self.is_over() || self.is_changing || self.view.epoch > epoch
    }
}

/// What the process asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    /// This process has dialled a member, or a process that asks to be let in.
    Connected(Member, Proven, SocketAddr),
    /// It could not, and why.
    Unreached(Member, String),
    Change {
        epoch: u64,
        out: Vec<Member>,
        admits: bool,
    },
    Tell {
        epoch: u64,
        value: Vec<u8>,
    },
    /// Whether every member of the view is needed, as this process makes a communicator of it.
    NeedAll(bool),
    Leave,
}

/// What a control is bound to, which ends with it.
#[derive(Clone, Debug)]
pub(super) enum Bound {
    /// This epoch, whatever comes next.
    Epoch(u64),
    /// The membership of all of these, in whatever epoch.
    Members(Vec<Member>),
}

impl Bound {
    /// Whether it is over in a later view.
    fn is_over(&self, view: &View) -> bool {
        match self {
            Self::Epoch(epoch) => *epoch < view.epoch,
            Self::Members(members) => !members.iter().all(|it| view.has(*it)),
        }
    }
}

pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    membership: Membership,
    commands: Vec<Command>,
    directory: BTreeMap<Member, Vec<SocketAddr>>,
    seen: Option<View>,
    told: BTreeMap<u64, Vec<u8>>,
    bound: Vec<(Bound, Superseder)>,
    said_goodbye: bool,
}

impl Shared {
    pub(super) fn new(view: Option<View>, directory: Vec<(Member, Vec<SocketAddr>)>) -> Self {
        let standing = if view.is_some() { Standing::Inside } else { Standing::Outside };
        let view = view.unwrap_or_default();
        let membership = Membership { view, standing, is_changing: false, newcomers: 0, end: None };
        let state = State {
            membership,
            commands: Vec::new(),
            directory: directory.into_iter().collect(),
            seen: None,
            told: BTreeMap::new(),
            bound: Vec::new(),
            said_goodbye: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// How many members there are known to be.
    pub(super) fn world(&self) -> usize {
        self.lock().directory.len().max(1)
    }

    pub(super) fn membership(&self) -> Membership {
        self.lock().membership.clone()
    }

    pub(super) fn addresses(&self, member: Member) -> Vec<SocketAddr> {
        self.lock().directory.get(&member).cloned().unwrap_or_default()
    }

    /// Where the processes that this one knows of listen.
    pub(super) fn directory(&self) -> Vec<(Member, Vec<SocketAddr>)> {
        self.lock().directory.clone().into_iter().collect()
    }

    /// Takes the entries that are new, and gives them.
    pub(super) fn learn(
        &self,
        entries: Vec<(Member, Vec<SocketAddr>)>,
    ) -> Vec<(Member, Vec<SocketAddr>)> {
        let directory = &mut self.lock().directory;
        let mut new = entries;
        new.retain(|(member, _)| !directory.contains_key(member));
        directory.extend(new.iter().cloned());
        new
    }

    /// Forgets where some listen.
    pub(super) fn forget(&self, is_gone: impl Fn(Member) -> bool) {
        self.lock().directory.retain(|&member, _| !is_gone(member));
    }

    /// Whether a process is worth being dialled still.
    pub(super) fn is_wanted(&self, member: Member) -> bool {
        let state = self.lock();
        state.directory.contains_key(&member) && !state.membership.is_over() && !state.said_goodbye
    }

    /// This process was told of the job that it wants to join.
    pub(super) fn was_told(&self, seen: &View) {
        self.lock().seen = Some(seen.clone());
    }

    /// The latest view of the job that this process was told of while it was outside.
    pub(super) fn seen(&self) -> Option<View> {
        self.lock().seen.clone()
    }

    pub(super) fn command(&self, command: Command) {
        self.lock().commands.push(command);
    }

    pub(super) fn has_commands(&self) -> bool {
        !self.lock().commands.is_empty()
    }

    pub(super) fn take_commands(&self) -> Vec<Command> {
        std::mem::take(&mut self.lock().commands)
    }

    /// Another state of affairs: what is bound to an epoch that is over ends.
    pub(super) fn update(&self, membership: Membership) {
        let mut state = self.lock();
        if state.membership.end.is_some() || state.membership == membership {
            return;
        }
        state.membership = membership;
        let Membership { view, end, .. } = &state.membership;
        let (view, end) = (view.clone(), end.clone());
        let epoch = view.epoch;
        state.told.retain(|&it, _| it >= epoch);
        let (over, bound) = std::mem::take(&mut state.bound)
            .into_iter()
            .partition::<Vec<_>, _>(|(bound, _)| end.is_some() || bound.is_over(&view));
        state.bound = bound;
        drop(state);
        self.changed.notify_all();
        let why = end.unwrap_or_else(|| format!("the job is in epoch {epoch} now"));
        over.into_iter().for_each(|(_, superseder)| superseder.supersede(&why));
    }

    /// This process is no longer in the job.
    pub(super) fn end(&self, why: &str) {
        let membership = self.membership();
        self.update(Membership { end: Some(why.to_owned()), ..membership });
    }

    /// The thread has ended, and this process is no longer in the job.
    pub(super) fn fail(&self, why: &str) {
        self.end(why);
        self.lock().said_goodbye = true;
        self.changed.notify_all();
    }

    /// Ends a control when what it is bound to is over, at once if it is.
    pub(super) fn bind(&self, bound: Bound, superseder: Superseder) {
        let mut state = self.lock();
        let Membership { view, end, .. } = &state.membership;
        if end.is_none() && !bound.is_over(view) {
            // Of groups that were dropped meanwhile nothing is kept.
            state.bound.retain(|(_, superseder)| superseder.is_needed());
            return state.bound.push((bound, superseder));
        }
        let now = view.epoch;
        let why = end.clone().unwrap_or_else(|| format!("the job is in epoch {now} now"));
        drop(state);
        superseder.supersede(&why);
    }

    pub(super) fn set_told(&self, epoch: u64, value: Vec<u8>) {
        let mut state = self.lock();
        if epoch >= state.membership.view.epoch {
            state.told.insert(epoch, value);
        }
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn told(&self, epoch: u64, until: Instant) -> Option<Vec<u8>> {
        let is_there = |it: &State| it.told.contains_key(&epoch) || it.membership.has_left(epoch);
        let state = self.wait_for(until, is_there);
        state.told.get(&epoch).filter(|_| !state.membership.has_left(epoch)).cloned()
    }

    pub(super) fn said_goodbye(&self) {
        self.lock().said_goodbye = true;
        self.changed.notify_all();
    }

    pub(super) fn await_goodbye(&self, until: Instant) {
        drop(self.wait_for(until, |it| it.said_goodbye));
    }

    /// Waits until `is_there`, or `until`. What is known then.
    pub(super) fn wait(
        &self,
        until: Instant,
        is_there: impl Fn(&Membership) -> bool,
    ) -> Membership {
        self.wait_for(until, |it| is_there(&it.membership)).membership.clone()
    }

    fn wait_for(&self, until: Instant, is_over: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let time = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(self.lock(), time, |it| !is_over(it));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Every critical section leaves what it guards whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
