//! The engine: executes one collective at a time over the links.
//!
//! A collective is started and then advanced until it is done. Advancing never blocks, so the
//! same code runs under a caller's thread, a progress thread, and a simulation of many ranks.

mod first;
mod folding;
mod links;
mod memories;
mod placement;
pub(crate) mod program;
mod pull;
mod scoreboard;
mod segment;
#[cfg(test)]
mod simulation;
mod taking;
mod together;
mod weave;

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use unisum_link::kernels::Fold;
use unisum_link::{
    Arrival, Call, Collective, Group, Link, LinkError, Part, Patience, Rank, Region, Regions,
};

use folding::{Extras, Folding};
pub(crate) use links::Links;
use memories::Memories;
use placement::{Memory, Move};
use program::{Action, Exchange, Program};
use scoreboard::{Bench, Scoreboard};
use together::{GroupBench, Next, Sources, part_bytes};

/// What [`Engine::advance`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    /// Something moved: advance again.
    Moved,
    /// Nothing can move until a peer does something.
    Waiting,
    /// The collective has ended; its region is the caller's again.
    Done,
}

/// Executes programs over the links of one communicator.
#[derive(Debug)]
pub(crate) struct Engine {
    rank: Rank,
    links: Links,
    scoreboard: Scoreboard,
    sources: Sources,
    /// How long the parts are in which private regions move among the members of the group.
    part_bytes: usize,
    /// Memory for what passes through this rank; grows to what the programs need.
    scratch: Vec<u64>,
    /// For waits in memory.
    patience: Patience,
    /// What the collective under way executes, or the last one did; not there while an advance
    /// works on it.
    program: Option<Arc<Program>>,
    running: Option<Box<Running>>,
    /// Where the next one goes: a pointer is moved about, and nothing is allocated.
    idle: Option<Box<Running>>,
    /// Whether the collective that ended last had a result that is infinite or NaN.
    found_nonfinite: bool,
}

/// A collective under way.
#[derive(Debug)]
struct Running {
    memories: Memories,
    folding: Folding,
    /// Whether all ranks are to know what one finds.
    spreads_marks: bool,
    /// Whether all regions turned out to be registered, and the program has a way for that.
    is_mapped: bool,
    action: usize,
    state: State,
}

/// Where an action stands. Group actions alternate between work and arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    InSegment,
    Entering(Arrival),
    /// When all have arrived, this piece of an exchange or a pull is due.
    BetweenPieces(Arrival, usize),
    /// When all have arrived, the action is done.
    Leaving(Arrival),
}

impl State {
    const fn arrival(self) -> Option<Arrival> {
        match self {
            Self::Start | Self::InSegment => None,
            Self::Entering(arrival) | Self::BetweenPieces(arrival, _) | Self::Leaving(arrival) => {
                Some(arrival)
            }
        }
    }
}

impl Running {
    /// Takes over how an exchange or a pull goes on after `piece`.
    const fn go_on(&mut self, next: Next, piece: usize) -> Advance {
        self.state = match next {
            Next::Done => return Advance::Done,
            Next::Last(arrival) => State::Leaving(arrival),
            Next::Piece(arrival) => State::BetweenPieces(arrival, piece + 1),
        };
        Advance::Moved
    }
}

impl Engine {
    /// `ranks_per_core` is about all ranks of the job on this host, and the same for all members of
    /// the group.
    pub(crate) fn new(rank: Rank, mut links: Links, ranks_per_core: f64) -> Self {
        let of_group = |group: &mut dyn Group| {
            part_bytes(group.members().len(), group.bench_bytes(), ranks_per_core)
        };
        let is_crowded = ranks_per_core > 1.0;
        Self {
            rank,
            part_bytes: links.group().map_or(0, of_group),
            links,
            scoreboard: Scoreboard::default(),
            sources: Sources::default(),
            scratch: Vec::new(),
            patience: if is_crowded { Patience::CROWDED } else { Patience::MEMORY },
            program: None,
            running: None,
            idle: None,
            found_nonfinite: false,
        }
    }

    pub(crate) fn links(&self) -> &[Box<dyn Link>] {
        &self.links.all
    }

    pub(crate) fn route(&self) -> &[usize] {
        &self.links.route
    }

