//! Memory that is used again as soon as a call has failed.
//!
//! In each round the ranks make a job of their own and call one collective in it, or one sends a
//! message to another. One rank makes another call, which no rank can make, so that the job fails;
//! the first of the others has entered by then, gets the error and writes something else to all its
//! memory at once; the last one enters only after that. Whoever gets a result has to find in it
//! what was put in, and nobody's memory may change once its call has returned.

use unisum::{Buffers, Collective, Communicator, Dtype, Messenger, Owned as _, ReduceOp};

use crate::sequence::random::{Random, mix};
use crate::sequence::step::{Kind, Step};
use crate::sequence::{Call, Memory, Store, Tensor};
use crate::support::{World, await_others, reach, setting, tell};

const SEED: &str = "TEST_SEED";
pub(crate) const ROUNDS: &str = "TEST_ROUNDS";
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
        // The rank that makes the other call, at least.
        assert!(failures >= rounds - usize::from(dies), "{transport}, seed {seed}: {told:?}");
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

/// The scenario of a rank that leaves as soon as its last call has ended, where others may still
/// have a little to do.
pub(crate) fn leave_at_once() {
    for round in 0..setting(ROUNDS).parse().unwrap() {
        let address = format!("{}.{round}", setting("UNISUM_RENDEZVOUS"));
        let comm = Communicator::builder().rendezvous(&address).connect().unwrap();
        comm.set_algorithm(Some("two-shot")).unwrap();
        // Some ranks' memory is registered, and others read it where it lies.
        let mut registered = comm.allocate::<i64>(60_000).unwrap();
        let mut private = vec![0; 60_000];
        let is_registered = (comm.rank() + round).is_multiple_of(3);
        let data = if is_registered { &mut registered[..] } else { &mut private[..] };
        data.fill(1);
        comm.all_reduce(data, ReduceOp::Sum).unwrap();
        assert!(data.iter().all(|&it| it == comm.world() as i64));
    }
}

/// What the ranks do in a round.
struct Part {
    round: u64,
    step: Step,
    algorithm: Option<&'static str>,
    /// Whether the first sends a message to the last, and there is no collective.
    is_message: bool,
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
        let is_message = common.one_in(5);
        Self { round, step, algorithm, is_message, first, last, other, dies }
    }

    /// One rank's part.
    fn play(&self, own: &mut Random) {
        let address = format!("{}.{}", setting("UNISUM_RENDEZVOUS"), self.round);
        let comm = Communicator::builder().rendezvous(&address).connect().unwrap();
        comm.set_algorithm(self.algorithm).unwrap();
        let messenger = self.is_message.then(|| Messenger::new(&comm).unwrap());
        let rank = comm.rank();
        let context = format!("round {}, rank {rank}: {:?}", self.round, self.step);
        let call = Call { step: self.step.clone(), rank, context };
        let mut tensor = Tensor::<i64>::new(&comm, &call, own);
        comm.barrier().unwrap();
        // Nobody fails while another is in the barrier.
        let (ready, reused) = (self.mark("ready"), self.mark("reused"));
        reach(&ready);
        await_others(&ready, RANKS, LIMIT);
        self.enter_in_turn(rank, &comm);
        match &messenger {
            _ if rank == self.other => {}
            Some(messenger) => self.pass_message(rank, messenger, &comm, own),
            None => match comm.run(&call.step.collective::<i64>(rank), tensor.lend()) {
                Ok(_) => drop(tensor.check(&call)),
                Err(error) => tell(format!("failed: {error}")),
            },
        }
        tensor.use_again(own);
        reach(&reused);
        await_others(&reused, RANKS - usize::from(self.dies), LIMIT);
        assert!(tensor.is_used_again(), "memory changed after the call: {}", call.context);
    }

    /// Waits until it is this rank's turn to make its call; the one that makes another has made it
    /// when this returns.
    fn enter_in_turn(&self, rank: usize, comm: &Communicator) {
        let entered = self.mark("entered");
        if rank == self.last {
            let reused = if self.is_message { "reused-message" } else { "reused" };
            await_others(&self.mark(reused), 1, LIMIT);
        } else if rank == self.first {
            reach(&entered);
        } else if rank == self.other {
            await_others(&entered, 1, LIMIT);
            if self.dies {
                std::process::abort();
            }
            let wrong =
                comm.run(&Collective::all_gather(), Buffers::OutOfPlace(&[1_u8], &mut [0; 1]));
            tell(format!("failed: {}", wrong.unwrap_err()));
        }
    }

    /// The first sends and uses its memory again; the last receives what was sent, or nothing.
    fn pass_message(
        &self,
        rank: usize,
        messenger: &Messenger,
        comm: &Communicator,
        own: &mut Random,
    ) {
        const COUNTS: [usize; 4] = [10, 900, 2000, 100_000];
        let count = COUNTS[self.round as usize % COUNTS.len()];
        if rank == self.first {
            let (mut registered, mut private) = (comm.allocate(count).unwrap(), vec![0; count]);
            let data = if own.one_in(2) { &mut registered[..] } else { &mut private[..] };
            data.fill(1);
            if let Err(error) = messenger.send(data, self.last, 5) {
                tell(format!("failed: {error}"));
            }
            data.fill(OTHER);
            reach(&self.mark("reused-message"));
            await_others(&self.mark("received"), 1, LIMIT);
        } else if rank == self.last {
            let mut data = vec![0; count];
            match messenger.receive(&mut data, self.first, 5) {
                Ok(()) => assert!(data.iter().all(|it| *it == 1), "{count} elements, {}", data[0]),
                Err(error) => tell(format!("failed: {error}")),
            }
            reach(&self.mark("received"));
        }
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
            Self::OutOfPlace { input, output } => vec![input, output],
        }
    }

    /// Does with the memory what its owner may do after a call: writes to it, or frees it, and has
    /// it given out again as a rule.
    fn use_again(&mut self, own: &mut Random) {
        for memory in self.memories() {
            let len = memory.all().len();
            memory.all_mut().fill(OTHER);
            if own.one_in(3) {
                memory.store = Store::Private(Vec::new());
                memory.store = Store::Private(vec![OTHER; len]);
            }
        }
    }

    fn is_used_again(&mut self) -> bool {
        self.memories().into_iter().all(|memory| memory.all().iter().all(|it| *it == OTHER))
    }
}
