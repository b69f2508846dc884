//! The engine: executes one collective at a time over the links.
//!
//! It uses plans (`unisum-algorithms`), links (`unisum-link`) and kernels (`unisum-kernels`), and
//! knows nothing of processes, joining or the public API. Start at [`Program::build`], which
//! compiles a rank's steps of a plan into actions, and at [`Engine::start`] and
//! [`Engine::advance`], which execute them. Then read `running` (one action after the other),
//! `scoreboard` (transfers between two ranks), and `group_exchange` and `group_pull` (what ranks
//! that share memory do as a group). [`device`] compiles plans for device memory instead.
//!
//! A collective is started and then advanced until it is done. Advancing never blocks, so the same
//! code runs under a caller's thread, a progress thread, and a simulation of many ranks.

mod counters;
pub mod device;
mod first;
mod folding;
mod fused_hierarchical;
mod group_exchange;
mod group_pull;
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
#[cfg(test)]
mod taken_back;
mod token;
mod unposted;

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use unisum_events::{Event, record};
use unisum_kernels::{Fold, said_by_reduction};
use unisum_link::{
    Call, Cause, CollectiveKind, Group, Link, LinkError, Patience, PeerCounts, Rank, Region,
    Regions,
};

pub use counters::Counters;
use folding::Folding;
use group_exchange::{Sources, part_bytes};
pub use links::Links;
use memories::Memories;
use program::Action;
pub use program::{GroupShape, Program, Source, Tuning};
use running::{Running, State, Tools};
use scoreboard::Scoreboard;
use token::Pair;

/// What [`Engine::advance`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// There was progress: advance again.
    Moved,
    /// No progress is possible until a peer acts.
    Waiting,
    /// The collective is complete; its regions are the caller's again.
    Done,
}

/// Executes programs over the links of one communicator.
#[derive(Debug)]
pub struct Engine {
    tools: Tools,
    /// Memory for data that passes through this rank; grows to what programs need.
    scratch: Vec<u64>,
    /// Whether ranks of the job share cores on this host.
    is_crowded: bool,
    /// For waits on memory. Where ranks have cores of their own, it adapts to how long parking was
    /// found to take.
    patience: Patience,
    /// The program of the collective under way, or of the last one.
    program: Option<Arc<Program>>,
    running: Option<Running>,
    /// Communicator and number of the collective that began last.
    call: (u32, u32),
    /// Whether the last collective had an infinite or NaN result.
    found_nonfinite: bool,
}

impl Engine {
    /// Creates an engine. `ranks_per_core` covers all ranks of the job on this host, and is the
    /// same for all members of the group.
    pub fn new(rank: Rank, mut links: Links, ranks_per_core: f64) -> Self {
        let of_group = |group: &mut dyn Group| {
            part_bytes(group.members().len(), group.staging_bytes(), ranks_per_core)
        };
        let is_crowded = ranks_per_core > 1.0;
        let counters = Arc::new(Counters::new(links.route.len(), &links.all));
        Self {
            tools: Tools {
                rank,
                part_bytes: links.group().map_or(0, of_group),
                links,
                scoreboard: Scoreboard::default(),
                counters,
                sources: Sources::default(),
            },
            scratch: Vec::new(),
            is_crowded,
            patience: if is_crowded { Patience::CROWDED } else { Patience::MEMORY },
            program: None,
            running: None,
            call: (0, 0),
            found_nonfinite: false,
        }
    }

    /// The links, in the order they were given.
    pub fn links(&self) -> &[Box<dyn Link>] {
        &self.tools.links.all
    }

    /// Before the rank leaves in order, see [`Link::linger`].
    pub fn linger(&mut self) {
        self.tools.links.all.iter_mut().for_each(|link| link.linger());
    }

    /// Dismantles the engine into its links and how long waiting on memory pays off.
    pub fn into_links(self) -> (Links, Patience) {
        (self.tools.links, self.patience)
    }

    /// The link that reaches a peer, for use between collectives.
    pub fn link_to(&mut self, peer: Rank) -> &mut dyn Link {
        self.tools.links.to(peer)
    }

    /// The group of the ranks that share this rank's memory, if there is one.
    pub fn group(&mut self) -> Option<&mut dyn Group> {
        self.tools.links.group()
    }

    /// Makes sure of the memory that a program takes beside the regions.
    ///
    /// # Errors
    /// If this rank, which the error names, has none.
    pub fn reserve(&mut self, program: &Program) -> Result<(), LinkError> {
        let (bytes, words) = (program.scratch, program.scratch.div_ceil(8));
        let missing = words.saturating_sub(self.scratch.len());
        let reserved = self.scratch.try_reserve_exact(missing);
        reserved.map_err(|error| {
            let what = format!("has no memory for the {bytes} bytes that the algorithm takes");
            self.lacking(what, error)
        })?;
        self.scratch(bytes);
        Ok(())
    }

