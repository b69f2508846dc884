//! Whatever one rank gives otherwise than the others is an error on every rank, soon, that says
//! both values: a call, one of its arguments and a rank are drawn, and nobody ends with Ok.
//!
//! Draws are made from seeds; a failure names its seed and `UNISUM_TEST_SEED=N` repeats it.
//! `UNISUM_TEST_DRAWS=N` makes more of them.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::{Duration, Instant};

use support::{World, await_others, reach, setting, tell};
use unisum::buckets::{Buckets, Compressed, Encoding, Hook as _, Parameter};
use unisum::{
    Buffers, Collective, Communicator, CustomOp, Dtype, Element, Error, ErrorKind, Mesh, Message,
    Messenger, ReduceOp, Reduction,
};

#[test]
fn rank_process() {
    support::run_if_rank(&[("drawn", drawn), ("pairs", pairs)]);
}

const LIMIT: Duration = Duration::from_secs(60);
const RANKS: usize = 4;
/// What a rank waits before it asks whether all are in the same call is 3 s.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn what_one_rank_gives_otherwise_is_an_error_on_all_that_says_both_values() {
    let draws = number("UNISUM_TEST_DRAWS").unwrap_or(2);
    let start = number("UNISUM_TEST_SEED")
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 % 1_000_000);
    let draws = if number("UNISUM_TEST_SEED").is_some() { 1 } else { draws };
    for (at, what) in ALL.iter().enumerate() {
        for draw in 0..draws {
            // Transports take turns, so that every run has each for some.
            let transports = support::transports();
            let transport = transports[(start as usize + at + draw as usize) % transports.len()];
            check(*what, transport, start + draw);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn check(what: What, transport: &str, seed: u64) {
    let difference = Difference::draw(what, seed);
    let context = format!("{what:?}, {transport}, seed {seed}: {difference:?}");
    let world = World::new(RANKS, "drawn")
        .set("UNISUM_TRANSPORT", transport)
        .set("WHAT", format!("{what:?}"))
        .set("SEED", seed);
    for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
        let (text, context) = (&told[0], format!("{context}, rank {rank}: {}", told[0]));
        assert!(text.starts_with("Mismatch"), "{context}");
        assert!(difference.says.iter().all(|part| text.contains(part)), "{context}");
        let failed_ranks = text.split(['[', ']']).nth(1).unwrap();
        let odd = difference.odd.to_string();
        assert!(failed_ranks.split(", ").any(|rank| rank == odd), "{context}");
        let seconds: f64 = told[1].parse().unwrap();
        assert!(seconds < SOON.as_secs_f64(), "{context}: took {seconds} s");
        let at_once = told[2] == "in that call";
        assert!(at_once || !difference.meets(rank), "{context}: it was Ok before");
    }
}

/// Rounds of a draw: each draws what differs, how long that is, and who comes late.
const ROUNDS: usize = 25;

/// Two ranks of which one has another length for the other than that expects. Whoever comes late
/// finds all that it waits for, and still neither of them, whichever is wrong, leaves with Ok.
#[test]
fn both_of_two_ranks_that_disagree_on_a_length_hear_so_in_that_call() {
    for transport in support::transports() {
        for draw in 0..number("UNISUM_TEST_DRAWS").unwrap_or(2) {
            let world = World::new(2, "pairs").set("UNISUM_TRANSPORT", transport);
            world.set("SEED", support::seed() + draw).succeed_as(transport, LIMIT);
        }
    }
}

/// A job for each round, as an error ends one.
fn pairs() {
    let mut random = Random(setting("SEED").parse().unwrap());
    for round in 0..ROUNDS {
        let place = format!("{}.{round}", setting("UNISUM_RENDEZVOUS"));
        let comm = Communicator::builder().rendezvous(&place).connect().unwrap();
        let (sent, expected) = random.two(&LENGTHS);
        let (back, from, late) = (random.of(&LENGTHS), random.below(2), random.below(2));
        let is_from = comm.rank() == from;
        let (sends, receives) = if is_from { (sent, back) } else { (back, expected) };
        let for_peer = |count| if comm.rank() == 0 { [0, count] } else { [count, 0] };
        let collective = Collective::all_to_all_v(&for_peer(sends), &for_peer(receives));
        let (input, mut output) = (vec![1_f32; sends], vec![0_f32; receives]);
        comm.barrier().unwrap();
        let point = format!("round{round}");
        if comm.rank() == late {
            await_others(&point, 1, LIMIT);
        } else {
            reach(&point);
        }
        let result = comm.run(&collective, Buffers::OutOfPlace(&input, &mut output));
        let context = format!("{sent} for {expected} from {from}, {back} back, {late} is late");
        let error = result.map(|_| context.clone()).unwrap_err();
        let (text, kind) = (format!("{context}: {error}"), error.kind());
        assert_eq!(kind, ErrorKind::Mismatch, "{text}");
        let counts = [sent, expected].map(|count| format!("x {count},"));
        assert!(counts.iter().all(|count| text.contains(count)), "{text}");
    }
}

/// A rank draws the same difference as the test, and calls what it has to.
fn drawn() {
    let comm = Communicator::from_environment().unwrap();
    let what = *ALL.iter().find(|what| format!("{what:?}") == setting("WHAT")).unwrap();
    let Difference { usual, other, odd, .. } =
        Difference::draw(what, setting("SEED").parse().unwrap());
    // What they called before was the same, and nobody is in it who could hear there of the next.
    comm.barrier().unwrap();
    reach("arrived");
    await_others("arrived", comm.world(), LIMIT);
    let start = Instant::now();
    let result = if comm.rank() == odd { &other } else { &usual }.call(&comm);
    let is_at_once = result.is_err();
    // Who has all it waits for hears of it in the next call.
    let (error, took) = (result.and_then(|()| comm.barrier()).unwrap_err(), start.elapsed());
    tell(format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()).replace('\n', " / "));
    tell(took.as_secs_f64());
    tell(if is_at_once { "in that call" } else { "in the next" });
    // Where nothing was sent yet the communicator stays usable; what is made of it tells it of its
    // own errors at its next call.
    if let Err(again) = comm.all_reduce(&mut [1_f32], ReduceOp::Sum) {
        assert!(matches!(again.kind(), ErrorKind::Aborted | ErrorKind::Mismatch), "{again}");
    }
}

