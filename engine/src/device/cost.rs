//! What a collective on device memory takes, reckoned from its queues.

use std::collections::HashSet;

use unisum_algorithms::{Algorithm, Rank, algorithms};

use super::layout::{Member, Work};
use super::ordering::Notes;
use super::{DeviceSource, Kind, Schedule};

/// The figures from which times are reckoned. They are taken from data sheets, not measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceFigures {
    /// From the end of one operation of a queue to the beginning of the next, in seconds: about
    /// what a launch costs the host, which enqueues them one after the other.
    pub launch_s: f64,
    /// From setting a flag to the peer's seeing it, in seconds.
    pub flag_s: f64,
    /// What a device reads from its peers, and what its peers read from it, in bytes per second.
    pub link_bytes_per_s: f64,
    /// What a device reads from and writes to its own memory, in bytes per second.
    pub memory_bytes_per_s: f64,
}

impl DeviceFigures {
    // Sources: NVIDIA's data sheets of the H100 SXM (NVLink 900 GB/s in both directions together,
    // HBM3 3.35 TB/s), H100 PCIe (PCIe 5.0 x16 128 GB/s, HBM2e 2.0 TB/s), A100 SXM 80 GB (NVLink
    // 600 GB/s, HBM2e 2.0 TB/s) and A100 PCIe 40 GB (PCIe 4.0 x16 64 GB/s, HBM2 1.55 TB/s). A link
    // is taken to carry four fifths of what it has in one direction, as packets have headers. The
    // launch and the flags are assumptions. For comparison: vLLM's one-shot all-reduce, fused into
    // a single launch, takes 9 µs for 1 MB on two H100 (vLLM issue 24111); with a launch for each
    // of the five operations, 15 µs are reckoned here.

    /// H100 with NVLink 4 through switches.
    pub const NVLINK4: Self = Self::new(1e-6, 0.8 * 450e9, 3.35e12);
    /// A100 with NVLink 3 through switches.
    pub const NVLINK3: Self = Self::new(1e-6, 0.8 * 300e9, 2.0e12);
    /// H100 with PCIe 5.0 x16 through a switch.
    pub const PCIE5: Self = Self::new(2e-6, 0.8 * 64e9, 2.0e12);
    /// A100 with PCIe 4.0 x16 through a switch.
    pub const PCIE4: Self = Self::new(2e-6, 0.8 * 32e9, 1.55e12);

    const fn new(flag_s: f64, link_bytes_per_s: f64, memory_bytes_per_s: f64) -> Self {
        Self { launch_s: 2e-6, flag_s, link_bytes_per_s, memory_bytes_per_s }
    }
}

/// An algorithm, how its transfers are cut, and the time reckoned for it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The algorithm.
    pub algorithm: &'static dyn Algorithm,
    /// For [`DeviceSource::slice_bytes`].
    pub slice_bytes: usize,
    /// The time.
    pub seconds: f64,
}

/// The algorithms that can execute the collective of `source`, the fastest first, by the given
/// figures; of equally fast ones, those that fold in rank order come first. The answer is the same
/// on all ranks that pass the same. Which algorithm `source` names and how it cuts
/// transfers does not matter.
///
/// `most_sources` limits the operands of a fold; algorithms with more of them are left out.
///
/// Cost: compiles every algorithm twice; keep the answer.
///
/// # Panics
/// As [`DeviceProgram::build`](super::DeviceProgram::build).
pub fn candidates(
    source: &DeviceSource<'_>,
    figures: &DeviceFigures,
    most_sources: usize,
) -> Vec<Candidate> {
    let shape = &source.shapes[0];
    let bytes = shape.elements() * source.element_bytes;
    // Few and large: each slice of a transfer costs three launches or so.
    let slice = (bytes / 32).max(SLICE_BYTES_MIN);
    let slices = if slice < bytes { &[usize::MAX, slice][..] } else { &[usize::MAX] };
    let fits = |algorithm: &&&'static dyn Algorithm| {
        source.shapes.iter().all(|shape| algorithm.supports(shape))
    };
    let mut candidates = Vec::new();
    for algorithm in algorithms(shape.collective).iter().filter(fits) {
        for &slice_bytes in slices {
            let schedule =
                Schedule::new(&DeviceSource { algorithm: *algorithm, slice_bytes, ..*source });
            if schedule.most_sources() <= most_sources {
                let seconds = Clocks::new(&schedule, figures).run();
                candidates.push(Candidate { algorithm: *algorithm, slice_bytes, seconds });
            }
        }
    }
    let by_time = |a: &Candidate, b: &Candidate| {
        let order = |it: &Candidate| !it.algorithm.in_rank_order();
        a.seconds.total_cmp(&b.seconds).then(order(a).cmp(&order(b)))
    };
    candidates.sort_by(by_time);
    let mut names = HashSet::new();
    candidates.retain(|it| names.insert(it.algorithm.name()));
    candidates
}

