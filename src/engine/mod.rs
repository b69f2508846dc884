//! The engine: executes one collective at a time over the links.
//!
//! A collective is started and then advanced until it is done. Advancing never blocks, so the
//! same code runs under a caller's thread, a progress thread, and a simulation of many ranks.

pub(crate) mod program;
mod scoreboard;
mod segment;
#[cfg(test)]
mod simulation;
mod together;

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use unisum_link::kernels::Fold;
use unisum_link::{Arrival, Call, Group, Link, LinkError, Patience, Rank, ReduceOp, Region};

use program::{Action, Program};
pub(crate) use scoreboard::Links;
use scoreboard::{Bench, Scoreboard};
use together::GroupBench;

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
    /// The link whose group takes the group actions.
    group_link: Option<usize>,
    scoreboard: Scoreboard,
    scratch: Vec<u8>,
    /// For waits in memory.
    patience: Patience,
    running: Option<Running>,
}

/// A collective under way.
#[derive(Debug)]
struct Running {
    program: Arc<Program>,
    region: Region,
    fold: Fold,
    action: usize,
    state: State,
}

/// Where an action stands. Group actions alternate between work and arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    InSegment,
    Arriving(Arrival),
    /// The slices of others are to be pulled, then a last arrival follows.
    ArrivingToPull(Arrival),
}

impl Engine {
    /// With `crowded`, more ranks run on this host than it has cores.
    pub(crate) fn new(rank: Rank, links: Links, group_link: Option<usize>, crowded: bool) -> Self {
        Self {
            rank,
            links,
            group_link,
            scoreboard: Scoreboard::default(),
            scratch: Vec::new(),
            patience: if crowded { Patience::CROWDED } else { Patience::MEMORY },
            running: None,
        }
    }

    pub(crate) fn links(&self) -> &[Box<dyn Link>] {
        &self.links.all
    }

    pub(crate) fn route(&self) -> &[usize] {
        &self.links.route
    }

    /// The link that reaches a peer, for use between collectives.
    pub(crate) fn link_to(&mut self, peer: Rank) -> &mut dyn Link {
        self.links.all[self.links.route[peer]].as_mut()
    }

    pub(crate) fn group(&mut self) -> Option<&mut dyn Group> {
        self.links.all[self.group_link?].group()
    }

    /// Begins a collective. The region is the engine's until [`Advance::Done`] or an abort.
    pub(crate) fn start(&mut self, call: Call, region: Region, program: Arc<Program>) {
        for link in &mut self.links.all {
            link.begin(call, region);
        }
        let world = u32::try_from(self.links.route.len()).ok().and_then(NonZeroU32::new);
        let divide_by = world.filter(|_| call.op == ReduceOp::Average);
        let fold = Fold { dtype: call.dtype, op: call.op, divide_by };
        let (action, state) = (0, State::Start);
        self.running = Some(Running { program, region, fold, action, state });
    }

    /// Does what can be done now. After an error only [`Engine::abort`] is left.
    pub(crate) fn advance(&mut self) -> Result<Advance, LinkError> {
        let Some(mut running) = self.running.take() else { return Ok(Advance::Done) };
        let result = self.advance_running(&mut running);
        if !matches!(result, Ok(Advance::Done)) {
            self.running = Some(running);
        }
        result
    }

