//! The engine: executes one collective at a time over the links.
//!
//! It uses plans (`unisum-algorithms`), links (`unisum-link`) and kernels (`unisum-kernels`), and
//! knows nothing of processes, joining or the public API. Start at [`Program::build`], which turns
//! a rank's steps of a plan into actions, and [`Engine::start`] and [`Engine::advance`], which
//! execute them; then `running` (action after action), `scoreboard` (transfers between pairs) and
//! `together`, `pull` (what ranks that share memory do as a group).
//!
//! A collective is started and then advanced until it is done. Advancing never blocks, so the
//! same code runs under a caller's thread, a progress thread, and a simulation of many ranks.

mod first;
mod folding;
mod links;
mod memories;
mod placement;
mod program;
mod pull;
mod running;
mod scoreboard;
mod segment;
#[cfg(test)]
mod simulation;
mod taking;
mod together;
mod token;
mod weave;

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use unisum_kernels::{Fold, said_by_reduction};
use unisum_link::{
    Call, Collective, Group, Link, LinkError, Patience, PeerCounts, Rank, Region, Regions,
};

use folding::Folding;
pub use links::Links;
use memories::Memories;
use program::Action;
pub use program::{GroupShape, Program, Source, Tuning};
use running::{Running, State, Tools};
use scoreboard::Scoreboard;
use together::{Sources, part_bytes};
use token::Pair;

/// What [`Engine::advance`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// Something moved: advance again.
    Moved,
    /// Nothing can move until a peer does something.
    Waiting,
    /// The collective has ended; its region is the caller's again.
    Done,
}

/// Executes programs over the links of one communicator.
#[derive(Debug)]
pub struct Engine {
    tools: Tools,
    /// Memory for what passes through this rank; grows to what the programs need.
    scratch: Vec<u64>,
    /// Whether ranks of the job share cores on this host.
    is_crowded: bool,
    /// For waits in memory. Where ranks have cores of their own, waits last as parking is found to
    /// take.
    patience: Patience,
    /// What the collective under way executes, or the last one did.
    program: Option<Arc<Program>>,
    running: Option<Running>,
    /// Whether the collective that ended last had a result that is infinite or NaN.
    found_nonfinite: bool,
}

impl Engine {
    /// `ranks_per_core` is about all ranks of the job on this host, and the same for all members of
    /// the group.
    pub fn new(rank: Rank, mut links: Links, ranks_per_core: f64) -> Self {
        let of_group = |group: &mut dyn Group| {
            part_bytes(group.members().len(), group.bench_bytes(), ranks_per_core)
        };
        let is_crowded = ranks_per_core > 1.0;
        Self {
            tools: Tools {
                rank,
                part_bytes: links.group().map_or(0, of_group),
                links,
                scoreboard: Scoreboard::default(),
                sources: Sources::default(),
            },
            scratch: Vec::new(),
            is_crowded,
            patience: if is_crowded { Patience::CROWDED } else { Patience::MEMORY },
            program: None,
            running: None,
            found_nonfinite: false,
        }
    }

    /// The links, as they were given.
    pub fn links(&self) -> &[Box<dyn Link>] {
        &self.tools.links.all
    }

    /// The links, for who has another use for them, and how long waiting in memory pays.
    pub fn into_links(self) -> (Links, Patience) {
        (self.tools.links, self.patience)
    }

    /// The link that reaches a peer, for use between collectives.
    pub fn link_to(&mut self, peer: Rank) -> &mut dyn Link {
        self.tools.links.to(peer)
    }

    /// The group of those who share this rank's memory, if there is one.
    pub fn group(&mut self) -> Option<&mut dyn Group> {
        self.tools.links.group()
    }

