//! What the links cost: measured between few ranks, then agreed by all.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use rustix::thread::sched_getcpu;
use unisum_algorithms::{Algorithm, CostModel, LinkCost, Topology, all};
use unisum_link::kernels::{Fold, Folded};
use unisum_link::{Call, Dtype, LinkError, Rank, ReduceOp, Regions};

use super::calibrate::{self, Limit};
use super::{Job, rendezvous_error};
use crate::choice::{Choice, Line, NodeCost};
use crate::engine::Engine;
use crate::engine::program::Tuning;
use crate::membership::Membership;
use crate::programs::{Key, Programs};
use crate::{Error, ErrorKind};

/// The figures that all ranks share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// Between ranks of a node; without such, as `across`.
    pub(super) inside: LinkCost,
    /// Between ranks of different nodes; without such, as `inside`.
    pub(super) across: LinkCost,
    pub(super) gamma_s_per_byte: f64,
    pub(super) cores: f64,
    /// All-reduces of the group that is the whole world: one-shot and two-shot.
    group: Option<[Line; 2]>,
    /// Whether any ranks take group steps; also on a rank that shares memory with nobody.
    has_groups: bool,
}

/// Whose costs are measured.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) rank: Rank,
    /// The ranks that share memory with this one, itself included.
    pub(super) members: &'a [Rank],
    pub(super) job: &'a Job,
    pub(super) topology: &'a Topology,
    pub(super) tuning: Tuning,
    pub(super) limit: Limit<'a>,
}

/// Measures: rank 0 with a rank of its node and with one of another, and all ranks together where
/// they share memory. Then rank 0's figures become everybody's.
pub(super) fn agree(engine: &mut Engine, site: Site<'_>) -> Result<Costs, Error> {
    let Site { rank, members, topology, .. } = site;
    let control = site.limit.membership.control();
    let told = control.exchange(tell(engine)).map_err(rendezvous_error)?;
    let has_groups = told.iter().any(|told| told.last() == Some(&1));
    let mut measured = [None; 2];
    for (kind, partner) in partners(topology, &told).into_iter().enumerate() {
        let Some(partner) = partner else { continue };
        let peer = if rank == 0 { partner } else { 0 };
        if rank == 0 || rank == partner {
            measured[kind] = Some(measure(engine, peer, site)?);
        }
    }
    let group = measure_group(engine, site)?;
    let (_, cores) = site.job.ranks_and_cores(members);
    let told = if rank == 0 { encode(cores, &measured, group) } else { Vec::new() };
    let blobs = control.exchange(told).map_err(rendezvous_error)?;
    let costs = decode(&blobs[0]).map(|costs| Costs { has_groups, ..costs });
    costs.ok_or_else(|| {
        let text = "rank 0 told no costs that this version understands";
        Error::new(ErrorKind::Rendezvous, text).on(rank).caused_by(vec![0])
    })
}

fn measure(engine: &mut Engine, peer: Rank, site: Site<'_>) -> Result<LinkCost, Error> {
    let Site { rank, job, limit, .. } = site;
    calibrate::measure(engine.link_to(peer), peer, rank == 0, &job.arena, limit)
        .map_err(|error| measuring_failed(error, limit.membership))
}

/// Where all ranks share memory: what its one-shot and its two-shot take, each at two sizes.
fn measure_group(engine: &mut Engine, site: Site<'_>) -> Result<Option<[Line; 2]>, Error> {
    let Some(slot_bytes) = engine.group().map(|group| group.slot_bytes()) else {
        return Ok(None);
    };
    if site.members.len() < site.topology.world() {
        return Ok(None);
    }
    let one_shot = measure_collectives(engine, site, "one-shot", [8, slot_bytes / 2])?;
    let two_shot = measure_collectives(engine, site, "two-shot", [4 << 10, 256 << 10])?;
    Ok(Some([one_shot, two_shot]))
}

fn measure_collectives(
    engine: &mut Engine,
    site: Site<'_>,
    algorithm: &str,
    sizes: [usize; 2],
) -> Result<Line, Error> {
    let failed = |text: String| Error::new(ErrorKind::Rendezvous, text).on(site.rank);
    let memory = site.job.arena.allocate(sizes[1]).map_err(failed)?;
    let named = |known: &&dyn Algorithm| known.name() == algorithm;
    let algorithm = all().iter().position(named).expect("the names are the algorithms'");
    let programs = Programs::new(site.rank, site.tuning);
    let mut points = [(0, 0.0); 2];
    for (point, bytes) in points.iter_mut().zip(sizes) {
        let count = bytes / size_of::<f32>();
        let key = Key::all_reduce(count, size_of::<f32>());
        let call = Call {
            algorithm: algorithm as u16,
            ..Call::all_reduce(u64::MAX, Dtype::F32, count as u64)
        };
        let program = programs.build_by(algorithm, &key, site.topology, engine);
        // SAFETY: `memory` outlives the measurement, and nothing else touches it; on an error the
        // links drop the region before `memory` is freed.
        let region = unsafe { site.job.arena.region_at(memory.start(), bytes) };
        let regions = Regions::in_place(region);
        let seconds = calibrate::collective_s(engine, call, regions, &program, site.limit);
        if seconds.is_err() {
            engine.abort();
        }
        let failed = |error| measuring_failed(error, site.limit.membership);
        *point = (bytes, seconds.map_err(failed)?);
    }
    Ok(Line::through(points[0], points[1]))
}

/// Ends the job on all ranks: the others wait for this one.
fn measuring_failed(error: LinkError, membership: &Membership) -> Error {
    let judged = membership.judge(error);
    let text = format!("measuring the links: {judged}");
    Error::new(ErrorKind::Rendezvous, text).caused_by(judged.culprits().to_vec())
}

