//! Which algorithm is fastest is tried out, once, when the first call of a size comes.
//!
//! The model knows what few pairs of ranks measured at start. It finds the few algorithms that come
//! into question; which of them wins, where ranks share cores, hosts differ or a network has its
//! ways, is found by running them: the same call with the same memory, in turns. A call takes as
//! long as it does on the slowest rank, and all ranks get that.
//!
//! What that may cost is bounded, by times that all ranks have in common. The first run is the call
//! itself: if another would take too long, there is none, and the call is made. Others run only if
//! they have the time by what the first took and by the model, which counts the slowest link.

mod race;

use std::ptr::NonNull;
use std::time::Instant;

use unisum_kernels::Fold;
use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::{Call, Region, Regions};

use self::race::{Tournament, calls_in_a_row, fastest_at_once};
use crate::autotuning::selector::Candidate;
use crate::collective::key::Key;
use crate::collective::reduction::Outcome;
use crate::execution::programs::{Compiled, Programs};
use crate::execution::runner::{Failure, Request, Runner, Wait};
use unisum_control::Needed;
use unisum_engine::Engine;

/// How long trying may take, in seconds, the first run included. So where a call takes longer than
/// a tenth of this, that is less than ten of them.
pub(crate) const TRIAL_S: f32 = 0.75;
/// And how much of the time that is left until the call's deadline.
const DEADLINE_SHARE: f32 = 0.25;
/// At first each candidate runs once more, twice at most, if all together take no longer than this
/// share of the time that is left: connections are opened and pages touched the first time, and
/// buffers and windows still grow the second.
const WARM_UP_SHARE: f32 = 0.125;

/// What trying left behind, beside an algorithm that is settled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tried {
    /// If the call was made on the way: its outcome. Otherwise its memory is as it was.
    pub(crate) made: Option<Outcome>,
}

/// What a call finds in its memory, to be put back.
struct Kept {
    input: Region,
    bytes: Vec<u8>,
}

impl Kept {
    fn new(input: Region, engine: &Engine) -> Result<Self, Failure> {
        let (mut bytes, length) = (Vec::new(), input.bytes());
        bytes.try_reserve_exact(length).map_err(|error| {
            let what = format!("has no memory for a copy of {length} bytes, to try algorithms on");
            Failure::Link(engine.lacking(what, error))
        })?;
        bytes.resize(length, 0);
        // SAFETY: the caller lent the region, nobody writes it before the call begins, and it is
        // as long as the vector.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(input.base(), bytes.len()) };
        Ok(Self { input, bytes })
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
    wait: &'a mut Wait,
    /// The modelled best first.
    candidates: Vec<(Candidate, Compiled)>,
    /// In place the input is written, apart it is not.
    kept: Option<Kept>,
    /// Since when all ranks are in it.
    begun: Instant,
    /// How much longer it may take, in seconds: the same on all ranks.
    left_s: f32,
}

impl Runner {
    /// Settles which algorithm calls of the kind and size of `request` take, if that is open. All
    /// ranks do so in the same call, whose waiting is `wait`. Each run takes a number of its own,
    /// from `next_number` on, as links tell collectives apart by them.
    pub(crate) fn try_out(
        &self,
        engine: &mut Engine,
        programs: &Programs,
        request: &Request,
        call: Call,
        (next_number, wait): (&mut u64, &mut Wait),
    ) -> Result<Option<Tried>, Failure> {
        let Request { key, regions, .. } = request;
        let fold = self.fold(request);
        // A user's function is for the user's data, and may count how often it is called.
        if key.custom {
            return Ok(None);
        }
        let topology = self.choice.topology();
        let shape = programs.shape(key, topology);
        let Some(candidates) = self.choice.open(&shape, key) else { return Ok(None) };
        // Only here: who does not try says its call once, with its algorithm. Of one number others
        // must never hear two calls.
        let status = self.membership.status();
        status.set_needs(Needed::All);
        status.begin(&call);
        let build = |candidate: Candidate| {
            let algorithm = candidate.algorithm;
            let program = programs.build_by(algorithm, key, topology, engine);
            (candidate, Compiled { algorithm, program })
        };
        let candidates = candidates.into_iter().map(build).collect();
        let kept = key.in_place.then(|| Kept::new(regions.input, engine)).transpose()?;
        let regions = *regions;
        let mut trial = Trial {
            runner: self,
            engine,
            programs,
            regions,
            fold,
            call,
            next_number,
            wait,
            candidates,
            kept,
            begun: Instant::now(),
            left_s: TRIAL_S,
        };
        let found = trial.best();
        status.set_needs(Needed::ByCall);
        let (best, made) = found?;
        let best = trial.candidates[best].0.algorithm;
        if let Some(line) = self.choice.settle(&shape, key, best, self.membership.job_rank()) {
            self.membership.control().keep(line);
        }
        Ok(Some(Tried { made }))
    }
}

impl Trial<'_> {
    /// Which of the candidates is fastest, and the outcome if the first run was the call; the same
    /// on all ranks. There is always an answer: were a size left open because trying takes too
    /// long, ranks would try again, and not all of them, as each keeps the programs of its own
    /// calls (in place or apart, say).
    fn best(&mut self) -> Result<(usize, Option<Outcome>), Failure> {
        // Ranks come late: that is no candidate's fault, and no time for trying.
        self.take_slowest(&mut [0.0])?;
        self.begun = Instant::now();
        let first_s = self.run(0)?;
        let outcome = Outcome { nonfinite: self.engine.found_nonfinite() };
        let first_s = self.share(vec![first_s])?[0];
        let others = 1..self.candidates.len();
        if !others.clone().any(|at| self.has_time_for(at, first_s)) {
            tracing::debug!("{}: {first_s} s leave no time for trying", self.call);
            return Ok((0, Some(outcome)));
        }
        self.put_back();
        let mut once = vec![f32::INFINITY; self.candidates.len()];
        once[0] = first_s;
        for at in others {
            if self.has_time_for(at, first_s) {
                once[at] = self.round(&[at], 1)?[0];
            }
        }
        let mut race = Tournament::new(&once);
        for _ in 0..2 {
            let all_s: f32 = race.running.iter().map(|&at| once[at]).sum();
            if all_s > WARM_UP_SHARE * self.left_s {
                break;
            }
            let times = self.round(&race.running, 1)?;
            race.running.iter().zip(times).for_each(|(&at, time)| once[at] = time);
        }
        let best = match calls_in_a_row(&once, self.left_s) {
            Some(calls) => {
                while !race.is_over(self.left_s) {
                    let round = self.round(&race.running, calls)?;
                    race.add(&round);
                }
                race.winner()
            }
            None => fastest_at_once(&once),
        };
        let tried: Vec<usize> = self.candidates.iter().map(|(it, _)| it.algorithm).collect();
        let (call, rounds, medians) = (&self.call, race.rounds, race.medians());
        tracing::debug!(
            "{call}: of {tried:?} once {once:?} s, {rounds} rounds {medians:?} s, {} s left",
            self.left_s
        );
        Ok((best, None))
    }

