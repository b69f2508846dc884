//! The prover catches plans that are wrong, and names the mistake.

mod support;

use support::{collectives, even};
use unisum_algorithms::{
    Fault, Incoming, OnArrival, Outgoing, Pattern, PlanKind, RING, Scope, Shape, Step, Topology,
    algorithms, by_name, prove_plans, prove_rank_order,
};

const COUNT: usize = 64;

fn plans(name: &str, shape: &Shape) -> Vec<Vec<Step>> {
    let algorithm = by_name(shape.collective, name).expect("a known name");
    (0..shape.world()).map(|rank| algorithm.steps(shape, rank).collect()).collect()
}

/// The fault of the plans of `name` for an all-reduce on four ranks after `mutate`.
fn fault_of(name: &str, mutate: impl FnOnce(&mut Vec<Vec<Step>>)) -> Fault {
    fault_in(&Shape::flat(4, COUNT), name, mutate)
}

/// The fault of the plans of `name` for this shape after `mutate`.
fn fault_in(shape: &Shape, name: &str, mutate: impl FnOnce(&mut Vec<Vec<Step>>)) -> Fault {
    let mut plans = plans(name, shape);
    assert_eq!(prove_plans(shape, &plans, 2), Ok(()), "{name} is right before it is changed");
    mutate(&mut plans);
    let fault = prove_plans(shape, &plans, 2).expect_err("the changed plans are wrong");
    assert!(!fault.to_string().is_empty());
    fault
}

/// A shape of four ranks with COUNT elements in all, or 16 in each block.
fn four(collective: PlanKind) -> Shape {
    even(&Topology::flat(4), collective, if is_whole(collective) { COUNT } else { COUNT / 4 })
}

fn is_whole(collective: PlanKind) -> bool {
    use PlanKind::{AllReduce, Broadcast, Reduce};
    matches!(collective, AllReduce | Broadcast { .. } | Reduce { .. })
}

fn send(to: usize, elements: std::ops::Range<usize>) -> Outgoing {
    Outgoing { to, elements }
}

fn receive(from: &[usize], elements: std::ops::Range<usize>, on_arrival: OnArrival) -> Incoming {
    Incoming { from: from.to_vec(), elements, on_arrival }
}

fn pairs(outgoing: Vec<Outgoing>, incoming: Vec<Incoming>) -> Step {
    Step { pattern: Pattern::Pairs, outgoing, incoming }
}

#[test]
fn a_skipped_step_is_caught() {
    for name in ["ring", "recursive-doubling", "one-shot", "two-shot"] {
        for rank in 0..4 {
            let fault = fault_of(name, |plans| {
                plans[rank].remove(0);
            });
            let caught = !matches!(fault, Fault::Partner { .. } | Fault::Bounds { .. });
            assert!(caught, "{name} rank {rank}: {fault}");
        }
    }
}

#[test]
fn a_round_that_all_ranks_skip_is_caught() {
    let fault = fault_of("recursive-doubling", |plans| {
        plans.iter_mut().for_each(|plan| drop(plan.pop()));
    });
    assert_eq!(fault, Fault::Missing { rank: 0, input: 2, element: 0 });
}

#[test]
fn a_store_where_a_reduce_belongs_is_caught() {
    let fault = fault_of("ring", |plans| plans[1][0].incoming[0].on_arrival = OnArrival::Store);
    assert!(matches!(fault, Fault::Missing { input: 1, .. }), "{fault}");
}

#[test]
fn a_reduce_where_a_store_belongs_is_caught() {
    let fault = fault_of("ring", |plans| plans[1][3].incoming[0].on_arrival = OnArrival::Reduce);
    assert!(matches!(fault, Fault::CountedTwice { rank: 1, round: 3, .. }), "{fault}");
}

#[test]
fn a_wrong_range_is_caught() {
    let fault = fault_of("ring", |plans| plans[2][1].outgoing[0].elements.end -= 1);
    assert!(matches!(fault, Fault::Elements { from: 2, sent_in: 1, to: 3, .. }), "{fault}");
    let fault = fault_of("ring", |plans| plans[2][1].outgoing[0].elements = 60..65);
    assert!(matches!(fault, Fault::Bounds { rank: 2, round: 1, .. }), "{fault}");
}

