//! Calls that can't be right: an error that says why, on every rank, soon, and never a hang.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::Duration;

use support::stopwatch::Stopwatch;
use support::{World, setting, tell};
use unisum::{
    Buffers, Collective, Communicator, CustomOp, Error, ErrorKind, Mesh, Messenger, MismatchedCall,
    ReduceOp, Reduction,
};

#[test]
fn rank_process() {
    support::run_if_rank(&[("differ", differ), ("refused", refused), ("makings", makings)]);
}

const LIMIT: Duration = Duration::from_secs(60);

/// What rank 1 does otherwise than the others, and what every rank's error begins with and says.
const DIFFERENCES: [(&str, &str, &[&str]); 14] = [
    ("kind", "Mismatch", &["all_gather", "all_reduce"]),
    ("root", "Mismatch", &["broadcast"]),
    ("counts", "Mismatch", &["all_gather"]),
    ("factor", "Mismatch", &["all_reduce"]),
    ("function", "Mismatch", &["all_reduce"]),
    ("short", "Mismatch [1]", &["rank 1", "the output has 8 elements where 9 are needed"]),
    ("indivisible", "Mismatch [1]", &["rank 1", "can't be divided into 3 blocks"]),
    ("own block", "Mismatch [1]", &["rank 1", "sends itself 1 elements and receives 2"]),
    ("pair", "Mismatch [0, 1]", &["all_to_all", "f32 x 1", "f32 x 5"]),
    ("no pair", "Mismatch [0, 1]", &["all_to_all", "f32 x 1", "f32 x 0"]),
    ("long pair", "Mismatch [0, 1]", &["all_to_all", "f32 x 65536", "f32 x 131072"]),
    ("batch", "Mismatch", &["all_reduce"]),
    ("tensor", "Mismatch [1]", &["rank 1", "tensor 1 of a batch: ", "where 9 are needed"]),
    ("panic", "Panicked [1]", &["on rank 1 the reduction function panicked: as the test has it"]),
];

#[test]
fn what_differs_between_ranks_is_an_error_on_all_that_says_what() {
    for transport in ["tcp", "shm"] {
        for (how, begins, says) in DIFFERENCES {
            let start = Stopwatch::start();
            let world = World::new(3, "differ").set("UNISUM_TRANSPORT", transport).set("HOW", how);
            for (rank, told) in world.succeed(LIMIT).iter().enumerate() {
                let (text, context) = (&told[0], format!("{transport}, {how}, rank {rank}"));
                assert!(text.starts_with(begins), "{context}: {text}");
                assert!(says.iter().all(|part| text.contains(part)), "{context}: {text}");
            }
            start.assert_within(Duration::from_secs(12), LIMIT / 2, &format!("{transport}, {how}"));
        }
    }
}

fn differ() {
    let comm = Communicator::from_environment().unwrap();
    let how = setting("HOW");
    // Who got all it waits for hears of it in the next call.
    let error = call(&comm, &how, comm.rank() == 1).and_then(|()| comm.barrier()).unwrap_err();
    tell(format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()));
    check_calls(&how, &error);
    let again = comm.all_reduce(&mut [1_f32], ReduceOp::Sum).unwrap_err();
    assert_eq!((again.kind(), again.failed_ranks()), (ErrorKind::Aborted, error.failed_ranks()));
}

/// What differs is told as data as well, on every rank.
fn check_calls(how: &str, error: &Error) {
    let calls = error.mismatched_calls();
    let both = |field: fn(&MismatchedCall) -> String| {
        let mut both = calls.expect("the calls differ").each_ref().map(field);
        both.sort();
        both
    };
    match how {
        "kind" => assert_eq!(both(|it| it.collective.to_owned()), ["all_gather", "all_reduce"]),
        "root" => assert_eq!(both(|it| format!("{:?}", it.root)), ["Some(0)", "Some(2)"]),
        "pair" => assert_eq!(both(|it| format!("{:?}", it.count)), ["Some(1)", "Some(5)"]),
        "short" | "indivisible" | "panic" => assert_eq!(calls, None),
        _ => {}
    }
    let ranks = calls.map(|calls| calls.each_ref().map(|call| call.rank));
    assert!(ranks.is_none_or(|[one, other]| one != other), "{calls:?}");
}

