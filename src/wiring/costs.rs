//! What the links cost: measured between a few ranks, then agreed by all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use rustix::thread::sched_getcpu;
use unisum_algorithms::{Algorithm, CostModel, LinkCost, Topology, all};
use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded};
use unisum_link::{Call, LinkError, Rank, Regions};

use super::calibrate::{self, Limit};
use super::description::{MeasuredCost, Rates};
use super::earlier::{Earlier, look_up};
use super::pairs::{self, Across, Measured};
use super::{Job, rendezvous_error, starting_failed};
use crate::autotuning::saved::{Tunings, Which};
use crate::autotuning::selector::{AlgorithmSelector, Line, NodeCost};
use crate::collective::key::Key;
use crate::execution::membership::Membership;
use crate::execution::programs::Programs;
use crate::{Error, ErrorKind};
use unisum_engine::{Engine, Tuning};

/// The figures that all ranks share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// Between ranks of a node; the same as `across` if there are none.
    pub(super) inside: LinkCost,
    /// Between ranks of different nodes, the median of the measurements; the same as `inside` if
    /// there is one node.
    pub(super) across: LinkCost,
    /// What the links between nodes are like, if there are several nodes.
    nodes: Option<Across>,
    pub(super) gamma_s_per_byte: f64,
    pub(super) cores: f64,
    /// All-reduces of the group that is the whole world: one-shot and two-shot.
    group: Option<[Line; 2]>,
    /// Whether any ranks take group steps; set even on a rank that shares memory with nobody.
    has_groups: bool,
}

/// What rank 0 measured besides links.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    gamma_s_per_byte: f64,
    cores: f64,
    group: Option<[Line; 2]>,
}

/// What measuring needs to know about a communicator.
#[derive(Clone, Copy)]
pub(super) struct MeasureContext<'a> {
    pub(super) rank: Rank,
    /// The ranks that share memory with this one, itself included.
    pub(super) members: &'a [Rank],
    pub(super) job: &'a Job,
    pub(super) topology: &'a Topology,
    /// The transports by which this rank reaches others.
    pub(super) transport: &'a str,
    pub(super) tuning: Tuning,
    pub(super) membership: &'a Membership,
}

/// What all ranks have agreed on.
pub(super) struct Agreed {
    costs: Costs,
    /// Whether algorithms may be tried.
    tries: bool,
    /// What earlier runs settled, and where this run saves its results.
    tunings: Option<Arc<Tunings>>,
    /// Where they come from, in words.
    pub(super) notes: Vec<String>,
}

impl Agreed {
    /// What was measured. What was not measured is not shown.
    pub(super) fn described(&self) -> Vec<MeasuredCost> {
        if self.tries { self.costs.described() } else { Vec::new() }
    }

    /// The selector of the job's communicator.
    pub(super) fn choice(
        self,
        topology: Topology,
        engine: &mut Engine,
        tuning: Tuning,
        fixed: Option<usize>,
    ) -> AlgorithmSelector {
        let ranks: Arc<[Rank]> = (0..topology.world()).collect();
        let choice = self.costs.choice(topology, engine, tuning, fixed);
        match self.tunings {
            _ if !self.tries => choice.by_model_alone(),
            Some(tunings) => {
                let ordinal = tunings.next_ordinal(&ranks);
                choice.keeping(tunings, Which { ranks, ordinal })
            }
            None => choice,
        }
    }
}

