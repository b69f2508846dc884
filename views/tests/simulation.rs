//! Random schedules on a virtual clock: delays, deaths, partitions, doubts, newcomers.
//!
//! `UNISUM_TEST_SEED=N` replays one schedule; `UNISUM_TEST_SCHEDULES=N` runs as many.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod world;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use unisum_views::{Member, Participant, Standing, Wait};
use world::World;

/// Milliseconds of the virtual clock.
type Time = u64;

const SILENCE: Time = 2000;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Deliver(usize, usize),
    Notice(usize, usize),
    Expire(usize, Wait, u64),
    Kill(usize),
    Change(usize, Vec<Member>),
    Ask(usize),
    /// A newcomer asks all members that it reaches.
    AskAll(usize),
    /// The first so many processes no longer reach the others.
    Part(usize),
    /// Two processes no longer reach each other.
    Cut(usize, usize),
}

/// Marsaglia, "Xorshift RNGs", 2003.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

struct Simulation {
    world: World,
    random: Random,
    now: Time,
    sequence: u64,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    /// When the last message of each pair arrives: none overtakes another.
    arrivals: BTreeMap<(usize, usize), Time>,
    /// What each process waits for, and since which event.
    timers: BTreeMap<usize, (Wait, u64)>,
    cut: Vec<(usize, usize)>,
    delay_max: Time,
    queued: BTreeMap<(usize, usize), usize>,
}

impl Simulation {
    fn new(seed: u64, members: usize, newcomers: usize) -> Self {
        let mut random = Random::new(seed);
        let delay_max = [1, 5, 40, 900][random.below(4) as usize];
        Self {
            world: World::new(members, newcomers),
            random,
            now: 0,
            sequence: 0,
            events: BinaryHeap::new(),
            arrivals: BTreeMap::new(),
            timers: BTreeMap::new(),
            cut: Vec::new(),
            delay_max,
            queued: BTreeMap::new(),
        }
    }

    fn at(&mut self, time: Time, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time, self.sequence, event)));
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cut.contains(&(a.min(b), a.max(b)))
    }

    /// Everything that was sent is under way, and all that is waited for has a time.
    fn schedule(&mut self) {
        let pairs: Vec<_> = self.world.wires.iter().map(|(&pair, it)| (pair, it.len())).collect();
        for (pair, count) in pairs {
            let queued = self.queued.get(&pair).copied().unwrap_or(0);
            for _ in queued..count {
                let delay = self.random.below(self.delay_max + 1);
                let time = (self.now + delay).max(self.arrivals.get(&pair).copied().unwrap_or(0));
                self.arrivals.insert(pair, time);
                self.at(time, Event::Deliver(pair.0, pair.1));
            }
            self.queued.insert(pair, count);
        }
        for process in 0..self.world.processes.len() {
            let waits = self.world.processes[process].waits();
            let waits = waits.filter(|_| self.world.is_alive(process));
            let known = self.timers.get(&process).map(|&(wait, _)| wait);
            if waits == known {
                continue;
            }
            self.timers.remove(&process);
            if let Some(wait) = waits {
                let (Wait { timer, ballot, .. }, rank) =
                    (wait, self.world.processes[process].rank());
                let time = timer.lasts(Duration::from_millis(SILENCE), rank, ballot).as_millis();
                let time = time as Time;
                let id = self.sequence;
                self.timers.insert(process, (wait, id));
                self.at(self.now + time, Event::Expire(process, wait, id));
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver(from, to) => {
                let pair = (from, to);
                if self.world.wires.contains_key(&pair) {
                    *self.queued.get_mut(&pair).unwrap() -= 1;
                    self.world.deliver(from, to);
                }
            }
            Event::Notice(who, whose) if self.world.is_alive(who) => {
                self.queued.remove(&(whose, who));
                self.world.notice(who, whose);
            }
            Event::Expire(process, wait, id) if self.timers.get(&process) == Some(&(wait, id)) => {
                self.timers.remove(&process);
                self.world.act(process, |it| it.expire(wait.timer));
            }
            Event::Kill(process) if self.world.is_alive(process) => {
                self.world.kill(process);
                for other in 0..self.world.processes.len() {
                    let noticed = self.now + self.random.below(self.delay_max + 1);
                    self.at(noticed, Event::Notice(other, process));
                }
                self.queued.retain(|&(_, to), _| to != process);
            }
            Event::Change(process, out) if self.world.is_alive(process) => {
                let epoch = self.world.processes[process].view().epoch;
                self.world.act(process, |it| it.change(epoch, &out, true));
            }
            Event::Ask(newcomer) if self.world.is_alive(newcomer) => {
                let asked = self.random.below(newcomer as u64) as usize;
                let member = self.world.processes[newcomer].own();
                if self.world.is_alive(asked) {
                    self.world.act(asked, |it| it.ask(member));
                }
            }
            Event::AskAll(newcomer) if self.world.is_alive(newcomer) => {
                let member = self.world.processes[newcomer].own();
                for asked in 0..self.world.processes.len() {
                    let is_member = self.world.processes[asked].standing() == Standing::Inside;
                    if self.world.is_alive(asked) && is_member {
                        self.world.act(asked, |it| it.ask(member));
                    }
                }
            }
            Event::Part(first) => {
                for a in 0..first {
                    (first..self.world.processes.len()).for_each(|b| self.sever(a, b));
                }
            }
            Event::Cut(a, b) => self.sever(a, b),
            _ => {}
        }
    }

    /// What is under way between the two is lost, and each notices some time after.
    fn sever(&mut self, a: usize, b: usize) {
        if self.is_cut(a, b) {
            return;
        }
        self.cut.push((a.min(b), a.max(b)));
        for (who, whose) in [(a, b), (b, a)] {
            let noticed = self.now + SILENCE / 2 + self.random.below(SILENCE);
            self.at(noticed, Event::Notice(who, whose));
        }
        self.drop_cut();
    }

    fn drop_cut(&mut self) {
        let cut = &self.cut;
        let is_cut = |&(a, b): &(usize, usize)| cut.contains(&(a.min(b), a.max(b)));
        self.world.wires.retain(|pair, _| !is_cut(pair));
        self.queued.retain(|pair, _| !is_cut(pair));
    }

    /// Until nothing happens any more. Gives the time.
    #[track_caller]
    fn run(&mut self, seed: u64) -> Time {
        let mut steps = 0;
        self.schedule();
        while let Some(Reverse((time, _, event))) = self.events.pop() {
            self.now = time;
            self.happen(event);
            self.drop_cut();
            self.schedule();
            steps += 1;
            assert_eq!(self.world.fault(), None, "seed {seed}");
            assert!(steps < 200_000, "seed {seed}: it does not come to an end");
        }
        self.now
    }
}

