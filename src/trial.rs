//! Which algorithm is fastest is tried out, once, when the first call of a size comes.
//!
//! The model knows what one pair of ranks measured at start. It finds the few algorithms that come
//! into question; which of them wins, where ranks share cores, hosts differ or a network has its
//! ways, is found by running them: the same call with the same memory, in turns, and all ranks take
//! the times of the slowest.

use std::ptr::NonNull;
use std::time::Instant;

use unisum_link::kernels::Fold;
use unisum_link::{Call, Collective as Kind, Dtype, ReduceOp, Region, Regions};

use crate::engine::Engine;
use crate::programs::{Compiled, Key, Programs};
use crate::runner::{Failure, Request, Runner};

/// What comes into question for a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidates {
    /// Numbers among the collective's algorithms, the modelled best first; two or more.
    pub(crate) algorithms: Vec<usize>,
    /// How often each is timed, and how many calls each time.
    pub(crate) rounds: usize,
    pub(crate) calls: usize,
}

/// By how much another algorithm has to be faster than the modelled best: less is noise.
const GAIN: f32 = 0.95;

/// What a call finds in its memory, to be put back.
struct Kept {
    input: Region,
    bytes: Vec<u8>,
}

impl Kept {
    fn new(input: Region) -> Self {
        let mut bytes = vec![0; input.bytes()];
        // SAFETY: the caller lent the region, nobody writes it before the call begins, and it is
        // as long as the vector.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(input.base(), bytes.len()) };
        Self { input, bytes }
    }

    fn put_back(&self) {
        // SAFETY: as above; no collective is under way, so nobody else reads or writes it.
        unsafe {
            self.input.base().copy_from_nonoverlapping(self.bytes.as_ptr(), self.bytes.len())
        };
    }
}

impl Runner {
    /// Settles which algorithm calls of the kind and size of `request` take, if that is open. All
    /// ranks do so in the same call. Its memory is afterwards as it was. Each run takes a number of
    /// its own, from `next_number` on, as links tell collectives apart by them.
    pub(crate) fn try_out(
        &self,
        engine: &mut Engine,
        programs: &Programs,
        request: &Request,
        call: Call,
        next_number: &mut u64,
    ) -> Result<(), Failure> {
        let mut number = || std::mem::replace(next_number, *next_number + 1);
        let Request { key, regions, .. } = request;
        let fold = self.fold(request);
        // A user's function is for the user's data, and may count how often it is called.
        if fold.custom.is_some() || key.ordered {
            return Ok(());
        }
        let topology = self.choice.topology();
        let shape = programs.shape(key, topology);
        let Some(candidates) = self.choice.open(&shape, key) else { return Ok(()) };
        let build = |&algorithm: &usize| Compiled {
            algorithm,
            program: programs.build_by(algorithm, key, topology, engine),
        };
        let compiled: Vec<Compiled> = candidates.algorithms.iter().map(build).collect();
        // In place the input is written, apart it is not.
        let kept = key.in_place.then(|| Kept::new(regions.input));
        let mut seconds = Vec::with_capacity(compiled.len() * candidates.rounds);
        for round in 0..=candidates.rounds {
            for Compiled { algorithm, program } in &compiled {
                let algorithm = *algorithm as u16;
                let start = Instant::now();
                for _ in 0..candidates.calls {
                    let call = Call { algorithm, number: number(), ..call };
                    engine.start(call, fold, *regions, program);
                    self.drive(engine, &call)?;
                }
                let took = start.elapsed().as_secs_f32();
                kept.iter().for_each(Kept::put_back);
                // The first time, ranks come late, connections are opened and pages touched.
                if round > 0 {
                    seconds.push(took);
                }
            }
        }
        let call = Call { number: number(), ..call };
        self.take_slowest(engine, programs, call, &mut seconds)?;
        let times = |index: usize| seconds.iter().skip(index).step_by(compiled.len()).copied();
        let medians: Vec<f32> = (0..compiled.len()).map(|index| median(times(index))).collect();
        tracing::debug!("tried {candidates:?} for {call}: {medians:?} s");
        let best = (0..medians.len()).min_by(|&a, &b| medians[a].total_cmp(&medians[b]));
        let best = best.filter(|&best| medians[best] < GAIN * medians[0]).unwrap_or(0);
        self.choice.settle(&shape, key, compiled[best].algorithm);
        Ok(())
    }

    /// All ranks get, of each time, that of the slowest rank.
    fn take_slowest(
        &self,
        engine: &mut Engine,
        programs: &Programs,
        call: Call,
        seconds: &mut [f32],
    ) -> Result<(), Failure> {
        let key = Key::all_reduce(seconds.len(), size_of::<f32>());
        let shape = programs.shape(&key, self.choice.topology());
        let algorithm = self.choice.algorithm(&shape, &key);
        let program = programs.build_by(algorithm, &key, self.choice.topology(), engine);
        let call = Call {
            collective: Kind::AllReduce,
            dtype: Dtype::F32,
            op: ReduceOp::Max,
            count: seconds.len() as u64,
            root: 0,
            algorithm: algorithm as u16,
            ..call
        };
        let memory = NonNull::from(&mut *seconds).cast();
        // SAFETY: nobody else touches the slice until this function ends, and by then the engine
        // has done with it or was aborted.
        let region = unsafe { Region::new(memory, size_of_val(seconds), None) };
        engine.start(call, Fold::new(call.dtype, call.op), Regions::in_place(region), &program);
        let result = self.drive(engine, &call);
        if result.is_err() {
            // Before the memory goes.
            engine.abort();
        }
        result
    }
}

fn median(times: impl Iterator<Item = f32>) -> f32 {
    let mut times: Vec<f32> = times.collect();
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f32::INFINITY)
}
