//! Right and bitwise equal results, on every transport, by every algorithm, between processes.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::time::Duration;

use support::{World, setting, tell};
use unisum::{Collective, Communicator, Element, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("every_algorithm", every_algorithm),
        ("every_type", every_type),
        ("async_in_any_order", async_in_any_order),
        ("special_values", special_values),
        ("repeat", repeat),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);

fn worlds(transport: &str, scenario: &'static str, sizes: &[usize]) {
    for &ranks in sizes {
        World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

#[test]
fn every_algorithm_is_right_on_tcp() {
    worlds("tcp", "every_algorithm", &[1, 2, 3, 4, 5, 7, 8, 16]);
}

#[test]
fn every_algorithm_is_right_on_shared_memory() {
    worlds("shm", "every_algorithm", &[1, 2, 3, 4, 5, 7, 8, 16]);
}

#[test]
fn every_algorithm_is_right_on_rdma() {
    if support::has_rdma() {
        worlds("verbs", "every_algorithm", &[2, 3, 4, 8]);
    }
}

#[test]
fn several_sockets_per_peer_carry_the_same_sums() {
    World::new(3, "every_algorithm")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_TCP_SOCKETS", 3)
        .succeed(LIMIT);
}

#[test]
fn private_memory_works_where_the_kernel_forbids_reading_other_processes() {
    World::new(4, "every_algorithm")
        .set("UNISUM_TRANSPORT", "shm")
        .set("UNISUM_CMA", 0)
        .succeed(LIMIT);
}

#[test]
fn tiny_slices_and_windows_change_nothing() {
    World::new(5, "every_algorithm")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_SLICE_BYTES", "4K")
        .set("UNISUM_WINDOW", 1)
        .succeed(LIMIT);
}

/// Every algorithm, over counts around the world's size and around the slices', in registered and
/// in private memory.
fn every_algorithm() {
    let communicator = Communicator::from_environment().unwrap();
    let world = communicator.world();
    for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
        communicator.set_algorithm(Some(algorithm)).unwrap();
        for count in [0, 1, world - 1, world, world + 1, 1000, 70_001, 300_000] {
            let mut private = vec![0_f32; count];
            let mut registered = communicator.allocate::<f32>(count).unwrap();
            for data in [&mut private[..], &mut registered] {
                check_sum(&communicator, data, &format!("{algorithm}, {count} elements"));
            }
        }
    }
}

fn check_sum(communicator: &Communicator, data: &mut [f32], context: &str) {
    let (rank, world) = (communicator.rank(), communicator.world());
    for (at, element) in data.iter_mut().enumerate() {
        *element = (rank + at % 1000) as f32;
    }
    communicator.all_reduce(data, ReduceOp::Sum).unwrap();
    let ranks = world * (world - 1) / 2;
    for (at, &element) in data.iter().enumerate() {
        let expected = (ranks + world * (at % 1000)) as f32;
        assert_eq!(element, expected, "element {at}, {context}, rank {rank} of {world}");
    }
}

#[test]
fn every_type_and_operation_is_right() {
    for transport in support::transports() {
        worlds(transport, "every_type", &[1, 3, 4]);
    }
}

fn every_type() {
    let communicator = Communicator::from_environment().unwrap();
    for algorithm in ["ring", "one-shot", "two-shot", "halving-doubling"] {
        communicator.set_algorithm(Some(algorithm)).unwrap();
        type_checks::<half::f16>(&communicator, half::f16::from_f32);
        type_checks::<half::bf16>(&communicator, half::bf16::from_f32);
        type_checks::<f32>(&communicator, |value| value);
        type_checks::<f64>(&communicator, f64::from);
        type_checks::<i8>(&communicator, |value| value as i8);
        type_checks::<u8>(&communicator, |value| value as u8);
        type_checks::<i16>(&communicator, |value| value as i16);
        type_checks::<u16>(&communicator, |value| value as u16);
        type_checks::<i32>(&communicator, |value| value as i32);
        type_checks::<u32>(&communicator, |value| value as u32);
        type_checks::<i64>(&communicator, |value| value as i64);
        type_checks::<u64>(&communicator, |value| value as u64);
    }
}

/// Small whole numbers, so that every type holds every result exactly.
fn type_checks<T: Element + PartialEq + std::fmt::Debug>(
    communicator: &Communicator,
    from: impl Fn(f32) -> T,
) {
    let world = communicator.world();
    let value = |rank: usize, at: usize| (1 + (rank + at) % 3) as f32;
    for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max, ReduceOp::Average] {
        for count in [1, 37, 5003] {
            let mut data: Vec<T> =
                (0..count).map(|at| from(value(communicator.rank(), at))).collect();
            if op == ReduceOp::Average {
                // The same on all ranks: the average of equal values is that value.
                data = (0..count).map(|at| from(value(0, at))).collect();
            }
            communicator.all_reduce(&mut data, op).unwrap();
            for (at, result) in data.iter().enumerate() {
                let values = (0..world).map(|rank| value(rank, at));
                let expected = match op {
                    ReduceOp::Sum => values.sum(),
                    ReduceOp::Product => values.product(),
                    ReduceOp::Min => values.fold(f32::MAX, f32::min),
                    ReduceOp::Max => values.fold(0.0, f32::max),
                    _ => value(0, at),
                };
                assert_eq!(*result, from(expected), "{op} of {}, element {at}", T::DTYPE);
            }
        }
    }
}

