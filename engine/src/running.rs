//! A collective under way: executes one action of its program after the other.

use std::ops::Range;
use std::sync::Arc;

use unisum_events::{Event, record};
use unisum_link::{Arrival, LinkError, Part, Rank};

use super::folding::{Extras, Folding};
use super::group_exchange::{GroupContext, Next, Sources};
use super::links::Links;
use super::memories::Memories;
use super::placement::{Memory, Move};
use super::program::{Action, Exchange, Program};
use super::scoreboard::{Scoreboard, SegmentContext};
use super::{Advance, Counters};

/// What collectives are executed with, one at a time.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) rank: Rank,
    pub(super) links: Links,
    pub(super) scoreboard: Scoreboard,
    pub(super) sources: Sources,
    pub(super) counters: Arc<Counters>,
    /// The length of the parts in which private regions move among the members of the group.
    pub(super) part_bytes: usize,
}

/// A collective under way.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) memories: Memories,
    pub(super) folding: Folding,
    /// Whether all ranks must learn what one rank detects.
    pub(super) spreads_marks: bool,
    /// Whether all regions turned out to be registered and the program has actions for that.
    pub(super) is_mapped: bool,
    pub(super) action: usize,
    pub(super) state: State,
}

/// The state of an action. Group actions alternate between work and arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Start,
    InSegment,
    Entering(Arrival),
    /// When all have arrived, this piece of an exchange or a pull is next.
    BetweenPieces(Arrival, usize),
    /// When all have arrived, the action is done.
    Leaving(Arrival),
}

impl State {
    pub(super) const fn arrival(self) -> Option<Arrival> {
        match self {
            Self::Start | Self::InSegment => None,
            Self::Entering(arrival) | Self::BetweenPieces(arrival, _) | Self::Leaving(arrival) => {
                Some(arrival)
            }
        }
    }
}

impl Running {
    /// Makes what progress is possible now.
    pub(super) fn advance(
        &mut self,
        program: &Program,
        tools: &mut Tools,
    ) -> Result<Advance, LinkError> {
        let mut moved = false;
        let mut actions = program.actions(self.is_mapped);
        while let Some(action) = actions.get(self.action) {
            let advance = match self.state {
                State::Start => self.begin_action(action, tools)?,
                State::InSegment => {
                    let (advance, moves) = self.advance_segment(action, tools)?;
                    moved |= moves;
                    advance
                }
                State::Entering(arrival)
                | State::BetweenPieces(arrival, _)
                | State::Leaving(arrival) => match tools.links.the_group().complete(arrival)? {
                    // By far the most frequent check.
                    false => Advance::Waiting,
                    true if self.becomes_mapped(program, tools) => {
                        actions = program.actions(self.is_mapped);
                        Advance::Moved
                    }
                    true => self.all_arrived(action, tools)?,
                },
            };
            match advance {
                Advance::Done => (self.action, self.state) = (self.action + 1, State::Start),
                Advance::Moved => {}
                Advance::Waiting if moved => return Ok(Advance::Moved),
                Advance::Waiting => return Ok(Advance::Waiting),
            }
            moved = true;
        }
        Ok(Advance::Done)
    }

    /// After all members have entered: switches to the actions for registered regions if the
    /// program has some and all regions are registered.
    fn becomes_mapped(&mut self, program: &Program, tools: &mut Tools) -> bool {
        if program.mapped.is_none() || !matches!(self.state, State::Entering(_)) {
            return false;
        }
        let group = tools.links.the_group();
        let is_mapped = [Part::Input, Part::Output].into_iter().all(|part| group.registered(part));
        if is_mapped {
            (self.is_mapped, self.action, self.state) = (true, 0, State::Start);
        }
        is_mapped
    }

    fn begin_action(&mut self, action: &Action, tools: &mut Tools) -> Result<Advance, LinkError> {
        record(|| Event::StepBegun { action: self.action as u32 });
        match action {
            Action::Transfers(segment) => {
                tools.scoreboard.start(segment, &tools.links);
                self.state = State::InSegment;
            }
            Action::Pull(pull) => {
                let group = tools.links.the_group();
                let arrival = if pull.enters { group.enter(pull.deposits) } else { group.arrive() };
                self.state = State::Entering(arrival);
            }
            Action::Exchange(exchange) if exchange.enters => {
                let arrival = self.group_context(tools, Extras::default()).enter(exchange);
                self.state = State::Entering(arrival);
            }
            Action::Exchange(exchange) => return self.exchange(exchange, tools),
            Action::Copy { moves, scales } => {
                moves.iter().for_each(|it| self.copy(it, *scales));
                return Ok(Advance::Done);
            }
            Action::Divide { bytes } => {
                self.divide(bytes);
                return Ok(Advance::Done);
            }
            Action::Arrive => {
                let arrival = self.group_context(tools, Extras::default()).arrive();
                self.state = State::Leaving(arrival);
            }
        }
        Ok(Advance::Moved)
    }

