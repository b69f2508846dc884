//! One member's part in the agreement: what happens goes in, what to send comes out.

mod proposal;

use std::collections::BTreeSet;
use std::time::Duration;

use self::proposal::{Proposal, Stage};
use crate::{Ballot, Member, Message, Promise, View};

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// It asks to be let in.
    Outside,
    /// It is in the view.
    Inside,
    /// The others went on without it. Final.
    Excluded,
    /// It has lost so many others that those left are no quorum of its view. That lasts, unless
    /// others know of a later view: they say so as soon as they have noticed the same losses.
    Stranded,
}

/// What a participant waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// For the answers of members that are not known to be lost: as long as silence may last before
    /// it convicts.
    Silence,
    /// For another process to finish what it proposes: longer than that one may wait for answers.
    Patience,
    /// For its turn to propose again after another proposer was ahead: some milliseconds, more for
    /// higher ranks.
    Retry,
}

impl Timer {
    /// How long a member of this rank waits, where silence of `silence` convicts. It grows with the
    /// ballots, so that proposers that meet get out of each other's way however slow messages are.
    pub fn lasts(self, silence: Duration, rank: usize, ballot: Ballot) -> Duration {
        let rank = u32::try_from(rank).unwrap_or(u32::MAX).min(RANK_MAX);
        let grown = |by: u32| 1 << ballot.round.saturating_sub(by).min(DOUBLINGS_MAX);
        match self {
            Self::Silence => silence,
            Self::Patience => (silence * 5 / 2 + silence / 2 * rank) * grown(1),
            Self::Retry => silence / 100 * (rank + 1) * grown(0),
        }
    }
}

/// That a participant waits. The caller's clock runs from when [`Participant::waits`] says so
/// first; whenever it says anything else, the clock starts anew: in each epoch, for each ballot,
/// and for each of its two questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wait {
    /// For what.
    pub timer: Timer,
    /// The ballot it concerns.
    pub ballot: Ballot,
    epoch: u64,
    is_accepting: bool,
}

/// The rank from which on waiting grows no more.
const RANK_MAX: u32 = 64;
/// How often waiting doubles at most.
const DOUBLINGS_MAX: u32 = 8;

/// What follows from what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Messages to send, in order.
    pub sends: Vec<(Member, Message)>,
    /// Whether view or standing have changed.
    pub changed: bool,
}

/// One member's part in the agreement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Participant {
    own: Member,
    /// The last view that this process knows to be decided.
    view: View,
    standing: Standing,
    /// Members of the view that this process can't reach any more.
    lost: BTreeSet<Member>,
    /// Members of the view that are to leave it for other reasons: somebody asked for that, or
    /// they were silent.
    unwanted: BTreeSet<Member>,
    /// Whether the view is to change though nobody is lost.
    wants_change: bool,
    /// Whether newcomers may enter with the next change.
    admits: bool,
    newcomers: BTreeSet<Member>,
    /// The highest ballot that this process follows, to leave the view.
    promised: Ballot,
    accepted: Option<(Ballot, View)>,
    /// While this process proposes.
    proposal: Option<Proposal>,
    /// Whom it told of the wish to change last, and what: nobody is told twice.
    told: Option<(Member, Message)>,
}

impl Participant {
    /// A member of the first view.
    ///
    /// # Panics
    /// If it is not in the view.
    pub fn new(own: Member, view: View) -> Self {
        assert!(view.has(own), "{own:?} is not in {view:?}");
        Self { view, standing: Standing::Inside, ..Self::newcomer(own) }
    }

    /// A process that is in no view yet.
    pub const fn newcomer(own: Member) -> Self {
        Self {
            own,
            view: View { epoch: 0, members: Vec::new() },
            standing: Standing::Outside,
            lost: BTreeSet::new(),
            unwanted: BTreeSet::new(),
            wants_change: false,
            admits: false,
            newcomers: BTreeSet::new(),
            promised: Ballot { round: 0, rank: 0 },
            accepted: None,
            proposal: None,
            told: None,
        }
    }

    /// This process.
    pub const fn own(&self) -> Member {
        self.own
    }

    /// The last view that this process knows to be decided.
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// This process's rank in that view; 0 outside.
    pub fn rank(&self) -> usize {
        self.view.rank(self.own).unwrap_or(0)
    }

    /// Where this process stands.
    pub const fn standing(&self) -> Standing {
        self.standing
    }

    /// Whether the view is about to change, as far as this process knows.
    pub fn is_changing(&self) -> bool {
        self.standing == Standing::Inside
            && (self.is_change_wanted() || self.promised.round > 0 || self.proposal.is_some())
    }

    /// The members of the view that this process has lost or wants out.
    pub fn out(&self) -> impl Iterator<Item = Member> {
        self.view.members.iter().copied().filter(|&it| self.is_out(it))
    }

