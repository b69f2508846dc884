//! Every order in which a newcomer may enter while members die: larger worlds than `model.rs` has,
//! of which states that make no difference are left out.
//!
//! Who will die, which member asks for the change, and which one the newcomer asks to be let in is
//! chosen at the start, so that there are more first states, and less that happens afterwards: each
//! of those that are to die does so at some moment. A world in which nothing can happen any more is
//! an end. What may never be is remembered ([`World::fault`]), so that it is enough to look at the
//! ends, if each of them is reached.
//!
//! **Messages that do nothing are not under way.** An answer, or a view, of an epoch that its
//! receiver has left changes nothing whenever it arrives, as a process never goes back. So does a
//! question of such an epoch whose sender is dead. What was decided in an epoch that nobody can
//! come to any more is forgotten.
//!
//! **Of events that commute one order is enough.** Each event is one process's: a message arrives
//! there, it notices an end, it dies, it asks for the change. It reads and writes what this process
//! knows, takes from the front of a wire that ends there, and puts messages at the ends of wires
//! that begin there. Events of two processes therefore commute, and neither stops the other; at
//! most, one makes the other possible: the first message on an empty wire can arrive, a death can
//! be noticed. (What is sent to one that is dead is lost, and what is on its way to one that dies
//! as well: in both orders. Of two views of one epoch, whoever installs the second finds the
//! fault.) So if a set of processes is such that none outside of it can put a first message on a
//! wire into it, or die and be noticed there, all that can ever happen outside
//! commutes with every event of the set: it is persistent (Godefroid, "Partial-Order Methods for
//! the Verification of Concurrent Systems", 1996), and from this state on only events of the set
//! need be tried. [`State::settles_first`] looks for the smallest such set. Who can send to whom
//! follows from who may ever propose: nobody is doubted here, so that only those that are to die
//! are ever left out, and nobody after the first member that lives on proposes. The others speak to
//! possible proposers only, and to the newcomer in answer to its question.
//!
//! Every end is reached so if there are no circles, and there are none: what a process knows of an
//! epoch only grows, ballots and epochs go up, requests are sent only by who has learnt something,
//! and answers, which are not answered, follow from requests only.
//!
//! `the_ends_are_the_same` compares the ends of worlds that can be explored both ways.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod world;

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use stateright::{Checker, Model, Property};
use unisum_views::{Member, Message};
use world::World;

/// A world, and what will happen in it.
#[derive(Clone, Debug)]
struct Job {
    members: usize,
    newcomers: usize,
    doomed: BTreeSet<usize>,
    starts: Vec<Start>,
    /// Whether events that commute are tried in one order only.
    reduced: bool,
    /// The ends, where they are wanted.
    ends: Option<Arc<Mutex<BTreeSet<String>>>>,
}

/// What is chosen at the start, besides who will die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Start {
    /// Who will ask for a change that lets newcomers in.
    renews: Option<usize>,
    /// Whom the newcomer asks.
    asked: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    /// Who will die, and lives.
    doomed: BTreeSet<usize>,
    /// Who will ask for a change that lets newcomers in.
    renews: Option<usize>,
    /// The first member that lives on: nobody after it ever proposes.
    last_proposer: usize,
    /// Whom the newcomer asks.
    asked: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Deliver(usize, usize),
    Notice(usize, usize),
    Kill(usize),
    Renew(usize),
}

impl Action {
    /// Whose event it is.
    const fn of(self) -> usize {
        match self {
            Self::Deliver(_, it) | Self::Notice(it, _) | Self::Kill(it) | Self::Renew(it) => it,
        }
    }
}

/// Of so many processes all sets of at most `most`.
fn sets(processes: usize, most: usize) -> Vec<BTreeSet<usize>> {
    let set = |bits: usize| (0..processes).filter(|it| bits >> it & 1 != 0).collect();
    let sets = (0..1 << processes).map(set);
    sets.filter(|it: &BTreeSet<usize>| it.len() <= most).collect()
}

impl State {
    fn living(&self) -> impl Iterator<Item = usize> {
        (0..self.world.processes.len()).filter(|&it| self.world.is_alive(it))
    }

    fn all_actions(&self) -> Vec<Action> {
        let world = &self.world;
        let mut actions: Vec<Action> =
            world.wires.keys().map(|&(from, to)| Action::Deliver(from, to)).collect();
        let ends = self.living().flat_map(|who| world.dead.iter().map(move |&it| (who, it)));
        let unnoticed = ends.filter(|pair| !world.noticed.contains(pair));
        actions.extend(unnoticed.map(|(who, whose)| Action::Notice(who, whose)));
        actions.extend(self.doomed.iter().map(|&it| Action::Kill(it)));
        let renews = self.renews.filter(|&it| world.is_alive(it));
        actions.extend(renews.map(Action::Renew));
        actions
    }