#[test]
fn a_transfer_to_the_wrong_rank_is_caught() {
    let fault = fault_of("ring", |plans| plans[0][0].outgoing[0].to = 2);
    assert!(matches!(fault, Fault::Deadlock { .. } | Fault::Elements { .. }), "{fault}");
    let fault = fault_of("ring", |plans| plans[0][0].outgoing[0].to = 0);
    assert_eq!(fault, Fault::Partner { rank: 0, round: 0, other: 0 });
    let fault = fault_of("ring", |plans| plans[0][0].incoming[0].from = vec![4]);
    assert_eq!(fault, Fault::Partner { rank: 0, round: 0, other: 4 });
}

#[test]
fn swapped_or_repeated_sources_are_caught() {
    let fault = fault_of("one-shot", |plans| plans[2][0].incoming[0].from.swap(0, 1));
    assert_eq!(fault, Fault::ReduceSources { rank: 2, round: 0, from: vec![1, 0, 3] });
    let fault = fault_of("one-shot", |plans| plans[2][0].incoming[0].from = vec![0, 0, 3]);
    assert!(matches!(fault, Fault::ReduceSources { .. }), "{fault}");
    let fault = fault_of("two-shot", |plans| plans[2][1].incoming[0].from = vec![0, 1]);
    assert_eq!(fault, Fault::StoreSources { rank: 2, round: 1, sources: 2 });
}

#[test]
fn another_order_of_folding_is_caught() {
    // Rank 2 folds all three at once where the others fold (0 + 1) + 2.
    let all = || 0..COUNT;
    let reduce = |from: usize| pairs(vec![], vec![receive(&[from], all(), OnArrival::Reduce)]);
    let sends = |to: usize| pairs(vec![send(to, all())], vec![]);
    let exchange = |with: usize| {
        pairs(vec![send(with, all())], vec![receive(&[with], all(), OnArrival::Reduce)])
    };
    let plans = vec![
        vec![sends(2), exchange(1), reduce(2)],
        vec![sends(2), exchange(0), reduce(2)],
        vec![pairs(
            vec![send(0, all()), send(1, all())],
            vec![receive(&[0, 1], all(), OnArrival::Reduce)],
        )],
    ];
    let order = Fault::Order { rank: 2, than: 0, element: 0 };
    assert_eq!(prove_plans(&Shape::flat(3, COUNT), &plans, 8), Err(order));
}

#[test]
fn false_marks_are_caught() {
    let is_mark = |fault: Fault| assert!(matches!(fault, Fault::Mark { .. }), "{fault}");
    is_mark(fault_of("ring", |plans| plans[1][0].pattern = Pattern::OneShot));
    is_mark(fault_of("recursive-doubling", |plans| {
        plans.iter_mut().for_each(|plan| plan[0].pattern = Pattern::AllGather);
    }));
    is_mark(fault_of("two-shot", |plans| plans[3][0].pattern = Pattern::Pairs));
    is_mark(fault_of("two-shot", |plans| plans[3][0].pattern = Pattern::OneShot));
    is_mark(fault_of("two-shot", |plans| plans[0][0].incoming[0].elements.end += 1));
    is_mark(fault_of("two-shot", |plans| {
        plans[3][1].outgoing.pop();
    }));
    // All leave the last member out: the group is then not the same for all.
    is_mark(fault_of("one-shot", |plans| {
        plans[..3].iter_mut().for_each(|plan| plan[0].outgoing.retain(|o| o.to != 3));
    }));
}

#[test]
fn touching_the_slice_of_another_between_scatter_and_gather_is_caught() {
    let shape = Shape::all_reduce(Topology::nodes(&[2, 2]), COUNT);
    let mut plans = plans("hierarchical", &shape);
    assert_eq!(prove_plans(&shape, &plans, 8), Ok(()));
    // Rank 0 owns 0..32 of its node, and lets rank 2 have a look beyond it.
    plans[0][1].outgoing.push(send(2, 40..41));
    plans[2][1].incoming.push(receive(&[0], 40..41, OnArrival::Store));
    let fault = prove_plans(&shape, &plans, 8).unwrap_err();
    assert!(matches!(fault, Fault::Mark { rank: 0, round: 1, .. }), "{fault}");
}