/// Takes the costs from rank 0's tuning file if it has them, or measures them, or uses round
/// figures where choices must not depend on measurements.
pub(super) fn agree(engine: &mut Engine, context: MeasureContext<'_>) -> Result<Agreed, Error> {
    let MeasureContext { rank, topology, .. } = context;
    let control = context.membership.control();
    let told = control.exchange(tell(engine, context)).map_err(rendezvous_error)?;
    let told: Vec<Told<'_>> = told.iter().map(|told| Told::new(told)).collect();
    let has_groups = told.iter().any(|told| told.has_group);
    if context.job.settings.reproducible {
        let costs = Costs { has_groups, ..Costs::of_kinds(topology, &told) };
        let note = "links as any of their kinds, not measured (UNISUM_REPRODUCIBLE)".to_owned();
        return Ok(Agreed { costs, tries: false, tunings: None, notes: vec![note] });
    }
    let earlier = if told[0].keeps { Some(look_up(context, &told)?) } else { None };
    let known = earlier.as_ref().and_then(|earlier| earlier.measured.clone());
    let is_known = known.is_some();
    let blobs = match known {
        Some(blobs) => blobs,
        None => {
            tracing::debug!("measuring the links");
            measure_all(engine, context, &told)?
        }
    };
    let costs = combine(topology, &blobs).map_err(|from| {
        let text = format!("rank {from} told no costs that this version understands");
        Error::new(ErrorKind::Rendezvous, text).on(rank).caused_by(vec![from])
    })?;
    if rank == 0 && !is_known {
        costs.warn();
    }
    if let Some(Earlier { tunings, .. }) = &earlier
        && !is_known
    {
        tunings.keep_measured(&blobs);
    }
    let (tunings, note) = earlier.map(|earlier| (earlier.tunings, earlier.note)).unzip();
    let notes = note.into_iter().collect();
    Ok(Agreed { costs: Costs { has_groups, ..costs }, tries: true, tunings, notes })
}

/// Measures: rank 0 with a rank of its node, each two neighbouring nodes with one rank each, and
/// all ranks together where they share memory. Returns what each rank sent, by rank.
fn measure_all(
    engine: &mut Engine,
    context: MeasureContext<'_>,
    told: &[Told<'_>],
) -> Result<Vec<Vec<u8>>, Error> {
    let MeasureContext { rank, members, topology, .. } = context;
    let mut measured = Vec::new();
    let [of_pairs @ .., of_group] = limits(Instant::now(), context);
    for (round, limit) in pairs::rounds(topology, |rank| told[rank].core).iter().zip(of_pairs) {
        let Some(peer) = pairs::partner(round, rank) else { continue };
        let cost = measure(engine, peer, (context, limit))?;
        if rank < peer {
            measured.push(Measured { pair: [rank, peer], cost });
        }
    }
    let group = measure_group(engine, (context, of_group))?;
    let (_, cores) = context.job.ranks_and_cores(members);
    let figures = || Figures { gamma_s_per_byte: gamma_s_per_byte(), cores: cores as f64, group };
    let blob = encode(&measured, (rank == 0).then(figures));
    context.membership.control().exchange(blob).map_err(rendezvous_error)
}

/// How long ranks that begin at `start` wait in each of three rounds of pairs, and for the group.
/// A rank may come late because it waits in an earlier round, whose time has to be up first: its
/// partner there is to blame. All of it is less than ranks wait that measure nothing, because who
/// measures knows more of what is wrong.
fn limits<'a>(start: Instant, context: MeasureContext<'a>) -> [Limit<'a>; 4] {
    let MeasureContext { job, membership, .. } = context;
    let until = |sixteenths: u32| start + job.settings.connect_timeout * sixteenths / 16;
    [9, 10, 11, 12].map(|sixteenths| Limit { until: until(sixteenths), membership })
}

fn measure(
    engine: &mut Engine,
    peer: Rank,
    (context, limit): (MeasureContext<'_>, Limit<'_>),
) -> Result<LinkCost, Error> {
    let MeasureContext { rank, job, .. } = context;
    calibrate::measure(engine.link_to(peer), peer, rank < peer, &job.arena, limit)
        .map_err(|error| measuring_failed(error, limit.membership))
}

/// If all ranks share memory: the times of a one-shot and a two-shot, each at two sizes.
fn measure_group(
    engine: &mut Engine,
    (context, limit): (MeasureContext<'_>, Limit<'_>),
) -> Result<Option<[Line; 2]>, Error> {
    let Some(slot_bytes) = engine.group().map(|group| group.slot_bytes()) else {
        return Ok(None);
    };
    if context.members.len() < context.topology.world() {
        return Ok(None);
    }
    let one_shot = measure_collectives(engine, (context, limit), "one-shot", [8, slot_bytes / 2])?;
    let two_shot = measure_collectives(engine, (context, limit), "two-shot", [4 << 10, 256 << 10])?;
    Ok(Some([one_shot, two_shot]))
}