fn call(comm: &Communicator, how: &str, is_odd: bool) -> Result<(), Error> {
    let input = [1_f32; 3];
    let (mut output, mut data) = ([0_f32; 9], [1_f32; 300]);
    match how {
        "kind" if is_odd => comm.all_gather(&data[..3], &mut output),
        "root" => comm.broadcast(&mut data, pick(is_odd, 2, 0)),
        "counts" => {
            let gather = Collective::all_gather().with_counts(&pick(is_odd, [2, 3, 4], [4, 3, 2]));
            let own = gather_count(comm.rank(), is_odd);
            comm.run(&gather, Buffers::OutOfPlace(&data[..own], &mut output)).map(drop)
        }
        "factor" => comm.all_reduce(&mut data, Reduction::sum_scaled_by(pick(is_odd, 0.5, 0.25))),
        "function" if is_odd => comm.all_reduce(&mut data, CustomOp::commutative(last)),
        "short" => comm.all_gather(&input, &mut output[..pick(is_odd, 8, 9)]),
        "indivisible" => comm.all_to_all(&data[..pick(is_odd, 10, 9)], &mut output),
        "own block" => {
            let receives = pick(is_odd, [1, 2, 1], [1; 3]);
            let to_all = Collective::all_to_all_v(&[1; 3], &receives);
            let gets = receives.iter().sum();
            comm.run(&to_all, Buffers::OutOfPlace(&input, &mut output[..gets])).map(drop)
        }
        "pair" => pairs(comm, pick(is_odd, 5, 1), 1),
        "no pair" => pairs(comm, pick(is_odd, 0, 1), 1),
        // By a whole slice, of which the first is alike.
        "long pair" => pairs(comm, pick(is_odd, 1 << 17, 1 << 16), 1 << 16),
        "batch" => {
            // As many elements in all.
            let (first, second) = data.split_at_mut(pick(is_odd, 100, 200));
            let mut batch = [Buffers::InPlace(first), Buffers::InPlace(second)];
            comm.run_batch(&Collective::all_reduce(ReduceOp::Sum), &mut batch).map(drop)
        }
        "tensor" => {
            let (first, second) = data.split_at_mut(9);
            let second = &mut second[..pick(is_odd, 8, 9)];
            let mut batch =
                [Buffers::OutOfPlace(&input, first), Buffers::OutOfPlace(&input, second)];
            comm.run_batch(&Collective::all_gather(), &mut batch).map(drop)
        }
        "panic" => {
            // Every rank folds a part.
            comm.set_algorithm(Some("ring")).unwrap();
            let function = pick::<fn(&mut [f32], &[f32])>(is_odd, panics, last);
            comm.all_reduce(&mut data, CustomOp::commutative(function))
        }
        _ => comm.all_reduce(&mut data, ReduceOp::Sum),
    }
}

/// Every rank has `each` elements for every other, and rank 1 expects `expected` of rank 0.
fn pairs(comm: &Communicator, expected: usize, each: usize) -> Result<(), Error> {
    let receives = [expected, each, each];
    let to_all = Collective::all_to_all_v(&[each; 3], &receives);
    let (input, mut output) = (vec![1_f32; 3 * each], vec![0_f32; receives.iter().sum()]);
    comm.run(&to_all, Buffers::OutOfPlace(&input, &mut output)).map(drop)
}

fn pick<T>(is_odd: bool, odd: T, other: T) -> T {
    if is_odd { odd } else { other }
}

const fn gather_count(rank: usize, is_odd: bool) -> usize {
    if is_odd { 2 + rank } else { 4 - rank }
}