    /// How many processes ask to be let in, as far as this one knows.
    pub fn newcomers(&self) -> usize {
        self.newcomers.len()
    }

    /// What this process waits for.
    pub fn waits(&self) -> Option<Wait> {
        if self.standing != Standing::Inside {
            return None;
        }
        let epoch = self.view.epoch;
        match &self.proposal {
            Some(proposal) => {
                let is_accepting = matches!(proposal.stage, Stage::Accepting { .. });
                let (timer, ballot) = (proposal.timer(), proposal.ballot);
                Some(Wait { timer, ballot, epoch, is_accepting })
            }
            None => {
                let (timer, ballot) = (Timer::Patience, self.promised);
                let wait = Wait { timer, ballot, epoch, is_accepting: false };
                self.is_changing().then_some(wait)
            }
        }
    }

    /// This process can't reach a member, or a process that asked to be let in, any more.
    pub fn lose(&mut self, member: Member) -> Output {
        self.newcomers.remove(&member);
        // It may be about to enter the view.
        self.lost.insert(member);
        self.go_on(Output::default())
    }

    /// The view is to change: without those in `out`, and with newcomers if it `admits` them. For
    /// epoch `epoch` only: if that is over, nothing happens.
    pub fn change(&mut self, epoch: u64, out: &[Member], admits: bool) -> Output {
        if epoch == self.view.epoch {
            self.wish(out, admits);
        }
        self.go_on(Output::default())
    }

    /// A process asks this one to be let in.
    pub fn ask(&mut self, newcomer: Member) -> Output {
        let mut output = Output::default();
        self.let_wait(newcomer, &mut output);
        self.go_on(output)
    }

    /// A message has come.
    pub fn hear(&mut self, from: Member, message: Message) -> Output {
        let mut output = Output::default();
        match self.standing {
            // What it knows may not be known to those that were to hear of it.
            Standing::Excluded if !matches!(message, Message::Decided(_)) => {
                self.answer_decided(from, &mut output);
            }
            Standing::Excluded => {}
            Standing::Inside | Standing::Outside | Standing::Stranded => {
                self.take(from, message, &mut output);
            }
        }
        self.go_on(output)
    }

    /// What [`Participant::waits`] said has lasted too long.
    pub fn expire(&mut self, timer: Timer) -> Output {
        let is_changing = self.is_changing();
        match (timer, &self.proposal) {
            (Timer::Retry, Some(proposal)) if matches!(proposal.stage, Stage::Beaten) => {
                self.proposal = None;
            }
            (Timer::Silence, Some(proposal)) => {
                let is_silent = |&it: &Member| !proposal.has_answered(it);
                self.unwanted.extend(self.view.members.iter().copied().filter(is_silent));
            }
            (Timer::Patience, None) if is_changing => {
                // The one that is to propose does not.
                self.unwanted.extend(self.coordinator().filter(|&it| it != self.own));
            }
            _ => {}
        }
        self.go_on(Output::default())
    }

    fn is_out(&self, member: Member) -> bool {
        self.lost.contains(&member) || self.unwanted.contains(&member)
    }

    fn is_change_wanted(&self) -> bool {
        self.wants_change || self.out().next().is_some()
    }

    /// Who is to propose: the first member that is there, as far as this process knows.
    fn coordinator(&self) -> Option<Member> {
        let mut members = self.view.members.iter().copied();
        // Who asks to be left out itself may still propose that.
        members.find(|&it| it == self.own || !self.is_out(it))
    }

    fn wish(&mut self, out: &[Member], admits: bool) {
        self.unwanted.extend(out.iter().copied().filter(|&it| self.view.has(it)));
        self.wants_change = true;
        self.admits |= admits;
    }

    fn let_wait(&mut self, newcomer: Member, output: &mut Output) {
        // Who hears of a newcomer from others may know already that it is gone.
        if self.standing == Standing::Outside || self.lost.contains(&newcomer) {
            return;
        }
        if self.view.has(newcomer) {
            return output.sends.push((newcomer, Message::Decided(self.view.clone())));
        }
        self.newcomers.insert(newcomer);
    }

    fn take(&mut self, from: Member, message: Message, output: &mut Output) {
        match message {
            Message::Decided(view) => self.install(view, output),
            Message::Join(newcomer) => self.let_wait(newcomer, output),
            Message::Wish { view, out, admits } => {
                self.install(view.clone(), output);
                match view.epoch == self.view.epoch {
                    true => self.wish(&out, admits),
                    false => self.answer_decided(from, output),
                }
            }
            Message::Prepare { view, ballot } => {
                self.install(view.clone(), output);
                match view.epoch == self.view.epoch {
                    true => self.promise(from, ballot, output),
                    false => self.answer_decided(from, output),
                }
            }
            Message::Accept { ballot, next } => match next.epoch == self.view.epoch + 1 {
                true => self.accept(from, ballot, next, output),
                false => self.answer_decided(from, output),
            },
            Message::Promised { epoch, ballot, promise } if epoch == self.view.epoch => {
                self.promised_by(from, ballot, promise);
            }
            Message::Accepted { epoch, ballot } if epoch == self.view.epoch => {
                if let Some(proposal) = self.proposal.as_mut().filter(|it| it.ballot == ballot) {
                    proposal.accepted(from);
                }
            }
            Message::Refused { epoch, ballot } if epoch == self.view.epoch => {
                self.promised = self.promised.max(ballot);
                self.meet(ballot);
            }
            Message::Promised { .. } | Message::Accepted { .. } | Message::Refused { .. } => {}
        }
    }

