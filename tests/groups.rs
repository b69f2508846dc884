//! Groups of ranks, between processes.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs::File;
use std::time::{Duration, Instant};
use std::{iter, thread};

use support::{World, await_others, reach, tell};
use unisum::{Collective, Communicator, ErrorKind, InPlace, Mesh, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("split", split),
        ("crossed", crossed),
        ("hybrid", hybrid),
        ("late_in_group", late_in_group),
        ("out_of_descriptors", out_of_descriptors),
        ("different_calls", different_calls),
        ("outlives", outlives),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn on_both(ranks: usize, scenario: &'static str) {
    for transport in support::transports() {
        World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn sum(communicator: &Communicator, value: u64) -> u64 {
    let mut data = communicator.allocate(1).unwrap();
    data[0] = value;
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    data[0]
}

#[test]
fn ranks_are_divided_by_color_and_numbered_by_key() {
    on_both(7, "split");
}

fn split() {
    let all = Communicator::from_environment().unwrap();
    let rank = all.rank();
    // Rank 6 is in no group; the others in two, numbered backwards.
    let color = (rank < 6).then_some(rank as u32 % 2);
    let group = all.split(color, -(rank as i64)).unwrap();
    let Some(group) = group else {
        assert_eq!(rank, 6);
        assert_eq!(sum(&all, 1), 7);
        return;
    };
    assert_eq!((group.rank(), group.world()), ((5 - rank) / 2, 3));
    let members = if rank.is_multiple_of(2) { 2 + 4 } else { 1 + 3 + 5 };
    assert_eq!(sum(&group, rank as u64), members);
    assert_eq!(sum(&all, 1), 7);
    let half = group.subset(&[2, 0]).unwrap();
    assert_eq!(half.is_none(), group.rank() == 1);
    if let Some(half) = half {
        assert_eq!(half.rank(), usize::from(group.rank() == 0));
        assert_eq!(sum(&half, rank as u64), if rank.is_multiple_of(2) { 4 } else { 1 + 5 });
        let alone = half.split(Some(rank as u32), 0).unwrap().unwrap();
        assert_eq!((alone.world(), sum(&alone, 5)), (1, 5));
    }
    let copy = group.duplicate().unwrap();
    drop(group);
    assert_eq!(sum(&copy, rank as u64), members);
}

#[test]
fn groups_that_are_called_in_different_order_do_not_deadlock() {
    on_both(4, "crossed");
}

/// Two communicators of the same ranks, each driven by a thread; large enough that nobody gets
/// through without the others. Half of the ranks call the one first, half the other.
fn crossed() {
    let all = Communicator::from_environment().unwrap();
    let other = all.duplicate().unwrap();
    let round = |communicator: &Communicator, seed: u64| {
        let mut data = vec![seed + communicator.rank() as u64; 300_000];
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!(data.iter().all(|&element| element == 4 * seed + 6));
    };
    for seed in 0..20 {
        thread::scope(|scope| {
            let (first, second) =
                if all.rank().is_multiple_of(2) { (&all, &other) } else { (&other, &all) };
            let started = scope.spawn(move || round(first, seed));
            scope.spawn(move || round(second, seed));
            started.join().unwrap();
        });
        // And asynchronously, waited for in opposite order.
        let work = |communicator: &Communicator| {
            let data = InPlace(vec![1_u32; 100_000]);
            communicator.start::<u32, _>(Collective::all_reduce(ReduceOp::Sum), data)
        };
        let (first, second) =
            if all.rank().is_multiple_of(2) { (&all, &other) } else { (&other, &all) };
        let (first, second) = (work(first), work(second));
        assert_eq!(second.wait().unwrap().0.0[5], 4);
        assert_eq!(first.wait().unwrap().0.0[5], 4);
    }
}

#[test]
fn hybrid_parallelism_gives_the_result_of_one_process() {
    on_both(6, "hybrid");
}

#[test]
fn a_split_fails_on_all_ranks_if_one_runs_out_of_descriptors_and_can_be_tried_again() {
    on_both(5, "out_of_descriptors");
}

fn out_of_descriptors() {
    let all = Communicator::from_environment().unwrap();
    // Ranks 0 and 1 are a group, 2 and 3 another, 4 is in none.
    let color = [Some(0), Some(0), Some(1), Some(1), None][all.rank()];
    // From here on the sockets to the others, by which ranks agree, are open.
    drop(all.split(color, 0).unwrap());
    assert_eq!(sum(&all, 1), 5);
    let mut taken = Vec::new();
    if all.rank() == 1 {
        // Few for the process, enough for the sockets that it has to wait for; and all in use.
        let few = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
        // SAFETY: the struct outlives the call, which only lowers this process's limit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) }, 0);
        taken.extend(iter::from_fn(|| File::open("/dev/null").ok()));
    }
    let start = Instant::now();
    let error = all.split(color, 0).unwrap_err();
    assert!(start.elapsed() < LIMIT / 2, "after {:?}: {error}", start.elapsed());
    assert!(error.to_string().contains("Too many open files"), "{error}");
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Resources, &[1][..]), "{error}");
    // And all can go on, and do it again when there are descriptors.
    assert_eq!(sum(&all, 1), 5);
    drop(taken);
    let group = all.split(color, 0).unwrap();
    assert_eq!(group.map(|group| sum(&group, 1)), color.map(|_| 2));
}

const BATCH: usize = 6;
const IN: usize = 8;
const OUT: usize = 12;

fn weight(row: usize, column: usize) -> f64 {
    ((row * 7 + column * 3) % 11) as f64 - 5.0
}

fn sample(row: usize, column: usize) -> f64 {
    ((row * 5 + column) % 9) as f64 - 4.0
}

/// A linear layer y = x·W on 2 copies of the model with 3 parts each: the columns of W are divided
/// among the ranks of a row of the mesh, the samples among the rows. Whole numbers, so that the
/// order of adding does not matter. Loss: the sum of y²/2, so that dW = xᵀ·y and dx = y·Wᵀ.
fn hybrid() {
    let all = Communicator::from_environment().unwrap();
    assert_eq!(Mesh::new(&all, 2, 2).unwrap_err().kind(), ErrorKind::Configuration);
    let mesh = Mesh::new(&all, 2, 3).unwrap();
    let (copy, part) = (mesh.column.rank(), mesh.row.rank());
    let (rows, columns) = (BATCH / 2, OUT / 3);
    let x = |row: usize, at: usize| sample(copy * rows + row, at);
    let w = |at: usize, column: usize| weight(at, part * columns + column);
    let dot = |len: usize, term: &dyn Fn(usize) -> f64| (0..len).map(term).sum::<f64>();
    // Forward: this part's columns of y, then all of them.
    let y: Vec<f64> = (0..rows * columns)
        .map(|i| dot(IN, &|at| x(i / columns, at) * w(at, i % columns)))
        .collect();
    let mut parts = vec![0.0; rows * OUT];
    mesh.row.all_gather(&y, &mut parts).unwrap();
    // Backward: the part's gradient, summed over the copies; the input's, over the parts.
    let mut dw: Vec<f64> = (0..IN * columns)
        .map(|i| dot(rows, &|row| x(row, i / columns) * y[row * columns + i % columns]))
        .collect();
    mesh.column.all_reduce(&mut dw, ReduceOp::Sum).unwrap();
    let mut dx: Vec<f64> = (0..rows * IN)
        .map(|i| dot(columns, &|column| y[i / IN * columns + column] * w(i % IN, column)))
        .collect();
    mesh.row.all_reduce(&mut dx, ReduceOp::Sum).unwrap();
    // The same in one process.
    let whole = |row: usize, column: usize| dot(IN, &|at| sample(row, at) * weight(at, column));
    for (i, &element) in parts.iter().enumerate() {
        let (of, row, column) = (i / (rows * columns), i / columns % rows, i % columns);
        assert_eq!(element, whole(copy * rows + row, of * columns + column), "y");
    }
    for (i, &element) in dw.iter().enumerate() {
        let (at, column) = (i / columns, part * columns + i % columns);
        assert_eq!(element, dot(BATCH, &|row| sample(row, at) * whole(row, column)), "dW");
    }
    for (i, &element) in dx.iter().enumerate() {
        let row = copy * rows + i / IN;
        assert_eq!(element, dot(OUT, &|column| whole(row, column) * weight(i % IN, column)), "dx");
    }
}

#[test]
fn a_rank_that_never_calls_in_its_group_is_named_by_its_number_in_the_job() {
    for transport in support::transports() {
        let ended = World::new(4, "late_in_group")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_TIMEOUT", "5")
            .run(LIMIT);
        for (rank, ended) in ended.iter().enumerate() {
            assert_eq!(ended.status, 0, "rank {rank}, {transport}: {ended:#?}");
        }
    }
}

fn late_in_group() {
    let all = Communicator::from_environment().unwrap();
    // Group 0: ranks 0 and 2, group 1: ranks 1 and 3, of which 3 never calls.
    let group = all.split(Some(all.rank() as u32 % 2), 0).unwrap().unwrap();
    let other = all.duplicate().unwrap();
    for _ in 0..5 {
        assert_eq!(sum(&other, 1), 4);
    }
    // Nobody leaves before rank 1 has found out.
    if all.rank() == 3 {
        return await_others("found", 1, LIMIT);
    }
    let mut data = [1.0_f32; 100];
    if all.rank() != 1 {
        group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        return await_others("found", 1, LIMIT);
    }
    let error = group.all_reduce(&mut data, ReduceOp::Sum).unwrap_err();
    reach("found");
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Timeout, &[3][..]), "{error}");
    assert!(error.to_string().contains("of group"), "{error}");
}

#[test]
fn calls_that_differ_in_a_group_are_told_apart_from_those_of_others() {
    on_both(4, "different_calls");
}

fn different_calls() {
    let all = Communicator::from_environment().unwrap();
    let group = all.split(Some(all.rank() as u32 / 2), 0).unwrap().unwrap();
    // Group 0 calls one thing, group 1 another, under the same numbers: nobody minds.
    for count in 1..10 {
        let mut data = vec![1_i32; count * (1 + all.rank() / 2)];
        group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!(data.iter().all(|&element| element == 2));
    }
    all.barrier().unwrap();
    let mut data = vec![1_i32; 10 + all.rank()];
    let error = group.all_reduce(&mut data, ReduceOp::Sum).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}");
}

#[test]
fn a_group_outlives_the_communicator_it_came_from() {
    on_both(3, "outlives");
}

fn outlives() {
    let all = Communicator::from_environment().unwrap();
    let mut data = all.allocate::<f32>(1000).unwrap();
    let group = all.duplicate().unwrap();
    drop(all);
    data.fill(1.0);
    group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert!(data.iter().all(|&element| element == 3.0));
    tell("done");
}