fn last(acc: &mut [f32], other: &[f32]) {
    acc.copy_from_slice(other);
}

fn panics(_: &mut [f32], _: &[f32]) {
    panic!("as the test has it");
}

#[test]
fn what_can_never_be_right_is_refused_and_the_communicator_stays_usable() {
    for (transport, ranks) in [("tcp", 3), ("shm", 3), ("tcp", 1)] {
        World::new(ranks, "refused").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn refused() {
    let comm = Communicator::from_environment().unwrap();
    let world = comm.world();
    let huge = vec![usize::MAX; world];
    let ones = vec![1; world + 1];
    let refuse = |collective: Collective, says: &str| {
        let error = comm.run(&collective, Buffers::InPlace(&mut vec![1_f32; world])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        let mut data = [1_u32; 5];
        comm.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [world as u32; 5]);
    };
    refuse(Collective::all_reduce(ReduceOp::BitXor), "bitxor is not defined for f32");
    refuse(Collective::broadcast(world), "to be the root");
    refuse(Collective::scatter(usize::MAX), "to be the root");
    refuse(Collective::all_gather().with_counts(&ones), "counts were given");
    refuse(Collective::all_gather().with_counts(&huge), "more elements than memory can hold");
    refuse(Collective::all_to_all_v(&huge, &huge), "more elements than memory can hold");
    refuse(Collective::broadcast(0).with_counts(&ones[1..]), "takes no counts");
    let made_for_others = CustomOp::commutative(|_: &mut [u64], _: &[u64]| {});
    refuse(Collective::all_reduce(made_for_others), "reduces u64 was given elements of f32");
    let scaled = Reduction::sum_scaled_by(0.5);
    let error = comm.all_reduce(&mut [1_i32; 3], scaled).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    comm.barrier().unwrap();
}

#[test]
fn groups_that_ranks_make_in_different_ways_are_refused_on_all_with_both_ways() {
    for transport in ["tcp", "shm"] {
        World::new(4, "makings").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn makings() {
    let comm = Communicator::from_environment().unwrap();
    let is_odd = comm.rank() == 2;
    let refuse = |made: Result<(), Error>, kind: ErrorKind, says: [&str; 2]| {
        let error = made.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(says.iter().all(|part| error.to_string().contains(part)), "{error}");
        if kind == ErrorKind::Mismatch {
            assert_eq!(error.failed_ranks(), [0, 2], "{error}");
        }
        let mut data = [1_u32; 5];
        comm.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [4; 5]);
    };
    let lists: [&[usize]; 4] = [&[2, 3], &[1, 0], &[0, 1, 2], &[0, 7]];
    for list in lists {
        let made = comm.subset(if is_odd { list } else { &[0, 1] }).map(drop);
        refuse(made, ErrorKind::Mismatch, ["subset [0, 1]", &format!("subset {list:?}")]);
    }
    let made = comm.subset(&[0, 7]).map(drop);
    refuse(made, ErrorKind::Configuration, ["subset [0, 7]", "rank 7"]);
    let (rows, columns) = if is_odd { (4, 1) } else { (2, 2) };
    let made = Mesh::new(&comm, rows, columns).map(drop);
    refuse(made, ErrorKind::Mismatch, ["2 rows of 2", "4 rows of 1"]);
    let made = Mesh::new(&comm, 0, 0).map(drop);
    refuse(made, ErrorKind::Configuration, ["no 0 rows", "of 0"]);
    let made = match is_odd {
        true => Messenger::new(&comm).map(drop),
        false => comm.duplicate().map(drop),
    };
    refuse(made, ErrorKind::Mismatch, ["duplicate", "Messenger"]);
    let made = match is_odd {
        true => comm.split(Some(0), 2).map(drop),
        false => comm.subset(&[0, 1, 2, 3]).map(drop),
    };
    refuse(made, ErrorKind::Mismatch, ["subset [0, 1, 2, 3]", "split"]);
}