/// Which argument of which kind of call differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Collective,
    Type,
    Operation,
    Factor,
    Function,
    Watched,
    Root,
    Count,
    Counts,
    Pair,
    Tensors,
    TensorLength,
    Algorithm,
    Subset,
    Mesh,
    Making,
    MessageLength,
    MessageType,
    Shape,
    BucketBytes,
    HookOfBuckets,
}

const ALL: [What; 21] = [
    What::Collective,
    What::Type,
    What::Operation,
    What::Factor,
    What::Function,
    What::Watched,
    What::Root,
    What::Count,
    What::Counts,
    What::Pair,
    What::Tensors,
    What::TensorLength,
    What::Algorithm,
    What::Subset,
    What::Mesh,
    What::Making,
    What::MessageLength,
    What::MessageType,
    What::Shape,
    What::BucketBytes,
    What::HookOfBuckets,
];

/// What a rank calls.
#[derive(Clone, Debug)]
enum Call {
    Run(Arguments),
    Batch(Vec<usize>),
    Algorithm(&'static str),
    Subset(Vec<usize>),
    Mesh(usize, usize),
    Make(&'static str),
    Message(Arguments),
    Buckets { shape: usize, bytes: usize, hook: Option<Encoding> },
}

/// The arguments of a collective, or of a message.
#[derive(Clone, Debug)]
struct Arguments {
    kind: &'static str,
    dtype: Dtype,
    op: ReduceOp,
    factor: Option<f64>,
    commutes: Option<bool>,
    watched: bool,
    root: usize,
    count: usize,
    counts: Option<Vec<usize>>,
    /// What rank i has for rank j, as this rank has it.
    pairs: Option<Vec<Vec<usize>>>,
}

const KINDS: [&str; 8] = [
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "gather",
    "scatter",
];
const REDUCING: [&str; 3] = ["all_reduce", "reduce", "reduce_scatter"];
const ROOTED: [&str; 4] = ["reduce", "broadcast", "gather", "scatter"];
const BLOCKS: [&str; 4] = ["all_gather", "reduce_scatter", "gather", "scatter"];
const TYPES: [Dtype; 3] = [Dtype::F32, Dtype::F64, Dtype::I32];
/// Around what goes in one message, in a slice, and what is tried first.
const LENGTHS: [usize; 9] = [0, 1, 2, 7, 255, 1024, 5000, 1 << 16, (1 << 17) + 3];

/// A call, and the same with one argument changed on one rank.
#[derive(Debug)]
struct Difference {
    usual: Call,
    other: Call,
    odd: usize,
    says: Vec<String>,
}

/// A linear congruential generator (Knuth's MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    /// Two different ones.
    fn two<T: Clone>(&mut self, all: &[T]) -> (T, T) {
        let first = self.below(all.len());
        let second = (first + 1 + self.below(all.len() - 1)) % all.len();
        (all[first].clone(), all[second].clone())
    }
}

impl Difference {
    fn draw(what: What, seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ what as u64);
        // The first numbers of neighbouring seeds are alike.
        for _ in 0..8 {
            random.below(2);
        }
        let odd = random.below(RANKS);
        let r = &mut random;
        let (usual, other, says) = match what {
            What::Subset | What::Mesh | What::Making => Self::of_groups(what, r),
            What::MessageLength | What::MessageType => Self::of_messages(what, r),
            What::Shape | What::BucketBytes | What::HookOfBuckets => Self::of_buckets(what, r),
            What::Tensors | What::TensorLength | What::Algorithm => Self::of_batches(what, r),
            _ => Self::of_collectives(what, odd, r),
        };
        Self { usual, other, odd, says }
    }