    /// The links, for who has another use for them, and how long waiting in memory pays.
    pub(crate) fn into_links(self) -> (Links, Patience) {
        (self.links, self.patience)
    }

    /// The link that reaches a peer, for use between collectives.
    pub(crate) fn link_to(&mut self, peer: Rank) -> &mut dyn Link {
        self.links.to(peer)
    }

    pub(crate) fn group(&mut self) -> Option<&mut dyn Group> {
        self.links.group()
    }

    /// Begins a collective. The regions are the engine's until [`Advance::Done`] or an abort.
    pub(crate) fn start(
        &mut self,
        call: Call,
        fold: Fold,
        regions: Regions,
        program: &Arc<Program>,
    ) {
        for link in &mut self.links.all {
            link.begin(call, regions);
        }
        let memories = Memories { regions, scratch: self.scratch(program.scratch) };
        let spreads_marks = fold.watch && call.collective == Collective::AllReduce;
        let (folding, is_mapped, action) = (Folding::new(fold), false, 0);
        self.found_nonfinite = false;
        if !self.program.as_ref().is_some_and(|last| Arc::ptr_eq(last, program)) {
            self.program = Some(program.clone());
        }
        let state = State::Start;
        let running = Running { memories, folding, spreads_marks, is_mapped, action, state };
        self.running = Some(match self.idle.take() {
            Some(mut place) => {
                *place = running;
                place
            }
            None => Box::new(running),
        });
    }

    /// At least `bytes` bytes of scratch memory, which nothing else uses.
    fn scratch(&mut self, bytes: usize) -> Region {
        if self.scratch.len() * 8 < bytes {
            self.scratch.resize(bytes.div_ceil(8), 0);
        }
        let base = NonNull::new(self.scratch.as_mut_ptr().cast()).unwrap_or(NonNull::dangling());
        // SAFETY: the vector is this long and stays as it is until the next collective starts;
        // only the engine and its links use it.
        unsafe { Region::new(base, bytes, None) }
    }

    /// Does what can be done now. After an error only [`Engine::abort`] is left.
    pub(crate) fn advance(&mut self) -> Result<Advance, LinkError> {
        if let Some(arrival) = self.running.as_ref().and_then(|running| running.state.arrival())
            && let Some(group) = self.group()
            && !group.complete(arrival)?
        {
            // By far the most frequent look.
            return Ok(Advance::Waiting);
        }
        let Some(mut running) = self.running.take() else { return Ok(Advance::Done) };
        let Some(program) = self.program.take() else { return Ok(Advance::Done) };
        let mut result = self.advance_running(&program, &mut running);
        self.program = Some(program);
        if running.folding.panicked {
            let what = "the program's reduction function panicked";
            result = Err(LinkError::protocol(self.rank, what));
        }
        if matches!(result, Ok(Advance::Done)) {
            let is_marked = running.spreads_marks && self.links.is_marked();
            self.found_nonfinite = running.folding.nonfinite || is_marked;
            self.idle = Some(running);
        } else {
            self.running = Some(running);
        }
        result
    }

    fn advance_running(
        &mut self,
        program: &Program,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        let mut moved = false;
        while let Some(action) = program.actions(running.is_mapped).get(running.action) {
            if program.mapped.is_some() && self.becomes_mapped(running)? {
                moved = true;
                continue;
            }
            match self.advance_action(action, running)? {
                Advance::Done => {
                    (running.action, running.state) = (running.action + 1, State::Start);
                    moved = true;
                }
                Advance::Moved => moved = true,
                Advance::Waiting => {
                    return Ok(if moved { Advance::Moved } else { Advance::Waiting });
                }
            }
        }
        Ok(Advance::Done)
    }

    /// Goes over to the program for registered regions when all have entered, if all have such.
    fn becomes_mapped(&mut self, running: &mut Running) -> Result<bool, LinkError> {
        let State::Entering(arrival) = running.state else { return Ok(false) };
        let group = self.links.the_group();
        let is_mapped = group.complete(arrival)?
            && [Part::Input, Part::Output].into_iter().all(|part| group.registered(part));
        if is_mapped {
            (running.is_mapped, running.action, running.state) = (true, 0, State::Start);
        }
        Ok(is_mapped)
    }

