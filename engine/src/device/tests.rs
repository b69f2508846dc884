//! Every algorithm of every collective on simulated devices.

use std::ops::Range;

use unisum_algorithms::{
    Algorithm, Incoming, OnArrival, Outgoing, Pattern, PlanKind, Rank, Shape, Step, Steps,
    Topology, algorithms, by_name, prove,
};

use super::simulation::{ELEMENT_BYTES, Schedule, World, folds};
use super::{
    DeviceFigures, DeviceProgram, DeviceSource, Memory, Operation, STAGING_MEMORIES, candidates,
    multimem_seconds, one_launch, one_launch_seconds, seconds,
};

/// Numbers from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

const WHOLE: usize = usize::MAX;

fn topologies(world: usize) -> Vec<Topology> {
    let mut topologies = vec![Topology::flat(world)];
    if world > 1 {
        topologies.push(Topology::nodes(&[world / 2, world - world / 2]));
        topologies
            .push(Topology::from_node_of((0..world as u32).map(|it| it % 3).collect::<Vec<_>>()));
    }
    if world > 3 {
        topologies.push(Topology::nodes(&[1, world - 2, 1]));
    }
    topologies
}

/// Shapes of all collectives, with blocks of uneven lengths where there are blocks.
fn shapes(topology: &Topology, count: usize, root: Rank, random: &mut Random) -> Vec<Shape> {
    use PlanKind::{
        AllGather, AllReduce, AllToAll, Broadcast, Gather, Reduce, ReduceScatter, Scatter,
    };
    let lengths: Vec<usize> = match count {
        0 | 1 => vec![count; topology.world()],
        _ => (0..topology.world()).map(|_| random.below(count / 2)).collect(),
    };
    let whole = [AllReduce, Reduce { root }, Broadcast { root }];
    let blocks = [AllGather, ReduceScatter, Gather { root }, Scatter { root }];
    let whole = whole.map(|kind| Shape::whole(topology.clone(), kind, count));
    let blocks = blocks.map(|kind| Shape::blocks(topology.clone(), kind, &lengths));
    let each = count.div_ceil(topology.world());
    whole.into_iter().chain(blocks).chain([Shape::even(topology.clone(), AllToAll, each)]).collect()
}

/// The shapes of all ranks in an all-to-all of any lengths.
fn any_lengths(topology: &Topology, count: usize, random: &mut Random) -> Vec<Shape> {
    let world = topology.world();
    let lengths: Vec<usize> = (0..world * world).map(|_| random.below(count + 1)).collect();
    let shape = |rank| {
        let sends: Vec<_> = (0..world).map(|to| lengths[rank * world + to]).collect();
        let receives: Vec<_> = (0..world).map(|from| lengths[from * world + rank]).collect();
        Shape::pairs(topology.clone(), rank, &sends, &receives)
    };
    (0..world).map(shape).collect()
}