#[test]
fn async_operations_complete_whatever_the_order_of_waiting() {
    for transport in support::transports() {
        worlds(transport, "async_in_any_order", &[1, 2, 5]);
    }
}

fn async_in_any_order() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let start = |number: usize| {
        let count = 1 + number * 997;
        if number.is_multiple_of(2) {
            let data = vec![(number + rank) as i64; count];
            Ok(communicator.all_reduce_async(data, ReduceOp::Sum))
        } else {
            let mut data = communicator.allocate::<i64>(count).unwrap();
            data.fill((number + rank) as i64);
            Err(communicator.all_reduce_async(data, ReduceOp::Sum))
        }
    };
    let mut works: Vec<_> = (0..12).map(|number| (number, start(number))).collect();
    // A blocking call in between runs after all of them.
    let mut blocking = [rank as u32];
    communicator.all_reduce(&mut blocking, ReduceOp::Max).unwrap();
    assert_eq!(blocking, [world as u32 - 1]);
    // Each rank waits in an order of its own; one work is dropped.
    works.rotate_left(rank * 5 % 12);
    works.swap(0, 7);
    drop(works.remove(3));
    for (number, work) in works {
        let expected = (world * number + world * (world - 1) / 2) as i64;
        match work {
            Ok(work) => assert!(work.wait().unwrap().iter().all(|&sum| sum == expected)),
            Err(work) => assert!(work.wait().unwrap().iter().all(|&sum| sum == expected)),
        }
    }
}

#[test]
fn nan_infinity_zero_and_overflow_give_the_same_bits_everywhere() {
    for transport in support::transports() {
        for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
            let all_told = World::new(4, "special_values")
                .set("UNISUM_TRANSPORT", transport)
                .set("UNISUM_ALGORITHM", algorithm)
                .succeed(LIMIT);
            assert!(!all_told[0].is_empty());
            let same = all_told.iter().all(|told| *told == all_told[0]);
            assert!(same, "{algorithm}: {all_told:#?}");
        }
    }
}

fn special_values() {
    let communicator = Communicator::from_environment().unwrap();
    let rank = communicator.rank();
    let payload = f32::from_bits(0x7fc0_0000 | (rank as u32 + 1));
    let special =
        [f32::NAN, -payload, payload, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MAX];
    for op in [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max, ReduceOp::Average] {
        // Every pair of special values meets on some ranks.
        let mut data: Vec<f32> =
            (0..4096).map(|at| special[(at >> (3 * rank)) % special.len()]).collect();
        communicator.all_reduce(&mut data, op).unwrap();
        for element in data.iter().filter(|element| element.is_nan()) {
            assert_eq!(element.to_bits(), 0x7fc0_0000, "{op}: NaN is the canonical one");
        }
        let mut integers = [i32::MAX, i32::MIN, -1];
        communicator.all_reduce(&mut integers, op).unwrap();
        tell(format!("{op} {:016x} {integers:?}", hash(&data)));
    }
}

#[test]
fn the_same_call_gives_the_same_bits_in_every_run() {
    for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
        let run = || {
            World::new(5, "repeat")
                .set("UNISUM_TRANSPORT", "tcp")
                .set("UNISUM_ALGORITHM", algorithm)
                .succeed(LIMIT)
        };
        let (first, second) = (run(), run());
        assert_eq!(first, second, "{algorithm}");
        assert!(first.iter().all(|told| *told == first[0]), "{algorithm}: {first:#?}");
    }
}

/// Values whose sum depends on the order of adding.
fn repeat() {
    let communicator = Communicator::from_environment().unwrap();
    let mut state = communicator.rank() as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        f32::from_bits((state >> 33) as u32 & 0x3fff_ffff)
    };
    let mut data: Vec<f32> = (0..100_000).map(|_| next()).collect();
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    tell(format!("{:016x} {}", hash(&data), setting("UNISUM_ALGORITHM")));
}

fn hash(data: &[f32]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, element| {
        (hash ^ u64::from(element.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}
