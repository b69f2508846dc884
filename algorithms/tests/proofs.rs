//! Every algorithm does what its collective says, whatever the world, the counts, the root and the
//! placement.

mod support;

use proptest::prelude::*;
use support::{collectives, even, with_every_root};
use unisum_algorithms::{
    Algorithm, Fault, Pattern, PlanKind, Shape, Step, Topology, algorithms, prove, prove_each,
    prove_plans, prove_rank_order, slice,
};

fn assert_proven(algorithm: &dyn Algorithm, shape: &Shape) {
    prove(algorithm, shape)
        .unwrap_or_else(|fault| panic!("{}, {shape:?}: {fault}", algorithm.name()));
}

#[test]
fn every_all_reduce_counts_each_input_once_in_the_same_order() {
    for algorithm in algorithms(PlanKind::AllReduce) {
        for world in 1..=33 {
            for count in [0, 1, world - 1, world, world + 1, 100_000] {
                assert_proven(*algorithm, &Shape::flat(world, count));
            }
        }
    }
}

#[test]
fn every_collective_is_proven_with_every_root() {
    for world in 1..=17 {
        let topology = Topology::flat(world);
        for collective in with_every_root(world) {
            for count in [0, 1, world - 1, world, world + 1, 100] {
                let shape = even(&topology, collective, count);
                algorithms(collective).iter().for_each(|it| assert_proven(*it, &shape));
            }
        }
    }
}

#[test]
fn uneven_nodes_are_proven() {
    let placements: [&[usize]; 6] =
        [&[1, 1], &[3, 1], &[4, 3, 5], &[1; 9], &[2, 6, 3], &[8, 7, 8, 8]];
    for sizes in placements {
        let topology = Topology::nodes(sizes);
        let world = topology.world();
        for root in [0, world / 2, world - 1] {
            for collective in collectives(root) {
                for count in [1, 7, if world > 20 { 64 } else { 100_000 }] {
                    let shape = even(&topology, collective, count);
                    algorithms(collective).iter().for_each(|it| assert_proven(*it, &shape));
                }
            }
        }
    }
}

/// An algorithm may say that it folds in rank order only if it always does, and has to if it does.
#[test]
fn those_that_say_so_and_no_others_fold_in_rank_order() {
    let topologies = (2..=17).map(Topology::flat).chain([
        Topology::nodes(&[4, 3, 5]),
        Topology::from_node_of(vec![0, 1, 0, 1, 2, 0, 2]),
        Topology::from_node_of((0..20).map(|rank| rank % 3).collect::<Vec<_>>()),
    ]);
    let mut out_of_order = Vec::new();
    for topology in topologies {
        for collective in with_every_root(topology.world()) {
            for algorithm in algorithms(collective) {
                let shape = even(&topology, collective, 20);
                match (prove_rank_order(*algorithm, &shape), algorithm.in_rank_order()) {
                    (Ok(()), _) => {}
                    (Err(Fault::RankOrder { .. }), false) => out_of_order.push(key(*algorithm)),
                    (Err(fault), _) => panic!("{}, {shape:?}: {fault}", algorithm.name()),
                }
            }
        }
    }
    for algorithm in collectives(0).into_iter().flat_map(algorithms) {
        let is_out = out_of_order.contains(&key(*algorithm));
        assert_ne!(is_out, algorithm.in_rank_order(), "{algorithm:?}");
    }
}

fn key(algorithm: &dyn Algorithm) -> *const () {
    std::ptr::from_ref(algorithm).cast()
}

/// Every transfer of a plan is needed: without it, at both of its ends, the proof fails.
#[test]
fn no_transfer_can_be_left_out() {
    for topology in [Topology::flat(2), Topology::flat(7), Topology::nodes(&[2, 3, 3])] {
        for collective in collectives(topology.world() - 1) {
            for algorithm in algorithms(collective) {
                let shape = even(&topology, collective, 19);
                let plans = pairwise(*algorithm, &shape);
                assert_eq!(prove_plans(&shape, &plans, 2), Ok(()));
                for (from, round) in rounds(&plans) {
                    for i in 0..plans[from][round].outgoing.len() {
                        let fewer = without(&plans, from, round, i);
                        let fault = prove_plans(&shape, &fewer, 2);
                        let out = &plans[from][round].outgoing[i];
                        let name = algorithm.name();
                        assert!(fault.is_err(), "{name}, {shape:?}: {from} {round} {out:?}");
                    }
                }
            }
        }
    }
}

/// The plans of all ranks without marks and empty transfers.
fn pairwise(algorithm: &dyn Algorithm, shape: &Shape) -> Vec<Vec<Step>> {
    let plan = |rank| {
        let steps = algorithm.steps(shape, rank);
        let plain = |mut step: Step| {
            step.pattern = Pattern::Pairs;
            step.outgoing.retain(|out| !out.elements.is_empty());
            step.incoming.retain(|arrival| !arrival.elements.is_empty());
            step
        };
        steps.map(plain).collect()
    };
    (0..shape.world()).map(plan).collect()
}