/// Calls `check` with a source for each algorithm of the collective of `shapes`, with everything
/// else chosen at random.
fn with_algorithms(
    shapes: &[Shape],
    random: &mut Random,
    mut check: impl FnMut(&DeviceSource<'_>, u64),
) {
    let world = shapes[0].world();
    for algorithm in algorithms(shapes[0].collective) {
        if !algorithm.supports(&shapes[0]) {
            continue;
        }
        let way = random.below(4);
        let in_place: Vec<bool> = (0..world)
            .map(|_| match way {
                _ if shapes[0].collective == PlanKind::AllToAll => false,
                0 => false,
                1 | 2 => true,
                _ => random.below(2) == 0,
            })
            .collect();
        let reduces = folds(&shapes[0]);
        let source = DeviceSource {
            algorithm: *algorithm,
            shapes,
            rank: 0,
            element_bytes: ELEMENT_BYTES,
            average: reduces && random.below(2) == 0,
            scales: reduces && random.below(3) == 0,
            in_place: &in_place,
            slice_bytes: [WHOLE, WHOLE, 4, 12, 20][random.below(5)],
        };
        check(&source, random.below(1 << 30) as u64);
    }
}

fn programs(source: &DeviceSource<'_>) -> Vec<DeviceProgram> {
    (0..source.world())
        .map(|rank| DeviceProgram::build(&DeviceSource { rank, ..*source }))
        .collect()
}

fn describe(source: &DeviceSource<'_>) -> String {
    let DeviceSource { algorithm, average, scales, in_place, slice_bytes, shapes, .. } = source;
    format!(
        "{}, average {average}, scales {scales}, in place {in_place:?}, slices {slice_bytes}, {:?}",
        algorithm.name(),
        shapes[0]
    )
}

fn assert_right(source: &DeviceSource<'_>, seed: u64) {
    let programs = programs(source);
    let schedule = match seed % 4 {
        0 => Schedule::Lowest,
        1 => Schedule::Highest,
        _ => Schedule::Random(seed),
    };
    let result = World::new(source, &programs, 2).run(schedule);
    assert_eq!(result, Ok(()), "{}, {schedule:?}", describe(source));
}

#[test]
fn every_algorithm_of_every_collective_is_right_in_any_order() {
    let mut random = Random(1);
    for world in 1..=9 {
        for topology in topologies(world) {
            for count in [0, 1, 7, 37] {
                let root = random.below(world);
                for shape in shapes(&topology, count, root, &mut random) {
                    with_algorithms(&[shape], &mut random, assert_right);
                }
            }
            let shapes = any_lengths(&topology, 5, &mut random);
            with_algorithms(&shapes, &mut random, assert_right);
        }
    }
}

/// No flag is one too many: without any single one, ranks race, wait forever or get wrong results.
#[test]
fn every_flag_is_needed() {
    let mut random = Random(2);
    let mut flags = 0;
    for world in [2, 3, 4, 5, 6] {
        for topology in topologies(world) {
            let root = random.below(world);
            for shape in shapes(&topology, 13, root, &mut random) {
                with_algorithms(&[shape], &mut random, |source, seed| {
                    flags += assert_needed(source, seed);
                });
            }
        }
    }
    assert!(flags > 10_000, "{flags}");
}

/// Leaves out one flag after the other; returns how many there were.
fn assert_needed(source: &DeviceSource<'_>, seed: u64) -> usize {
    let mut programs = programs(source);
    let mut flags = 0;
    assert_eq!(World::new(source, &programs, 1).run(Schedule::Random(seed)), Ok(()));
    for rank in 0..programs.len() {
        for at in 0..programs[rank].operations.len() {
            let original = programs[rank].operations[at].clone();
            let (Operation::Wait(notes) | Operation::Signal(notes)) = &original else { continue };
            for dropped in 0..notes.len() {
                let mut fewer = notes.clone();
                let note = fewer.remove(dropped);
                programs[rank].operations[at] = match original {
                    Operation::Wait(_) => Operation::Wait(fewer),
                    _ => Operation::Signal(fewer),
                };
                let result = World::new(source, &programs, 1).run(Schedule::Random(seed));
                let context = || format!("rank {rank}, {at}: {note:?}, {}", describe(source));
                assert_ne!(result, Ok(()), "{}", context());
                flags += 1;
            }
            programs[rank].operations[at] = original;
        }
    }
    flags
}

/// An all-reduce of three ranks as no algorithm does it: the steps of each rank.
#[derive(Debug)]
struct Unusual;

impl Algorithm for Unusual {
    fn name(&self) -> &'static str {
        "unusual"
    }

    fn steps<'a>(&'a self, shape: &'a Shape, rank: Rank) -> Steps<'a> {
        use OnArrival::{Reduce, Store};
        let all = shape.all();
        let halves = [all.start..all.end / 2, all.end / 2..all.end];
        let [low, high] = halves;
        // From, to, elements.
        let transfers = [
            // Rank 0 then has the low half of 0 and 2.
            (2, 0, &low, Reduce),
            // The low half is complete and the high one is not.
            (1, 0, &all, Reduce),
            // Rank 1 overwrites what rank 0 may be reading, with what does not depend on it.
            (2, 1, &high, Store),
            (1, 0, &high, Reduce),
            (0, 1, &all, Store),
            (0, 2, &all, Store),
        ];
        let step = move |(from, to, elements, on_arrival): (Rank, Rank, Range<usize>, _)| Step {
            pattern: Pattern::Wall,
            outgoing: (rank == from)
                .then(|| Outgoing { to, elements: elements.clone() })
                .into_iter()
                .collect(),
            incoming: (rank == to)
                .then(|| Incoming { from: vec![from], elements, on_arrival })
                .into_iter()
                .collect(),
        };
        let owned = transfers.map(|(from, to, elements, on)| (from, to, elements.clone(), on));
        Box::new(owned.into_iter().map(step))
    }

    fn in_rank_order(&self) -> bool {
        false
    }
}