/// Which core a rank is on, and whether it has a group.
fn tell(engine: &mut Engine) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32_le(sched_getcpu() as u32);
    bytes.put_u8(u8::from(engine.group().is_some()));
    bytes
}

/// Whom rank 0 measures links with, by what all ranks told: one of its node, on another core than
/// its own if there is one, as what two ranks of a core take is its switches' time; and one of
/// another node.
fn partners(topology: &Topology, told: &[impl AsRef<[u8]>]) -> [Option<Rank>; 2] {
    let core = |rank: Rank| told[rank].as_ref().first_chunk::<4>();
    let is_inside = |&peer: &Rank| topology.node_of(peer) == topology.node_of(0);
    let (inside, across): (Vec<Rank>, Vec<Rank>) = (1..topology.world()).partition(is_inside);
    let elsewhere = inside.iter().find(|&&peer| core(peer) != core(0));
    [elsewhere.or_else(|| inside.first()).copied(), across.first().copied()]
}

fn encode(cores: usize, measured: &[Option<LinkCost>; 2], group: Option<[Line; 2]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let [inside, across] = measured;
    let (Some(inside), Some(across)) = (inside.or(*across), across.or(*inside)) else {
        return bytes;
    };
    for value in [
        inside.alpha_s,
        inside.beta_s_per_byte,
        inside.beta_cached_s_per_byte,
        across.alpha_s,
        across.beta_s_per_byte,
        across.beta_cached_s_per_byte,
        gamma_s_per_byte(),
        cores as f64,
    ] {
        bytes.put_f64_le(value);
    }
    for line in group.iter().flatten() {
        bytes.put_f64_le(line.start_s);
        bytes.put_f64_le(line.s_per_byte);
    }
    bytes
}

pub(super) fn decode(mut bytes: &[u8]) -> Option<Costs> {
    let is_figure = |value: &f64| *value > 0.0 && value.is_finite();
    let mut next = || bytes.try_get_f64_le().ok().filter(is_figure);
    let mut link = || {
        let (alpha_s, beta_s_per_byte, beta_cached_s_per_byte) = (next()?, next()?, next()?);
        Some(LinkCost { alpha_s, beta_s_per_byte, beta_cached_s_per_byte })
    };
    let (inside, across) = (link()?, link()?);
    let (gamma_s_per_byte, cores) = (next()?, next()?);
    let mut line = || Some(Line { start_s: next()?, s_per_byte: next()? });
    let group = line().and_then(|one_shot| Some([one_shot, line()?]));
    Some(Costs { inside, across, gamma_s_per_byte, cores, group, has_groups: false })
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
    /// The choice that follows from the figures.
    pub(super) fn choice(
        &self,
        topology: Topology,
        engine: &mut Engine,
        tuning: Tuning,
        fixed: Option<usize>,
    ) -> Choice {
        let world = topology.world();
        let largest_node = (0..topology.node_count())
            .map(|node| topology.members(node as u32).len())
            .max()
            .unwrap_or(1);
        let ranks_per_core = largest_node as f64 / self.cores;
        let node =
            engine.group().filter(|group| group.members().len() == world).and_then(|group| {
                let [one_shot, two_shot] = self.group?;
                // A two-shot waits for all twice. Where a wait is mostly the time that other ranks
                // have the cores for, its measurement may not show that.
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
        Choice::new(topology, model, node, fixed)
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, profile) in [("inside a node", &self.inside), ("across nodes", &self.across)] {
            let LinkCost { alpha_s, beta_s_per_byte, beta_cached_s_per_byte } = profile;
            let (micros, rate) = (alpha_s * 1e6, 1e-9 / beta_s_per_byte);
            let cached = 1e-9 / beta_cached_s_per_byte;
            writeln!(
                f,
                "{name}: {micros:.1} us + bytes at {rate:.2} GB/s, {cached:.2} in cache \
                 (measured by rank 0)"
            )?;
        }
        for (name, line) in ["one-shot", "two-shot"].iter().zip(self.group.iter().flatten()) {
            let (micros, rate) = (line.start_s * 1e6, 1e-9 / line.s_per_byte);
            writeln!(f, "{name} of all ranks: {micros:.1} us + bytes at {rate:.2} GB/s")?;
        }
        writeln!(f, "reducing: {:.1} GB/s a core", 1e-9 / self.gamma_s_per_byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_measured_with_a_rank_of_another_core_and_with_one_of_another_node() {
        let found = |nodes: &[usize], cores: &[u32]| {
            let told: Vec<_> = cores.iter().map(|core| core.to_le_bytes()).collect();
            partners(&Topology::nodes(nodes), &told)
        };
        assert_eq!(found(&[3], &[5, 5, 6]), [Some(2), None]);
        assert_eq!(found(&[3], &[5, 5, 5]), [Some(1), None], "all on one core");
        assert_eq!(found(&[2, 2], &[5, 5, 6, 5]), [Some(1), Some(2)]);
        assert_eq!(found(&[1, 2], &[5, 5, 5]), [None, Some(1)]);
        assert_eq!(found(&[1], &[5]), [None, None]);
    }

    #[test]
    fn one_kind_of_link_stands_for_the_other() {
        let profile = LinkCost::new(1e-6, 1e-9);
        let costs = decode(&encode(4, &[None, Some(profile)], None)).unwrap();
        assert_eq!((costs.inside, costs.across, costs.group), (profile, profile, None));
        assert_eq!(decode(&encode(4, &[None, None], None)), None);
        assert_eq!(decode(&[0; 56]), None);
    }
}
