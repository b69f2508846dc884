//! What drives a link in the suite: a bare engine that posts, waits and checks.

use std::collections::HashSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::memory::{Memory, copy};
use super::{End, Mesh};
use crate::{
    Arrival, Backoff, Call, Group, Landing, Link, LinkError, Patience, Pause, Rank, Regions, Ticket,
};
use unisum_kernels::Dtype;

/// How long any wait of the suite may take before it counts as a hang.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Which memory a case runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Private,
    Registered,
}

/// A rank of a case: its link, its memory, and what is done.
pub(super) struct Port<'a> {
    pub(super) rank: Rank,
    pub(super) link: Box<dyn Link>,
    pub(super) memory: Memory,
    /// Whether the link is dropped when this rank's part ends, and not when all parts have.
    pub(super) leaves_early: bool,
    gate: &'a Gate,
    done: HashSet<Ticket>,
    tickets: u64,
}

/// A call with the given number and count.
pub(super) fn call(number: u64, count: usize) -> Call {
    Call { algorithm: 1, ..Call::all_reduce(number, Dtype::U8, count as u64) }
}

/// Runs `rank` on every end of a fresh mesh, once with private and once with registered memory of
/// `bytes` bytes if the transport has that.
pub(super) fn run(mesh: &Mesh, world: usize, bytes: usize, rank: impl Fn(&mut Port<'_>) + Sync) {
    run_on(mesh, world, bytes, Kind::Private, &rank);
    run_on(mesh, world, bytes, Kind::Registered, &rank);
}

/// [`run`] on one kind of memory; a kind that the transport lacks runs nothing.
pub(super) fn run_on(
    mesh: &Mesh,
    world: usize,
    bytes: usize,
    kind: Kind,
    rank: &(impl Fn(&mut Port<'_>) + Sync),
) {
    let ends = (mesh.connect)(world);
    if ends.is_empty() {
        return;
    }
    assert_eq!(ends.len(), world, "one end per rank");
    if kind == Kind::Registered && ends.iter().any(|end| end.registered.is_none()) {
        return;
    }
    let gate = Gate::new(world);
    thread::scope(|scope| {
        for (index, end) in ends.into_iter().enumerate() {
            let gate = &gate;
            thread::Builder::new()
                .name(format!("rank {index} {kind:?}"))
                .spawn_scoped(scope, move || {
                    let mut port = Port::new(index, end, bytes, kind, gate);
                    let outcome = catch_unwind(AssertUnwindSafe(|| rank(&mut port)));
                    if let Err(panic) = outcome {
                        gate.give_up();
                        resume_unwind(panic);
                    }
                    // Else a link may be dropped only when its peers have what it sent.
                    if port.leaves_early {
                        drop(port);
                        return gate.pass();
                    }
                    port.meet();
                })
                .expect("a thread for a rank");
        }
    });
}

impl<'a> Port<'a> {
    fn new(rank: Rank, end: End, bytes: usize, kind: Kind, gate: &'a Gate) -> Self {
        let memory = match (kind, end.registered) {
            (Kind::Registered, Some(allocate)) => allocate(&*end.heap, bytes),
            _ => Memory::private(bytes),
        };
        let (done, leaves_early) = (HashSet::new(), false);
        Self { rank, link: end.link, memory, leaves_early, gate, done, tickets: 0 }
    }

    /// Waits until every rank is here: order that the case needs outside of the link.
    pub(super) fn meet(&self) {
        self.gate.pass();
    }

    pub(super) fn begin(&mut self, call: Call) {
        self.link.begin(&call, &Regions::in_place(self.memory.region()));
    }

    pub(super) fn send(&mut self, to: Rank, bytes: Range<usize>) -> Ticket {
        self.try_send(to, bytes).expect("a send is accepted")
    }

    pub(super) fn try_send(&mut self, to: Rank, bytes: Range<usize>) -> Result<Ticket, LinkError> {
        let ticket = self.ticket();
        self.link.send(to, self.memory.region().part(&bytes), ticket).map(|()| ticket)
    }

    pub(super) fn receive(&mut self, from: Rank, bytes: Range<usize>, landing: Landing) -> Ticket {
        let ticket = self.ticket();
        let memory = self.memory.region().part(&bytes);
        self.link.receive(from, memory, landing, ticket).expect("a receive is accepted");
        ticket
    }

    /// Waits until all of `tickets` are done.
    pub(super) fn wait(&mut self, tickets: &[Ticket]) {
        self.try_wait(tickets).expect("the transfers get done");
    }

    pub(super) fn try_wait(&mut self, tickets: &[Ticket]) -> Result<(), LinkError> {
        let until = Instant::now() + PATIENCE;
        let mut backoff = Backoff::new();
        loop {
            self.look()?;
            let open = tickets.iter().filter(|ticket| !self.done.contains(ticket)).count();
            if open == 0 {
                return Ok(());
            }
            assert!(Instant::now() < until, "rank {}: {open} transfers hang", self.rank);
            if backoff.pause(self.link.patience()) == Pause::Park {
                self.link.park(until, open)?;
                backoff.reset();
            }
        }
    }

    /// One round of progress; no ticket may be reported twice.
    pub(super) fn look(&mut self) -> Result<(), LinkError> {
        let mut done = Vec::new();
        self.link.progress(&mut done)?;
        for ticket in done {
            assert!(ticket.0 < self.tickets, "{ticket:?} was never posted");
            assert!(self.done.insert(ticket), "{ticket:?} is done twice");
        }
        Ok(())
    }

    pub(super) fn is_done(&self, ticket: Ticket) -> bool {
        self.done.contains(&ticket)
    }

    /// The bytes of a done receive, wherever they landed; a slot is given back.
    pub(super) fn take(
        &mut self,
        ticket: Ticket,
        bytes: Range<usize>,
        landing: Landing,
    ) -> Vec<u8> {
        match landing {
            Landing::Place => self.memory.read(bytes.start, bytes.len()),
            Landing::Slot => {
                let taken = copy(self.link.arrived(ticket), bytes.len());
                self.link.release(ticket).expect("the sender is there");
                taken
            }
        }
    }

    /// The group; only where the case knows that the link has one.
    pub(super) fn group(&mut self) -> &mut dyn Group {
        self.link.group().expect("a link keeps its group")
    }

    /// Waits until an arrival is complete.
    pub(super) fn complete(&mut self, arrival: Arrival) -> Result<(), LinkError> {
        let until = Instant::now() + PATIENCE;
        let mut backoff = Backoff::new();
        while !self.group().complete(arrival)? {
            let missing = self.group().missing(arrival);
            assert!(Instant::now() < until, "ranks {missing:?} never arrived");
            if backoff.pause(Patience::MEMORY) == Pause::Park {
                self.group().park(arrival, until)?;
                backoff.reset();
            }
        }
        Ok(())
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets - 1)
    }
}

/// A barrier between the ranks of a case that fails rather than hangs.
pub(super) struct Gate {
    world: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: usize,
    round: u64,
    given_up: bool,
}

impl Gate {
    fn new(world: usize) -> Self {
        Self { world, state: Mutex::default(), changed: Condvar::new() }
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting += 1;
        let round = state.round;
        if state.waiting == self.world {
            state.waiting = 0;
            state.round += 1;
            self.changed.notify_all();
            return;
        }
        let here = |state: &mut State| state.round == round && !state.given_up;
        let (state, wait) = self
            .changed
            .wait_timeout_while(state, PATIENCE, here)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!wait.timed_out() && !state.given_up, "another rank of the case failed");
    }

    fn give_up(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).given_up = true;
        self.changed.notify_all();
    }
}
