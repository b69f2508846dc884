//! Every order in which messages, deaths, their noticing and wishes may come, in small worlds.
//!
//! A state is what all processes know and all that is under way. Messages between two processes
//! arrive in order or, from some point on, not at all; those of different pairs in any order.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod world;

use std::time::{Duration, Instant};

use stateright::{Checker, Model, Property};
use unisum_views::{Standing, Timer};
use world::World;

#[derive(Clone, Copy, Debug)]
struct Job {
    members: usize,
    deaths: usize,
    newcomers: usize,
    /// How often a process may find another one silent that is merely slow.
    doubts: usize,
    /// How often a beaten proposer may try again.
    retries: usize,
    /// Whether a member may ask for a change that lets newcomers in.
    renews: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    doubts: usize,
    retries: usize,
    renewed: bool,
    /// How many of the newcomers have asked.
    asked: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Deliver(usize, usize),
    Kill(usize),
    Notice(usize, usize),
    Expire(usize, Timer),
    Ask,
    Renew(usize),
}

impl Model for Job {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let world = World::new(self.members, self.newcomers);
        vec![State { world, doubts: 0, retries: 0, renewed: false, asked: 0 }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let world = &state.world;
        actions.extend(world.wires.keys().map(|&(from, to)| Action::Deliver(from, to)));
        let living = (0..world.processes.len()).filter(|&it| world.is_alive(it));
        let ends = living.flat_map(|who| world.dead.iter().map(move |&whose| (who, whose)));
        let unnoticed = ends.filter(|pair| !world.noticed.contains(pair));
        actions.extend(unnoticed.map(|(who, whose)| Action::Notice(who, whose)));
        if world.dead.len() < self.deaths {
            let living = (0..world.processes.len()).filter(|&it| world.is_alive(it));
            actions.extend(living.map(Action::Kill));
        }
        for (process, participant) in world.processes.iter().enumerate() {
            let Some(wait) = participant.waits().filter(|_| world.is_alive(process)) else {
                continue;
            };
            let timer = wait.timer;
            let may = match timer {
                Timer::Retry => state.retries < self.retries,
                Timer::Silence | Timer::Patience => state.doubts < self.doubts,
            };
            if may {
                actions.push(Action::Expire(process, timer));
            }
        }
        if state.asked < self.newcomers && world.is_alive(self.members + state.asked) {
            actions.push(Action::Ask);
        }
        if self.renews && !state.renewed {
            let inside = |it: &usize| world.processes[*it].standing() == Standing::Inside;
            let living = (0..self.members).filter(|&it| world.is_alive(it));
            actions.extend(living.filter(inside).map(Action::Renew));
        }
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        let world = &mut state.world;
        match action {
            Action::Deliver(from, to) => world.deliver(from, to),
            Action::Kill(process) => world.kill(process),
            Action::Notice(who, whose) => world.notice(who, whose),
            Action::Expire(process, timer) => {
                match timer {
                    Timer::Retry => state.retries += 1,
                    Timer::Silence | Timer::Patience => state.doubts += 1,
                }
                world.act(process, |it| it.expire(timer));
            }
            Action::Ask => {
                let newcomer = world.processes[self.members + state.asked].own();
                state.asked += 1;
                // Of all members the last, which coordinates last.
                let member = (0..self.members).rev().find(|&it| world.is_alive(it))?;
                world.act(member, |it| it.ask(newcomer));
            }
            Action::Renew(process) => {
                state.renewed = true;
                let epoch = world.processes[process].view().epoch;
                world.act(process, |it| it.change(epoch, &[], true));
            }
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no epoch has two views", |_, state: &State| {
                state.world.fault().is_none()
            }),
            Property::always("those that are left go on", |model: &Self, state: &State| {
                let mut actions = Vec::new();
                model.actions(state, &mut actions);
                let is_over = |action: &Action| {
                    matches!(action, Action::Kill(_) | Action::Ask | Action::Renew(_))
                        || matches!(action, Action::Expire(_, it) if *it != Timer::Retry)
                };
                // Who may not try again is no longer watched.
                let is_cut = model.retries == state.retries && model.doubts > 0;
                is_cut || !actions.iter().all(is_over) || state.world.is_settled()
            }),
        ]
    }
}

const TIME_MAX: Duration = Duration::from_secs(900);

/// Checks all states, and says how many there were.
#[track_caller]
fn check(job: Job) {
    let started = Instant::now();
    let checker = job.checker().threads(2).timeout(TIME_MAX).spawn_bfs().join();
    let (states, took) = (checker.unique_state_count(), started.elapsed());
    println!("{job:?}: {states} states, {:.1} s", took.as_secs_f64());
    if let Some((name, path)) = checker.discoveries().into_iter().next() {
        let steps = path.clone().into_actions();
        let steps: Vec<String> = steps.iter().map(|it| format!("{it:?}")).collect();
        let last = path.into_states().pop().unwrap();
        panic!("{job:?}: not so that {name}, after\n  {}\n{last:#?}", steps.join("\n  "));
    }
    assert!(took < TIME_MAX, "{job:?}: more states than there is time for");
}

const PLAIN: Job =
    Job { members: 3, deaths: 0, newcomers: 0, doubts: 0, retries: 0, renews: false };

#[test]
fn whoever_dies_whenever() {
    for (members, deaths) in [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (5, 1)] {
        check(Job { members, deaths, ..PLAIN });
    }
}

#[test]
fn newcomers_enter_while_others_die() {
    let joining = Job { newcomers: 1, renews: true, ..PLAIN };
    for (members, deaths) in [(1, 1), (2, 1), (2, 2), (3, 0), (3, 1)] {
        check(Job { members, deaths, ..joining });
    }
    for (members, deaths) in [(1, 1), (2, 0), (2, 1)] {
        check(Job { members, deaths, newcomers: 2, ..joining });
    }
}

/// Two proposers at once: one is taken for dead that is merely slow.
#[test]
fn who_is_slow_makes_no_two_views() {
    for (members, deaths, doubts, retries) in [(2, 1, 2, 1), (3, 1, 1, 1), (3, 0, 1, 1)] {
        check(Job { members, deaths, doubts, retries, renews: deaths == 0, ..PLAIN });
    }
}

/// All that fits into a night rather than into a CI.
#[test]
#[ignore = "takes minutes"]
fn five_members_two_deaths_and_a_newcomer() {
    check(Job { members: 5, deaths: 2, ..PLAIN });
    check(Job { members: 4, deaths: 2, newcomers: 1, renews: true, ..PLAIN });
    check(Job { members: 5, deaths: 1, newcomers: 1, renews: true, ..PLAIN });
    check(Job { members: 4, deaths: 1, doubts: 1, retries: 1, ..PLAIN });
}
