//! The cost model agrees with the formulas it stands for, and orders the algorithms as they are
//! used.

mod support;

use support::{collectives, even, seconds};
use unisum_algorithms::{CostModel, LinkCost, Shape, Topology, algorithms, cost};

/// Nodes of one rank each, so that nothing runs as a group step.
fn apart(world: usize, count: usize) -> Shape {
    Shape::all_reduce(Topology::nodes(&vec![1; world]), count)
}

fn assert_near(actual: f64, expected: f64, tolerance: f64) {
    assert!((actual / expected - 1.0).abs() < tolerance, "{actual:e} s instead of {expected:e} s");
}

const MIB: usize = 1 << 20;

#[test]
fn a_large_ring_runs_at_the_bandwidth_bound() {
    let model = CostModel { slice_elements: MIB / 4, ..CostModel::default() };
    for world in [2, 5, 16] {
        let bytes = 1024 * MIB;
        let n = world as f64;
        let bound = 2.0 * (n - 1.0) / n * bytes as f64 * model.across.beta_s_per_byte;
        assert_near(seconds("ring", &apart(world, bytes / 4), &model), bound, 0.03);
    }
}

#[test]
fn slices_hide_the_reduction_and_whole_chunks_do_not() {
    let whole = CostModel { slice_elements: usize::MAX, ..CostModel::default() };
    let sliced = CostModel { slice_elements: MIB / 4, ..whole };
    let shape = apart(8, 16 * MIB);
    let (n, bytes) = (8.0, 64.0 * MIB as f64);
    let gamma = (n - 1.0) / n * bytes * whole.gamma_s_per_byte;
    let saved = seconds("ring", &shape, &whole) - seconds("ring", &shape, &sliced);
    assert!(saved > 0.7 * gamma && saved < 1.1 * gamma, "{saved:e} s of {gamma:e} s saved");
}

#[test]
fn trees_are_pipelined_by_slices() {
    let model = CostModel { gamma_s_per_byte: 0.0, ..CostModel::default() };
    let shape = apart(32, 64 * MIB);
    let bytes = 256.0 * MIB as f64 * model.across.beta_s_per_byte;
    let (tree, double) = (seconds("tree", &shape, &model), seconds("double-tree", &shape, &model));
    let whole = CostModel { slice_elements: usize::MAX, ..model };
    assert!(tree < 3.6 * bytes, "tree takes {} buffers", tree / bytes);
    assert!(double < 3.0 * bytes, "double tree takes {} buffers", double / bytes);
    assert!(seconds("tree", &shape, &whole) > 8.0 * bytes);
}

#[test]
fn recursive_doubling_costs_its_formula() {
    let model = CostModel::default();
    for (world, rounds) in [(2, 1.0), (8, 3.0), (12, 5.0)] {
        let expected = rounds * (model.across.alpha_s + model.message_s);
        assert_near(seconds("recursive-doubling", &apart(world, 1), &model), expected, 0.01);
    }
}

#[test]
fn halving_doubling_is_bandwidth_optimal_on_a_power_of_two() {
    let model = CostModel { gamma_s_per_byte: 0.0, ..CostModel::default() };
    let bound = 2.0 * 15.0 / 16.0 * 256.0 * MIB as f64 * model.across.beta_s_per_byte;
    assert_near(seconds("halving-doubling", &apart(16, 64 * MIB), &model), bound, 0.03);
}

#[test]
fn the_usual_algorithm_wins_at_each_size() {
    let model = CostModel::default();
    let on = |name, count| seconds(name, &apart(32, count), &model);
    assert!(on("tree", 2) < on("ring", 2));
    assert!(on("ring", 256 * MIB) < on("tree", 256 * MIB));
    let one_node = |name, count| seconds(name, &Shape::flat(16, count), &model);
    assert!(one_node("one-shot", 2) < one_node("two-shot", 2));
    assert!(one_node("two-shot", MIB) < one_node("one-shot", MIB));
    assert!(one_node("two-shot", MIB) < one_node("ring", MIB));
    let nodes = Topology::nodes(&[8; 8]);
    let across = |name, count| seconds(name, &Shape::all_reduce(nodes.clone(), count), &model);
    assert!(across("hierarchical", MIB) < across("ring", MIB));
    assert!(across("hierarchical-tree", 64) < across("hierarchical", 64));
}

#[test]
fn the_fewest_messages_win_where_ranks_share_cores() {
    let link = LinkCost::new(1e-6, 1e-10);
    let alone = CostModel { inside: link, message_s: 5e-6, ..CostModel::default() };
    let sharing = CostModel { ranks_per_core: 8.0, ..alone };
    let on = |name, model| seconds(name, &Shape::flat(16, 2), model);
    assert!(on("recursive-doubling", &alone) < on("k-tree", &alone));
    assert!(on("k-tree", &sharing) < on("recursive-doubling", &sharing));
}

#[test]
fn several_streams_into_one_network_link_end_later_than_one() {
    let model =
        CostModel { across: LinkCost::new(50e-6, 1.0 / 120e6), window: 4, ..CostModel::default() };
    let hosts = |ranks, name| {
        let shape = Shape::all_reduce(Topology::nodes(&[ranks; 4]), 256 << 10);
        seconds(name, &shape, &model)
    };
    assert!(hosts(1, "ring") * 1.2 < hosts(1, "two-shot"));
    assert!(hosts(4, "hierarchical") < hosts(4, "halving-doubling"));
}

#[test]
fn nothing_costs_nothing() {
    let model = CostModel::default();
    for collective in collectives(0) {
        for algorithm in algorithms(collective) {
            let costs = |world, count| {
                cost(*algorithm, &even(&Topology::flat(world), collective, count), &model).unwrap()
            };
            assert_eq!(costs(1, 100), 0.0);
            assert!(costs(3, 0) < 1e-5, "{algorithm:?}");
        }
    }
}