    /// Whether a run of a candidate fits in the time that is left, if one of the first takes so
    /// long, in seconds.
    fn has_time_for(&self, candidate: usize, first_s: f32) -> bool {
        first_s * self.candidates[candidate].0.times <= self.left_s
    }

    /// What each of so many calls by each of these candidates takes the slowest rank, in seconds.
    fn round(&mut self, which: &[usize], calls: usize) -> Result<Vec<f32>, Failure> {
        let mut seconds = Vec::with_capacity(which.len() * calls);
        for &at in which {
            for _ in 0..calls {
                seconds.push(self.run(at)?);
            }
            self.put_back();
        }
        self.share(seconds)
    }

    /// Runs the call by a candidate: what that takes this rank, in seconds.
    fn run(&mut self, candidate: usize) -> Result<f32, Failure> {
        let Compiled { algorithm, program } = self.candidates[candidate].1.clone();
        let start = Instant::now();
        let call = Call { algorithm: algorithm as u8, ..self.next_call() };
        self.engine.reserve(&program).map_err(Failure::Link)?;
        self.engine.start(&call, self.fold, &self.regions, &program);
        self.runner.drive(self.engine, &self.call, self.wait)?;
        Ok(start.elapsed().as_secs_f32())
    }

    fn put_back(&self) {
        self.kept.iter().for_each(Kept::put_back);
    }

    fn next_call(&mut self) -> Call {
        let number = *self.next_number;
        *self.next_number += 1;
        Call { number, ..self.call }
    }

    /// Of each time, that of the slowest rank. And all ranks know how much is left of the time for
    /// trying, by the rank that has been in it for longest and the one whose deadline is next.
    fn share(&mut self, mut seconds: Vec<f32>) -> Result<Vec<f32>, Failure> {
        let runs = seconds.len();
        let spent_s = self.begun.elapsed().as_secs_f32();
        let left_s = self.runner.left(self.wait).as_secs_f32();
        seconds.extend([spent_s, -left_s]);
        self.take_slowest(&mut seconds)?;
        let [spent_s, left_s] = [seconds[runs], -seconds[runs + 1]];
        self.left_s = TRIAL_S.min(DEADLINE_SHARE * left_s) - spent_s;
        seconds.truncate(runs);
        Ok(seconds)
    }

    /// All ranks get, of each time, that of the slowest rank.
    fn take_slowest(&mut self, seconds: &mut [f32]) -> Result<(), Failure> {
        let key = Key::all_reduce(seconds.len(), size_of::<f32>());
        let choice = &self.runner.choice;
        let shape = self.programs.shape(&key, choice.topology());
        let algorithm = choice.algorithm(&shape, &key);
        let program = self.programs.build_by(algorithm, &key, choice.topology(), self.engine);
        // Told as the call that algorithms are tried for: who called something else hears of that.
        let call = Call { algorithm: Call::BETWEEN_TRIALS, ..self.next_call() };
        let memory = NonNull::from(&mut *seconds).cast();
        // SAFETY: nobody else touches the slice until this function ends, and by then the engine
        // has done with it or was aborted.
        let region = unsafe { Region::new(memory, size_of_val(seconds), None) };
        let fold = Fold::new(Dtype::F32, ReduceOp::Max);
        self.engine.start(&call, fold, &Regions::in_place(region), &program);
        let result = self.runner.drive(self.engine, &self.call, self.wait);
        if result.is_err() {
            // Before the memory goes.
            self.engine.abort();
        }
        result
    }
}