    /// Whether a rank has to hear of it in that very call: it is one of two that compare lengths.
    fn meets(&self, rank: usize) -> bool {
        let (Call::Run(usual), Call::Run(other)) = (&self.usual, &self.other) else { return false };
        let (Some(usual), Some(other)) = (&usual.pairs, &other.pairs) else { return false };
        let differs = |from: usize, to: usize| usual[from][to] != other[from][to];
        (0..RANKS).any(|peer| differs(rank, peer) || differs(peer, rank))
    }

    fn of_collectives(what: What, odd: usize, r: &mut Random) -> (Call, Call, Vec<String>) {
        let mut usual = Arguments::draw(r);
        let mut other = usual.clone();
        let says = match what {
            What::Collective => {
                (usual.kind, other.kind) = r.two(&KINDS);
                vec![usual.kind.to_owned(), other.kind.to_owned()]
            }
            What::Type => {
                (usual.dtype, other.dtype) = r.two(&TYPES);
                vec![usual.dtype.to_string(), other.dtype.to_string()]
            }
            What::Operation => {
                usual.kind = r.of(&REDUCING);
                other.kind = usual.kind;
                (usual.op, other.op) =
                    r.two(&[ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max]);
                vec![usual.op.to_string(), other.op.to_string()]
            }
            What::Factor => {
                (usual.kind, usual.dtype) = (r.of(&REDUCING), Dtype::F32);
                other = usual.clone();
                (usual.factor, other.factor) =
                    r.two(&[None, Some(0.0), Some(0.5), Some(0.25), Some(1.0)]);
                let factors = [usual.factor, other.factor].into_iter().flatten();
                factors.map(|factor| format!("factor {factor}")).collect()
            }
            What::Function => {
                (usual.kind, usual.dtype) = (r.of(&REDUCING), Dtype::F32);
                other = usual.clone();
                (usual.commutes, other.commutes) = r.two(&[None, Some(false), Some(true)]);
                let commutes = [usual.commutes, other.commutes].into_iter().flatten();
                let word =
                    |it| if it { "function that commutes" } else { "function with an order" };
                commutes.map(word).map(str::to_owned).collect()
            }
            What::Watched => {
                (usual.kind, usual.dtype) = (r.of(&["all_reduce", "reduce_scatter"]), Dtype::F32);
                other = usual.clone();
                (usual.watched, other.watched) = r.two(&[false, true]);
                vec!["sum watched".into(), "sum,".into()]
            }
            What::Root => {
                usual.kind = r.of(&ROOTED);
                usual.count = r.of(&LENGTHS[1..]);
                other = usual.clone();
                (usual.root, other.root) = r.two(&[0, 1, 2, 3]);
                vec![format!("root {}", usual.root), format!("root {}", other.root)]
            }
            What::Count => {
                (usual.count, other.count) = r.two(&LENGTHS);
                vec![format!("x {},", usual.count), format!("x {},", other.count)]
            }
            _ => return Self::of_lengths(what, odd, usual, r),
        };
        (Call::Run(usual), Call::Run(other), says)
    }