#[test]
fn plans_of_any_kind_are_right() {
    for count in [1, 2, 9] {
        let shapes = [Shape::flat(3, count)];
        assert_eq!(prove(&Unusual, &shapes[0]), Ok(()));
        for at in 0..4 {
            let (in_place, scales) = ([at < 2; 3], at % 2 == 0);
            let source = source("ring", &shapes, &in_place);
            let source = DeviceSource { algorithm: &Unusual, scales, ..source };
            (0..20).for_each(|seed| assert_right(&source, seed));
            assert!(assert_needed(&source, 1) > 0);
        }
    }
    // Only the half that is complete is divided.
    let shapes = [Shape::flat(3, 8)];
    let source = source("ring", &shapes, &[false; 3]);
    let program = DeviceProgram::build(&DeviceSource { algorithm: &Unusual, rank: 0, ..source });
    let folds = program.operations.iter().filter_map(|operation| match operation {
        Operation::Fold(fold) if !fold.scales => Some((fold.bytes, fold.divides)),
        _ => None,
    });
    let expected = [(16, false), (16, true), (16, false), (16, true)];
    assert_eq!(folds.collect::<Vec<_>>(), expected);
}

/// The operations of a program, a letter each.
fn letters(source: &DeviceSource<'_>) -> String {
    let letter = |operation: &Operation| match operation {
        Operation::Signal(_) => 's',
        Operation::Wait(_) => 'w',
        Operation::Copy(_) => 'c',
        Operation::Fold(_) => 'f',
    };
    DeviceProgram::build(source).operations.iter().map(letter).collect()
}

fn source<'a>(name: &str, shapes: &'a [Shape], in_place: &'a [bool]) -> DeviceSource<'a> {
    DeviceSource {
        algorithm: by_name(shapes[0].collective, name).unwrap(),
        shapes,
        rank: 1,
        element_bytes: ELEMENT_BYTES,
        average: true,
        scales: true,
        in_place,
        slice_bytes: WHOLE,
    }
}

#[test]
fn queues_are_short() {
    let all_reduce = [Shape::flat(4, 100)];
    let queue = |name, in_place| letters(&source(name, &all_reduce, &[in_place; 4]));
    assert_eq!(queue("one-shot", false), "swfsw");
    assert_eq!(queue("one-shot", true), "swfswc");
    assert_eq!(queue("two-shot", false), "swfswcsw");
    assert_eq!(queue("two-shot", true), "swfswcsw");
    // Scaled once before the ring begins; nothing is waited for but what the neighbour has ready.
    assert_eq!(queue("ring", true), format!("fs{}{}w", "wfs".repeat(3), "wcs".repeat(3)));

    let topology = Topology::flat(4);
    let queue = |collective, name| {
        let shapes = [match collective {
            PlanKind::Broadcast { .. } => Shape::whole(topology.clone(), collective, 10),
            _ => Shape::even(topology.clone(), collective, 10),
        }];
        letters(&DeviceSource {
            average: false,
            scales: false,
            ..source(name, &shapes, &[false; 4])
        })
    };
    // The own block is copied together with those of the others.
    assert_eq!(queue(PlanKind::AllGather, "direct"), "swcsw");
    assert_eq!(queue(PlanKind::AllToAll, "direct"), "swcsw");
    assert_eq!(queue(PlanKind::ReduceScatter, "direct"), "swfsw");
    assert_eq!(queue(PlanKind::Broadcast { root: 0 }, "direct"), "wcs");
    assert_eq!(queue(PlanKind::Broadcast { root: 1 }, "direct"), "scw");
}

/// What is kept while peers read its place lies like that place, for accesses of 16 bytes.
#[test]
fn what_is_kept_is_aligned_as_the_place_where_it_lands() {
    let shapes = [Shape::flat(6, 101)];
    let source = source("recursive-doubling", &shapes, &[true; 6]);
    let program = DeviceProgram::build(&DeviceSource { slice_bytes: 20, ..source });
    let mut kept = [0; 4];
    for operation in &program.operations {
        let Operation::Copy(copies) = operation else { continue };
        for copy in copies.iter().filter(|it| it.from.place.memory == Memory::Scratch) {
            assert_eq!(copy.from.place.start % 16, copy.to.start % 16);
            kept[copy.to.start % 16 / ELEMENT_BYTES] += 1;
        }
    }
    assert!(kept.iter().all(|count| *count > 0), "{kept:?}");
}

