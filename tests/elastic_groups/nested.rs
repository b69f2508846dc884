//! Groups of groups of elastic jobs, while ranks die in turn or at once: each goes on, or ends, by
//! its own members alone, whatever became of the group that it was made of.

use super::*;

/// Which processes are in a group, by their numbers there.
fn members(group: &Communicator, process: u64) -> Vec<u64> {
    let mut all = vec![0; group.world()];
    group.all_gather(&[process], &mut all).unwrap();
    all
}

/// Groups of groups down to pairs, the last rank of each first in the next ones.
fn descend(communicator: &Communicator) -> Vec<Communicator> {
    let mut groups: Vec<Communicator> = Vec::new();
    loop {
        let parent = groups.last().unwrap_or(communicator);
        if parent.world() == 2 {
            return groups;
        }
        let rank = parent.rank();
        groups.push(parent.split(Some(rank as u32 % 2), -(rank as i64)).unwrap().unwrap());
    }
}

/// Streams in all of its groups at once while ranks are lost, and says of each how it ended.
pub(super) fn descend_and_stream() {
    let communicator = connect();
    let process = communicator.rank() as u64;
    let groups = descend(&communicator);
    let all: Vec<_> = groups.iter().map(|group| members(group, process)).collect();
    let last: usize = setting("LAST").parse().unwrap();
    let is_done = AtomicBool::new(false);
    let ends: Vec<_> = std::thread::scope(|scope| {
        let stream = |(depth, group)| {
            let is_done = &is_done;
            scope.spawn(move || stream(group, &format!("depth{depth}"), is_done))
        };
        let streams: Vec<_> = groups.iter().enumerate().map(stream).collect();
        drop(rebuild_until(communicator, last).unwrap());
        // Release: pairs with the Acquire load of the streams.
        is_done.store(true, Ordering::Release);
        streams.into_iter().map(|it| it.join().unwrap()).collect()
    });
    for ((group, members), end) in groups.iter().zip(&all).zip(ends) {
        let (kind, lost) = match &end {
            Ok(steps) => {
                assert!(*steps > 20);
                // It is as good as any, and so is what is made of it.
                drop(descend(&group.duplicate().unwrap()));
                assert!(step(group, 5, true).unwrap());
                ("goes on".to_owned(), &[][..])
            }
            Err(error) => {
                let again = group.barrier().unwrap_err();
                assert_eq!(again.kind(), ErrorKind::ViewChanged, "{again}");
                (format!("{:?}", error.kind()), error.lost())
            }
        };
        tell(format!("{}/{kind}/{}", numbers(members), numbers(lost)));
    }
}

fn numbers<T: ToString>(all: &[T]) -> String {
    all.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

/// Starts so many ranks, kills these, so far apart, and checks what became of all groups.
fn lose_in_turn(ranks: usize, transport: &str, victims: &[(Rank, Duration)]) {
    let world = World::new(ranks, "descend_and_stream")
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_REPRODUCIBLE", 1)
        .set("LAST", ranks - victims.len());
    let running = world.start();
    let depths = ranks.ilog2() as usize - 1;
    (0..depths).for_each(|depth| running.wait_for(&format!("depth{depth}"), ranks, LIMIT));
    for &(victim, after) in victims {
        std::thread::sleep(after);
        running.signal(victim, libc::SIGKILL);
    }
    let victims: Vec<Rank> = victims.iter().map(|(victim, _)| *victim).collect();
    for (rank, told) in succeeded(&running.wait(LIMIT), &victims) {
        assert_eq!(told.len(), depths, "rank {rank}");
        for told in told {
            let [members, kind, lost] = told.split('/').collect::<Vec<_>>()[..] else {
                panic!("rank {rank}: {told}")
            };
            let read = |it: &str| -> Vec<Rank> {
                it.split_whitespace().map(|it| it.parse().unwrap()).collect()
            };
            let (members, lost) = (read(members), read(lost));
            let is_dead = |number: &Rank| victims.contains(&members[*number]);
            let dead: Vec<Rank> = (0..members.len()).filter(is_dead).collect();
            let context = format!("{transport}, {victims:?} died, rank {rank}: {told}");
            if dead.is_empty() {
                assert_eq!(kind, "goes on", "{context}");
                continue;
            }
            // It ends with the first of several that the job loses, or with some of them at once.
            assert_eq!(kind, "ViewChanged", "{context}");
            assert!(!lost.is_empty() && lost.iter().all(|it| dead.contains(it)), "{context}");
        }
    }
}

const AT_ONCE: Duration = Duration::ZERO;

#[test]
fn groups_of_groups_outlive_coordinators_of_theirs_and_of_the_job_that_die_at_once() {
    for transport in support::transports() {
        // Rank 0 coordinates the job; 6 and 7 the halves of it, 0 and 1 their quarters.
        lose_in_turn(8, transport, &[(0, AT_ONCE), (7, AT_ONCE)]);
    }
}

#[test]
fn of_groups_of_groups_of_16_ranks_those_end_that_lose_a_member() {
    let mut random = Random::new();
    let trials = std::env::var("UNISUM_TEST_KILLS").map_or(1, |it| it.parse().unwrap());
    for trial in 0..trials {
        let transport = random.of(&support::transports());
        let mut ranks: Vec<Rank> = (0..16).collect();
        let count = 2 + random.below(4);
        let victims: Vec<(Rank, Duration)> = (0..count)
            .map(|_| {
                let victim = ranks.swap_remove(random.below(ranks.len()));
                let after = random.of(&[0, 1_000, 20_000, 200_000]);
                (victim, Duration::from_micros(random.below(after + 1) as u64))
            })
            .collect();
        println!("trial {trial}: {transport}, {victims:?}");
        lose_in_turn(16, transport, &victims);
    }
}