#[test]
fn a_store_into_what_the_same_step_sends_is_caught() {
    let fault = fault_of("recursive-doubling", |plans| {
        plans[1][1].incoming[0].on_arrival = OnArrival::Store;
    });
    assert_eq!(fault, Fault::StoreIntoSent { rank: 1, round: 1, elements: 0..COUNT });
}

#[test]
fn overlapping_arrivals_are_caught() {
    let fault = fault_of("one-shot", |plans| {
        let again = plans[0][0].incoming[0].clone();
        plans[0][0].incoming.push(again);
    });
    assert_eq!(fault, Fault::ArrivalsOverlap { rank: 0, round: 0, elements: 0..COUNT });
}

#[test]
fn an_order_that_deadlocks_is_caught_only_where_the_window_is_too_small() {
    // Each rank would first send one half and only then receive the other.
    let (low, high) = (0..COUNT / 2, COUNT / 2..COUNT);
    let reduce = |from, half| pairs(vec![], vec![receive(&[from], half, OnArrival::Reduce)]);
    let store = |from, half| pairs(vec![], vec![receive(&[from], half, OnArrival::Store)]);
    let sends = |to, half| pairs(vec![send(to, half)], vec![]);
    let plans = vec![
        vec![
            sends(1, high.clone()),
            reduce(1, low.clone()),
            sends(1, low.clone()),
            store(1, high.clone()),
        ],
        vec![sends(0, low.clone()), reduce(0, high.clone()), sends(0, high), store(0, low)],
    ];
    let stuck = Fault::Deadlock { rank: 0, round: 0, window: 1 };
    assert_eq!(prove_plans(&Shape::flat(2, COUNT), &plans, 1), Err(stuck));
    assert_eq!(prove_plans(&Shape::flat(2, COUNT), &plans, 2), Ok(()));
}

#[test]
fn a_plan_for_another_root_is_caught() {
    let both = collectives(1).into_iter().zip(collectives(3));
    for (meant, taken) in both.filter(|(meant, _)| meant.root().is_some()) {
        for algorithm in algorithms(meant) {
            let plans = plans(algorithm.name(), &four(taken));
            let fault = prove_plans(&four(meant), &plans, 2).expect_err("the root is another");
            let caught = matches!(fault, Fault::NoValue { .. } | Fault::Missing { .. });
            assert!(caught, "{} {meant:?}: {fault}", algorithm.name());
        }
    }
}

#[test]
fn a_block_that_a_rank_does_not_have_is_not_sent() {
    let gather = four(PlanKind::Gather { root: 3 });
    let fault = fault_in(&gather, "direct", |plans| {
        plans[0][0].outgoing[0].elements = 16..32;
        plans[3][0].incoming[0].elements = 16..32;
        plans[3][0].incoming.remove(1);
        plans[1][0].outgoing.clear();
    });
    assert_eq!(fault, Fault::NoValue { rank: 0, round: 0, element: 16 });
}

#[test]
fn swapped_blocks_are_caught() {
    let scatter = four(PlanKind::Scatter { root: 0 });
    let fault = fault_in(&scatter, "direct", |plans| {
        plans[0][0].outgoing[0].elements = 32..48;
        plans[0][0].outgoing[1].elements = 16..32;
        plans[1][0].incoming[0].elements = 32..48;
        plans[2][0].incoming[0].elements = 16..32;
    });
    assert_eq!(fault, Fault::Missing { rank: 1, input: 0, element: 16 });
    let all_to_all = four(PlanKind::AllToAll);
    let swap = |plans: &mut Vec<Vec<Step>>| {
        let (a, b) = (all_to_all.pair(0, 1), all_to_all.pair(0, 2));
        plans[0][0].outgoing[0].elements = b.clone();
        plans[0][0].outgoing[1].elements = a.clone();
        plans[1][0].incoming[0].elements = b;
        plans[2][0].incoming[0].elements = a;
    };
    let fault = fault_in(&all_to_all, "direct", swap);
    assert_eq!(fault, Fault::Missing { rank: 1, input: 0, element: all_to_all.pair(0, 1).start });
}