    /// Begins a collective. The regions are the engine's until [`Advance::Done`] or an abort.
    pub fn start(&mut self, call: &Call, fold: Fold, regions: &Regions, program: &Arc<Program>) {
        for link in &mut self.tools.links.all {
            link.begin(call, regions);
        }
        for &Pair { peer, sends, receives } in &program.pairs {
            let counts = PeerCounts { sends: sends as u64, receives: receives as u64 };
            self.tools.links.to(peer).pair_counts(peer, counts);
        }
        let memories = Memories { regions: *regions, scratch: self.scratch(program.scratch) };
        let spreads_marks = fold.watch && call.collective == Collective::AllReduce;
        self.tools.scoreboard.begin();
        let (folding, is_mapped, action) = (Folding::new(fold), false, 0);
        self.found_nonfinite = false;
        if !self.program.as_ref().is_some_and(|last| Arc::ptr_eq(last, program)) {
            self.program = Some(program.clone());
        }
        let state = State::Start;
        self.running = Some(Running { memories, folding, spreads_marks, is_mapped, action, state });
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
    pub fn advance(&mut self) -> Result<Advance, LinkError> {
        let (Some(running), Some(program)) = (&mut self.running, &self.program) else {
            return Ok(Advance::Done);
        };
        let advance = running.advance(program, &mut self.tools);
        if running.folding.panicked {
            let what = format!("the reduction function panicked: {}", said_by_reduction());
            return Err(LinkError::panicked(self.tools.rank, what));
        }
        let advance = advance?;
        if advance == Advance::Done {
            let is_marked = running.spreads_marks && self.tools.links.is_marked();
            self.found_nonfinite = running.folding.nonfinite || is_marked;
            self.running = None;
        }
        Ok(advance)
    }

    /// Whether the collective that ended last had a result that is infinite or NaN; only if its
    /// fold watched for that.
    pub const fn found_nonfinite(&self) -> bool {
        self.found_nonfinite
    }

    /// How often looking again pays for what is under way, and how long, before it parks.
    pub fn patience(&mut self) -> Patience {
        match self.running.as_ref().map(|running| running.state) {
            Some(State::InSegment) => self.patience_for_links(),
            Some(state) if self.is_crowded => self.patience_among_many(state),
            _ => self.patience,
        }
    }

    fn patience_among_many(&mut self, state: State) -> Patience {
        if let Some(arrival) = state.arrival()
            && let Some(group) = self.tools.links.group()
            && !group.awaits_own_core(arrival)
        {
            // To give the core away would help nobody who is waited for.
            return Patience::MEMORY;
        }
        self.patience
    }

    fn patience_for_links(&self) -> Patience {
        let in_flight = self.tools.scoreboard.in_flight().iter().zip(&self.tools.links.all);
        let links = in_flight
            .filter(|(in_flight, _)| **in_flight > 0)
            .map(|(_, link)| link.patience())
            .reduce(Patience::min);
        let crowded = Some(self.patience).filter(|_| self.is_crowded);
        let patience = links.into_iter().chain(crowded).reduce(Patience::min);
        Patience { spell: self.patience.spell, ..patience.unwrap_or(self.patience) }
    }

    /// Hears that the thread gave its core away while it waited.
    pub fn yielded(&mut self) {
        if let Some(group) = self.tools.links.group() {
            group.yielded();
        }
    }

    /// Sleeps until something may have moved, until woken, or until `until`.
    pub fn park(&mut self, until: Instant) -> Result<(), LinkError> {
        let start = Instant::now();
        self.sleep(until)?;
        if !self.is_crowded {
            let spell = &mut self.patience.spell;
            *spell = Patience::spell_after(*spell, start.elapsed());
        }
        Ok(())
    }

    fn sleep(&mut self, until: Instant) -> Result<(), LinkError> {
        let Some(running) = &self.running else { return Ok(()) };
        if let Some(arrival) = running.state.arrival() {
            return match self.group() {
                Some(group) => group.park(arrival, until),
                None => Ok(()),
            };
        }
        let wanted = match self.action(running) {
            Some(Action::Transfers(segment)) => self.tools.scoreboard.wanted(segment),
            _ => 1,
        };
        self.tools.links.park(self.tools.scoreboard.in_flight(), until, wanted, self.tools.rank)
    }

    /// The action that the running collective is in.
    fn action(&self, running: &Running) -> Option<&Action> {
        self.program.as_ref()?.actions(running.is_mapped).get(running.action)
    }

    /// How far the running collective is: (steps done, steps in all).
    pub fn position(&self) -> (usize, usize) {
        let (Some(running), Some(program)) = (&self.running, &self.program) else { return (0, 0) };
        let steps = |action: &Action| match action {
            Action::Transfers(segment) => segment.steps(),
            _ => 1,
        };
        let actions = program.actions(running.is_mapped);
        let before: usize = actions[..running.action].iter().map(steps).sum();
        let inside =
            if running.state == State::InSegment { self.tools.scoreboard.retired() } else { 0 };
        (before + inside, actions.iter().map(steps).sum())
    }

    /// The ranks without which the running collective can't go on.
    pub fn waiting_for(&mut self) -> Vec<Rank> {
        let Some(running) = &self.running else { return Vec::new() };
        match (running.state, self.action(running)) {
            (State::InSegment, Some(Action::Transfers(segment))) => {
                self.tools.scoreboard.waiting_for(segment)
            }
            (state, _) => state.arrival().map_or_else(Vec::new, |arrival| {
                self.group().map_or_else(Vec::new, |group| group.missing(arrival))
            }),
        }
    }

    /// Payload bytes that the collective's pairwise transfers have moved.
    pub const fn bytes_moved(&self) -> u64 {
        self.tools.scoreboard.bytes_moved()
    }

    /// Ends everything: afterwards no link touches any region.
    pub fn abort(&mut self) {
        self.running = None;
        self.tools.links.abort();
    }
}
