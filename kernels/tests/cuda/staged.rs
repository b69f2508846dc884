//! All-reduces in one launch by each rank.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use unisum_kernels::cuda::{RANKS_MAX, StagedTask, staged_kernel};
use unisum_kernels::{Dtype, Fold, Folded, ReduceOp};

use super::device::{Grid, Host};
use super::folds::flags_of;
use crate::harness::{Misaligned, folds};
use crate::inputs;

const BLOCKS: usize = 3;
const STAGING: usize = 4096;

#[repr(align(16))]
struct Staging([AtomicU64; STAGING / 8]);

/// What the ranks share: of each rank, two staging memories, and the flags of all others.
struct World {
    staging: Vec<[Box<Staging>; 2]>,
    flags: Vec<Vec<[AtomicU64; BLOCKS]>>,
    abort: AtomicU32,
    stopped: Vec<AtomicU32>,
}

impl World {
    fn new(ranks: usize) -> Self {
        let staging = || {
            [(); 2].map(|()| Box::new(Staging([const { AtomicU64::new(u64::MAX) }; STAGING / 8])))
        };
        let flags = || (0..ranks).map(|_| [const { AtomicU64::new(0) }; BLOCKS]).collect();
        Self {
            staging: (0..ranks).map(|_| staging()).collect(),
            flags: (0..ranks).map(|_| flags()).collect(),
            abort: AtomicU32::new(0),
            stopped: (0..ranks).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// A task without its operation and buffers.
    fn task(&self, rank: usize, call: u64) -> StagedTask {
        let of_ranks = |address: &dyn Fn(usize) -> u64| {
            let mut all = [0; RANKS_MAX];
            (0..self.staging.len()).for_each(|rank| all[rank] = address(rank));
            all
        };
        let flags = |at: usize, of: usize| self.flags[at][of].as_ptr() as u64;
        StagedTask {
            to: 0,
            from: 0,
            staging: of_ranks(&|it| self.staging[it][call as usize % 2].0[0].as_ptr() as u64),
            theirs: of_ranks(&|it| flags(it, rank)),
            mine: of_ranks(&|it| flags(rank, it)),
            count: 0,
            call,
            divisor: f64::NAN,
            factor: f64::NAN,
            nonfinite: 0,
            abort: self.abort.as_ptr() as u64,
            stopped: self.stopped[rank].as_ptr() as u64,
            flags: 0,
            rank: rank as u32,
            ranks: self.staging.len() as u32,
        }
    }
}

/// One call: all ranks' elements as bytes, the operation and the shape.
struct Call {
    fold: Fold,
    inputs: Vec<Vec<u8>>,
    grid: Grid,
    in_place: bool,
    /// By how many elements this rank's memory is behind a multiple of 16 bytes.
    offset: usize,
}

impl Call {
    fn count(&self) -> usize {
        self.inputs[0].len() / self.fold.dtype.bytes()
    }

    /// What the host makes of it, and whether a result is not finite.
    fn expected(&self) -> (Vec<u8>, bool) {
        let mut result = Misaligned::new(&self.inputs[0], 0);
        let inputs = self.inputs.iter().map(|input| Misaligned::new(input, 0));
        let mut inputs: Vec<Misaligned> = inputs.collect();
        let sources: Vec<_> = inputs.iter_mut().map(|it| it.pointer().cast_const()).collect();
        // SAFETY: all have as many elements, and the result is apart.
        let folded = unsafe { self.fold.run(result.pointer(), &sources, self.count()) };
        (result.values(), folded == Folded::Nonfinite)
    }

    /// A rank's part.
    fn run(&self, device: &Host, world: &World, rank: usize, call: u64) -> (Vec<u8>, bool) {
        let Fold { op, dtype, divide_by, factor, watch, .. } = self.fold;
        let place = || Misaligned::new(&self.inputs[rank], self.offset * dtype.bytes());
        let (mut from, mut to) = (place(), place());
        let mut nonfinite = 0_u32;
        let mut task = world.task(rank, call);
        task.from = from.pointer() as u64;
        task.to = if self.in_place { task.from } else { to.pointer() as u64 };
        task.count = self.count() as u64;
        task.divisor = divide_by.map_or(f64::NAN, |by| by.get().into());
        task.factor = factor.unwrap_or(f64::NAN);
        task.nonfinite = if watch { (&raw mut nonfinite) as u64 } else { 0 };
        task.flags = flags_of(&self.fold);
        let kernel = staged_kernel(op, dtype).unwrap();
        // SAFETY: all memories are as large as the task says, and the world outlives it.
        unsafe { device.launch(&kernel.name, self.grid, &task) };
        let result = if self.in_place { from } else { to };
        (result.values(), nonfinite == 1)
    }
}

/// Runs the calls one after the other on every rank, as fast as each can.
fn run_all(device: &Host, ranks: usize, calls: &[Call]) {
    let world = World::new(ranks);
    let world = &world;
    let rank = |rank: usize| {
        let numbered = calls.iter().zip(1..);
        numbered.map(|(call, number)| call.run(device, world, rank, number)).collect::<Vec<_>>()
    };
    let results: Vec<_> = thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|it| scope.spawn(move || rank(it))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (i, call) in calls.iter().enumerate() {
        let expected = call.expected();
        for (rank, results) in results.iter().enumerate() {
            let what = format!("rank {rank} of {ranks}, call {i}, {:?}", call.fold);
            assert!(results[i] == expected, "{what}: {:x?}, not {expected:x?}", results[i]);
        }
    }
}

#[test]
fn all_ranks_get_the_bits_of_the_host_in_one_launch() {
    let Some(device) = Host::get() else { return };
    for (dtype, ranks) in Dtype::ALL.into_iter().flat_map(|it| [1, 2, 3, 5].map(|n| (it, n))) {
        let folds = folds(dtype).filter(|it| staged_kernel(it.op, it.dtype).is_some());
        let call = |(i, fold)| Call {
            fold,
            inputs: inputs(dtype, ranks, [1, 2, 3, 4, 7, 8, 9, 31, 64, 100, 257][(i + ranks) % 11]),
            grid: [Grid(1, 1), Grid(1, 3), Grid(BLOCKS as u32, 2)][i % 3],
            in_place: i % 2 == 0,
            offset: [0, 1, 0, 3][i % 4] % (16 / dtype.bytes()),
        };
        let calls: Vec<_> = folds.enumerate().map(call).collect();
        run_all(device, ranks, &calls);
    }
}

/// Nothing but the kernels orders the ranks: a rank that is ahead must not overwrite what others
/// still read.
#[test]
fn launches_may_follow_one_another() {
    let Some(device) = Host::get() else { return };
    let divide_by = NonZeroU32::new(3);
    let call = |i: usize| Call {
        fold: Fold { divide_by, ..Fold::new(Dtype::F32, ReduceOp::Average) },
        inputs: inputs(Dtype::F32, 4, 1000 - i % 9),
        grid: if i.is_multiple_of(3) { Grid(BLOCKS as u32, 2) } else { Grid(1, 2) },
        in_place: true,
        offset: 0,
    };
    run_all(device, 4, &(0..200).map(call).collect::<Vec<_>>());
}

#[test]
fn an_abort_ends_a_launch_without_its_peers_and_nothing_is_signalled_afterwards() {
    let Some(device) = Host::get() else { return };
    let world = World::new(3);
    let call = Call {
        fold: Fold::new(Dtype::I64, ReduceOp::Sum),
        inputs: vec![vec![1; 80]; 3],
        grid: Grid(2, 2),
        in_place: false,
        offset: 0,
    };
    let seen = |at: usize, of: usize| {
        // No thread is left.
        world.flags[at][of].each_ref().map(|flag| flag.load(Ordering::Relaxed))
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = [0, 2]
            .map(|rank| {
                scope.spawn({
                    let (call, world) = (&call, &world);
                    move || call.run(device, world, rank, 1)
                })
            })
            .into();
        thread::sleep(Duration::from_millis(20));
        assert!(ranks.iter().all(|rank| !rank.is_finished()), "rank 1 is missing");
        world.abort.store(1, Ordering::Relaxed); // It orders nothing.
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), (vec![1; 80], false), "nothing was written");
        }
    });
    let stopped = world.stopped.iter().map(|word| word.load(Ordering::Relaxed)); // As above.
    assert_eq!(stopped.collect::<Vec<_>>(), [1, 0, 1]);
    // Blocks after the one that ended early signal nothing, nor do later launches.
    assert_eq!([seen(1, 0), seen(1, 2)], [[1, 0, 0]; 2]);
    call.run(device, &world, 0, 2);
    assert_eq!(seen(1, 0), [1, 0, 0]);
}