fn rounds(plans: &[Vec<Step>]) -> impl Iterator<Item = (usize, usize)> {
    plans.iter().enumerate().flat_map(|(rank, plan)| (0..plan.len()).map(move |at| (rank, at)))
}

fn without(plans: &[Vec<Step>], from: usize, round: usize, i: usize) -> Vec<Vec<Step>> {
    let mut plans = plans.to_vec();
    let out = plans[from][round].outgoing.remove(i);
    let incoming = &mut plans[out.to][round].incoming;
    let expected = incoming
        .iter_mut()
        .find(|arrival| arrival.from.contains(&from) && arrival.elements == out.elements);
    expected.expect("both ends agree").from.retain(|&other| other != from);
    incoming.retain(|arrival| !arrival.from.is_empty());
    plans
}

#[test]
fn a_world_of_one_does_nothing() {
    for collective in collectives(0) {
        let shape = even(&Topology::flat(1), collective, 100);
        for algorithm in algorithms(collective) {
            assert_eq!(algorithm.steps(&shape, 0).count(), 0, "{algorithm:?}");
        }
    }
}

#[test]
fn names_are_distinct_and_found() {
    for collective in collectives(0) {
        for algorithm in algorithms(collective) {
            let found = unisum_algorithms::by_name(collective, algorithm.name()).unwrap();
            assert!(std::ptr::addr_eq(found, *algorithm), "{algorithm:?}");
        }
        assert!(unisum_algorithms::by_name(collective, "no such").is_none());
    }
}

/// A world of up to `most` ranks scattered over up to 6 nodes.
fn topologies(most: usize) -> impl Strategy<Value = Topology> {
    prop::collection::vec(0u32..6, 1..=most).prop_map(Topology::from_node_of)
}

/// As many lengths as asked for, half of them 0.
fn lengths(count: usize) -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![Just(0), 0usize..50], count)
}

/// Any shape whose blocks are those of all ranks; those of an all-to-all are alike.
fn shapes(most: usize) -> impl Strategy<Value = Shape> {
    use PlanKind::{AllGather, Gather, ReduceScatter, Scatter};
    let parts = (topologies(most), 0usize..8, any::<prop::sample::Index>(), 0usize..3000);
    parts.prop_flat_map(|(topology, kind, root, count)| {
        let collective = collectives(root.index(topology.world()))[kind];
        lengths(topology.world()).prop_map(move |lengths| match collective {
            AllGather | ReduceScatter | Gather { .. } | Scatter { .. } => {
                Shape::blocks(topology.clone(), collective, &lengths)
            }
            _ => even(&topology, collective, count),
        })
    })
}

/// The shapes of all ranks in an all-to-all of any lengths.
fn exchanges() -> impl Strategy<Value = Vec<Shape>> {
    topologies(17).prop_flat_map(|topology| {
        let world = topology.world();
        lengths(world * world).prop_map(move |lengths| {
            let shape = |rank| {
                let sends: Vec<_> = (0..world).map(|to| lengths[rank * world + to]).collect();
                let receives: Vec<_> =
                    (0..world).map(|from| lengths[from * world + rank]).collect();
                Shape::pairs(topology.clone(), rank, &sends, &receives)
            };
            (0..world).map(shape).collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn scattered_placements_are_proven(topology in topologies(64), count in 0usize..3000) {
        let shape = Shape::all_reduce(topology, count);
        for algorithm in algorithms(PlanKind::AllReduce) {
            prop_assert_eq!(prove(*algorithm, &shape), Ok(()), "{}", algorithm.name());
        }
    }

    #[test]
    fn an_all_to_all_of_any_lengths_is_proven(shapes in exchanges()) {
        let supported = |it: &&&dyn Algorithm| it.supports(&shapes[0]);
        let mut proven = 0;
        for algorithm in algorithms(PlanKind::AllToAll).iter().filter(supported) {
            prop_assert_eq!(prove_each(*algorithm, &shapes), Ok(()), "{}", algorithm.name());
            proven += 1;
        }
        prop_assert_eq!(proven, 2);
    }

    #[test]
    fn any_slice_length_is_proven(
        world in 2usize..14, count in 1usize..5000, slices in 1usize..40, window in 1usize..10,
    ) {
        let topology = Topology::nodes(&[world / 2, world - world / 2]);
        for collective in collectives(count % world) {
            let shape = even(&topology, collective, count);
            for algorithm in algorithms(collective) {
                let plan = |rank| slice(algorithm.steps(&shape, rank), count.div_ceil(slices));
                let plans: Vec<Vec<Step>> = (0..world).map(plan).collect();
                let proof = prove_plans(&shape, &plans, window);
                prop_assert_eq!(proof, Ok(()), "{} {:?}", algorithm.name(), collective);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_shape_is_proven(shape in shapes(17)) {
        for algorithm in algorithms(shape.collective) {
            prop_assert_eq!(prove(*algorithm, &shape), Ok(()), "{}", algorithm.name());
        }
    }
}
