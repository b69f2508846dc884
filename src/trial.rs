//! Which algorithm is fastest is tried out, once, when the first call of a size comes.
//!
//! The model knows what few pairs of ranks measured at start. It finds the few algorithms that come
//! into question; which of them wins, where ranks share cores, hosts differ or a network has its
//! ways, is found by running them: the same call with the same memory, in turns. A call takes as
//! long as it does on the slowest rank, and all ranks get that.

use std::ptr::NonNull;
use std::time::Instant;

use unisum_link::kernels::Fold;
use unisum_link::{Call, Collective as Kind, Dtype, ReduceOp, Region, Regions};

use crate::engine::Engine;
use crate::programs::{Compiled, Key, Programs};
use crate::runner::{Failure, Request, Runner};

/// How a race goes after its first, second, third and later rounds.
const STANDINGS: [Standing; 3] = [
    Standing { behind: 1.6, gain: 0.8 },
    Standing { behind: 1.4, gain: 0.88 },
    Standing { behind: 1.25, gain: 0.98 },
];
/// How long trying may take, in seconds and rounds: there is one at least.
const TRIAL_S: f32 = 1.0;
const ROUNDS_MAX: usize = 9;
/// Several calls follow each other, as they do later: for about so long, in seconds, but at least
/// and at most so many; fewer only where the first round would take all the time there is. The
/// first, after another algorithm's, does not count.
const BLOCK_S: f32 = 2e-3;
const CALLS_MIN: usize = 4;
const CALLS_MAX: usize = 64;

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

/// A trial under way on this rank.
struct Trial<'a> {
    runner: &'a Runner,
    engine: &'a mut Engine,
    programs: &'a Programs,
    regions: Regions,
    fold: Fold,
    /// What all its runs have in common; the call that this rank says it is in meanwhile, whichever
    /// run it waits in: who runs another call's trial may be in another run.
    call: Call,
    next_number: &'a mut u64,
    /// The modelled best first.
    candidates: Vec<Compiled>,
    /// In place the input is written, apart it is not.
    kept: Option<Kept>,
}

impl Runner {
    /// Whether it settled which algorithm calls of the kind and size of `request` take: it does if
    /// that is open. All ranks do so in the same call. Its memory is afterwards as it was. Each run
    /// takes a number of its own, from `next_number` on, as links tell collectives apart by them.
    pub(crate) fn try_out(
        &self,
        engine: &mut Engine,
        programs: &Programs,
        request: &Request,
        call: Call,
        next_number: &mut u64,
    ) -> Result<bool, Failure> {
        let Request { key, regions, .. } = request;
        let fold = self.fold(request);
        // A user's function is for the user's data, and may count how often it is called.
        if key.custom {
            return Ok(false);
        }
        let topology = self.choice.topology();
        let shape = programs.shape(key, topology);
        let Some(candidates) = self.choice.open(&shape, key) else { return Ok(false) };
        // Only here: who does not try says its call once, with its algorithm. Of one number others
        // must never hear two calls.
        self.membership.status().begin(&call);
        let build = |algorithm| {
            let program = programs.build_by(algorithm, key, topology, engine);
            Compiled { algorithm, program }
        };
        let candidates: Vec<Compiled> = candidates.into_iter().map(build).collect();
        let kept = key.in_place.then(|| Kept::new(regions.input));
        let regions = *regions;
        let mut trial = Trial {
            runner: self,
            engine,
            programs,
            regions,
            fold,
            call,
            next_number,
            candidates,
            kept,
        };
        let best = trial.best()?;
        self.choice.settle(&shape, key, trial.candidates[best].algorithm);
        Ok(true)
    }
}