    /// Tells a process whose epoch is over what has come after it.
    fn answer_decided(&self, to: Member, output: &mut Output) {
        if self.view.epoch > 0 && to != self.own {
            output.sends.push((to, Message::Decided(self.view.clone())));
        }
    }

    /// Whether a higher ballot was promised, which the proposer is then told. Else this one is.
    fn refuses(&mut self, from: Member, ballot: Ballot, output: &mut Output) -> bool {
        if ballot < self.promised {
            let (epoch, ballot) = (self.view.epoch, self.promised);
            output.sends.push((from, Message::Refused { epoch, ballot }));
            return true;
        }
        self.promised = ballot;
        self.meet(ballot);
        false
    }

    fn promise(&mut self, from: Member, ballot: Ballot, output: &mut Output) {
        if self.refuses(from, ballot, output) {
            return;
        }
        let epoch = self.view.epoch;
        let promise = Promise { accepted: self.accepted.clone(), out: self.out().collect() };
        output.sends.push((from, Message::Promised { epoch, ballot, promise }));
    }

    fn accept(&mut self, from: Member, ballot: Ballot, next: View, output: &mut Output) {
        if self.refuses(from, ballot, output) {
            return;
        }
        let epoch = self.view.epoch;
        self.accepted = Some((ballot, next));
        output.sends.push((from, Message::Accepted { epoch, ballot }));
    }

    /// Another proposer has this ballot.
    fn meet(&mut self, ballot: Ballot) {
        if let Some(proposal) = &mut self.proposal {
            proposal.meets(ballot);
        }
    }

    fn promised_by(&mut self, from: Member, ballot: Ballot, promise: Promise) {
        if let Some(proposal) = self.proposal.as_mut().filter(|it| it.ballot == ballot) {
            proposal.promised(from, promise);
        }
    }

    /// A view was decided.
    fn install(&mut self, view: View, output: &mut Output) {
        if view.epoch <= self.view.epoch {
            return;
        }
        let is_in = view.has(self.own);
        if self.standing == Standing::Outside && !is_in {
            // It is still waiting.
            return;
        }
        self.standing = if is_in { Standing::Inside } else { Standing::Excluded };
        self.view = view;
        let Self { view, lost, unwanted, newcomers, .. } = self;
        lost.retain(|&it| view.has(it));
        unwanted.clear();
        newcomers.retain(|&it| !view.has(it));
        (self.wants_change, self.admits) = (false, false);
        (self.promised, self.accepted, self.proposal) = (Ballot::default(), None, None);
        self.told = None;
        output.changed = true;
    }

    /// Does what follows from all that is known.
    fn go_on(&mut self, mut output: Output) -> Output {
        while self.advance(&mut output) {}
        output
    }

    /// Takes the next step, if there is one.
    fn advance(&mut self, output: &mut Output) -> bool {
        if matches!(self.standing, Standing::Inside | Standing::Stranded) {
            let has_quorum = self.view.is_quorum(|it| !self.lost.contains(&it));
            let standing = if has_quorum { Standing::Inside } else { Standing::Stranded };
            output.changed |= standing != self.standing;
            self.standing = standing;
        }
        if !self.is_changing() {
            return false;
        }
        let coordinator = self.coordinator().unwrap_or(self.own);
        if coordinator != self.own {
            self.tell(coordinator, output);
            return false;
        }
        match self.proposal {
            None => self.propose(output),
            Some(_) => self.pursue(output),
        }
    }

    /// Tells the coordinator that the view is to change, and why.
    fn tell(&mut self, coordinator: Member, output: &mut Output) {
        if !self.is_change_wanted() {
            return;
        }
        let (view, out) = (self.view.clone(), self.out().collect());
        let admits = self.admits;
        let wish = Message::Wish { view, out, admits };
        let told = Some((coordinator, wish.clone()));
        if self.told == told {
            return;
        }
        self.told = told;
        // Who is asked does not forget that it was, but another coordinator was not asked.
        for newcomer in self.newcomers.iter().filter(|_| admits) {
            output.sends.push((coordinator, Message::Join(*newcomer)));
        }
        output.sends.push((coordinator, wish));
    }
}