/// What all ranks launch in a number of calls that use so many staging memories in turns.
fn launches(source: &DeviceSource<'_>, memories: usize) -> Vec<DeviceProgram> {
    let of_call = |half| {
        let rank = move |rank| one_launch(&DeviceSource { rank, ..*source }, half);
        (0..source.world()).map(rank)
    };
    (0..memories).flat_map(of_call).collect()
}

/// All-reduces in one launch are right one after the other in any order of execution; with a single
/// staging memory, or without one of the flags, they are not.
#[test]
fn an_all_reduce_in_one_launch_needs_two_staging_memories_and_every_flag() {
    let mut caught = 0;
    for world in 2..=6 {
        let shapes = [Shape::flat(world, 5)];
        for in_place in [false, true] {
            let in_place = vec![in_place; world];
            let source = source("one-shot", &shapes, &in_place);
            let run = |programs: &[DeviceProgram], schedule| {
                World::new(&source, programs, 5).keeping_scratch().run(schedule)
            };
            let mut programs = launches(&source, STAGING_MEMORIES);
            let random = (0..30).map(Schedule::Random);
            for schedule in random.chain([Schedule::Lowest, Schedule::Highest]) {
                assert_eq!(run(&programs, schedule), Ok(()), "{world} ranks, {schedule:?}");
            }
            let one = launches(&source, 1);
            let is_right = |seed: &u64| run(&one, Schedule::Random(*seed)).is_ok();
            assert_eq!((0..30).filter(is_right).count(), 0, "{world} ranks, one memory");
            for rank in 0..programs.len() {
                for at in [1, 2] {
                    let original = programs[rank].operations[at].clone();
                    let (Operation::Signal(notes) | Operation::Wait(notes)) =
                        &mut programs[rank].operations[at]
                    else {
                        unreachable!("a signal and a wait come after the copy")
                    };
                    notes.pop();
                    assert_ne!(run(&programs, Schedule::Random(3)), Ok(()), "{rank}, {at}");
                    programs[rank].operations[at] = original;
                    caught += 1;
                }
            }
        }
    }
    assert!(caught >= 80, "{caught}");
}

#[test]
fn a_single_launch_is_reckoned_faster_than_any_queue_while_links_have_little_to_do() {
    let best = |world, bytes| {
        let shapes = [Shape::flat(world, bytes / ELEMENT_BYTES)];
        let in_place = vec![true; world];
        let source = DeviceSource { scales: false, ..source("ring", &shapes, &in_place) };
        candidates(&source, &DeviceFigures::NVLINK4, 32)[0].seconds
    };
    let one = |world, bytes| one_launch_seconds(world, bytes, &DeviceFigures::NVLINK4);
    for world in [2, 4, 8] {
        assert!(one(world, 4 << 10) < best(world, 4 << 10) / 2.0, "{world} ranks");
    }
    assert!(one(8, 8 << 20) > best(8, 8 << 20), "eight ranks read seven times as much");
    assert!(one(2, 8 << 20) < best(2, 8 << 20), "two ranks read no more than they must");
}

/// The fastest algorithm for an all-reduce of this many bytes.
fn fastest(figures: &DeviceFigures, world: usize, bytes: usize) -> &'static str {
    let shapes = [Shape::flat(world, bytes / ELEMENT_BYTES)];
    let in_place = vec![true; world];
    let source = DeviceSource { scales: false, ..source("ring", &shapes, &in_place) };
    candidates(&source, figures, 32)[0].algorithm.name()
}

#[test]
fn small_messages_go_in_one_shot_and_large_ones_where_links_carry_least() {
    use DeviceFigures as Figures;
    for figures in [Figures::NVLINK4, Figures::NVLINK3, Figures::PCIE5, Figures::PCIE4] {
        for world in [4, 8] {
            assert_eq!(fastest(&figures, world, 4 << 10), "one-shot", "{figures:?}");
            assert_eq!(fastest(&figures, world, 1 << 20), "two-shot", "{figures:?}");
            let large = fastest(&figures, world, 256 << 20);
            assert!(["two-shot", "ring"].contains(&large), "{figures:?}: {large}");
        }
    }
    // Slower links leave one-shot earlier.
    let last = |figures: &Figures| {
        (10..25).take_while(|power| fastest(figures, 8, 1 << power) == "one-shot").count()
    };
    assert!(last(&Figures::NVLINK4) > last(&Figures::PCIE5));
    assert!(last(&Figures::PCIE5) > last(&Figures::PCIE4));
}