    /// Whose blocks are given: by rank, or by pair.
    fn of_lengths(
        what: What,
        odd: usize,
        mut usual: Arguments,
        r: &mut Random,
    ) -> (Call, Call, Vec<String>) {
        match what {
            What::Counts => {
                usual.kind = r.of(&BLOCKS);
                let counts: Vec<usize> = (0..RANKS).map(|_| r.of(&LENGTHS)).collect();
                let at = r.below(RANKS);
                let mut other = usual.clone();
                let mut changed = counts.clone();
                changed[at] = r.of(&LENGTHS) + usize::from(counts[at] > 0);
                changed[at] += usize::from(changed[at] == counts[at]);
                (usual.counts, other.counts) = (Some(counts.clone()), Some(changed.clone()));
                let says = vec![format!("{counts:?}"), format!("{changed:?}")];
                (Call::Run(usual), Call::Run(other), says)
            }
            _ => {
                let row = |r: &mut Random| (0..RANKS).map(|_| r.of(&LENGTHS)).collect();
                let pairs: Vec<Vec<usize>> = (0..RANKS).map(|_| row(r)).collect();
                let peer = (odd + 1 + r.below(RANKS - 1)) % RANKS;
                let (from, to) = if r.below(2) == 0 { (odd, peer) } else { (peer, odd) };
                let mut changed = pairs.clone();
                let lengths: Vec<usize> =
                    LENGTHS.into_iter().filter(|&it| it != pairs[from][to]).collect();
                changed[from][to] = r.of(&lengths);
                let says = [pairs[from][to], changed[from][to]].map(|count| format!("x {count},"));
                usual.kind = "all_to_all";
                let mut other = usual.clone();
                (usual.pairs, other.pairs) = (Some(pairs), Some(changed));
                (Call::Run(usual), Call::Run(other), says.to_vec())
            }
        }
    }

    fn of_batches(what: What, r: &mut Random) -> (Call, Call, Vec<String>) {
        if what == What::Algorithm {
            let (usual, other) = r.two(&["ring", "tree", "halving-doubling", "double-tree"]);
            let says = vec![usual.to_owned(), other.to_owned()];
            return (Call::Algorithm(usual), Call::Algorithm(other), says);
        }
        let usual: Vec<usize> = (0..1 + r.below(5)).map(|_| r.of(&LENGTHS)).collect();
        let mut other = usual.clone();
        let at = r.below(other.len());
        match (what, r.below(2)) {
            (What::Tensors, 0) => drop(other.pop()),
            (What::Tensors, _) => other.push(r.of(&LENGTHS)),
            _ => other[at] += 1,
        }
        let says =
            [&usual, &other].map(|lengths| format!("{} tensors of {lengths:?}", lengths.len()));
        (Call::Batch(usual), Call::Batch(other), says.to_vec())
    }