fn measure_collectives(
    engine: &mut Engine,
    (context, limit): (MeasureContext<'_>, Limit<'_>),
    algorithm: &str,
    sizes: [usize; 2],
) -> Result<Line, Error> {
    let failed = |text: String| Error::new(ErrorKind::Rendezvous, text).on(context.rank);
    let memory = context.job.arena.allocate_anywhere(sizes[1]).map_err(failed)?;
    let named = |known: &&dyn Algorithm| known.name() == algorithm;
    let algorithm = all().iter().position(named).expect("the names are the algorithms'");
    let programs = Programs::new(context.rank, context.tuning);
    let mut points = [(0, 0.0); 2];
    for (point, bytes) in points.iter_mut().zip(sizes) {
        let count = bytes / size_of::<f32>();
        let key = Key::all_reduce(count, size_of::<f32>());
        let call = Call {
            algorithm: algorithm as u8,
            ..Call::all_reduce(Call::NUMBER_MAX, Dtype::F32, count as u64)
        };
        let program = programs.build_by(algorithm, &key, context.topology, engine);
        // SAFETY: `memory` outlives the measurement, and nothing else touches it; on an error the
        // links drop the region before `memory` is freed.
        let region = unsafe { context.job.arena.region_at(memory.start(), bytes) };
        let regions = Regions::in_place(region);
        let seconds = calibrate::collective_s(engine, call, regions, &program, limit);
        if seconds.is_err() {
            engine.abort();
        }
        let failed = |error| measuring_failed(error, context.membership);
        *point = (bytes, seconds.map_err(failed)?);
    }
    Ok(Line::through(points[0], points[1]))
}

/// Ends the job on all ranks: the others wait for this one.
fn measuring_failed(error: LinkError, membership: &Membership) -> Error {
    starting_failed(&membership.judge(error), "measuring the links")
}

/// What a rank sends about itself.
pub(super) struct Told<'a> {
    /// The core it is on.
    core: Option<[u8; 4]>,
    has_group: bool,
    /// Whether it was given a tuning file.
    pub(super) keeps: bool,
    /// The transports by which it reaches others.
    pub(super) transport: &'a [u8],
}

impl<'a> Told<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let flag = |at: usize| bytes.get(at) == Some(&1);
        let core = bytes.first_chunk().copied();
        let transport = bytes.get(6..).unwrap_or_default();
        Self { core, has_group: flag(4), keeps: flag(5), transport }
    }
}

fn tell(engine: &mut Engine, context: MeasureContext<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32_le(sched_getcpu() as u32);
    bytes.put_u8(u8::from(engine.group().is_some()));
    bytes.put_u8(u8::from(context.job.settings.tuning.is_some()));
    bytes.put_slice(context.transport.as_bytes());
    bytes
}

fn encode(measured: &[Measured], figures: Option<Figures>) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32_le(measured.len() as u32);
    for Measured { pair: [_, peer], cost } in measured {
        bytes.put_u32_le(*peer as u32);
        for value in [cost.alpha_s, cost.beta_s_per_byte, cost.beta_cached_s_per_byte] {
            bytes.put_f64_le(value);
        }
    }
    if let Some(Figures { gamma_s_per_byte, cores, group }) = figures {
        bytes.put_f64_le(gamma_s_per_byte);
        bytes.put_f64_le(cores);
        for line in group.iter().flatten() {
            bytes.put_f64_le(line.start_s);
            bytes.put_f64_le(line.s_per_byte);
        }
    }
    bytes
}