    fn advance_action(
        &mut self,
        action: &Action,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        match running.state {
            State::Start => self.begin_action(action, running),
            State::InSegment => self.advance_segment(action, running),
            State::Entering(arrival)
            | State::BetweenPieces(arrival, _)
            | State::Leaving(arrival) => match self.links.the_group().complete(arrival)? {
                true => self.all_arrived(action, running),
                false => Ok(Advance::Waiting),
            },
        }
    }

    fn begin_action(
        &mut self,
        action: &Action,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        match action {
            Action::Transfers(segment) => {
                self.scoreboard.start(segment, &self.links);
                running.state = State::InSegment;
            }
            Action::Pull(pull) => {
                let group = self.links.the_group();
                let arrival = if pull.enters { group.enter(pull.deposits) } else { group.arrive() };
                running.state = State::Entering(arrival);
            }
            Action::Exchange(exchange) if exchange.enters => {
                let mut bench = self.bench(running, Extras::default());
                running.state = State::Entering(bench.enter(exchange));
            }
            Action::Exchange(exchange) => return self.exchange(exchange, running),
            Action::Copy { moves, scales } => {
                moves.iter().for_each(|it| copy(running, it, *scales));
                return Ok(Advance::Done);
            }
            Action::Divide { bytes } => {
                divide(running, bytes);
                return Ok(Advance::Done);
            }
            Action::Arrive => {
                let arrival = self.bench(running, Extras::default()).arrive();
                running.state = State::Leaving(arrival);
            }
        }
        Ok(Advance::Moved)
    }

    fn all_arrived(
        &mut self,
        action: &Action,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        match (action, running.state) {
            (Action::Pull(pull), State::Entering(_)) => {
                let next = self.bench(running, pull.extras()).pull(pull)?;
                Ok(running.go_on(next, 0))
            }
            (Action::Pull(pull), State::BetweenPieces(_, piece)) => {
                let next = self.bench(running, pull.extras()).pull_piece(pull, piece)?;
                Ok(running.go_on(next, piece))
            }
            (Action::Exchange(exchange), State::Entering(_)) => self.exchange(exchange, running),
            (Action::Exchange(exchange), State::BetweenPieces(_, piece)) => {
                let next = self.bench(running, exchange.extras()).piece(exchange, piece)?;
                Ok(running.go_on(next, piece))
            }
            _ => Ok(Advance::Done),
        }
    }

    fn exchange(
        &mut self,
        exchange: &Exchange,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        let next = self.bench(running, exchange.extras()).exchange(exchange)?;
        Ok(running.go_on(next, usize::from(exchange.folds)))
    }

    fn advance_segment(
        &mut self,
        action: &Action,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        let Action::Transfers(segment) = action else { return Ok(Advance::Done) };
        let mut bench = Bench {
            rank: self.rank,
            segment,
            sources: &mut self.sources,
            part_bytes: self.part_bytes,
            links: &mut self.links,
            memories: running.memories,
            folding: &mut running.folding,
            spreads_marks: running.spreads_marks,
        };
        let moved = self.scoreboard.advance(&mut bench)?;
        Ok(match (self.scoreboard.is_done(segment), moved) {
            (true, _) => Advance::Done,
            (false, true) => Advance::Moved,
            (false, false) => Advance::Waiting,
        })
    }

    fn bench<'a>(&'a mut self, running: &'a mut Running, extras: Extras) -> GroupBench<'a> {
        GroupBench {
            rank: self.rank,
            group: self.links.the_group(),
            memories: running.memories,
            folding: &mut running.folding,
            extras,
            spreads_marks: running.spreads_marks,
            sources: &mut self.sources,
            part_bytes: self.part_bytes,
        }
    }

    /// Whether the collective that ended last had a result that is infinite or NaN; only if its
    /// fold watched for that.
    pub(crate) const fn found_nonfinite(&self) -> bool {
        self.found_nonfinite
    }