    fn of_groups(what: What, r: &mut Random) -> (Call, Call, Vec<String>) {
        match what {
            What::Subset => {
                let lists =
                    [vec![0, 1], vec![1, 0], vec![2, 3], vec![0, 1, 2, 3], vec![], vec![0, 9]];
                let (usual, other) = r.two(&lists);
                let says = [&usual, &other].map(|list| format!("subset {list:?}"));
                (Call::Subset(usual), Call::Subset(other), says.to_vec())
            }
            What::Mesh => {
                let (usual, other) = r.two(&[(1, 4), (4, 1), (2, 2), (3, 3)]);
                let says =
                    [usual, other].map(|(rows, columns)| format!("{rows} rows of {columns}"));
                (Call::Mesh(usual.0, usual.1), Call::Mesh(other.0, other.1), says.to_vec())
            }
            _ => {
                let (usual, other) = r.two(&["split", "duplicate", "Messenger", "Buckets"]);
                let says = vec![usual.to_owned(), other.to_owned()];
                (Call::Make(usual), Call::Make(other), says)
            }
        }
    }

    fn of_messages(what: What, r: &mut Random) -> (Call, Call, Vec<String>) {
        let mut usual =
            Arguments { dtype: Dtype::F32, count: r.of(&LENGTHS), ..Arguments::draw(r) };
        let mut other = usual.clone();
        let says = if what == What::MessageType {
            (usual.dtype, other.dtype) = r.two(&TYPES);
            vec![format!("bytes of {}", usual.dtype), format!("bytes of {}", other.dtype)]
        } else {
            (usual.count, other.count) = r.two(&LENGTHS);
            [usual.count, other.count].map(|count| format!(" {} bytes of f32", 4 * count)).to_vec()
        };
        (Call::Message(usual), Call::Message(other), says)
    }

    fn of_buckets(what: What, r: &mut Random) -> (Call, Call, Vec<String>) {
        let make = |shape, bytes, hook| Call::Buckets { shape, bytes, hook };
        match what {
            What::Shape => {
                let (usual, other) = r.two(&[10, 11, 4000]);
                let says = [usual, other].map(|shape| format!("{shape}"));
                (make(usual, 1 << 20, None), make(other, 1 << 20, None), says.to_vec())
            }
            What::BucketBytes => {
                let (usual, other) = r.two(&[1 << 20, 2 << 20, 1 << 16]);
                let says = [usual, other].map(|bytes| format!("bucket_bytes {bytes}"));
                (make(10, usual, None), make(10, other, None), says.to_vec())
            }
            _ => {
                let hooks = [None, Some(Encoding::Bf16), Some(Encoding::F8E4M3)];
                let (usual, other) = r.two(&hooks);
                let named = |hook: Option<Encoding>| hook.map(|it| Compressed::new(it).name());
                let says =
                    [usual, other].map(|it| named(it).unwrap_or_else(|| "all-reduce".into()));
                (make(10, 1 << 20, usual), make(10, 1 << 20, other), says.to_vec())
            }
        }
    }
}

impl Arguments {
    fn draw(r: &mut Random) -> Self {
        Self {
            kind: r.of(&KINDS),
            dtype: r.of(&TYPES),
            op: ReduceOp::Sum,
            factor: None,
            commutes: None,
            watched: false,
            root: r.below(RANKS),
            count: r.of(&LENGTHS),
            counts: None,
            pairs: None,
        }
    }

    fn reduction<T: Element>(&self) -> Reduction {
        let fold = |acc: &mut [T], other: &[T]| acc.copy_from_slice(other);
        let reduction: Reduction = match (self.factor, self.commutes) {
            (Some(factor), _) => Reduction::sum_scaled_by(factor),
            (_, Some(true)) => CustomOp::commutative(fold).into(),
            (_, Some(false)) => CustomOp::ordered(fold).into(),
            _ => self.op.into(),
        };
        if self.watched { reduction.detect_nonfinite() } else { reduction }
    }

    /// The lengths of input and output on a rank.
    fn lengths(&self, rank: usize) -> (usize, usize) {
        if let Some(pairs) = &self.pairs {
            return (pairs[rank].iter().sum(), pairs.iter().map(|row| row[rank]).sum());
        }
        let all = self.counts.as_ref().map_or(self.count * RANKS, |it| it.iter().sum());
        let own = self.counts.as_ref().map_or(self.count, |counts| counts[rank]);
        let at_root = |len| if rank == self.root { len } else { 0 };
        match self.kind {
            "all_gather" => (own, all),
            "reduce_scatter" => (all, own),
            "all_to_all" => (all, all),
            "gather" => (own, at_root(all)),
            "scatter" => (at_root(all), own),
            _ => (self.count, self.count),
        }
    }