    /// The error of a call for which this rank lacks something.
    pub fn lacking(&self, what: String, error: impl Into<Cause>) -> LinkError {
        LinkError::lacking(self.tools.rank, what, error)
    }

    /// Begins a collective. The regions are the engine's until [`Advance::Done`] or an abort.
    pub fn start(&mut self, call: &Call, fold: Fold, regions: &Regions, program: &Arc<Program>) {
        record(|| entered(call));
        self.call = (call.communicator, call.number as u32);
        for link in &mut self.tools.links.all {
            link.begin(call, regions);
        }
        for &Pair { peer, sends, receives } in &program.pairs {
            let counts = PeerCounts { sends: sends as u64, receives: receives as u64 };
            self.tools.links.to(peer).pair_counts(peer, counts);
        }
        let memories = Memories { regions: *regions, scratch: self.scratch(program.scratch) };
        let spreads_marks = fold.watch && call.collective == CollectiveKind::AllReduce;
        self.tools.scoreboard.begin();
        let (folding, is_mapped, action) = (Folding::new(fold), false, 0);
        self.found_nonfinite = false;
        if !self.program.as_ref().is_some_and(|last| Arc::ptr_eq(last, program)) {
            self.program = Some(program.clone());
        }
        let state = State::Start;
        self.running = Some(Running { memories, folding, spreads_marks, is_mapped, action, state });
    }

    /// At least `bytes` bytes of scratch memory that nothing else uses.
    fn scratch(&mut self, bytes: usize) -> Region {
        if self.scratch.len() * 8 < bytes {
            self.scratch.resize(bytes.div_ceil(8), 0);
        }
        let base = NonNull::new(self.scratch.as_mut_ptr().cast()).unwrap_or(NonNull::dangling());
        // SAFETY: the vector is this long and stays as it is until the next collective starts;
        // only the engine and its links use it.
        unsafe { Region::new(base, bytes, None) }
    }

    /// Makes what progress is possible now. After an error, only [`Engine::abort`] may be called.
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
            self.tools.counters.completed();
            let (communicator, number) = self.call;
            record(|| Event::CallCompleted { communicator, number });
        }
        Ok(advance)
    }

    /// Whether the last collective had an infinite or NaN result; only if its fold watched for
    /// that.
    pub const fn found_nonfinite(&self) -> bool {
        self.found_nonfinite
    }

    /// How often, and how long, checking again pays off for what is under way before parking.
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
            // Yielding the core would help no rank that is waited for.
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

    /// Tells the engine that the thread yielded its core while it waited.
    pub fn yielded(&mut self) {
        if let Some(group) = self.tools.links.group() {
            group.yielded();
        }
    }

    /// Sleeps until progress may be possible, until woken, or until `until`.
    pub fn park(&mut self, until: Instant) -> Result<(), LinkError> {
        let start = Instant::now();
        record(|| Event::Blocked { on: self.waiting_for().first().map(|&rank| rank as u32) });
        let result = self.sleep(until);
        record(|| Event::Woken);
        let slept = start.elapsed();
        self.tools.counters.slept(slept);
        if !self.is_crowded && result.is_ok() {
            let spell = &mut self.patience.spell;
            *spell = Patience::spell_after(*spell, slept);
        }
        result
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

    /// The action that the running collective executes.
    fn action(&self, running: &Running) -> Option<&Action> {
        self.program.as_ref()?.actions(running.is_mapped).get(running.action)
    }

    /// The progress of the running collective: (steps done, steps in all).
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

    /// The ranks that the running collective waits for.
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

    /// What was done so far, for any thread to read.
    pub const fn counters(&self) -> &Arc<Counters> {
        &self.tools.counters
    }

    /// Payload bytes that the collective's pairwise transfers have moved.
    pub const fn bytes_moved(&self) -> u64 {
        self.tools.scoreboard.bytes_moved()
    }

    /// Aborts everything: afterwards no link touches any region.
    pub fn abort(&mut self) {
        if self.running.take().is_some() {
            let (communicator, number) = self.call;
            record(|| Event::CallAborted { communicator, number });
        }
        self.tools.links.abort();
    }
}

fn entered(call: &Call) -> Event {
    let Call { communicator, number, collective, dtype, algorithm, count, .. } = *call;
    Event::CallEntered {
        communicator,
        number: number as u32,
        collective: collective as u8,
        dtype: dtype as u8,
        algorithm,
        count,
    }
}
