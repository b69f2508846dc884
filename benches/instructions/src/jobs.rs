//! The jobs: each prepares its work unobserved and then repeats it in [`measured`].

use std::fmt;
use std::hint::black_box;
use std::str::FromStr;

use unisum_algorithms::{
    Algorithm, CostModel, PlanKind, Shape, Topology, all, by_name, cost, prove, slice,
};
use unisum_kernels::{Dtype, ReduceOp};
use unisum_kernels::{Fold, Folded, Isa, isa};

use crate::Result;
use crate::allocator::allocations;
use crate::worlds::{Memory, Transport, World};
use unisum_engine::{Program, Source, Tuning};

/// Does a job's work once.
type Work = Box<dyn FnMut()>;

/// Something to count.
pub(crate) struct Job {
    pub(crate) name: String,
    repetitions: u64,
    prepare: Box<dyn FnOnce() -> Result<Work>>,
}

/// What a job says about itself when it has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) repetitions: u64,
    /// In all repetitions.
    pub(crate) allocations: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} repetitions, {} allocations", self.repetitions, self.allocations)
    }
}

impl FromStr for Outcome {
    type Err = Box<dyn std::error::Error>;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.trim().strip_suffix(" allocations");
        let numbers = numbers.and_then(|numbers| numbers.split_once(" repetitions, "));
        let (repetitions, allocations) = numbers.ok_or("a job said nothing of itself")?;
        Ok(Self { repetitions: repetitions.parse()?, allocations: allocations.parse()? })
    }
}

/// All jobs, in the order of the report.
pub(crate) fn jobs() -> Vec<Job> {
    let plans = all().iter().flat_map(|algorithm| plan_jobs(*algorithm));
    let folds =
        FOLDS.iter().map(|&(level, dtype, op, sources)| fold_job(level, dtype, op, sources));
    let reductions = REDUCTIONS.iter().map(all_reduce_job);
    plans.chain(folds).chain(reductions).collect()
}

/// Runs the job of that name. Only what [`measured`] does is to be counted.
pub(crate) fn run(name: &str) -> Result<Outcome> {
    let job = jobs().into_iter().find(|job| job.name == name);
    let job = job.ok_or_else(|| format!("there is no job {name:?}"))?;
    let mut work = (job.prepare)()?;
    // What happens once: growing buffers, finding out what the processor can.
    (0..WARM_UP).for_each(|_| work());
    let before = allocations();
    measured(&mut work, job.repetitions);
    Ok(Outcome { repetitions: job.repetitions, allocations: allocations() - before })
}

/// Callgrind counts while this function runs, and finds it by its name.
#[inline(never)]
fn measured(work: &mut dyn FnMut(), repetitions: u64) {
    for _ in 0..repetitions {
        work();
    }
}

const WARM_UP: u64 = 8;

fn plan_jobs(algorithm: &'static dyn Algorithm) -> impl Iterator<Item = Job> {
    let job = |what: &str, repetitions, work: fn(&dyn Algorithm)| Job {
        name: format!("{what} {}", algorithm.name()),
        repetitions,
        prepare: Box::new(move || Ok(Box::new(move || work(algorithm)) as Work)),
    };
    [
        job("plan", 8, plan),
        job("compile", 8, compile),
        job("prove", 1, |algorithm| {
            let shape = Shape::all_reduce(Topology::nodes(&[3, 4]), 1000);
            prove(algorithm, black_box(&shape)).expect("the algorithms are right");
        }),
        job("cost", 1, |algorithm| {
            let seconds = cost(algorithm, &sixteen(1 << 20), black_box(&CostModel::default()));
            black_box(seconds).expect("the algorithms are right");
        }),
    ]
    .into_iter()
}

/// Two nodes of eight ranks.
fn sixteen(count: usize) -> Shape {
    Shape::all_reduce(Topology::nodes(&[8, 8]), count)
}

/// The steps of all ranks, sliced.
fn plan(algorithm: &dyn Algorithm) {
    let shape = sixteen(black_box(1 << 20));
    for rank in 0..shape.world() {
        black_box(slice(algorithm.steps(&shape, rank), 64 << 10));
    }
}

/// The program of one rank, with its hazards.
fn compile(algorithm: &dyn Algorithm) {
    black_box(Program::build(&Source {
        algorithm,
        shape: &sixteen(black_box(1 << 20)),
        rank: 5,
        element_bytes: 4,
        average: false,
        scales: false,
        in_place: true,
        tuning: Tuning { slice_bytes: 256 << 10, window: 4 },
        group: None,
    }));
}