    fn advance_running(&mut self, running: &mut Running) -> Result<Advance, LinkError> {
        let program = running.program.clone();
        let mut moved = false;
        while let Some(action) = program.actions.get(running.action) {
            match self.advance_action(action, running)? {
                Advance::Done if self.must_go_pairwise(action, running) => {
                    let pairwise = program.pairwise.clone().expect("just seen");
                    (running.program, running.action) = (pairwise, 0);
                    running.state = State::Start;
                    return Ok(Advance::Moved);
                }
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

    /// Whether the group that was just entered can't reach all its members' memory. The answer is
    /// the same on all members.
    fn must_go_pairwise(&mut self, action: &Action, running: &Running) -> bool {
        matches!(action, Action::Enter { deposit: false })
            && running.program.pairwise.is_some()
            && !self.bench(running, false).group.registered()
    }

    fn advance_action(
        &mut self,
        action: &Action,
        running: &mut Running,
    ) -> Result<Advance, LinkError> {
        match running.state {
            State::Start => self.begin_action(action, running),
            State::InSegment => self.advance_segment(action, running),
            State::Arriving(arrival) => {
                Ok(match self.bench(running, false).group.complete(arrival)? {
                    true => Advance::Done,
                    false => Advance::Waiting,
                })
            }
            State::ArrivingToPull(arrival) => self.pull_when_complete(action, running, arrival),
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
            Action::Enter { deposit } => {
                let arrival = self.bench(running, false).group.enter(*deposit);
                running.state = State::Arriving(arrival);
            }
            Action::Fold { bytes, divide, push } => {
                let mut bench = self.bench(running, *divide);
                let push = *push && bench.group.registered();
                bench.fold(bytes, push)?;
                return Ok(Advance::Done);
            }
            Action::Gather { slices, pushed } => {
                running.state = self.begin_gather(slices, *pushed, running);
            }
            Action::Divide { bytes } => {
                divide(running, bytes);
                return Ok(Advance::Done);
            }
        }
        Ok(Advance::Moved)
    }

    fn begin_gather(&mut self, slices: &[Range<usize>], pushed: bool, running: &Running) -> State {
        let mut bench = self.bench(running, false);
        if !bench.group.registered() {
            return State::ArrivingToPull(bench.group.arrive());
        }
        if !pushed {
            let members = bench.group.members().to_vec();
            let own = members.iter().position(|&member| member == bench.rank);
            bench.push(&members, &slices[own.expect("a rank is in its own group")]);
        }
        State::Arriving(bench.group.arrive())
    }

    fn pull_when_complete(
        &mut self,
        action: &Action,
        running: &mut Running,
        arrival: Arrival,
    ) -> Result<Advance, LinkError> {
        let mut bench = self.bench(running, false);
        if !bench.group.complete(arrival)? {
            return Ok(Advance::Waiting);
        }
        if let Action::Gather { slices, .. } = action {
            bench.pull(slices)?;
        }
        running.state = State::Arriving(bench.group.arrive());
        Ok(Advance::Moved)
    }

    fn advance_segment(
        &mut self,
        action: &Action,
        running: &Running,
    ) -> Result<Advance, LinkError> {
        let Action::Transfers(segment) = action else { return Ok(Advance::Done) };
        let fold = Fold { divide_by: None, ..running.fold };
        let (rank, region) = (self.rank, running.region);
        let mut bench = Bench { rank, segment, links: &mut self.links, region, fold };
        let moved = self.scoreboard.advance(&mut bench)?;
        Ok(match (self.scoreboard.is_done(segment), moved) {
            (true, _) => Advance::Done,
            (false, true) => Advance::Moved,
            (false, false) => Advance::Waiting,
        })
    }

    fn bench(&mut self, running: &Running, divide: bool) -> GroupBench<'_> {
        let link = self.group_link.expect("programs have group actions only where a group is");
        let group = self.links.all[link].group().expect("the group's link has a group");
        let divide_by = running.fold.divide_by.filter(|_| divide);
        GroupBench {
            rank: self.rank,
            group,
            region: running.region,
            fold: Fold { divide_by, ..running.fold },
            scratch: &mut self.scratch,
        }
    }

    /// How long waiting for what is under way pays before it parks.
    pub(crate) fn patience(&self) -> Patience {
        let in_segment = |running: &Running| running.state == State::InSegment;
        if !self.running.as_ref().is_some_and(in_segment) {
            return self.patience;
        }
        let in_flight = self.scoreboard.in_flight().iter().zip(&self.links.all);
        in_flight
            .filter(|(in_flight, _)| **in_flight > 0)
            .fold(self.patience, |patience, (_, link)| patience.min(link.patience()))
    }

    /// Sleeps until something may have moved, until woken, or until `until`.
    pub(crate) fn park(&mut self, until: Instant) -> Result<(), LinkError> {
        let Some(running) = &self.running else { return Ok(()) };
        if let State::Arriving(arrival) | State::ArrivingToPull(arrival) = running.state {
            return match self.group() {
                Some(group) => group.park(arrival, until),
                None => Ok(()),
            };
        }
        let wanted = match running.program.actions.get(running.action) {
            Some(Action::Transfers(segment)) => self.scoreboard.wanted(segment),
            _ => 1,
        };
        match self.only_busy_link() {
            Some(link) => self.links.all[link].park(until, wanted),
            None => self.park_on_many(until),
        }
    }

    /// The links that have transfers under way.
    fn busy_links(&self) -> impl Iterator<Item = usize> {
        let in_flight = self.scoreboard.in_flight();
        (0..in_flight.len()).filter(|&link| in_flight[link] > 0)
    }

    fn only_busy_link(&self) -> Option<usize> {
        let mut busy = self.busy_links();
        busy.next().filter(|_| busy.next().is_none())
    }

    fn park_on_many(&mut self, until: Instant) -> Result<(), LinkError> {
        let busy: Vec<usize> = self.busy_links().collect();
        let armed = busy.iter().take_while(|&&link| self.links.all[link].arm()).count();
        let slept = if armed == busy.len() { self.poll_all(&busy, until) } else { Ok(()) };
        for &link in &busy[..armed] {
            self.links.all[link].disarm();
        }
        slept.map_err(|error| LinkError::os(self.rank, "waiting for several links", error))
    }

    fn poll_all(&self, busy: &[usize], until: Instant) -> rustix::io::Result<()> {
        let mut descriptors: Vec<PollFd<'_>> = busy
            .iter()
            .map(|&link| PollFd::from_borrowed_fd(self.links.all[link].wake_fd(), PollFlags::IN))
            .collect();
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// How far the running collective is: (steps done, steps in all).
    pub(crate) fn position(&self) -> (usize, usize) {
        let Some(running) = &self.running else { return (0, 0) };
        let steps = |action: &Action| match action {
            Action::Transfers(segment) => segment.steps(),
            _ => 1,
        };
        let before: usize = running.program.actions[..running.action].iter().map(steps).sum();
        let inside = if running.state == State::InSegment { self.scoreboard.retired() } else { 0 };
        (before + inside, running.program.actions.iter().map(steps).sum())
    }

    /// The ranks without which the running collective can't go on.
    pub(crate) fn waiting_for(&mut self) -> Vec<Rank> {
        let Some(running) = &self.running else { return Vec::new() };
        match (running.state, running.program.actions.get(running.action)) {
            (State::InSegment, Some(Action::Transfers(segment))) => {
                self.scoreboard.waiting_for(segment)
            }
            (State::Arriving(arrival) | State::ArrivingToPull(arrival), _) => {
                self.group().map_or_else(Vec::new, |group| group.missing(arrival))
            }
            _ => Vec::new(),
        }
    }

    /// Payload bytes that pairwise transfers moved so far.
    pub(crate) const fn bytes_moved(&self) -> u64 {
        self.scoreboard.bytes_moved()
    }

    /// Ends everything: afterwards no link touches any region.
    pub(crate) fn abort(&mut self) {
        self.running = None;
        for link in &mut self.links.all {
            link.abort();
        }
    }
}

fn divide(running: &Running, bytes: &Range<usize>) {
    let own = running.region.pointer(bytes);
    let count = bytes.len() / running.fold.dtype.bytes();
    // SAFETY: the region is valid for `bytes` and no transfer is under way between two actions;
    // folding one source in place is allowed.
    unsafe { running.fold.run(own, &[own.cast_const()], count) };
}
