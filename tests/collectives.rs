//! Every collective by every algorithm, between processes, against what one process computes.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::ptr::NonNull;
use std::time::Duration;

use support::World;
use unisum::{Buffers, Collective, Communicator, Dtype, Element, ErrorKind, RawBuffers, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("every_collective", every_collective)]);
}

const LIMIT: Duration = Duration::from_secs(100);

#[test]
fn every_collective_is_right_on_tcp() {
    for ranks in [1, 2, 3, 5, 8] {
        World::new(ranks, "every_collective").set("UNISUM_TRANSPORT", "tcp").succeed(LIMIT);
    }
}

#[test]
fn every_collective_is_right_on_shared_memory() {
    for ranks in [1, 2, 3, 5, 8] {
        World::new(ranks, "every_collective").set("UNISUM_TRANSPORT", "shm").succeed(LIMIT);
    }
}

#[test]
fn every_collective_is_right_on_rdma() {
    if support::has_rdma() {
        World::new(3, "every_collective").set("UNISUM_TRANSPORT", "verbs").succeed(LIMIT);
    }
}

/// A collective and what it means: which elements of the input, seen as blocks, a rank gets.
struct Case {
    collective: Collective,
    /// Elements that this rank puts in and gets, for blocks of `count` elements.
    lengths: fn(world: usize, rank: usize, root: usize, count: usize) -> (usize, usize),
    /// Element `at` of this rank's result.
    result: fn(world: usize, rank: usize, root: usize, count: usize, at: usize) -> i64,
}

/// Element `at` of what `rank` puts in.
fn input(rank: usize, at: usize) -> i64 {
    (rank * 1_000_003 + at * 17 % 4099) as i64
}

fn sum(world: usize, at: usize) -> i64 {
    (0..world).map(|rank| input(rank, at)).sum()
}

fn average(world: usize, at: usize) -> i64 {
    sum(world, at) / world as i64
}

fn cases(root: usize) -> Vec<Case> {
    let case = |collective, lengths, result| Case { collective, lengths, result };
    vec![
        case(
            Collective::all_reduce(ReduceOp::Sum),
            |_, _, _, count| (count, count),
            |world, _, _, _, at| sum(world, at),
        ),
        case(
            Collective::reduce(ReduceOp::Sum, root),
            |_, rank, root, count| (count, if rank == root { count } else { 0 }),
            |world, _, _, _, at| sum(world, at),
        ),
        case(
            Collective::broadcast(root),
            |_, rank, root, count| (if rank == root { count } else { 0 }, count),
            |_, _, root, _, at| input(root, at),
        ),
        case(
            Collective::all_gather(),
            |world, _, _, count| (count, world * count),
            |_, _, _, count, at| input(at / count, at % count),
        ),
        case(
            Collective::reduce_scatter(ReduceOp::Sum),
            |world, _, _, count| (world * count, count),
            |world, rank, _, count, at| sum(world, rank * count + at),
        ),
        case(
            Collective::all_reduce(ReduceOp::Average),
            |_, _, _, count| (count, count),
            |world, _, _, _, at| average(world, at),
        ),
        case(
            Collective::reduce(ReduceOp::Average, root),
            |_, rank, root, count| (count, if rank == root { count } else { 0 }),
            |world, _, _, _, at| average(world, at),
        ),
        case(
            Collective::reduce_scatter(ReduceOp::Average),
            |world, _, _, count| (world * count, count),
            |world, rank, _, count, at| average(world, rank * count + at),
        ),
        case(
            Collective::all_to_all(),
            |world, _, _, count| (world * count, world * count),
            |_, rank, _, count, at| input(at / count, rank * count + at % count),
        ),
        case(
            Collective::gather(root),
            |world, rank, root, count| (count, if rank == root { world * count } else { 0 }),
            |_, _, _, count, at| input(at / count, at % count),
        ),
        case(
            Collective::scatter(root),
            |world, rank, root, count| (if rank == root { world * count } else { 0 }, count),
            |_, rank, root, count, at| input(root, rank * count + at),
        ),
    ]
}

fn every_collective() {
    let communicator = Communicator::from_environment().unwrap();
    let world = communicator.world();
    for root in [0, world - 1] {
        for case in cases(root) {
            let algorithms = case.collective.algorithms();
            for algorithm in algorithms.into_iter().map(Some).chain([None]) {
                communicator.set_algorithm(algorithm).unwrap();
                for count in [0, 1, world + 1, 1000, 30_001] {
                    apart(&communicator, &case, root, count, algorithm);
                }
            }
        }
    }
    types_at_run_time(&communicator);
    communicator.barrier().unwrap();
}

/// The calls whose element type is a value: odd lengths of bytes, so that copies have tails.
fn types_at_run_time(comm: &Communicator) {
    let (world, rank) = (comm.world(), comm.rank());
    for each in [0, 1, 13, 70_001] {
        let mut data: Vec<u8> =
            (0..world).flat_map(|to| vec![(rank * world + to) as u8; each]).collect();
        let start = NonNull::from(&mut data[..]).cast();
        // SAFETY: the vector is not touched until the calls have ended.
        let raw = || unsafe { RawBuffers::in_place(Dtype::U8, start, world * each) };
        comm.run_raw(&Collective::all_to_all(), raw()).unwrap();
        let gets = (0..world).flat_map(|from| vec![(from * world + rank) as u8; each]);
        assert_eq!(data, gets.collect::<Vec<_>>(), "{each} elements for each");
        let sums: Vec<u8> = data.iter().map(|it| it.wrapping_mul(world as u8)).collect();
        if each > 0 {
            comm.run_raw(&Collective::broadcast(0), raw()).unwrap();
            comm.run_batch_raw(&Collective::all_reduce(ReduceOp::Sum), Dtype::U8, &mut [raw()])
                .unwrap();
        }
        if rank == 0 {
            assert_eq!(data, sums);
        }
    }
    let (mut bytes, mut others) = ([0_u8; 4], [0_i8; 4]);
    let mut mixed =
        [Buffers::InPlace(&mut bytes[..]).into(), Buffers::InPlace(&mut others[..]).into()];
    let sum = Collective::all_reduce(ReduceOp::Sum);
    let refused = comm.run_batch_raw(&sum, Dtype::U8, &mut mixed).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains("tensor 1 of a batch of u8 has elements of i8"));
}

/// Out of place, from and to private and registered memory.
fn apart(comm: &Communicator, case: &Case, root: usize, count: usize, algorithm: Option<&str>) {
    let (world, rank) = (comm.world(), comm.rank());
    let (puts, gets) = (case.lengths)(world, rank, root, count);
    let values: Vec<i64> = (0..puts).map(|at| input(rank, at)).collect();
    let mut registered_input = registered(comm, puts);
    registered_input.copy_from_slice(&values);
    let mut registered_output = registered(comm, gets);
    let mut output = vec![-1; gets];
    let context = format!("{:?} {algorithm:?}, {count}, root {root}, rank {rank}", case.collective);
    for (input, output) in
        [(&values[..], &mut output[..]), (&registered_input, &mut registered_output)]
    {
        comm.run(&case.collective, Buffers::OutOfPlace(input, output)).unwrap();
        for (at, &element) in output.iter().enumerate() {
            let expected = (case.result)(world, rank, root, count, at);
            assert_eq!(element, expected, "element {at}: {context}");
        }
        assert_eq!(input, values, "{context}: the input changed");
    }
}

fn registered<T: Element>(comm: &Communicator, count: usize) -> unisum::Buffer<T> {
    comm.allocate(count).unwrap()
}
