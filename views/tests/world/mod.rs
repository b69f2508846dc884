//! Processes, the connections between them, and what has to hold whatever happens.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use unisum_views::{Member, Message, Output, Participant, Standing, View};

/// A job under test: every process that there is or was, by its number.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// Shared with the worlds before this one, as far as they are the same.
    pub(crate) processes: Vec<Arc<Participant>>,
    pub(crate) dead: BTreeSet<usize>,
    /// Whose end whom has noticed: (who, whose).
    pub(crate) noticed: BTreeSet<(usize, usize)>,
    /// What is under way from whom to whom, in order.
    pub(crate) wires: BTreeMap<(usize, usize), VecDeque<Message>>,
    /// Each epoch's view, as the first process said that installed it.
    pub(crate) decided: BTreeMap<u64, View>,
    fault: Option<String>,
}

impl World {
    /// Members 0 to `members` - 1 in a view, and as many processes outside.
    pub(crate) fn new(members: usize, newcomers: usize) -> Self {
        let view = View::first((0..members as u64).map(Member).collect());
        let inside = view.members.iter().map(|&it| Participant::new(it, view.clone()));
        let outside = (members..members + newcomers).map(|it| Member(it as u64));
        let processes = inside.chain(outside.map(Participant::newcomer)).map(Arc::new).collect();
        Self {
            processes,
            dead: BTreeSet::new(),
            noticed: BTreeSet::new(),
            wires: BTreeMap::new(),
            decided: [(1, view)].into(),
            fault: None,
        }
    }

    pub(crate) fn is_alive(&self, process: usize) -> bool {
        !self.dead.contains(&process)
    }

    /// What was found that may never be.
    pub(crate) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// A process does something.
    pub(crate) fn act(&mut self, process: usize, act: impl FnOnce(&mut Participant) -> Output) {
        let before = self.processes[process].view().epoch;
        let output = act(Arc::make_mut(&mut self.processes[process]));
        let view = self.processes[process].view().clone();
        if view.epoch != before {
            let known = self.decided.entry(view.epoch).or_insert_with(|| view.clone());
            if *known != view {
                self.fault = Some(format!("epoch {} has {known:?} and {view:?}", view.epoch));
            }
        }
        for (Member(to), message) in output.sends {
            let to = to as usize;
            // What is sent to a process that is gone, or that this one does not reach, is lost.
            if self.is_alive(to) && !self.noticed.contains(&(process, to)) {
                self.wires.entry((process, to)).or_default().push_back(message);
            }
        }
    }

    /// The next message from one process arrives at another.
    pub(crate) fn deliver(&mut self, from: usize, to: usize) {
        let wire = self.wires.get_mut(&(from, to)).expect("something is under way");
        let message = wire.pop_front().expect("something is under way");
        if wire.is_empty() {
            self.wires.remove(&(from, to));
        }
        self.act(to, |it| it.hear(Member(from as u64), message));
    }

    /// A process ends. What it sent may still arrive, until others notice. What it knew is
    /// forgotten: nothing follows from it any more, and worlds that differ only there are one.
    pub(crate) fn kill(&mut self, process: usize) {
        self.dead.insert(process);
        self.wires.retain(|&(_, to), _| to != process);
        self.noticed.retain(|&(who, _)| who != process);
        self.processes[process] = Arc::new(Participant::newcomer(Member(process as u64)));
    }

    /// A process notices that another can't be reached any more; what was under way is lost.
    pub(crate) fn notice(&mut self, who: usize, whose: usize) {
        self.noticed.insert((who, whose));
        self.wires.remove(&(whose, who));
        self.act(who, |it| it.lose(Member(whose as u64)));
    }

    fn living(&self) -> impl Iterator<Item = (usize, &Participant)> {
        let processes = self.processes.iter().map(|it| &**it).enumerate();
        processes.filter(|(index, _)| self.is_alive(*index))
    }

    /// When nothing more will happen: whether the members that are left of the latest view, if they
    /// are a quorum of it, are all in it, without any that are gone.
    pub(crate) fn is_settled(&self) -> bool {
        let Some(view) = self
            .living()
            .map(|(_, it)| it.view())
            .filter(|view| view.epoch > 0)
            .max_by_key(|view| view.epoch)
        else {
            return true;
        };
        let lives = |Member(it): Member| self.is_alive(it as usize);
        if !view.is_quorum(lives) {
            return true;
        }
        view.members.iter().all(|&Member(it)| {
            let process = &self.processes[it as usize];
            self.is_alive(it as usize)
                && process.standing() == Standing::Inside
                && process.view() == view
                && !process.is_changing()
        })
    }
}
