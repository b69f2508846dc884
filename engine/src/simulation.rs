//! The engine on a virtual clock: all ranks of a world in one thread, over links whose delays,
//! buffering and losses come from a seed. The engine is the real one; the doubles are the links
//! (they show no kernel, no partial messages, and time passes only where a message travels).

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use unisum_algorithms::{self as plans, Algorithm, Shape, Topology, algorithms, all};
use unisum_kernels::Fold;
use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::{
    Call, Group, Landing, Link, LinkError, PeerCounts, Rank, Region, Regions, Ticket, Wake,
};

use super::program::{Program, Source, Tuning};
use super::{Advance, Engine, Links};

/// SplitMix64: enough randomness for a schedule, replayed by its seed.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[derive(Debug)]
struct Message {
    at: u64,
    call: Call,
    marked: bool,
    bytes: Vec<u8>,
    /// The sender's ticket, if it is done only when the message is received.
    on_receipt: Option<Ticket>,
}

#[derive(Debug)]
struct Network {
    now: u64,
    random: Random,
    lines: HashMap<(Rank, Rank), VecDeque<Message>>,
    /// Tickets of rendezvous sends that were received, by sender and receiver.
    received: HashMap<(Rank, Rank), Vec<Ticket>>,
    /// From this time on the rank is gone.
    death: Option<(Rank, u64)>,
}

impl Network {
    fn is_dead(&self, rank: Rank) -> bool {
        self.death.is_some_and(|(dead, at)| dead == rank && at <= self.now)
    }

    /// Lets time pass until the next message arrives or the next death; `false` if none will.
    fn pass_time(&mut self) -> bool {
        let arrivals =
            self.lines.values().filter_map(|line| line.front()).map(|message| message.at);
        let death = self.death.map(|(_, at)| at);
        let next = arrivals.chain(death).filter(|&at| at > self.now).min();
        self.now = next.unwrap_or(self.now);
        next.is_some()
    }
}

#[derive(Debug)]
struct SimulatedLink {
    rank: Rank,
    network: Arc<Mutex<Network>>,
    current: Option<Call>,
    counts: HashMap<Rank, PeerCounts>,
    posted: HashMap<Rank, VecDeque<(Region, Landing, Ticket)>>,
    /// Sends that are done and not reported yet.
    sent: Vec<Ticket>,
    /// How many sends to each rank wait to be received.
    awaited: HashMap<Rank, usize>,
    slots: HashMap<Ticket, Vec<u8>>,
    marked: bool,
}

#[derive(Debug)]
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl SimulatedLink {
    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap()
    }

    fn current(&self) -> Call {
        self.current.expect("begun")
    }

    fn land(&mut self, message: Message, memory: Region, landing: Landing, ticket: Ticket) {
        assert_eq!(message.bytes.len(), memory.bytes(), "both ends post the same lengths");
        self.marked |= message.marked;
        match landing {
            Landing::Place => {
                let to = memory.base();
                // SAFETY: the region is that long; the message is memory of its own.
                unsafe { to.copy_from_nonoverlapping(message.bytes.as_ptr(), memory.bytes()) };
            }
            Landing::Slot => {
                self.slots.insert(ticket, message.bytes);
            }
        }
    }
}

impl Link for SimulatedLink {
    fn begin(&mut self, call: &Call, _regions: &Regions) {
        (self.current, self.marked) = (Some(*call), false);
        self.counts.clear();
    }

    fn pair_counts(&mut self, peer: Rank, counts: PeerCounts) {
        self.counts.insert(peer, counts);
    }

    fn send(&mut self, to: Rank, memory: Region, ticket: Ticket) -> Result<(), LinkError> {
        let (call, marked) = (self.current(), self.marked);
        let call = self.counts.get(&to).map_or(call, |counts| counts.told(call));
        // SAFETY: the region is that long and the engine sends only what is quiet.
        let payload = unsafe { std::slice::from_raw_parts(memory.base(), memory.bytes()) }.to_vec();
        let mut network = self.network();
        let delay = 1 + network.random.below(50);
        let line = network.lines.get(&(self.rank, to)).and_then(|line| line.back());
        let at = line.map_or(0, |last| last.at).max(network.now + delay);
        let on_receipt = (network.random.below(2) == 0).then_some(ticket);
        let message = Message { at, call, marked, bytes: payload, on_receipt };
        network.lines.entry((self.rank, to)).or_default().push_back(message);
        drop(network);
        match on_receipt {
            None => self.sent.push(ticket),
            Some(_) => *self.awaited.entry(to).or_default() += 1,
        }
        Ok(())
    }

    fn receive(
        &mut self,
        from: Rank,
        memory: Region,
        landing: Landing,
        ticket: Ticket,
    ) -> Result<(), LinkError> {
        self.posted.entry(from).or_default().push_back((memory, landing, ticket));
        Ok(())
    }

