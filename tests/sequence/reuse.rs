//! Memory that is used again as soon as a call has failed.
//!
//! In each round the ranks make a job of their own and call one collective in it. One rank makes
//! another call, which no rank can make, so that the job fails; the first of the others has entered
//! by then, gets the error and writes something else to all its memory at once; the last one enters
//! only after that. Whoever gets a result has to find in it what was put in, and nobody's memory
//! may change once its call has returned.

use unisum::{Buffers, Collective, Communicator, Dtype, Owned as _};

use crate::sequence::random::{Random, mix};
use crate::sequence::step::{Kind, Step};
use crate::sequence::{Call, Memory, Tensor};
use crate::support::{World, await_others, reach, setting, tell};

const SEED: &str = "TEST_SEED";
const ROUNDS: &str = "TEST_ROUNDS";
/// Whether the job of the last round fails because a rank dies.
const DIES: &str = "TEST_DIES";
const RANKS: usize = 4;
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

/// Runs so many rounds in a world of the scenario [`run_rounds`].
pub(crate) fn check(transport: &str, seed: u64, rounds: usize) {
    for dies in [false, true] {
        let world = World::new(RANKS, "reuse").set("UNISUM_TRANSPORT", transport);
        let world = world.set(SEED, mix(seed ^ u64::from(dies))).set(DIES, dies);
        let rounds = if dies { 1 + rounds / 8 } else { rounds };
        let ended = world.set(ROUNDS, rounds).set("RUST_BACKTRACE", 0).run(3 * LIMIT);
        let failed = ended.iter().filter(|ended| ended.status != 0).count();
        assert_eq!(failed, usize::from(dies), "{transport}, seed {seed}: {ended:#?}");
        let told: Vec<&String> = ended.iter().flat_map(|ended| &ended.told).collect();
        let failures = told.iter().filter(|told| told.starts_with("failed")).count();
        // The rank that makes the other call, and at least one that has to learn of it.
        assert!(failures >= 2 * rounds - usize::from(dies), "{transport}, seed {seed}: {told:?}");
    }
}

/// The scenario of a rank.
pub(crate) fn run_rounds() {
    let number = |name| setting(name).parse::<u64>().unwrap();
    let (seed, rounds) = (number(SEED), number(ROUNDS));
    let rank: usize = setting("UNISUM_RANK").parse().unwrap();
    let mut common = Random(seed);
    let mut own = Random(mix(seed ^ (rank as u64 + 1) << 32));
    for round in 0..rounds {
        let dies = setting(DIES) == "true" && round + 1 == rounds;
        let step = Part::random(&mut common, round, dies);
        step.play(&mut own);
    }
}

/// What the ranks do in a round.
struct Part {
    round: u64,
    step: Step,
    algorithm: Option<&'static str>,
    /// Enters first, enters whenever it likes, enters last, and makes the other call.
    first: usize,
    last: usize,
    other: usize,
    dies: bool,
}

impl Part {
    fn random(common: &mut Random, round: u64, dies: bool) -> Self {
        let mut ranks: Vec<usize> = (0..RANKS).collect();
        common.shuffle(&mut ranks);
        let (first, last, other) = (ranks[0], ranks[1], ranks[2]);
        // Those in which a rank may need nothing of the one that makes another call.
        let flows = [Kind::Broadcast, Kind::Scatter, Kind::Gather, Kind::AllToAll];
        let folds = [Kind::AllReduce, Kind::Reduce, Kind::AllGather, Kind::ReduceScatter];
        let kinds = if common.one_in(3) { folds } else { flows };
        let kind = common.pick(&kinds);
        let mut step = Step::random_of(common, kind, Dtype::I64, RANKS, 100_000);
        step.root = if kind == Kind::Gather { last } else { first };
        let algorithms = step.collective::<i64>(0).algorithms();
        let algorithm = Some(common.pick(&algorithms));
        Self { round, step, algorithm, first, last, other, dies }
    }

    /// One rank's part.
    fn play(&self, own: &mut Random) {
        let address = format!("{}.{}", setting("UNISUM_RENDEZVOUS"), self.round);
        let comm = Communicator::builder().rendezvous(&address).connect().unwrap();
        let rank = comm.rank();
        let context = format!("round {}, rank {rank}: {:?}", self.round, self.step);
        comm.set_algorithm(self.algorithm).unwrap();
        let call = Call { step: self.step.clone(), rank, context };
        let mut tensor = Tensor::<i64>::new(&comm, &call, own);
        comm.barrier().unwrap();
        let [ready, entered, reused] = ["ready", "entered", "reused"].map(|name| self.mark(name));
        // Nobody fails while another is in the barrier.
        reach(&ready);
        await_others(&ready, RANKS, LIMIT);
        if rank == self.other {
            await_others(&entered, 1, LIMIT);
            if self.dies {
                std::process::abort();
            }
            let wrong = comm.run(&Collective::all_gather(), Buffers::Apart(&[1_u8], &mut [0; 1]));
            tell(format!("failed: {}", wrong.unwrap_err()));
        } else {
            if rank == self.last {
                await_others(&reused, 1, LIMIT);
            } else if rank == self.first {
                reach(&entered);
            }
            let outcome = comm.run(&call.step.collective::<i64>(rank), tensor.lend());
            match &outcome {
                Ok(_) => drop(tensor.check(&call)),
                Err(error) => tell(format!("failed: {error}")),
            }
        }
        tensor.use_again();
        reach(&reused);
        await_others(&reused, RANKS - usize::from(self.dies), LIMIT);
        assert!(tensor.is_used_again(), "memory changed after the call: {}", call.context);
    }

    fn mark(&self, name: &str) -> String {
        format!("{name}-{}", self.round)
    }
}

/// What nobody puts in.
const OTHER: i64 = 0x7e57;

impl Tensor<i64> {
    fn memories(&mut self) -> Vec<&mut Memory<i64>> {
        match self {
            Self::InPlace { data, .. } => vec![data],
            Self::Apart { input, output } => vec![input, output],
        }
    }

    /// Does with the memory what its owner may do after a call.
    fn use_again(&mut self) {
        self.memories().into_iter().for_each(|memory| memory.all_mut().fill(OTHER));
    }

    fn is_used_again(&mut self) -> bool {
        self.memories().into_iter().all(|memory| memory.all().iter().all(|it| *it == OTHER))
    }
}
