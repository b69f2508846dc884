//! The cost model finds for each collective the algorithm that is known to be best at each size.

mod support;

use support::{collectives, even, seconds};
use unisum_algorithms::PlanKind::{
    self, AllGather, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
};
use unisum_algorithms::{CostModel, Shape, Topology, algorithms, cost};

const MIB: usize = 1 << 20;

/// `world` nodes of one rank.
fn apart(world: usize) -> Topology {
    Topology::nodes(&vec![1; world])
}

/// A model in which folding costs no time.
fn without_folds() -> CostModel {
    CostModel { gamma_s_per_byte: 0.0, ..CostModel::default() }
}

fn assert_near(actual: f64, expected: f64, tolerance: f64) {
    assert!((actual / expected - 1.0).abs() < tolerance, "{actual:e} s instead of {expected:e} s");
}

#[test]
fn trees_win_for_small_messages_and_chains_for_large_ones() {
    for collective in [Broadcast { root: 3 }, Reduce { root: 3 }] {
        let model = CostModel::default();
        let on = |name, count| seconds(name, &even(&apart(32), collective, count), &model);
        assert!(on("tree", 16) < on("chain", 16));
        assert!(on("tree", 16) < on("direct", MIB));
        assert!(on("chain", 64 * MIB) < on("tree", 64 * MIB));
        assert!(on("chain", 64 * MIB) < on("direct", 64 * MIB));
        assert!(on("double-tree", MIB) < on("tree", MIB));
        assert!(on("double-tree", MIB) < on("chain", MIB));
    }
}

#[test]
fn large_messages_cross_a_link_once_in_a_chain_and_twice_where_they_are_scattered_first() {
    let model = without_folds();
    let bytes_s = 256.0 * MIB as f64 * model.across.beta_s_per_byte;
    for collective in [Broadcast { root: 0 }, Reduce { root: 0 }] {
        let on = |name| seconds(name, &even(&apart(8), collective, 64 * MIB), &model);
        assert_near(on("chain"), bytes_s, 0.05);
        let scattered = if matches!(collective, Reduce { .. }) { "ring" } else { "scatter-gather" };
        assert_near(on(scattered), 2.0 * 7.0 / 8.0 * bytes_s, 0.1);
    }
}

#[test]
fn doubling_wins_for_small_blocks_and_the_ring_is_at_the_bound_for_large_ones() {
    for (collective, doubling) in [(AllGather, "doubling"), (ReduceScatter, "halving")] {
        let on = |name, count| {
            seconds(name, &even(&apart(32), collective, count), &CostModel::default())
        };
        assert!(on(doubling, 4) < on("ring", 4));
        assert!(on("ring", MIB) < on(doubling, MIB));
        let bytes_s = 31.0 * 4.0 * MIB as f64 * CostModel::default().across.beta_s_per_byte;
        assert_near(on("ring", MIB), bytes_s, 0.1);
    }
}

#[test]
fn doubling_costs_its_formula() {
    let model = CostModel::default();
    for (world, rounds) in [(2, 1.0), (8, 3.0), (32, 5.0)] {
        let expected = rounds * (model.across.alpha_s + model.message_s);
        let actual = seconds("doubling", &even(&apart(world), AllGather, 1), &model);
        // Blocks from both ends of the space go in two messages.
        assert!(actual >= expected && actual < 1.1 * expected);
        let actual = seconds("tree", &even(&apart(world), Broadcast { root: 0 }, 1), &model);
        assert_near(actual, expected, 0.01);
    }
}

#[test]
fn an_all_to_all_is_at_the_bound_and_bruck_pays_for_its_messages() {
    let on = |name, topology: &Topology, count| {
        seconds(name, &even(topology, AllToAll, count), &CostModel::default())
    };
    let beta = CostModel::default().across.beta_s_per_byte;
    for name in ["pairwise", "direct"] {
        let bytes_s = 15.0 * 4.0 * MIB as f64 * beta;
        assert_near(on(name, &apart(16), MIB), bytes_s, 0.1);
        // All eight ranks of a node send over its link.
        let shared_s = 8.0 * 24.0 * 4.0 * MIB as f64 * beta;
        assert_near(on(name, &Topology::nodes(&[8; 4]), MIB), shared_s, 0.1);
    }
    assert!(on("bruck", &apart(32), 1) > on("direct", &apart(32), 1));
}

#[test]
fn trees_gather_and_scatter_small_blocks_of_many_ranks() {
    for collective in [Gather { root: 0 }, Scatter { root: 0 }] {
        let on = |name, count| {
            seconds(name, &even(&apart(512), collective, count), &CostModel::default())
        };
        assert!(on("tree", 1) < on("direct", 1));
        assert!(on("direct", 256 << 10) < 1.05 * on("tree", 256 << 10));
    }
}

#[test]
fn one_step_in_shared_memory_beats_everything_else() {
    let topology = Topology::flat(16);
    for collective in collectives(0).into_iter().filter(|kind| *kind != PlanKind::AllReduce) {
        for count in [1, 256 << 10] {
            let model = CostModel { ranks_per_core: 4.0, ..CostModel::default() };
            let shape = even(&topology, collective, count);
            let on = |name| seconds(name, &shape, &model);
            let costs = algorithms(collective).iter().map(|it| cost(*it, &shape, &model).unwrap());
            // The root of a large reduce leaves the folding to all.
            let shared = match collective {
                Reduce { .. } if count > 1 => "scatter-gather",
                _ => "direct",
            };
            // A hierarchical plan comes to the same where there is one node.
            let best = costs.fold(f64::INFINITY, f64::min);
            assert!(on(shared) < 1.1 * best, "{collective:?}, {count}");
            let pairwise = CostModel { group_steps: false, ..model };
            assert!(on(shared) < seconds(shared, &shape, &pairwise), "{collective:?}");
        }
    }
}

#[test]
fn hierarchical_plans_win_on_nodes_of_many_ranks() {
    let nodes = Topology::nodes(&[8; 8]);
    let on = |name, collective, count| {
        seconds(name, &even(&nodes, collective, count), &CostModel::default())
    };
    for (collective, flat) in [
        (Broadcast { root: 9 }, "tree"),
        (Reduce { root: 9 }, "tree"),
        (Gather { root: 9 }, "tree"),
        (Scatter { root: 9 }, "tree"),
        (AllGather, "ring"),
        (ReduceScatter, "ring"),
    ] {
        assert!(on("hierarchical", collective, 16) < on(flat, collective, 16), "{collective:?}");
    }
    assert!(on("hierarchical-doubling", AllGather, 16) < on("doubling", AllGather, 16));
    assert!(on("hierarchical-halving", ReduceScatter, 16) < on("halving", ReduceScatter, 16));
    for collective in [Broadcast { root: 9 }, Reduce { root: 9 }] {
        let large = |name| on(name, collective, 4 * MIB);
        assert!(large("hierarchical-chain") < large("hierarchical"), "{collective:?}");
        assert!(large("hierarchical-chain") < large("tree"), "{collective:?}");
    }
}

#[test]
fn an_all_to_all_of_any_lengths_costs_as_one_of_their_mean() {
    let (topology, model) = (apart(4), CostModel::default());
    let own = Shape::pairs(topology.clone(), 1, &[4000, 1000, 0, 3000], &[0, 1000, 7, 9]);
    let even = even(&topology, AllToAll, 2000);
    assert_eq!(seconds("pairwise", &own, &model), seconds("pairwise", &even, &model));
}