    fn progress(&mut self, done: &mut Vec<Ticket>) -> Result<(), LinkError> {
        done.append(&mut self.sent);
        let rank = self.rank;
        for (&peer, awaited) in &mut self.awaited {
            let mut network = self.network.lock().unwrap();
            let mut received = network.received.remove(&(rank, peer)).unwrap_or_default();
            *awaited -= received.len();
            done.append(&mut received);
            if *awaited > 0 && network.is_dead(peer) {
                return Err(LinkError::closed(peer));
            }
        }
        let peers: Vec<Rank> = self.posted.keys().copied().collect();
        for peer in peers {
            while !self.posted[&peer].is_empty() {
                let ours = self.current();
                let ours = self.counts.get(&peer).map_or(ours, |counts| counts.heard(ours));
                let mut network = self.network();
                let now = network.now;
                let line = network.lines.entry((peer, rank)).or_default();
                let is_here = line.front().is_some_and(|message| message.at <= now);
                let Some(message) = is_here.then(|| line.pop_front()).flatten() else {
                    if network.is_dead(peer) {
                        return Err(LinkError::closed(peer));
                    }
                    break;
                };
                if let Some(ticket) = message.on_receipt {
                    network.received.entry((peer, rank)).or_default().push(ticket);
                }
                drop(network);
                assert_eq!(message.call, ours);
                let posted = self.posted.get_mut(&peer).and_then(VecDeque::pop_front);
                let (memory, landing, ticket) = posted.expect("just seen");
                self.land(message, memory, landing, ticket);
                done.push(ticket);
            }
        }
        Ok(())
    }

    fn arrived(&self, ticket: Ticket) -> *const u8 {
        self.slots[&ticket].as_ptr()
    }

    fn release(&mut self, ticket: Ticket) -> Result<(), LinkError> {
        self.slots.remove(&ticket).expect("released once, after it arrived");
        Ok(())
    }

    fn mark(&mut self) {
        self.marked = true;
    }

    fn is_marked(&self) -> bool {
        self.marked
    }

    fn park(&mut self, _until: Instant, _wanted: usize) -> Result<(), LinkError> {
        unreachable!("the simulation never sleeps")
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}

    fn wake_fd(&self) -> BorrowedFd<'_> {
        unreachable!("the simulation never sleeps")
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }

    fn abort(&mut self) {
        self.posted.clear();
        self.sent.clear();
        self.awaited.clear();
        self.slots.clear();
    }

    fn group(&mut self) -> Option<&mut dyn Group> {
        None
    }
}

/// A world under simulation: the engines and their buffers.
struct World {
    network: Arc<Mutex<Network>>,
    engines: Vec<Engine>,
    inputs: Vec<Vec<i32>>,
    /// Where the results go, if not to the inputs.
    outputs: Vec<Vec<i32>>,
}

impl World {
    fn new(world: usize, seed: u64, death: Option<(Rank, u64)>) -> Self {
        let random = Random(seed);
        let (lines, received) = (HashMap::new(), HashMap::new());
        let network = Network { now: 0, random, lines, received, death };
        let network = Arc::new(Mutex::new(network));
        let link = |rank| SimulatedLink {
            rank,
            network: network.clone(),
            current: None,
            counts: HashMap::new(),
            posted: HashMap::new(),
            sent: Vec::new(),
            awaited: HashMap::new(),
            slots: HashMap::new(),
            marked: false,
        };
        // Two links, so that what arrives over different links is reordered as well.
        let engine = |rank| {
            let all: Vec<Box<dyn Link>> = vec![Box::new(link(rank)), Box::new(link(rank))];
            let route = (0..world).map(|peer| (peer + rank) % 2).collect();
            let links = Links { all, route, group: None };
            Engine::new(rank, links, 1.0)
        };
        let engines = (0..world).map(engine).collect();
        Self { network, engines, inputs: Vec::new(), outputs: Vec::new() }
    }

    /// Starts a sum by `algorithm`, with one buffer a rank for input and output if `in_place`.
    fn start(&mut self, algorithm: &dyn Algorithm, shape: &Shape, in_place: bool, tuning: Tuning) {
        let call = Call::all_reduce(0, Dtype::I32, shape.elements() as u64);
        let buffers = |rank: Rank| Buffers::new(shape, rank, in_place);
        let buffers: Vec<Buffers> = (0..self.engines.len()).map(buffers).collect();
        self.inputs = buffers.iter().map(|it| it.input.clone()).collect();
        self.outputs = buffers.iter().map(|it| vec![-1; it.output]).collect();
        for (rank, engine) in self.engines.iter_mut().enumerate() {
            let program = Program::build(&Source {
                algorithm,
                shape,
                rank,
                element_bytes: 4,
                average: false,
                scales: false,
                in_place: buffers[rank].overlaid.is_some(),
                tuning,
                group: None,
            });
            let input = region(&mut self.inputs[rank]);
            let regions = match &buffers[rank].overlaid {
                Some((puts, gets)) => Regions { input: input.part(puts), output: input.part(gets) },
                None => Regions { input, output: region(&mut self.outputs[rank]) },
            };
            let fold = Fold::new(Dtype::I32, ReduceOp::Sum);
            engine.start(&call, fold, &regions, &Arc::new(program));
        }
    }

