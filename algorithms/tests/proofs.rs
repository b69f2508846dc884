//! Every algorithm is an all-reduce, whatever the world, the count and the placement.

use proptest::prelude::*;
use unisum_algorithms::{Algorithm, Shape, Step, Topology, all, prove, prove_plans, slice};

fn assert_proven(algorithm: &dyn Algorithm, shape: &Shape) {
    prove(algorithm, shape)
        .unwrap_or_else(|fault| panic!("{}, {shape:?}: {fault}", algorithm.name()));
}

#[test]
fn every_algorithm_counts_each_input_once_in_the_same_order() {
    for algorithm in all() {
        for world in 1..=33 {
            for count in [0, 1, world - 1, world, world + 1, 100_000] {
                assert_proven(*algorithm, &Shape::flat(world, count));
            }
        }
    }
}

#[test]
fn uneven_nodes_are_proven() {
    let placements: [&[usize]; 6] =
        [&[1, 1], &[3, 1], &[4, 3, 5], &[1; 9], &[8, 7, 8, 8], &[2, 6, 3]];
    for algorithm in all() {
        for sizes in placements {
            for count in [1, 7, 64, 100_000] {
                assert_proven(*algorithm, &Shape { topology: Topology::nodes(sizes), count });
            }
        }
    }
}

#[test]
fn a_world_of_one_does_nothing() {
    for algorithm in all() {
        assert_eq!(algorithm.steps(&Shape::flat(1, 100), 0).count(), 0, "{}", algorithm.name());
    }
}

#[test]
fn names_are_distinct_and_found() {
    for algorithm in all() {
        let found = unisum_algorithms::by_name(algorithm.name()).unwrap();
        assert!(std::ptr::addr_eq(found, *algorithm), "{}", algorithm.name());
    }
    assert!(unisum_algorithms::by_name("no such").is_none());
}

/// A world of up to 64 ranks scattered over up to 6 nodes.
fn topologies() -> impl Strategy<Value = Topology> {
    prop::collection::vec(0u32..6, 1..=64).prop_map(Topology::from_node_of)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn scattered_placements_are_proven(
        topology in topologies(), count in 0usize..3000, which in 0..all().len(),
    ) {
        let shape = Shape { topology, count };
        prop_assert_eq!(prove(all()[which], &shape), Ok(()), "{}", all()[which].name());
    }

    #[test]
    fn any_slice_length_is_proven(
        world in 2usize..14, count in 1usize..5000, slices in 1usize..40, window in 1usize..10,
    ) {
        let shape = Shape { topology: Topology::nodes(&[world / 2, world - world / 2]), count };
        for algorithm in all() {
            let plan = |rank| slice(algorithm.steps(&shape, rank), count.div_ceil(slices));
            let plans: Vec<Vec<Step>> = (0..world).map(plan).collect();
            prop_assert_eq!(prove_plans(&plans, count, window), Ok(()), "{}", algorithm.name());
        }
    }
}