    fn run<T: Element>(&self, comm: &Communicator, one: T) -> Result<(), Error> {
        let reduction = self.reduction::<T>();
        let collective = match self.kind {
            "all_reduce" => Collective::all_reduce(reduction),
            "reduce" => Collective::reduce(reduction, self.root),
            "broadcast" => Collective::broadcast(self.root),
            "all_gather" => Collective::all_gather(),
            "reduce_scatter" => Collective::reduce_scatter(reduction),
            "gather" => Collective::gather(self.root),
            "scatter" => Collective::scatter(self.root),
            _ => Collective::all_to_all(),
        };
        let collective = match (&self.counts, &self.pairs) {
            (Some(counts), _) => collective.with_counts(counts),
            (_, Some(pairs)) => {
                let receives: Vec<usize> = pairs.iter().map(|row| row[comm.rank()]).collect();
                Collective::all_to_all_v(&pairs[comm.rank()], &receives)
            }
            _ => collective,
        };
        let (input, output) = self.lengths(comm.rank());
        let (input, mut output) = (vec![one; input], vec![one; output]);
        comm.run(&collective, Buffers::OutOfPlace(&input, &mut output)).map(drop)
    }

    /// A message round the ring: each rank sends and receives its own idea of it.
    fn message<T: Element>(&self, comm: &Communicator, one: T) -> Result<(), Error> {
        let post = Messenger::new(comm)?;
        let (out, mut inn) = (vec![one; self.count], vec![one; self.count]);
        let (to, from) = ((comm.rank() + 1) % RANKS, (comm.rank() + RANKS - 1) % RANKS);
        post.exchange(&mut [
            Message::Send { data: &out, to, tag: 7 },
            Message::Receive { data: &mut inn, from, tag: 7 },
        ])
    }
}

impl Call {
    fn call(&self, comm: &Communicator) -> Result<(), Error> {
        match self {
            Self::Run(it) => match it.dtype {
                Dtype::F32 => it.run(comm, 1_f32),
                Dtype::F64 => it.run(comm, 1_f64),
                _ => it.run(comm, 1_i32),
            },
            Self::Message(it) => match it.dtype {
                Dtype::F32 => it.message(comm, 1_f32),
                Dtype::F64 => it.message(comm, 1_f64),
                _ => it.message(comm, 1_i32),
            },
            Self::Batch(lengths) => {
                let mut tensors: Vec<Vec<f32>> =
                    lengths.iter().map(|&len| vec![1.0; len]).collect();
                let mut batch: Vec<_> = tensors.iter_mut().map(|it| Buffers::InPlace(it)).collect();
                comm.run_batch(&Collective::all_reduce(ReduceOp::Sum), &mut batch).map(drop)
            }
            Self::Algorithm(name) => {
                comm.set_algorithm(Some(name)).unwrap();
                comm.all_reduce(&mut [1_f32; 3000], ReduceOp::Sum)
            }
            Self::Subset(list) => comm.subset(list).map(drop),
            Self::Mesh(rows, columns) => Mesh::new(comm, *rows, *columns).map(drop),
            Self::Make("split") => comm.split(Some(1), 0).map(drop),
            Self::Make("duplicate") => comm.duplicate().map(drop),
            Self::Make("Messenger") => Messenger::new(comm).map(drop),
            Self::Make(_) => buckets(comm, 10, 1 << 20, None),
            Self::Buckets { shape, bytes, hook } => buckets(comm, *shape, *bytes, *hook),
        }
    }
}

fn buckets(
    comm: &Communicator,
    shape: usize,
    bytes: usize,
    hook: Option<Encoding>,
) -> Result<(), Error> {
    let builder = Buckets::builder(comm).bucket_bytes(bytes);
    let builder = match hook {
        Some(encoding) => builder.hook(Compressed::new(encoding)),
        None => builder,
    };
    builder.build(&[Parameter::new("weight", &[shape], Dtype::F32)]).map(drop)
}