#[test]
fn a_fold_into_nothing_is_caught() {
    for name in ["tree", "direct"] {
        let fault = fault_in(&four(PlanKind::Broadcast { root: 0 }), name, |plans| {
            plans[2].iter_mut().flat_map(|step| &mut step.incoming).for_each(|arrival| {
                arrival.on_arrival = OnArrival::Reduce;
            });
        });
        assert_eq!(fault, Fault::NoValue { rank: 2, round: 0, element: 0 });
    }
}

#[test]
fn a_reduce_done_twice_is_caught() {
    for algorithm in algorithms(PlanKind::Reduce { root: 2 }) {
        let fault = fault_in(&four(PlanKind::Reduce { root: 2 }), algorithm.name(), |plans| {
            plans.iter_mut().for_each(|plan| plan.extend(plan.clone()));
        });
        assert!(matches!(fault, Fault::CountedTwice { .. }), "{}: {fault}", algorithm.name());
    }
}

#[test]
fn false_direct_marks_are_caught() {
    let why = |fault: Fault| match fault {
        Fault::Mark { pattern: Pattern::Direct(_), why, .. } => why,
        _ => panic!("{fault}"),
    };
    let gather = four(PlanKind::AllGather);
    let fault = fault_in(&gather, "direct", |plans| plans[2][0].pattern = Pattern::Pairs);
    assert_eq!(why(fault), "a member runs another pattern");
    let fault = fault_in(&four(PlanKind::AllReduce), "recursive-doubling", |plans| {
        plans.iter_mut().for_each(|plan| plan[0].pattern = Pattern::Direct(Scope::World));
    });
    assert_eq!(why(fault), "it receives into what others read");
    let nodes = even(&Topology::nodes(&[2, 1, 2]), PlanKind::AllGather, 16);
    let direct_in_nodes = |plans: &mut Vec<Vec<Step>>| {
        plans.iter_mut().for_each(|plan| plan[0].pattern = Pattern::Direct(Scope::Node));
    };
    assert_eq!(why(fault_in(&nodes, "direct", direct_in_nodes)), "a transfer leaves the group");
    let alone = |plans: &mut Vec<Vec<Step>>| {
        plans[2][0].pattern = Pattern::Direct(Scope::Node);
    };
    assert_eq!(why(fault_in(&nodes, "hierarchical", alone)), "its scope has no other rank");
}

#[test]
fn a_wall_that_only_some_ranks_have_is_caught() {
    let fault = fault_in(&four(PlanKind::AllGather), "doubling", |plans| {
        plans[1][0].pattern = Pattern::Pairs;
    });
    assert!(matches!(fault, Fault::Mark { pattern: Pattern::Wall, round: 0, .. }), "{fault}");
}

#[test]
fn another_order_than_that_of_the_ranks_is_caught() {
    let fault = prove_rank_order(&RING, &Shape::flat(4, COUNT)).unwrap_err();
    assert!(matches!(fault, Fault::RankOrder { .. }), "{fault}");
    assert!(fault.to_string().contains("not in rank order"));
}

#[test]
fn elements_beyond_the_block_of_a_pair_are_caught() {
    let shape = four(PlanKind::AllToAll);
    let fault = fault_in(&shape, "pairwise", |plans| plans[3][1].outgoing[0].elements.end += 1);
    assert!(matches!(fault, Fault::Bounds { rank: 3, round: 1, .. }), "{fault}");
    // A rank knows only its own lengths.
    let own = Shape::pairs(Topology::flat(4), 0, &[1, 2, 3, 4], &[1, 0, 0, 0]);
    let mut plans = vec![Vec::new(); 4];
    plans[1] = vec![pairs(vec![send(2, shape.pair(1, 2))], vec![])];
    assert!(matches!(prove_plans(&own, &plans, 1), Err(Fault::Bounds { rank: 1, .. })));
}