    /// Whether a process can ever propose.
    const fn proposes(&self, process: usize) -> bool {
        process <= self.last_proposer
    }

    /// Whether a living process may put a first message on a wire to another one, as far as can be
    /// told from who they are.
    fn may_begin(&self, from: usize, to: usize) -> bool {
        if self.world.wires.contains_key(&(from, to)) || self.world.noticed.contains(&(from, to)) {
            return false;
        }
        let answers = self.asked == Some(from) && self.world.wires.contains_key(&(to, from));
        self.proposes(from) || self.proposes(to) || answers
    }

    /// The processes whose events commute with all that the others may do before these: the
    /// smallest such set that this process is in.
    fn persistent(&self, process: usize) -> u32 {
        // A bit for each; those whose deaths may be noticed are always in it.
        let mut new = self.doomed.iter().fold(1 << process, |set, it| set | 1 << it);
        let mut set = 0_u32;
        while new != set {
            let it = (new & !set).trailing_zeros() as usize;
            set |= 1 << it;
            let begin = self.living().filter(|&from| from != it && self.may_begin(from, it));
            new = begin.fold(new, |new, from| new | 1 << from);
        }
        set
    }

    /// The fewest events that need be tried.
    fn settles_first(&self, actions: Vec<Action>) -> Vec<Action> {
        let of_set = |process| {
            let set = self.persistent(process);
            actions.iter().copied().filter(|it| set >> it.of() & 1 != 0).collect::<Vec<_>>()
        };
        let sets = self.living().map(of_set).filter(|it| !it.is_empty());
        sets.min_by_key(Vec::len).unwrap_or(actions)
    }

    /// Forgets what makes no difference.
    fn tidy(&mut self) {
        let World { processes, dead, wires, decided, .. } = &mut self.world;
        for (&(from, to), wire) in wires.iter_mut() {
            let (epoch, is_dead) = (processes[to].view().epoch, dead.contains(&from));
            wire.retain(|message| match message {
                Message::Decided(view) => view.epoch > epoch,
                Message::Promised { epoch: of, .. }
                | Message::Accepted { epoch: of, .. }
                | Message::Refused { epoch: of, .. } => *of >= epoch,
                Message::Wish { view, .. } | Message::Prepare { view, .. } => {
                    !is_dead || view.epoch >= epoch
                }
                Message::Accept { next, .. } => !is_dead || next.epoch > epoch,
                Message::Join(_) => true,
            });
        }
        wires.retain(|_, wire| !wire.is_empty());
        let newcomer = processes.len() - 1;
        self.asked = self.asked.filter(|&it| wires.contains_key(&(newcomer, it)));
        let inside = processes.iter().filter(|it| it.view().epoch > 0);
        let first = inside.map(|it| it.view().epoch).min().unwrap_or(0);
        let comes = |epoch: u64| wires.values().flatten().any(|it| told(it) == Some(epoch));
        decided.retain(|&epoch, _| epoch >= first || comes(epoch));
    }
}

/// The epoch of the view that a message tells.
const fn told(message: &Message) -> Option<u64> {
    match message {
        Message::Decided(view) | Message::Wish { view, .. } | Message::Prepare { view, .. } => {
            Some(view.epoch)
        }
        _ => None,
    }
}

impl Model for Job {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let first = |&Start { renews, asked }: &Start| {
            let mut world = World::new(self.members, self.newcomers);
            if let Some(asked) = asked {
                let join = Message::Join(Member(self.members as u64));
                world.wires.insert((self.members, asked), VecDeque::from([join]));
            }
            let (doomed, last_proposer) = (self.doomed.clone(), self.last_proposer());
            State { world, doomed, renews, last_proposer, asked }
        };
        self.starts.iter().map(first).collect()
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let all = state.all_actions();
        actions.extend(if self.reduced { state.settles_first(all) } else { all });
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        let world = &mut state.world;
        match action {
            Action::Deliver(from, to) => world.deliver(from, to),
            Action::Kill(process) => {
                state.doomed.remove(&process);
                world.kill(process);
                state.renews = state.renews.filter(|&it| it != process);
            }
            Action::Notice(who, whose) => world.notice(who, whose),
            Action::Renew(process) => {
                state.renews = None;
                let epoch = world.processes[process].view().epoch;
                world.act(process, |it| it.change(epoch, &[], true));
            }
        }
        state.tidy();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no epoch has two views", |_, state: &State| {
                state.world.fault().is_none()
            }),
            Property::always("those that are left go on", |model: &Self, state: &State| {
                if !state.all_actions().is_empty() {
                    return true;
                }
                if let Some(ends) = &model.ends {
                    ends.lock().unwrap().insert(format!("{state:?}"));
                }
                state.world.is_settled()
            }),
        ]
    }
}