/// Instruction set, type, operation, sources. Valgrind shows programs the same processor wherever
/// it runs, one with AVX2 (if the real one has that) and without AVX-512.
type FoldCase = (&'static str, Dtype, ReduceOp, usize);

const FOLDS: &[FoldCase] = &[
    ("avx2", Dtype::F32, ReduceOp::Sum, 2),
    ("avx2", Dtype::F32, ReduceOp::Sum, 4),
    ("avx2", Dtype::F32, ReduceOp::Max, 2),
    ("avx2", Dtype::F32, ReduceOp::Average, 2),
    ("avx2", Dtype::F64, ReduceOp::Sum, 2),
    ("avx2", Dtype::Bf16, ReduceOp::Sum, 2),
    ("avx2", Dtype::Bf16, ReduceOp::Sum, 4),
    ("avx2", Dtype::Bf16, ReduceOp::Max, 2),
    ("avx2", Dtype::Bf16, ReduceOp::Average, 2),
    ("avx2", Dtype::F16, ReduceOp::Sum, 2),
    ("avx2", Dtype::F16, ReduceOp::Max, 2),
    ("avx2", Dtype::I8, ReduceOp::Sum, 2),
    ("avx2", Dtype::I32, ReduceOp::Sum, 2),
    ("avx2", Dtype::I32, ReduceOp::Average, 2),
    ("avx2", Dtype::I64, ReduceOp::Min, 2),
    ("avx2", Dtype::U64, ReduceOp::Product, 2),
    ("sse2", Dtype::F32, ReduceOp::Sum, 2),
    ("sse2", Dtype::Bf16, ReduceOp::Sum, 2),
    ("sse2", Dtype::F16, ReduceOp::Sum, 2),
];

/// Folds 16 KiB in place.
fn fold_job(level: &'static str, dtype: Dtype, op: ReduceOp, sources: usize) -> Job {
    let prepare = move || {
        let known = Isa::available().find(|known| known.name() == level);
        let isa = known.ok_or_else(|| format!("valgrind shows no processor with {level}"))?;
        let divide_by = (op == ReduceOp::Average).then(|| 3.try_into().expect("not zero"));
        let fold = Fold { divide_by, ..Fold::new(dtype, op) };
        let mut buffers = vec![vec![0_u64; FOLD_BYTES / size_of::<u64>()]; sources];
        let work = move || {
            let dst: *mut u8 = buffers[0].as_mut_ptr().cast();
            let rest = buffers[1..].iter().map(|buffer| buffer.as_ptr().cast::<u8>());
            let mut pointers = [dst.cast_const(); 4];
            pointers[1..].iter_mut().zip(rest).for_each(|(pointer, other)| *pointer = other);
            let pointers = black_box(&pointers[..sources]);
            // SAFETY: the buffers have FOLD_BYTES bytes each; `dst` is the first source exactly.
            let outcome = unsafe { fold.run_with(isa, dst, pointers, FOLD_BYTES / dtype.bytes()) };
            assert_eq!(outcome, Folded::Done);
        };
        Ok(Box::new(work) as Work)
    };
    let name = format!("fold {level} {dtype} {op} of {sources}");
    Job { name, repetitions: 8, prepare: Box::new(prepare) }
}

const FOLD_BYTES: usize = 16 << 10;

/// An all-reduce of all ranks of a world that share one thread.
struct Reduction {
    transport: Transport,
    memory: Memory,
    world: usize,
    algorithm: &'static str,
    bytes: usize,
    slice_bytes: usize,
}

const fn reduction(
    transport: Transport,
    memory: Memory,
    world: usize,
    algorithm: &'static str,
    bytes: usize,
    slice_bytes: usize,
) -> Reduction {
    Reduction { transport, memory, world, algorithm, bytes, slice_bytes }
}

/// Small buffers, so that the engine and the links are most of it; slices, so that the window is.
const REDUCTIONS: &[Reduction] = {
    use Memory::{Private, Registered};
    use Transport::{Shm, Tcp};
    &[
        reduction(Shm, Registered, 2, "one-shot", 8, 4096),
        reduction(Shm, Registered, 2, "two-shot", 4096, 4096),
        reduction(Shm, Private, 2, "two-shot", 4096, 4096),
        reduction(Shm, Registered, 4, "ring", 4096, 256),
        reduction(Shm, Private, 4, "ring", 64 << 10, 16 << 10),
        reduction(Shm, Registered, 4, "k-tree", 8, 4096),
        reduction(Shm, Registered, 4, "halving-doubling", 4096, 256),
        reduction(Tcp, Private, 2, "recursive-doubling", 8, 4096),
        reduction(Tcp, Private, 4, "ring", 4096, 256),
        reduction(Tcp, Private, 4, "k-tree", 8, 4096),
    ]
};

fn all_reduce_job(reduction: &'static Reduction) -> Job {
    let Reduction { transport, memory, world, algorithm, bytes, slice_bytes } = *reduction;
    let prepare = move || {
        if isa() != FOLDS[0].0 {
            return Err(format!("valgrind shows a processor of which {} is used", isa()).into());
        }
        let algorithm = by_name(PlanKind::AllReduce, algorithm).ok_or("an algorithm is gone")?;
        let tuning = Tuning { slice_bytes, window: 4 };
        let mut world = World::new(transport, memory, world, bytes)?;
        let programs = world.compile(algorithm, tuning);
        Ok(Box::new(move || world.all_reduce(&programs)) as Work)
    };
    let name = format!("all-reduce {transport:?} {memory:?} {algorithm} {world} x {bytes} B");
    Job { name: name.to_lowercase(), repetitions: 200, prepare: Box::new(prepare) }
}