impl Trial<'_> {
    /// Which of the candidates is fastest; the same on all ranks. There is always an answer: were a
    /// size left open because trying takes too long, ranks would try again, and not all of them, as
    /// each keeps the programs of its own calls (in place or apart, say).
    fn best(&mut self) -> Result<usize, Failure> {
        let mut race = Race::new(self.candidates.len());
        // The first time, ranks come late, connections are opened and pages touched; the second
        // time, buffers and windows still grow, unless calls are long.
        self.round(&race.running, 1)?;
        let mut once = self.round(&race.running, 1)?;
        if once.iter().sum::<f32>() < TRIAL_S / 16.0 {
            once = self.round(&race.running, 1)?;
        }
        let calls = calls_in_a_row(once);
        while !race.is_over() {
            let round = self.round(&race.running, calls)?;
            race.add(&round);
        }
        let tried: Vec<usize> = self.candidates.iter().map(|it| it.algorithm).collect();
        let (call, rounds, medians) = (&self.call, race.rounds, race.medians());
        tracing::debug!("{call}: {rounds} rounds of {calls} of {tried:?} took {medians:?} s each");
        Ok(race.winner())
    }

    /// What each of so many calls by each of these candidates takes the slowest rank, in seconds.
    fn round(&mut self, which: &[usize], calls: usize) -> Result<Vec<f32>, Failure> {
        let mut seconds = Vec::with_capacity(which.len() * calls);
        for &at in which {
            let Compiled { algorithm, program } = self.candidates[at].clone();
            for _ in 0..calls {
                let start = Instant::now();
                let call = Call { algorithm: algorithm as u16, ..self.next_call() };
                self.engine.start(&call, self.fold, &self.regions, &program);
                self.runner.drive(self.engine, &self.call)?;
                seconds.push(start.elapsed().as_secs_f32());
            }
            self.kept.iter().for_each(Kept::put_back);
        }
        self.take_slowest(&mut seconds)?;
        Ok(seconds)
    }

    fn next_call(&mut self) -> Call {
        let number = *self.next_number;
        *self.next_number += 1;
        Call { number, ..self.call }
    }

    /// All ranks get, of each time, that of the slowest rank.
    fn take_slowest(&mut self, seconds: &mut [f32]) -> Result<(), Failure> {
        let key = Key::all_reduce(seconds.len(), size_of::<f32>());
        let choice = &self.runner.choice;
        let shape = self.programs.shape(&key, choice.topology());
        let algorithm = choice.algorithm(&shape, &key);
        let program = self.programs.build_by(algorithm, &key, choice.topology(), self.engine);
        let call = Call {
            collective: Kind::AllReduce,
            dtype: Dtype::F32,
            op: ReduceOp::Max,
            count: seconds.len() as u64,
            root: 0,
            algorithm: algorithm as u16,
            ..self.next_call()
        };
        let memory = NonNull::from(&mut *seconds).cast();
        // SAFETY: nobody else touches the slice until this function ends, and by then the engine
        // has done with it or was aborted.
        let region = unsafe { Region::new(memory, size_of_val(seconds), None) };
        let fold = Fold::new(call.dtype, call.op);
        self.engine.start(&call, fold, &Regions::in_place(region), &program);
        let result = self.runner.drive(self.engine, &self.call);
        if result.is_err() {
            // Before the memory goes.
            self.engine.abort();
        }
        result
    }
}

/// What the times are worth by now.
struct Standing {
    /// Who takes so much longer than the fastest is out of the race.
    behind: f32,
    /// By how much another has to be faster than the modelled best: less is noise.
    gain: f32,
}

/// The candidates' times so far, and who still runs. The same on all ranks, as the times are.
#[derive(Debug)]
struct Race {
    /// By candidate, the times of its calls, in seconds.
    times: Vec<Vec<f32>>,
    /// Ascending.
    running: Vec<usize>,
    rounds: usize,
    spent_s: f32,
    /// What another round would take.
    round_s: f32,
}

impl Race {
    fn new(candidates: usize) -> Self {
        let (times, running) = (vec![Vec::new(); candidates], (0..candidates).collect());
        Self { times, running, rounds: 0, spent_s: 0.0, round_s: 0.0 }
    }