/// Combines what all ranks sent, by rank.
///
/// # Errors
/// The rank whose bytes cannot be decoded.
pub(super) fn combine(topology: &Topology, blobs: &[impl AsRef<[u8]>]) -> Result<Costs, Rank> {
    let (mut links, mut figures) = (Vec::new(), None);
    for (rank, blob) in blobs.iter().enumerate() {
        let mut blob = blob.as_ref();
        links.extend(take_links(&mut blob, rank, topology.world()).ok_or(rank)?);
        if rank == 0 {
            figures = take_figures(blob);
        }
    }
    let Figures { gamma_s_per_byte, cores, group } = figures.ok_or(0_usize)?;
    let (inside, across): (Vec<Measured>, Vec<_>) =
        links.into_iter().partition(|link| link.is_inside(topology));
    let inside = inside.first().map(|link| link.cost);
    let nodes = Across::of(across);
    let across = nodes.map(|nodes| nodes.median.cost).or(inside).ok_or(0_usize)?;
    let inside = inside.unwrap_or(across);
    Ok(Costs { inside, across, nodes, gamma_s_per_byte, cores, group, has_groups: false })
}

/// The next figure: above 0.
fn take(bytes: &mut &[u8]) -> Option<f64> {
    bytes.try_get_f64_le().ok().filter(|value| *value > 0.0 && value.is_finite())
}

/// What a rank measured with ranks behind it.
fn take_links(bytes: &mut &[u8], rank: Rank, world: usize) -> Option<Vec<Measured>> {
    let count = bytes.try_get_u32_le().ok()? as usize;
    let mut links = Vec::new();
    for _ in 0..count {
        let peer = bytes.try_get_u32_le().ok()? as Rank;
        let (alpha_s, beta_s_per_byte) = (take(bytes)?, take(bytes)?);
        let cost = LinkCost { alpha_s, beta_s_per_byte, beta_cached_s_per_byte: take(bytes)? };
        let is_behind = (rank + 1..world).contains(&peer);
        links.push(is_behind.then_some(Measured { pair: [rank, peer], cost })?);
    }
    Some(links)
}

fn take_figures(mut bytes: &[u8]) -> Option<Figures> {
    let (gamma_s_per_byte, cores) = (take(&mut bytes)?, take(&mut bytes)?);
    let mut line = || Some(Line { start_s: take(&mut bytes)?, s_per_byte: take(&mut bytes)? });
    let group = line().and_then(|one_shot| Some([one_shot, line()?]));
    Some(Figures { gamma_s_per_byte, cores, group })
}

/// Seconds to add a byte of one buffer to another, both in cache.
fn gamma_s_per_byte() -> f64 {
    const COUNT: usize = 64 << 10;
    let (mut to, from) = (vec![1.0_f32; COUNT], vec![1.0_f32; COUNT]);
    let fold = Fold::new(Dtype::F32, ReduceOp::Sum);
    let mut fastest = Duration::MAX;
    for _ in 0..4 {
        let start = Instant::now();
        let own: *mut u8 = to.as_mut_ptr().cast();
        // SAFETY: both vectors hold `COUNT` elements; the destination is one of the sources.
        let outcome = unsafe { fold.run(own, &[own.cast_const(), from.as_ptr().cast()], COUNT) };
        debug_assert_eq!(outcome, Folded::Done);
        fastest = fastest.min(start.elapsed());
    }
    fastest.as_secs_f64().max(1e-9) / (COUNT * size_of::<f32>()) as f64
}

