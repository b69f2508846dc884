use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::moving::bytes_of;
use super::*;
use crate::buckets::Parameter;

thread_local! {
    /// How many elements at once this thread has memory for.
    static ROOM: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Asks for more than there can be where the test leaves no room.
pub(super) fn asked_for(count: usize) -> usize {
    if count > ROOM.get() { usize::MAX } else { count }
}

#[test]
fn a_byte_that_is_changed_on_its_way_is_found_out() {
    let (sent, counts) = ([1_u16, 2, 3, 4, 5], [2, 0, 3]);
    let of = |buckets: &[&[u16]]| {
        let mut prints = Fingerprints::new(3);
        for bucket in buckets {
            prints.add(bytes_of(bucket), &counts, bytes_of(bucket), &counts);
        }
        assert_eq!(prints.sent, prints.received);
        prints.sent
    };
    let right = of(&[&sent, &sent]);
    assert!(right[1] == [0; 32] && right[0] != right[2]);
    let mut other = sent;
    other[3] ^= 256;
    let [first, last] = [of(&[&other, &sent]), of(&[&sent, &other])];
    assert!(first != last, "the order counts");
    for wrong in [first, last, of(&[&sent])] {
        assert_ne!(wrong[2], right[2]);
    }
    assert_eq!(of(&[&other, &sent])[0], right[0], "only who gets it sees it");
}

/// Two ranks, which are threads.
fn run_in_two_ranks(work: impl Fn(&Communicator) + Sync) {
    static MEETINGS: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: only the number counts.
    let number = MEETINGS.fetch_add(1, Ordering::Relaxed);
    let name = format!("unisum-shards-{}-{number}", std::process::id());
    let meeting = std::env::temp_dir().join(name);
    let work_as = |rank| {
        let builder = Communicator::builder().rank(rank).world(2);
        let builder = builder.rendezvous(&format!("file://{}", meeting.display()));
        let builder = builder.token("a token of the tests, long enough").transport("tcp");
        work(&builder.connect().expect("both are there"));
    };
    thread::scope(|scope| (0..2).for_each(|rank| drop(scope.spawn(move || work_as(rank)))));
    let _ = std::fs::remove_file(&meeting);
}

fn build(communicator: &Communicator, end_bucket_bytes: usize) -> Buckets {
    let parameter =
        |(at, count): (usize, usize)| Parameter::new(at.to_string(), &[count], Dtype::F32);
    let list: Vec<_> = [100, 37, 1, 0, 300].into_iter().enumerate().map(parameter).collect();
    let builder = Buckets::builder(communicator).end_bucket_bytes(end_bucket_bytes);
    builder.sharded().build(&list).expect("both build the same")
}

fn value(parameter: usize, at: usize) -> f32 {
    (1000 * parameter + at + 1) as f32
}

/// All that is this rank's: what is missing is zero.
fn check(state: &mut ShardState<f32>, resharded: &Resharded, rank: Rank) {
    for it in resharded.moves.iter().filter(|it| it.to == rank && it.from.is_some()) {
        let elements = state.elements_mut(0, it.parameter, it.elements.clone()).iter();
        let expected = it.elements.clone().map(|at| value(it.parameter, at));
        assert!(elements.copied().eq(expected), "{it:?}");
    }
}

/// State of version 5, all of which is there: in the first vector, values that tell it.
fn begin(communicator: &Communicator) -> ShardState<f32> {
    let mut state = ShardState::new(3);
    let laid_out = build(communicator, 4000).reshard(&mut state).expect("the first");
    for it in laid_out.lost().filter(|it| it.to == communicator.rank()) {
        let elements = state.elements_mut(0, it.parameter, it.elements.clone());
        let values = it.elements.clone().map(|at| value(it.parameter, at));
        elements.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    }
    state.set_version(5);
    state
}

fn own(state: &ShardState<f32>) -> Vec<Vec<Vec<f32>>> {
    let of_bucket = |it: &Vec<Vector<f32>>| it.iter().map(|it| it.to_vec()).collect();
    state.own.shards.iter().map(of_bucket).collect()
}

/// What a rank has, without what other ranks can't know of.
fn kept(state: &ShardState<f32>) -> (u64, Vec<Vec<Vec<f32>>>, Vec<u64>) {
    let versions = state.holdings().map(|it| it.version).collect();
    (state.version, own(state), versions)
}

#[test]
fn layouts_that_nobody_agreed_on_neither_pile_up_nor_come_back() {
    run_in_two_ranks(|communicator| {
        let mut state = begin(communicator);
        let (version, before, _) = kept(&state);
        for attempt in 0..12 {
            let layout = [64, 1000, 200][attempt % 3];
            build(communicator, layout).bring(&mut state).expect("both are there");
            assert!(state.laid.len() <= 3, "one a layout, not {}", state.laid.len());
            assert_eq!((state.version, &own(&state)), (version, &before), "as it was");
        }
        // The program goes on with what it has.
        let mut further = state.clone();
        further.set_version(6);
        assert_eq!(kept(&further).2, [6], "nothing is left to go back to");
        let mut third = build(communicator, 300);
        for _ in 0..5 {
            let all = third.reshard(&mut state).expect("both are there");
            assert_eq!((all.version, all.lost().count()), (5, 0));
            check(&mut state, &all, communicator.rank());
            assert_eq!(kept(&state).2, [5], "only its own");
        }
    });
}

/// Copies, as if the last barrier had failed on all ranks but one: the number of the copies.
fn copy_known_to(rank: Rank, layout: &mut Buckets, state: &mut ShardState<f32>) -> u64 {
    let before = state.copies.clone();
    layout.copy_shards(state).expect("both are there");
    let made = state.copies.number;
    if layout.core.communicator().rank() != rank {
        state.copied = Some(std::mem::replace(&mut state.copies, before));
    }
    made
}

#[test]
fn copies_that_one_rank_knows_of_are_not_lost_by_the_other_and_do_not_pile_up() {
    run_in_two_ranks(|communicator| {
        let mut state = begin(communicator);
        let mut layout = build(communicator, 4000);
        for attempt in 0..12 {
            let made = copy_known_to(attempt % 3, &mut layout, &mut state);
            if attempt < 6 {
                // A next copy that fails early finds out, before it makes any.
                state.set_version(state.version + 1);
                check_and_draw(communicator, &mut state, true).expect("both are there");
            } else {
                layout.reshard(&mut state).expect("both are there");
            }
            assert!(state.copied.is_none());
            let is_known = attempt % 3 < 2;
            assert_eq!(state.copies.number == made, is_known, "in attempt {attempt}");
            assert!(state.holdings().count() <= 3);
        }
    });
}

#[test]
fn no_memory_for_what_travels_is_an_error_on_all_ranks_and_changes_nothing() {
    run_in_two_ranks(|communicator| {
        let mut state = begin(communicator);
        let before = kept(&state);
        let mut second = build(communicator, 64);
        let shard = (0..second.plan.layout.plans().len())
            .map(|it| second.plan.layout.shard(it, (communicator.rank(), 2)).len());
        let longest = shard.max().expect("it has buckets");
        // With room for each vector, but not for what travels of all three.
        for (lacks, room) in [(0, 0), (1, 1), (0, longest), (1, longest)] {
            if lacks == communicator.rank() {
                ROOM.set(room);
            }
            let reshard = second.reshard(&mut state);
            ROOM.set(usize::MAX);
            let error = reshard.expect_err("there is no room");
            assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Memory, &[lacks][..]));
            assert_eq!(kept(&state), before);
        }
        let all = second.reshard(&mut state).expect("there is room");
        check(&mut state, &all, communicator.rank());
    });
}

#[test]
fn a_layout_that_one_rank_got_and_the_other_did_not_loses_nothing() {
    run_in_two_ranks(|communicator| {
        let rank = communicator.rank();
        for gets in 0..2 {
            let mut state = begin(communicator);
            let second = build(communicator, 64);
            let brought = second.bring(&mut state).expect("both are there");
            let mut moves = brought.resharded.moves.iter();
            assert!(brought.is_whole && moves.any(|it| it.from != Some(it.to)));
            // The last call of it fails on the other rank.
            if gets == rank {
                state.settle(&brought, second.placement(), second.counts());
            }
            drop(second);
            let mut third = build(communicator, 1000);
            // If what came were forgotten, the rank that got it has nothing else.
            let mut forgetful = state.clone();
            forgetful.laid.clear();
            let lost = third.reshard(&mut forgetful).expect("both are there");
            assert!(lost.lost().count() > 0);
            check(&mut forgetful, &lost, rank);
            let all = third.reshard(&mut state).expect("both are there");
            assert_eq!((all.version, all.lost().count()), (5, 0));
            check(&mut state, &all, rank);
            assert!(state.laid.is_empty() && state.copies.held.is_empty());
        }
    });
}