impl Job {
    /// All starts of a world in which these die, of those that are alike the first.
    fn new(members: usize, newcomers: usize, doomed: BTreeSet<usize>) -> Self {
        let (starts, ends) = (Vec::new(), None);
        let mut job = Self { members, newcomers, doomed, starts, reduced: true, ends };
        let starts: Vec<Start> =
            job.all_starts().into_iter().filter(|it| job.first_alike(*it) == *it).collect();
        job.starts = starts;
        job
    }

    fn all_starts(&self) -> Vec<Start> {
        let members = || (0..self.members).map(Some);
        let asked = || members().filter(|_| self.newcomers > 0);
        let asked = || asked().chain((self.newcomers == 0).then_some(None));
        let start = |renews| asked().map(move |asked| Start { renews, asked });
        members().chain([None]).flat_map(start).collect()
    }

    /// The first member that lives on. Nobody after it ever proposes.
    fn last_proposer(&self) -> usize {
        (0..self.members).find(|it| !self.doomed.contains(it)).unwrap_or(self.members)
    }

    /// The start that differs from this one in nothing but which of several members it is that
    /// stand next to each other, live on, and never propose. Where members stand in a view matters
    /// for who proposes, and for who is believed of two that accuse each other: nobody accuses
    /// those that live on.
    fn first_alike(&self, start: Start) -> Start {
        let is_like = |it: usize| it > self.last_proposer() && !self.doomed.contains(&it);
        let mut names: Vec<usize> = (0..self.members).collect();
        for it in [start.renews, start.asked].into_iter().flatten().filter(|it| is_like(*it)) {
            let first = (0..=it).rev().take_while(|it| is_like(*it)).last().unwrap_or(it);
            // The first of them that no earlier choice has taken; who has a name keeps it.
            let taken = start.renews.filter(|&other| {
                Some(it) == start.asked
                    && other != it
                    && is_like(other)
                    && (other.min(it)..=other.max(it)).all(is_like)
            });
            names[it] = first + usize::from(taken.is_some());
        }
        let name = |it: Option<usize>| it.map(|it| names[it]);
        Start { renews: name(start.renews), asked: name(start.asked) }
    }

    /// Checks all states; how many there were.
    #[track_caller]
    fn check(&self) -> usize {
        let checker = self.clone().checker().spawn_dfs().join();
        if let Some((name, path)) = checker.discoveries().into_iter().next() {
            let steps = path.clone().into_actions();
            let steps: Vec<String> = steps.iter().map(|it| format!("{it:?}")).collect();
            let last = path.into_states().pop().unwrap();
            panic!("{self:?}: not so that {name}, after\n  {}\n{last:#?}", steps.join("\n  "));
        }
        checker.unique_state_count()
    }
}

/// Checks a world with all that may die, on two threads; says how many states there were.
#[track_caller]
fn check(members: usize, deaths: usize, newcomers: usize) {
    check_sets(members, newcomers, sets(members + newcomers, deaths), |_| true);
}

/// The same for those that may die, and the starts for which `is_wanted`.
#[track_caller]
fn check_sets(
    members: usize,
    newcomers: usize,
    doomed: Vec<BTreeSet<usize>>,
    is_wanted: impl Fn(&Start) -> bool,
) {
    let started = Instant::now();
    let deaths = doomed.iter().map(BTreeSet::len).max().unwrap_or(0);
    let jobs = doomed.into_iter().map(|doomed| {
        let mut job = Job::new(members, newcomers, doomed);
        let all = job.all_starts().into_iter().filter(&is_wanted);
        let mut starts: Vec<Start> = Vec::new();
        for start in all.map(|it| job.first_alike(it)) {
            if !starts.contains(&start) {
                starts.push(start);
            }
        }
        job.starts = starts;
        job
    });
    let jobs = Mutex::new(jobs.collect::<Vec<_>>().into_iter());
    let counts = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(job) = jobs.lock().unwrap().next() else { break };
                    let states = job.check();
                    let took = started.elapsed().as_secs_f64();
                    println!("  {:?} die: {states} states, {took:.1} s since", job.doomed);
                    counts.lock().unwrap().push(states);
                }
            });
        }
    });
    let counts = counts.into_inner().unwrap();
    let (states, most) = (counts.iter().sum::<usize>(), counts.iter().max().unwrap());
    let took = started.elapsed().as_secs_f64();
    println!(
        "{members} members, {deaths} deaths, {newcomers} newcomers: {states} states, at most \
         {most} at a time, {took:.1} s"
    );
}