    fn all_arrived(&mut self, action: &Action, tools: &mut Tools) -> Result<Advance, LinkError> {
        match (action, self.state) {
            (Action::Pull(pull), State::Entering(_)) => {
                let next = self.group_context(tools, pull.extras()).pull(pull)?;
                Ok(self.continue_with(next, 0))
            }
            (Action::Pull(pull), State::BetweenPieces(_, piece)) => {
                let next = self.group_context(tools, pull.extras()).pull_piece(pull, piece)?;
                Ok(self.continue_with(next, piece))
            }
            (Action::Exchange(exchange), State::Entering(_)) => self.exchange(exchange, tools),
            (Action::Exchange(exchange), State::BetweenPieces(_, piece)) => {
                let next = self.group_context(tools, exchange.extras()).piece(exchange, piece)?;
                Ok(self.continue_with(next, piece))
            }
            _ => Ok(Advance::Done),
        }
    }

    fn exchange(&mut self, exchange: &Exchange, tools: &mut Tools) -> Result<Advance, LinkError> {
        let next = self.group_context(tools, exchange.extras()).exchange(exchange)?;
        Ok(self.continue_with(next, usize::from(exchange.folds)))
    }

    /// Sets the state in which an exchange or a pull continues after `piece`.
    const fn continue_with(&mut self, next: Next, piece: usize) -> Advance {
        self.state = match next {
            Next::Done => return Advance::Done,
            Next::Last(arrival) => State::Leaving(arrival),
            Next::Piece(arrival) => State::BetweenPieces(arrival, piece + 1),
        };
        Advance::Moved
    }

    /// Advances a segment. Reports waiting even after progress if another check is useless.
    fn advance_segment(
        &mut self,
        action: &Action,
        tools: &mut Tools,
    ) -> Result<(Advance, bool), LinkError> {
        let Action::Transfers(segment) = action else { return Ok((Advance::Done, true)) };
        let mut context = SegmentContext {
            rank: tools.rank,
            segment,
            sources: &mut tools.sources,
            part_bytes: tools.part_bytes,
            links: &mut tools.links,
            memories: self.memories,
            folding: &mut self.folding,
            spreads_marks: self.spreads_marks,
        };
        let moved = tools.scoreboard.advance(&mut context)?;
        let advance = match &tools.scoreboard {
            board if board.is_done(segment) => {
                tools.counters.moved(segment.traffic());
                Advance::Done
            }
            board if moved && board.may_find_more(segment) => Advance::Moved,
            _ => Advance::Waiting,
        };
        Ok((advance, moved))
    }

    fn group_context<'a>(&'a mut self, tools: &'a mut Tools, extras: Extras) -> GroupContext<'a> {
        GroupContext {
            rank: tools.rank,
            group: tools.links.the_group(),
            memories: self.memories,
            folding: &mut self.folding,
            extras,
            spreads_marks: self.spreads_marks,
            sources: &mut tools.sources,
            part_bytes: tools.part_bytes,
        }
    }

    fn divide(&mut self, bytes: &Range<usize>) {
        let own = self.memories.regions.output.pointer(bytes);
        let extras = Extras { divides: true, ..Extras::default() };
        // SAFETY: the output is valid for `bytes` and no transfer is under way between two actions;
        // folding one source in place is allowed.
        unsafe { self.folding.run(own, &[own.cast_const()], bytes.len(), extras) };
    }

    /// Copies within this rank; inputs of a pre-multiplied sum are multiplied by the factor.
    fn copy(&mut self, Move { from, to, count: bytes }: &Move, scales: bool) {
        let source = self.memories.pointer(*from, *bytes).cast_const();
        let into = self.memories.pointer(*to, *bytes);
        // Sums that were computed in scratch memory become results here.
        let watches = self.folding.watches() && from.memory == Memory::Scratch;
        if scales || watches {
            let extras = Extras { scales, watches, ..Extras::default() };
            // SAFETY: both are valid for that many bytes, no transfer is under way between two
            // actions, and they are one place or do not overlap.
            unsafe { self.folding.run(into, &[source], *bytes, extras) };
        } else {
            // SAFETY: as above; in place they may overlap.
            unsafe { into.copy_from(source, *bytes) };
        }
    }
}