    /// Checks every rank's result, and that inputs apart stayed as they were.
    fn check(&self, shape: &Shape, in_place: bool, context: &str) {
        let world = self.engines.len();
        for rank in 0..world {
            let buffers = Buffers::new(shape, rank, in_place);
            let result = match &buffers.overlaid {
                Some((_, gets)) => &self.inputs[rank][gets.start / 4..gets.end / 4],
                None => {
                    assert_eq!(self.inputs[rank], buffers.input, "{context}: an input changed");
                    &self.outputs[rank]
                }
            };
            assert_eq!(result, expected(shape, rank), "{context}: rank {rank}");
        }
    }

    /// Advances ranks in random order until all have ended; the errors of those that failed.
    fn run(&mut self) -> Vec<Option<LinkError>> {
        let world = self.engines.len();
        let mut ended: Vec<Option<Option<LinkError>>> = vec![None; world];
        loop {
            let mut moved = false;
            for _ in 0..2 * world {
                let rank = self.network().random.below(world as u64) as usize;
                moved |= self.advance(rank, &mut ended[rank]);
            }
            for (rank, ended) in ended.iter_mut().enumerate() {
                moved |= self.advance(rank, ended);
            }
            if ended.iter().all(Option::is_some) {
                return ended.into_iter().flatten().collect();
            }
            assert!(moved || self.network().pass_time(), "deadlock: nobody moves, nothing travels");
        }
    }

    fn advance(&mut self, rank: Rank, ended: &mut Option<Option<LinkError>>) -> bool {
        if ended.is_some() {
            return false;
        }
        if self.network().is_dead(rank) {
            *ended = Some(None);
            return true;
        }
        match self.engines[rank].advance() {
            Ok(Advance::Waiting) => false,
            Ok(Advance::Moved) => true,
            Ok(Advance::Done) => {
                *ended = Some(None);
                true
            }
            Err(error) => {
                self.engines[rank].abort();
                // As the control connection would: everybody hears of the failure.
                *ended = Some(Some(error));
                true
            }
        }
    }

    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap()
    }
}

fn uneven(world: usize) -> Vec<usize> {
    match world {
        0..=2 => vec![world],
        _ => vec![world / 3, world - world / 3],
    }
}

/// What a rank begins with.
struct Buffers {
    input: Vec<i32>,
    /// Elements of the output.
    output: usize,
    /// Where input and output lie in one buffer, in bytes.
    overlaid: Option<(Range<usize>, Range<usize>)>,
}

impl Buffers {
    fn new(shape: &Shape, rank: Rank, in_place: bool) -> Self {
        let (puts, gets) = (shape.contributes(rank), shape.wants(rank));
        let input: Vec<i32> = puts.iter().cloned().flatten().map(|at| value(rank, at)).collect();
        let output = gets.iter().map(Range::len).sum();
        let (Some(first_in), Some(first_out), true) = (puts.first(), gets.first(), in_place) else {
            return Self { input, output, overlaid: None };
        };
        let start = first_in.start.min(first_out.start);
        let place = |first: usize, len: usize| (first - start) * 4..(first - start + len) * 4;
        let overlaid = (place(first_in.start, input.len()), place(first_out.start, output));
        let mut both = vec![-1; overlaid.0.end.max(overlaid.1.end) / 4];
        both[overlaid.0.start / 4..overlaid.0.end / 4].copy_from_slice(&input);
        Self { input: both, output: 0, overlaid: Some(overlaid) }
    }
}

fn region(buffer: &mut [i32]) -> Region {
    let (base, bytes) = (NonNull::from(&mut *buffer).cast(), size_of_val(buffer));
    // SAFETY: the buffers outlive the engines' use of them: both live in one world.
    unsafe { Region::new(base, bytes, None) }
}

const fn value(rank: Rank, element: usize) -> i32 {
    (rank * 1000 + element % 10_007 * 7) as i32
}