#[test]
fn newcomers_enter_while_members_die() {
    for (members, deaths, newcomers) in [(1, 2, 1), (2, 3, 1), (3, 2, 1), (4, 1, 1), (4, 2, 0)] {
        check(members, deaths, newcomers);
    }
}

/// A proposer that dies may have overtaken another one before: who knows of its death then goes on
/// without waiting for its turn.
#[test]
fn who_was_overtaken_by_the_dead_goes_on() {
    use Action::{Deliver, Kill, Notice, Renew};
    let job = Job::new(5, 0, BTreeSet::from([0, 1]));
    let first = Start { renews: Some(1), asked: None };
    let job = Job { starts: vec![first], ..job };
    let mut state = job.init_states().pop().unwrap();
    // 1 overtakes 0, which dies, and dies itself when 4 has promised; 2 begins where 0 had begun.
    let steps = [
        Renew(1),
        Deliver(1, 0),
        Kill(0),
        Notice(4, 0),
        Notice(3, 0),
        Deliver(0, 1),
        Notice(1, 0),
        Kill(1),
        Deliver(1, 4),
        Notice(4, 1),
        Deliver(4, 2),
        Deliver(2, 4),
        Deliver(2, 3),
        Notice(2, 1),
        Notice(2, 0),
        Deliver(4, 2),
        Deliver(3, 2),
    ];
    for step in steps {
        assert!(state.all_actions().contains(&step), "{step:?} of {state:#?}");
        state = job.next_state(&state, step).unwrap();
    }
    while let Some(step) = state.all_actions().first() {
        state = job.next_state(&state, *step).unwrap();
    }
    assert!(state.world.is_settled(), "{state:#?}");
}

#[test]
fn the_ends_are_the_same() {
    for (members, deaths, newcomers) in [(2, 1, 1), (2, 2, 1), (3, 1, 0), (3, 2, 0), (3, 1, 1)] {
        for doomed in sets(members + newcomers, deaths) {
            let explore = |reduced| {
                let ends = Some(Arc::default());
                let job = Job::new(members, newcomers, doomed.clone());
                let job = Job { reduced, ends, starts: job.all_starts(), ..job };
                let states = job.check();
                let ends = std::mem::take(&mut *job.ends.unwrap().lock().unwrap());
                (states, ends)
            };
            let ((all, ends), (fewer, reduced)) = (explore(false), explore(true));
            println!("{members}, {newcomers}, {doomed:?}: {all}, {fewer}, {} ends", ends.len());
            assert!(ends == reduced, "{} and {} ends", ends.len(), reduced.len());
        }
    }
}

#[test]
fn starts_that_are_alike_have_as_many_states() {
    let mut fewer = 0;
    for doomed in sets(5, 1) {
        let job = Job::new(4, 1, doomed);
        let job_of = |start| Job { starts: vec![start], reduced: false, ..job.clone() };
        let count = |start| job_of(start).check();
        for start in job.all_starts() {
            let first = job.first_alike(start);
            if first != start {
                assert!(job.starts.contains(&first), "{start:?} and {first:?}");
                assert_eq!(count(start), count(first), "{start:?} and {first:?}");
                fewer += 1;
            }
        }
    }
    assert!(fewer > 0);
}

/// `UNISUM_TEST_VIEWS="5 2 1" cargo test --release -p unisum-views --test joins -- --ignored
/// --nocapture`: so many members, deaths and newcomers; of those that die only some sets with, say,
/// `UNISUM_TEST_DOOMED="0 1, 1 2"`.
#[test]
#[ignore = "takes minutes to hours"]
fn worlds_by_hand() {
    let world = std::env::var("UNISUM_TEST_VIEWS").unwrap_or_else(|_| "4 2 1".into());
    let asks_last = world.ends_with(" last");
    let numbers = world.trim_end_matches(" last").split(' ');
    let numbers: Vec<usize> = numbers.map(|it| it.parse().unwrap()).collect();
    let [members, deaths, newcomers] = numbers[..] else { panic!("{world:?}") };
    let doomed = match std::env::var("UNISUM_TEST_DOOMED") {
        Ok(doomed) => {
            let set = |set: &str| set.split_whitespace().map(|it| it.parse().unwrap()).collect();
            doomed.split(',').map(set).collect()
        }
        Err(_) => sets(members + newcomers, deaths),
    };
    check_sets(members, newcomers, doomed, |it| !asks_last || it.asked == Some(members - 1));
}
