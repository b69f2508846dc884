use std::thread;

use super::*;
use crate::buckets::Parameter;

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
    let meeting = std::env::temp_dir().join(format!("unisum-shards-{}", std::process::id()));
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

#[test]
fn a_layout_that_one_rank_got_and_the_other_did_not_loses_nothing() {
    run_in_two_ranks(|communicator| {
        let rank = communicator.rank();
        for gets in 0..2 {
            let mut state = ShardState::new(1);
            let laid_out = build(communicator, 4000).reshard(&mut state).expect("the first");
            for it in laid_out.lost().filter(|it| it.to == rank) {
                let elements = state.elements_mut(0, it.parameter, it.elements.clone());
                let values = it.elements.clone().map(|at| value(it.parameter, at));
                elements.iter_mut().zip(values).for_each(|(to, value)| *to = value);
            }
            state.set_version(5);
            let second = build(communicator, 64);
            let (brought, is_whole) = second.bring(&mut state).expect("both are there");
            assert!(is_whole && brought.moves.iter().any(|it| it.from != Some(it.to)));
            // The last call of it fails on the other rank.
            if gets == rank {
                state.settle(brought.version, second.shard_place(), second.counts());
            }
            drop(second);
            let mut third = build(communicator, 1000);
            // If what came were forgotten, the rank that got it has nothing else.
            let mut forgetful = state.clone();
            forgetful.coming.clear();
            let lost = third.reshard(&mut forgetful).expect("both are there");
            assert!(lost.lost().count() > 0);
            check(&mut forgetful, &lost, rank);
            let all = third.reshard(&mut state).expect("both are there");
            assert_eq!((all.version, all.lost().count()), (5, 0));
            check(&mut state, &all, rank);
        }
    });
}