impl Costs {
    /// Round figures for each kind of link: the same on all machines.
    fn of_kinds(topology: &Topology, told: &[Told<'_>]) -> Self {
        let world = topology.world();
        let shares = told.iter().any(|told| told.has_group);
        let has_rdma = told.iter().any(|told| told.transport.ends_with(b"verbs"));
        // Shared memory, or TCP inside a host; RDMA of 100 Gbit/s, or TCP of 10.
        let inside = match shares {
            true => LinkCost::new(1e-6, 1.0 / 10e9),
            false => LinkCost::new(15e-6, 1.0 / 2e9),
        };
        let across = match has_rdma {
            true => LinkCost::new(3e-6, 1.0 / 12.5e9),
            false => LinkCost::new(25e-6, 1.0 / 1.25e9),
        };
        let is_one_node = topology.node_count() == 1;
        // A rank that reduces reads what all ranks have.
        let (ranks, s_per_byte) = (world as f64, 1.0 / 10e9);
        let one_shot = Line { start_s: 0.5e-6 * ranks, s_per_byte: ranks * s_per_byte };
        let two_shot = Line { start_s: 1e-6 * ranks, s_per_byte: 3.0 * s_per_byte };
        Self {
            inside,
            across: if is_one_node { inside } else { across },
            nodes: None,
            gamma_s_per_byte: 1.0 / 20e9,
            // Each rank has one.
            cores: ranks,
            group: (is_one_node && shares).then_some([one_shot, two_shot]),
            has_groups: shares,
        }
    }

    /// The selector that follows from the figures.
    fn choice(
        &self,
        topology: Topology,
        engine: &mut Engine,
        tuning: Tuning,
        fixed: Option<usize>,
    ) -> AlgorithmSelector {
        let world = topology.world();
        let largest_node = (0..topology.node_count())
            .map(|node| topology.members(node as u32).len())
            .max()
            .unwrap_or(1);
        let ranks_per_core = largest_node as f64 / self.cores;
        let node =
            engine.group().filter(|group| group.members().len() == world).and_then(|group| {
                let [one_shot, two_shot] = self.group?;
                // A two-shot waits for all ranks twice. If a wait is mostly the time in which other
                // ranks have the cores, its measurement may not show that.
                let two_shot = two_shot.starting_from(1.5 * one_shot.start_s);
                Some(NodeCost { one_shot, two_shot, slot_bytes: group.slot_bytes() })
            });
        // Most of a short message's time is the processors' at its two ends. A wait that gives the
        // core to another rank costs as much as two, where it is for a rank of this node (measured
        // over TCP, 4 to 16 ranks on 2 cores).
        let slowest_alpha_s = self.inside.alpha_s.max(self.across.alpha_s);
        let wait_s =
            if self.has_groups { slowest_alpha_s / 2.0 } else { 2.0 * self.inside.alpha_s };
        let mut inside = self.inside;
        if ranks_per_core > 1.0 {
            // Two ranks alone measured this; all together they drive each other's data out of the
            // caches (measured likewise).
            inside.beta_s_per_byte =
                inside.beta_s_per_byte.max(1.3 * inside.beta_cached_s_per_byte);
        }
        let model = CostModel {
            inside,
            // Between hosts the wire is the limit, whatever the caches hold; short messages may
            // only seem faster where the network lets bursts pass.
            across: LinkCost::new(self.across.alpha_s, self.across.beta_s_per_byte),
            // What is reduced lands in a slot before: one more pass over it.
            gamma_s_per_byte: self.gamma_s_per_byte + self.inside.beta_cached_s_per_byte / 2.0,
            message_s: slowest_alpha_s / 3.0,
            wait_s,
            ranks_per_core,
            slice_elements: tuning.slice_bytes / 4,
            window: tuning.window,
            group_steps: self.has_groups,
            ..CostModel::default()
        };
        let slowest = self.nodes.map_or(model.across, |nodes| nodes.slowest.cost);
        AlgorithmSelector::new(topology, model, slowest, node, fixed)
    }

    /// Costs that were not measured are not shown: one kind may only stand for the other.
    pub(super) fn described(&self) -> Vec<MeasuredCost> {
        let mut all = Vec::new();
        let mut tell = |what: &str, rates, source: String| {
            all.push(MeasuredCost { what: what.to_owned(), rates, source });
        };
        if self.nodes.is_none() || self.inside != self.across {
            tell("inside a node", Rates::of_link(&self.inside), "measured by rank 0".into());
        }
        if let Some(Across { slowest, links, .. }) = self.nodes {
            let median = format!("median of {links} links");
            tell("across nodes", Rates::of_link(&self.across), median);
            if links > 1 {
                let [from, to] = slowest.pair;
                let pair = format!("ranks {from} and {to}");
                tell("slowest of them", Rates::of_link(&slowest.cost), pair);
            }
        }
        for (name, line) in ["one-shot", "two-shot"].iter().zip(self.group.iter().flatten()) {
            let rates = Rates::new(line.start_s, line.s_per_byte);
            tell(name, rates, "measured by all ranks".into());
        }
        tell("reducing", Rates::new(0.0, self.gamma_s_per_byte), "a core".into());
        all
    }

    /// Warns if one link between nodes is much slower than most.
    fn warn(&self) {
        let Some(nodes) = self.nodes else { return };
        if let Some(times) = nodes.outlier() {
            let [from, to] = nodes.slowest.pair;
            unisum_link::warning!(
                "the link between ranks {from} and {to} takes {times:.1} times as long for 1 MiB \
                 as the fastest third of {} links between nodes: {}, not {}",
                nodes.links,
                Rates::of_link(&nodes.slowest.cost),
                Rates::of_link(&nodes.fast.cost),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_kinds_hang_on_the_shape_alone() {
        let told = |core: u8, group: u8, transport: &'static [u8]| {
            [&[core, 0, 0, 0, group, 0], transport].concat()
        };
        let of = |nodes: &[usize], blobs: &[Vec<u8>]| {
            let told: Vec<Told<'_>> = blobs.iter().map(|blob| Told::new(blob)).collect();
            Costs::of_kinds(&Topology::nodes(nodes), &told)
        };
        let shared = of(&[2], &[told(0, 1, b"shm"), told(1, 1, b"shm")]);
        assert_eq!(shared, of(&[2], &[told(7, 1, b"shm"), told(7, 1, b"shm")]), "any cores");
        assert!(shared.group.is_some() && shared.inside == shared.across);
        let apart =
            of(&[2, 1], &[told(0, 1, b"shm+tcp"), told(0, 1, b"shm+tcp"), told(0, 0, b"tcp")]);
        assert!(apart.group.is_none() && apart.has_groups && apart.across.alpha_s > 10e-6);
        let rdma = of(&[1, 1], &[told(0, 0, b"verbs"), told(0, 0, b"verbs")]);
        assert!(rdma.across.alpha_s < 10e-6 && !rdma.has_groups);
    }

    #[test]
    fn one_kind_of_link_stands_for_the_other() {
        let cost = LinkCost::new(1e-6, 1e-9);
        let figures = Figures { gamma_s_per_byte: 1e-11, cores: 4.0, group: None };
        let measured = [Measured { pair: [0, 1], cost }];
        for nodes in [&[2][..], &[1, 1]] {
            let blobs = [encode(&measured, Some(figures)), encode(&[], None)];
            let costs = combine(&Topology::nodes(nodes), &blobs).unwrap();
            assert_eq!((costs.inside, costs.across, costs.group), (cost, cost, None));
            let told = costs.described();
            let is_told = ["inside a node", "across nodes"]
                .map(|kind| told.iter().any(|cost| cost.what == kind));
            assert_eq!(is_told, [nodes.len() == 1, nodes.len() > 1], "{told:?}");
        }
    }

    #[test]
    fn whose_costs_make_no_sense_is_named() {
        let topology = Topology::nodes(&[1, 1]);
        let figures = Figures { gamma_s_per_byte: 1e-11, cores: 4.0, group: None };
        let cost = LinkCost::new(1e-6, 1e-9);
        let good = encode(&[Measured { pair: [0, 1], cost }], Some(figures));
        let none = encode(&[], None);
        assert_eq!(combine(&topology, &[encode(&[], Some(figures)), none.clone()]), Err(0));
        assert_eq!(combine(&topology, &[vec![0; 56], none.clone()]), Err(0));
        assert_eq!(combine(&topology, &[good.clone(), vec![1]]), Err(1));
        // A link to oneself, and one of no speed.
        let itself = encode(&[Measured { pair: [1, 1], cost }], None);
        assert_eq!(combine(&topology, &[good, itself]), Err(1));
        let still = Measured { pair: [0, 1], cost: LinkCost::new(0.0, 1e-9) };
        assert_eq!(combine(&topology, &[encode(&[still], Some(figures)), none]), Err(0));
    }
}