#[test]
fn a_fold_of_too_many_sources_is_no_candidate() {
    let shapes = [Shape::flat(5, 100)];
    let source = source("ring", &shapes, &[false; 5]);
    let names = |most| -> Vec<&str> {
        let candidates = candidates(&source, &DeviceFigures::NVLINK4, most);
        candidates.iter().map(|it| it.algorithm.name()).collect()
    };
    assert!(names(5).contains(&"one-shot") && !names(4).contains(&"one-shot"));
    assert!(names(2).contains(&"ring"));
}

#[test]
fn transfers_of_large_messages_are_cut_where_that_is_faster() {
    let shapes = [Shape::whole(Topology::flat(8), PlanKind::Broadcast { root: 0 }, 64 << 20)];
    let source =
        DeviceSource { average: false, scales: false, ..source("chain", &shapes, &[true; 8]) };
    let all = candidates(&source, &DeviceFigures::NVLINK4, 32);
    let chain = all.iter().find(|it| it.algorithm.name() == "chain").unwrap();
    let whole = seconds(&source, &DeviceFigures::NVLINK4);
    assert!(chain.slice_bytes < WHOLE && chain.seconds < whole / 3.0, "{chain:?}, {whole}");
}

/// What a rank does grows with the steps of its plan, not with those of the others.
#[test]
fn queues_of_large_worlds_are_short() {
    const WORLD: usize = 48;
    let shapes = [Shape::flat(WORLD, 1 << 20)];
    let operations = |name| letters(&source(name, &shapes, &[true; WORLD])).len();
    assert_eq!(operations("ring"), 2 + 3 * 2 * (WORLD - 1) + 1);
    assert_eq!(operations("two-shot"), 8);
    assert!(operations("halving-doubling") < 3 * 2 * 7);
}

/// What is chosen for an all-reduce of f32 in place on H100s with NVLink 4, where the switch may
/// add or not, and the time.
fn choice(world: usize, bytes: usize, may_switch: bool) -> (&'static str, f64) {
    let shapes = [Shape::flat(world, bytes / ELEMENT_BYTES)];
    let in_place = vec![true; world];
    let source =
        DeviceSource { average: false, scales: false, ..source("ring", &shapes, &in_place) };
    let best = candidates(&source, &DeviceFigures::NVLINK4, 32)[0];
    let once = one_launch_seconds(world, bytes, &DeviceFigures::NVLINK4);
    let switched = multimem_seconds(world, bytes, 8 << 20, &DeviceFigures::NVLINK4);
    let mut ways = vec![(best.algorithm.name(), best.seconds)];
    ways.extend((bytes <= 1 << 20).then_some(("one launch", once)));
    ways.extend(may_switch.then_some(("multimem", switched)));
    ways.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap()
}

/// The choices, each from so many bytes on. `--nocapture` prints the times.
fn choices(may_switch: bool) -> Vec<(usize, usize, &'static str)> {
    let mut choices = Vec::new();
    for world in [2, 4, 8] {
        let mut last = "";
        for power in 8..=28 {
            let (name, seconds) = choice(world, 1 << power, may_switch);
            println!("{world} ranks, {} bytes: {name}, {:.1} us", 1 << power, seconds * 1e6);
            if name != last {
                choices.push((world, 1_usize << power, name));
                last = name;
            }
        }
    }
    choices
}

/// What docs/performance.md has as reckoned.
#[test]
fn the_documented_choices_are_those_of_the_model() {
    assert_eq!(choices(false), EXPECTED);
    assert_eq!(choices(true), EXPECTED_WITH_MULTIMEM);
}

const EXPECTED: &[(usize, usize, &str)] = &[
    (2, 256, "one launch"),
    (2, 2 << 20, "one-shot"),
    (2, 8 << 20, "two-shot"),
    (4, 256, "one launch"),
    (4, 2 << 20, "two-shot"),
    (8, 256, "one launch"),
    (8, 1 << 20, "two-shot"),
];

const EXPECTED_WITH_MULTIMEM: &[(usize, usize, &str)] = &[
    (2, 256, "one launch"),
    (2, 2 << 20, "multimem"),
    (2, 4 << 20, "one-shot"),
    (2, 8 << 20, "two-shot"),
    (4, 256, "one launch"),
    (4, 256 << 10, "multimem"),
    (4, 16 << 20, "two-shot"),
    (8, 256, "one launch"),
    (8, 64 << 10, "multimem"),
];