/// Slices are not made smaller than this.
const SLICE_BYTES_MIN: usize = 1 << 20;

/// The time in seconds from a common beginning until all ranks' queues have ended.
///
/// # Panics
/// As [`DeviceProgram::build`](super::DeviceProgram::build).
pub fn seconds(source: &DeviceSource<'_>, figures: &DeviceFigures) -> f64 {
    Clocks::new(&Schedule::new(source), figures).run()
}

/// Follows all queues through time.
///
/// An operation takes as long as the busiest of three: what comes in over the rank's own link,
/// what each peer's link sends out, to one reader after the other, and the rank's own memory.
struct Clocks<'a> {
    schedule: &'a Schedule,
    figures: &'a DeviceFigures,
    /// When each node of each rank and its signals have ended.
    ends: Vec<Vec<f64>>,
    /// When each rank's link has sent what was read before.
    sent: Vec<f64>,
}

impl<'a> Clocks<'a> {
    fn new(schedule: &'a Schedule, figures: &'a DeviceFigures) -> Self {
        let world = schedule.layout.members.len();
        Self { schedule, figures, ends: vec![Vec::new(); world], sent: vec![0.0; world] }
    }

    fn run(mut self) -> f64 {
        let world = self.ends.len();
        while let Some((start, rank)) = (0..world)
            .filter_map(|rank| Some((self.start(rank)?, rank)))
            .min_by(|a, b| a.0.total_cmp(&b.0))
        {
            let end = self.node(rank, start);
            self.ends[rank].push(end);
        }
        self.ends.iter().filter_map(|ends| ends.last()).copied().fold(0.0, f64::max)
    }

    fn next(&self, rank: Rank) -> Option<&'a Notes> {
        self.schedule.ordering.notes[rank].get(self.ends[rank].len())
    }

    /// When the next node of a rank begins, if all that it waits for has ended.
    fn start(&self, rank: Rank) -> Option<f64> {
        let notes = self.next(rank)?;
        let mut start = self.ends[rank].last().copied().unwrap_or(0.0);
        if !notes.waits.is_empty() {
            start += self.figures.launch_s;
        }
        for (note, &node) in notes.waits.iter().zip(&notes.awaited) {
            start = start.max(self.ends[note.peer].get(node)? + self.figures.flag_s);
        }
        Some(start)
    }

    /// When the next node of a rank ends, with its signals.
    fn node(&mut self, rank: Rank, start: f64) -> f64 {
        let member: &Member = &self.schedule.layout.members[rank];
        let work = member.nodes.get(self.ends[rank].len()).map_or(&[][..], |node| &node.work);
        let (folds, copies): (Vec<&Work>, Vec<&Work>) =
            work.iter().partition(|work| matches!(work.kind, Kind::Fold | Kind::Scale));
        let mut at = start;
        for fold in folds {
            at = self.operation(rank, at, &[fold]);
        }
        if !copies.is_empty() {
            at = self.operation(rank, at, &copies);
        }
        let signals = self.next(rank).is_some_and(|notes| !notes.signals.is_empty());
        at + if signals { self.figures.launch_s } else { 0.0 }
    }

    fn operation(&mut self, rank: Rank, at: f64, work: &[&Work]) -> f64 {
        let start = at + self.figures.launch_s;
        let (mut end, mut received, mut touched) = (start, 0, 0);
        for work in work {
            touched += work.bytes;
            for source in &work.sources {
                if source.rank == rank {
                    touched += work.bytes;
                    continue;
                }
                received += work.bytes;
                let sent = &mut self.sent[source.rank];
                *sent = sent.max(start) + work.bytes as f64 / self.figures.link_bytes_per_s;
                end = end.max(*sent);
            }
        }
        let receiving = received as f64 / self.figures.link_bytes_per_s;
        end.max(start + receiving).max(start + touched as f64 / self.figures.memory_bytes_per_s)
    }
}