    /// How long waiting for what is under way pays before it parks.
    pub(crate) fn patience(&mut self) -> Patience {
        let state = self.running.as_ref().map(|running| running.state);
        if self.patience == Patience::CROWDED
            && let Some(arrival) = state.and_then(State::arrival)
            && let Some(group) = self.links.group()
            && !group.awaits_own_core(arrival)
        {
            // To give the core away would help nobody who is waited for.
            return Patience::MEMORY;
        }
        if state != Some(State::InSegment) {
            return self.patience;
        }
        let in_flight = self.scoreboard.in_flight().iter().zip(&self.links.all);
        let links = in_flight
            .filter(|(in_flight, _)| **in_flight > 0)
            .map(|(_, link)| link.patience())
            .reduce(Patience::min);
        let crowded = Some(self.patience).filter(|patience| *patience == Patience::CROWDED);
        links.into_iter().chain(crowded).reduce(Patience::min).unwrap_or(self.patience)
    }

    /// Hears that the thread gave its core away while it waited.
    pub(crate) fn yielded(&mut self) {
        if let Some(group) = self.links.group() {
            group.yielded();
        }
    }

    /// Sleeps until something may have moved, until woken, or until `until`.
    pub(crate) fn park(&mut self, until: Instant) -> Result<(), LinkError> {
        let Some(running) = &self.running else { return Ok(()) };
        if let Some(arrival) = running.state.arrival() {
            return match self.group() {
                Some(group) => group.park(arrival, until),
                None => Ok(()),
            };
        }
        let wanted = match self.action(running) {
            Some(Action::Transfers(segment)) => self.scoreboard.wanted(segment),
            _ => 1,
        };
        self.links.park(self.scoreboard.in_flight(), until, wanted, self.rank)
    }

    /// The action that the running collective is in.
    fn action(&self, running: &Running) -> Option<&Action> {
        self.program.as_ref()?.actions(running.is_mapped).get(running.action)
    }

    /// How far the running collective is: (steps done, steps in all).
    pub(crate) fn position(&self) -> (usize, usize) {
        let (Some(running), Some(program)) = (&self.running, &self.program) else { return (0, 0) };
        let steps = |action: &Action| match action {
            Action::Transfers(segment) => segment.steps(),
            _ => 1,
        };
        let actions = program.actions(running.is_mapped);
        let before: usize = actions[..running.action].iter().map(steps).sum();
        let inside = if running.state == State::InSegment { self.scoreboard.retired() } else { 0 };
        (before + inside, actions.iter().map(steps).sum())
    }

    /// The ranks without which the running collective can't go on.
    pub(crate) fn waiting_for(&mut self) -> Vec<Rank> {
        let Some(running) = &self.running else { return Vec::new() };
        match (running.state, self.action(running)) {
            (State::InSegment, Some(Action::Transfers(segment))) => {
                self.scoreboard.waiting_for(segment)
            }
            (state, _) => state.arrival().map_or_else(Vec::new, |arrival| {
                self.group().map_or_else(Vec::new, |group| group.missing(arrival))
            }),
        }
    }

    /// Payload bytes that pairwise transfers moved so far.
    pub(crate) const fn bytes_moved(&self) -> u64 {
        self.scoreboard.bytes_moved()
    }

    /// Ends everything: afterwards no link touches any region.
    pub(crate) fn abort(&mut self) {
        self.running = None;
        self.links.abort();
    }
}

fn divide(running: &mut Running, bytes: &Range<usize>) {
    let own = running.memories.regions.output.pointer(bytes);
    let extras = Extras { divides: true, ..Extras::default() };
    // SAFETY: the output is valid for `bytes` and no transfer is under way between two actions;
    // folding one source in place is allowed.
    unsafe { running.folding.run(own, &[own.cast_const()], bytes.len(), extras) };
}

/// Copies within this rank, the inputs of a pre-multiplied sum times the factor.
fn copy(running: &mut Running, Move { from, to, count: bytes }: &Move, scales: bool) {
    let source = running.memories.pointer(*from, *bytes).cast_const();
    let into = running.memories.pointer(*to, *bytes);
    // Sums that were worked on in scratch memory become results here.
    let watches = running.folding.watches() && from.memory == Memory::Scratch;
    if scales || watches {
        let extras = Extras { scales, watches, ..Extras::default() };
        // SAFETY: both are valid for that many bytes, no transfer is under way between two
        // actions, and they are one place or do not overlap.
        unsafe { running.folding.run(into, &[source], *bytes, extras) };
    } else {
        // SAFETY: as above; in place they may overlap.
        unsafe { into.copy_from(source, *bytes) };
    }
}