/// The sum of all contributions to what a rank wants.
fn expected(shape: &Shape, rank: Rank) -> Vec<i32> {
    let inputs: Vec<Vec<Range<usize>>> =
        (0..shape.world()).map(|peer| shape.contributes(peer)).collect();
    let has = |peer: Rank, at: usize| inputs[peer].iter().any(|range| range.contains(&at));
    let peers = |at: usize| (0..shape.world()).filter(move |&peer| has(peer, at));
    let sum = |at: usize| peers(at).map(|peer| value(peer, at)).sum();
    shape.wants(rank).into_iter().flatten().map(sum).collect()
}

/// A shape of each collective on uneven nodes, with uneven blocks where it may have them.
fn shapes(world: usize, count: usize, random: &mut Random) -> Vec<Shape> {
    use plans::PlanKind::{
        AllGather, AllReduce, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
    };
    let topology = || Topology::nodes(&uneven(world));
    let root = random.below(world as u64) as usize;
    let mut length = || random.below(2 * count as u64 / world as u64 + 1) as usize;
    let lengths: Vec<usize> = (0..world).map(|_| length()).collect();
    let whole = [AllReduce, Reduce { root }, Broadcast { root }];
    let blocks = [AllGather, ReduceScatter, Gather { root }, Scatter { root }];
    whole
        .map(|collective| Shape::whole(topology(), collective, count))
        .into_iter()
        .chain(blocks.map(|collective| Shape::blocks(topology(), collective, &lengths)))
        .chain([Shape::even(topology(), AllToAll, count / world)])
        .collect()
}

#[test]
fn every_algorithm_of_every_collective_is_right_under_any_schedule() {
    for seed in 0..if cfg!(miri) { 1 } else { 40 } {
        let mut random = Random(seed);
        let world = 2 + random.below(8) as usize;
        let count = random.below(200) as usize + 1;
        for shape in shapes(world, count, &mut random) {
            let in_place = shape.collective != plans::PlanKind::AllToAll && random.below(2) == 0;
            let fits = |algorithm: &&&dyn Algorithm| algorithm.supports(&shape);
            for algorithm in algorithms(shape.collective).iter().filter(fits) {
                let tuning =
                    Tuning { slice_bytes: 4 << random.below(6), window: 1 << random.below(6) };
                let mut simulated = World::new(world, random.next(), None);
                simulated.start(*algorithm, &shape, in_place, tuning);
                let failures = simulated.run();
                let (name, collective) = (algorithm.name(), shape.collective);
                let context = format!(
                    "seed {seed}, {collective:?} {name}, world {world}, count {count}, {tuning:?}, \
                     in place {in_place}"
                );
                assert!(failures.iter().all(Option::is_none), "{context}: {failures:?}");
                simulated.check(&shape, in_place, &context);
            }
        }
    }
}

#[test]
fn a_rank_that_dies_leaves_nobody_waiting_for_it_without_an_error() {
    for seed in 0..if cfg!(miri) { 1 } else { 60 } {
        let mut random = Random(seed);
        let world = 2 + random.below(6) as usize;
        let dead = random.below(world as u64) as usize;
        let algorithm = random.below(all().len() as u64) as usize;
        let death = Some((dead, random.below(200)));
        let mut simulated = World::new(world, random.next(), death);
        let shape = Shape::all_reduce(Topology::nodes(&uneven(world)), 64);
        simulated.start(all()[algorithm], &shape, true, Tuning { slice_bytes: 32, window: 8 });
        let (failed, finished) = simulated.run_with_deaths(dead);
        assert_eq!(failed + finished + 1, world, "seed {seed}");
    }
}

impl World {
    /// Runs until every live rank has ended or waits for a rank that failed; the latter is what
    /// the control connection's verdict ends. Counts (failed or told, finished) live ranks.
    fn run_with_deaths(&mut self, dead: Rank) -> (usize, usize) {
        let world = self.engines.len();
        let mut ended: Vec<Option<Option<LinkError>>> = vec![None; world];
        loop {
            let mut moved = false;
            for (rank, ended) in ended.iter_mut().enumerate() {
                moved |= self.advance(rank, ended);
            }
            if !moved && !self.network().pass_time() {
                break;
            }
        }
        let errors = ended.iter().flatten().flatten();
        assert!(errors.clone().all(|error| error.peer == dead), "only the dead rank is blamed");
        let finished = |(rank, end): (usize, &Option<Option<LinkError>>)| {
            rank != dead && matches!(end, Some(None))
        };
        let finished = ended.iter().enumerate().filter(|&entry| finished(entry)).count();
        // Whoever still waits must have somebody who can tell: a rank that saw the death itself,
        // unless all live ranks finished before it.
        let waiting = world - 1 - finished - errors.clone().count();
        assert!(waiting == 0 || errors.count() > 0, "ranks wait, and nobody noticed the death");
        (world - 1 - finished, finished)
    }
}