fn schedules() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|it| it.parse::<u64>().ok());
    match number("UNISUM_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("UNISUM_TEST_SCHEDULES").unwrap_or(10_000),
    }
}

#[test]
fn survivors_of_deaths_go_on_in_one_view() {
    for seed in schedules() {
        let mut random = Random::new(!seed);
        let members = 2 + random.below(9) as usize;
        let newcomers = random.below(4) as usize;
        let mut simulation = Simulation::new(seed, members, newcomers);
        let span = [10, 100, 3000][random.below(3) as usize];
        for _ in 0..random.below(members as u64 / 2 + 1) {
            let process = random.below((members + newcomers) as u64) as usize;
            simulation.at(random.below(span), Event::Kill(process));
        }
        for newcomer in members..members + newcomers {
            simulation.at(random.below(span), Event::Ask(newcomer));
        }
        for _ in 0..random.below(3) {
            let process = random.below(members as u64) as usize;
            simulation.at(random.below(span), Event::Change(process, Vec::new()));
        }
        simulation.run(seed);
        assert!(simulation.world.is_settled(), "seed {seed}: {:#?}", simulation.world);
    }
}

/// Newcomers ask all members while some of these die, and some of the newcomers too. With the next
/// change that lets them in, whoever of them lives is in the view, and in the same one.
#[test]
fn all_that_ask_and_live_enter_with_the_next_change() {
    for seed in schedules() {
        let mut random = Random::new(!seed);
        let members = 1 + random.below(7) as usize;
        let newcomers = 1 + random.below(4) as usize;
        let mut simulation = Simulation::new(seed, members, newcomers);
        let span = [10, 100, 3000][random.below(3) as usize];
        // The others remain a quorum.
        for _ in 0..random.below((members as u64 - 1) / 2 + 1) {
            let process = random.below((members + newcomers) as u64) as usize;
            simulation.at(random.below(span), Event::Kill(process));
        }
        for newcomer in members..members + newcomers {
            simulation.at(random.below(span), Event::AskAll(newcomer));
        }
        simulation.run(seed);
        let lives = |world: &World, it: &usize| world.is_alive(*it);
        let first = (0..members).find(|it| lives(&simulation.world, it)).unwrap();
        let at = simulation.now + 1;
        simulation.at(at, Event::Change(first, Vec::new()));
        // One that dies as it enters is put out again.
        let dies = random.chance(30).then(|| members + random.below(newcomers as u64) as usize);
        if let Some(dies) = dies {
            simulation.at(at + random.below(3 * simulation.delay_max + 1), Event::Kill(dies));
        }
        simulation.run(seed);
        let world = &simulation.world;
        let view = world.processes[first].view();
        for process in (0..members + newcomers).filter(|it| lives(world, it)) {
            let it = &world.processes[process];
            let is_in = it.standing() == Standing::Inside && it.view() == view;
            assert!(is_in && !it.is_changing(), "seed {seed}, process {process}: {world:#?}");
        }
        let count = (0..members + newcomers).filter(|it| lives(world, it)).count();
        assert_eq!(view.members.len(), count, "seed {seed}: {world:#?}");
    }
}