    /// Takes in a round: as many calls of each that runs.
    fn add(&mut self, round: &[f32]) {
        let calls = round.len() / self.running.len();
        for (&at, block) in self.running.iter().zip(round.chunks_exact(calls)) {
            self.times[at].extend(&block[1..]);
        }
        self.spent_s += round.iter().sum::<f32>();
        self.rounds += 1;
        let medians = self.medians();
        let fastest = medians.iter().copied().fold(f32::INFINITY, f32::min);
        let behind = self.standing().behind;
        self.running.retain(|&at| medians[at] <= behind * fastest);
        let sum_s: f32 = self.running.iter().map(|&at| medians[at]).sum();
        self.round_s = sum_s * calls as f32;
    }

    fn is_over(&self) -> bool {
        let is_late = self.spent_s + self.round_s > TRIAL_S;
        self.rounds > 0 && (self.running.len() < 2 || self.rounds == ROUNDS_MAX || is_late)
    }

    /// By candidate, infinite without times.
    fn medians(&self) -> Vec<f32> {
        self.times.iter().cloned().map(median).collect()
    }

    /// The fastest, if it is so much faster than the first.
    fn winner(&self) -> usize {
        let medians = self.medians();
        let best = (0..medians.len()).min_by(|&a, &b| medians[a].total_cmp(&medians[b]));
        let gain = self.standing().gain;
        best.filter(|&best| medians[best] < gain * medians[0]).unwrap_or(0)
    }

    /// After at least a round.
    fn standing(&self) -> &Standing {
        &STANDINGS[self.rounds.clamp(1, STANDINGS.len()) - 1]
    }
}

/// How many calls follow each other, by what one of each candidate takes, in seconds.
fn calls_in_a_row(once: Vec<f32>) -> usize {
    let affordable = (TRIAL_S / once.iter().sum::<f32>()) as usize;
    let calls = ((BLOCK_S / median(once)) as usize).clamp(CALLS_MIN, CALLS_MAX);
    calls.min(affordable.max(2))
}

fn median(mut times: Vec<f32>) -> f32 {
    times.sort_by(f32::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f32::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_falls_behind_is_out_and_the_fastest_wins() {
        let mut race = Race::new(4);
        // Two calls each, of which the first does not count.
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3, 0.0, 2e-3]);
        assert_eq!(race.running, [0, 1, 2], "whoever takes twice as long");
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3]);
        race.add(&[9e-3, 1.1e-3, 9e-3, 1.3e-3, 0.0, 1e-3]);
        assert_eq!(race.running, [0, 2]);
        assert!((race.round_s / 4.2e-3 - 1.0).abs() < 1e-3, "two calls of each: {race:?}");
        assert!(!race.is_over());
        while !race.is_over() {
            race.add(&[0.0, 0.9e-3, 0.0, 0.8e-3]);
        }
        assert_eq!((race.rounds, race.winner()), (ROUNDS_MAX, 2));
    }

    #[test]
    fn rows_are_long_for_short_calls_and_short_where_time_is() {
        assert_eq!(calls_in_a_row(vec![1e-6; 4]), CALLS_MAX);
        assert_eq!(calls_in_a_row(vec![0.2e-3; 4]), 10);
        assert_eq!(calls_in_a_row(vec![15e-3; 6]), CALLS_MIN);
        // A host so busy that a round of them would take seconds.
        assert_eq!(calls_in_a_row(vec![0.3; 6]), 2);
    }

    #[test]
    fn the_first_wins_by_default() {
        let mut race = Race::new(3);
        race.add(&[0.0, TRIAL_S, 0.0, 0.9 * TRIAL_S, 0.0, 1.5 * TRIAL_S]);
        assert!(race.is_over(), "another round would take too long");
        assert_eq!(race.winner(), 0, "by one round that much may be noise");
        let mut race = Race::new(2);
        (0..3).for_each(|_| race.add(&[0.0, 1e-3, 0.0, 1.3e-3]));
        assert!(race.is_over() && race.winner() == 0, "the other is out");
        let mut race = Race::new(2);
        (0..3).for_each(|_| race.add(&[0.0, 1e-3, 0.0, 0.99e-3]));
        assert_eq!(race.winner(), 0, "that little is noise");
    }
}