#[test]
fn of_a_job_in_two_parts_one_goes_on_at_most() {
    for seed in schedules() {
        let mut random = Random::new(!seed);
        let members = 8;
        // 3 and 5, and 4 and 4, half of the time.
        let first = if random.chance(50) { 3 + random.below(2) } else { 1 + random.below(7) };
        let mut simulation = Simulation::new(seed, members, 0);
        let at = random.below(3000);
        simulation.at(at, Event::Part(first as usize));
        // The wish to change may be under way.
        if random.chance(50) {
            let process = random.below(members as u64) as usize;
            simulation.at(at.saturating_sub(random.below(100)), Event::Change(process, Vec::new()));
        }
        simulation.run(seed);
        let (low, high) = simulation.world.processes.split_at(first as usize);
        let is_on = |side: &[Arc<Participant>]| {
            side.iter().all(|it| it.standing() == Standing::Inside && !it.is_changing())
        };
        let is_stranded =
            |side: &[Arc<Participant>]| side.iter().all(|it| it.standing() == Standing::Stranded);
        let (on, left) = if first >= 4 { (low, high) } else { (high, low) };
        let views: Vec<_> = on.iter().map(|it| it.view()).collect();
        assert!(is_on(on) && is_stranded(left), "seed {seed}: {:#?}", simulation.world);
        assert_eq!(views[0].members.len(), on.len(), "seed {seed}");
        assert!(views.iter().all(|it| *it == views[0]), "seed {seed}");
    }
}

/// What else may go wrong: connections break one by one, members are asked out. Whoever it hits,
/// the others agree, and nobody waits for ever.
#[test]
fn broken_connections_never_make_two_views_and_nobody_waits_for_ever() {
    for seed in schedules() {
        let mut random = Random::new(!seed);
        let members = 3 + random.below(6) as usize;
        let mut simulation = Simulation::new(seed, members, 0);
        let span = [10, 3000, 20_000][random.below(3) as usize];
        for _ in 0..=random.below(members as u64) {
            let (a, b) = (random.below(members as u64), random.below(members as u64));
            if a != b {
                simulation.at(random.below(span), Event::Cut(a as usize, b as usize));
            }
        }
        if random.chance(50) {
            let process = random.below(members as u64) as usize;
            let out = vec![Member(random.below(members as u64))];
            simulation.at(random.below(span), Event::Change(process, out));
        }
        if random.chance(30) {
            simulation.at(random.below(span), Event::Kill(random.below(members as u64) as usize));
        }
        simulation.run(seed);
        let world = &simulation.world;
        let living = world.processes.iter().enumerate().filter(|(it, _)| world.is_alive(*it));
        for (process, it) in living {
            assert!(!it.is_changing(), "seed {seed}: process {process} waits: {world:#?}");
        }
    }
}

/// A process that is merely slow may be put out; the others are in one view all the same.
#[test]
fn who_is_silent_for_long_is_put_out_and_hears_of_it() {
    for seed in schedules() {
        let mut random = Random::new(!seed);
        let members = 3 + random.below(6) as usize;
        let mut simulation = Simulation::new(seed, members, 0);
        // Messages take longer than silence is borne.
        simulation.delay_max = 3 * SILENCE;
        for _ in 0..=random.below(2) {
            let process = random.below(members as u64) as usize;
            simulation.at(random.below(100), Event::Change(process, Vec::new()));
        }
        simulation.run(seed);
        let world = &simulation.world;
        let latest = world.processes.iter().map(|it| it.view()).max_by_key(|it| it.epoch);
        for (process, it) in world.processes.iter().enumerate() {
            let is_in = latest.unwrap().has(Member(process as u64));
            let expected = if is_in { Standing::Inside } else { Standing::Excluded };
            assert_eq!(it.standing(), expected, "seed {seed}: {world:#?}");
            assert!(!it.is_changing(), "seed {seed}: process {process} waits: {world:#?}");
        }
    }
}
