//! Groups of elastic jobs, which go on while none of their own ranks is lost: real processes,
//! killed in the middle of calls.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "elastic_groups/ends.rs"]
mod ends;
#[path = "elastic_groups/entering.rs"]
mod entering;
#[path = "elastic_groups/links.rs"]
mod links;
#[path = "elastic_groups/nested.rs"]
mod nested;
mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{
    Ended, Random, Running, World, await_others, open_files_and_threads, reach, setting, tell,
    tell_error,
};
use unisum::{Communicator, Elastic, Error, ErrorKind, Message, Messenger, Rank, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("outlive", outlive),
        ("lose", lose),
        ("come_and_go", come_and_go),
        ("change", change),
        ("leave_group", ends::leave_group),
        ("end_in_order", ends::end_in_order),
        ("be_late", ends::be_late),
        ("be_stopped", ends::be_stopped),
        ("be_aborted", ends::be_aborted),
        ("count_costs", ends::count_costs),
        ("split_while_killed", split_while_killed),
        ("intrude", ends::intrude),
        ("knit", links::knit),
        ("lose_host", links::lose_host),
        ("descend_and_stream", nested::descend_and_stream),
        ("grow", entering::grow),
        ("enter", entering::enter),
        ("enter_late", entering::enter_late),
        ("lack_a_port", ends::lack_a_port),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);

fn connect() -> Communicator {
    Communicator::builder().elastic(Elastic { minimum: 1 }).connect().unwrap()
}

/// Ranks, from a variable of the test.
fn ranks(name: &str) -> Vec<Rank> {
    setting(name).split_whitespace().map(|it| it.parse().unwrap()).collect()
}

/// Waits, without a call, until so many ranks are here.
fn meet(place: &str, ranks: usize) {
    reach(place);
    await_others(place, ranks, LIMIT);
}

fn view(communicator: &Communicator) -> (u64, Vec<u64>) {
    let view = communicator.view().unwrap();
    (view.epoch, view.processes)
}

/// One step of a stream of collectives, of which each rank can reckon all results. Whether all
/// ranks say that it is the last.
fn step(group: &Communicator, number: u64, is_last: bool) -> Result<bool, Error> {
    let (rank, world) = (group.rank() as u64, group.world() as u64);
    let count = [1, 700, 40_000][(number % 3) as usize];
    let mut sum = vec![number * (rank + 1); count];
    group.all_reduce(&mut sum, ReduceOp::Sum)?;
    assert!(sum.iter().all(|it| *it == number * world * (world + 1) / 2), "step {number}");
    let mut all = vec![0; group.world() * 3];
    group.all_gather(&[rank ^ number; 3], &mut all)?;
    let expected = (0..world).flat_map(|rank| [rank ^ number; 3]);
    assert!(all.into_iter().eq(expected), "step {number}");
    let root = (number % world) as Rank;
    let mut told = [if root as u64 == rank { number } else { 0 }; 9];
    group.broadcast(&mut told, root)?;
    assert_eq!(told, [number; 9]);
    let mut are_last = [u8::from(is_last)];
    group.all_reduce(&mut are_last, ReduceOp::Min)?;
    Ok(are_last == [1])
}

/// Steps until all ranks have said that they are done, and says by `mark` that it is under way; how
/// many there were.
fn stream(group: &Communicator, mark: &str, is_done: &AtomicBool) -> Result<u64, Error> {
    for number in 1.. {
        // Acquire: pairs with the Release store of the thread that rebuilds.
        if step(group, number, is_done.load(Ordering::Acquire))? {
            return Ok(number);
        }
        if number == 20 {
            reach(mark);
        }
    }
    unreachable!("the loop ends by itself");
}

/// Works on the job's communicator, and rebuilds it, until it has so many ranks.
fn rebuild_until(mut communicator: Communicator, last: usize) -> Result<Communicator, Error> {
    loop {
        let mut sum = [1_u64; 10];
        match communicator.all_reduce(&mut sum, ReduceOp::Sum) {
            Ok(()) => assert_eq!(sum, [communicator.world() as u64; 10]),
            Err(error) if error.kind() == ErrorKind::ViewChanged => {
                communicator = communicator.rebuild()?;
                let (epoch, _) = view(&communicator);
                match communicator.barrier() {
                    Ok(()) => reach(&format!("epoch{epoch}")),
                    Err(error) if error.kind() == ErrorKind::ViewChanged => {}
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        }
        if communicator.world() == last {
            return Ok(communicator);
        }
    }
}

/// The group of `MEMBERS`, in this order, streams while others are lost; afterwards it can do all
/// that groups can.
fn outlive() {
    let communicator = connect();
    let group = communicator.subset(&ranks("MEMBERS")).unwrap();
    let last: usize = setting("LAST").parse().unwrap();
    let is_done = AtomicBool::new(false);
    let (communicator, steps) = std::thread::scope(|scope| {
        let stream = group
            .as_ref()
            .map(|group| scope.spawn(|| stream(group, "streaming", &is_done).unwrap()));
        let rebuilt = rebuild_until(communicator, last).unwrap();
        // Release: pairs with the Acquire load of the stream.
        is_done.store(true, Ordering::Release);
        (rebuilt, stream.map(|it| it.join().unwrap()))
    });
    let Some(group) = group else { return tell("no member") };
    // Groups of the group, one of all its ranks and one of some.
    let (rank, world) = (group.rank(), group.world());
    assert!(!step(&group.duplicate().unwrap(), 7, false).unwrap());
    let part = group.split((rank < 2).then_some(0), -(rank as i64)).unwrap();
    if let Some(part) = &part {
        assert_eq!((part.rank(), part.world()), (1 - rank, 2));
        assert!(step(part, 8, true).unwrap());
    }
    let messenger = Messenger::new(&group).unwrap();
    let (mut data, sent) = ([0_u32; 8], [rank as u32; 8]);
    let send = Message::Send { data: &sent, to: (rank + 1) % world, tag: 7 };
    let from = (rank + world - 1) % world;
    messenger.exchange(&mut [send, Message::Receive { data: &mut data, from, tag: 7 }]).unwrap();
    assert_eq!(data, [from as u32; 8]);
    // It needs no communicator of the job any more.
    let (epoch, processes) = view(&communicator);
    drop(communicator);
    assert!(step(&group, 9, true).unwrap());
    drop((part, messenger));
    assert!(step(&group, 10, true).unwrap());
    tell(format!("{epoch} {processes:?} {}", steps.unwrap() > 20));
}

/// Kills these ranks, one after the other, each once all that are left are in the next view.
fn kill_in_turn(running: &Running, world: usize, victims: &[Rank]) {
    for (index, &victim) in victims.iter().enumerate() {
        running.signal(victim, libc::SIGKILL);
        running.wait_for(&format!("epoch{}", index + 2), world - 1 - index, LIMIT);
    }
}

fn succeeded(ended: &[Ended], victims: &[Rank]) -> Vec<(Rank, Vec<String>)> {
    let left = ended.iter().enumerate().filter(|(rank, _)| !victims.contains(rank));
    left.map(|(rank, it)| {
        assert_eq!(it.status, 0, "rank {rank}: {ended:#?}");
        (rank, it.told.clone())
    })
    .collect()
}

#[test]
fn a_group_goes_on_while_others_are_lost_in_turn_rank_0_among_them() {
    for transport in support::transports() {
        // The group's order is not the job's.
        let (members, victims) = ([4, 1, 3], [0, 5, 2]);
        let world = World::new(6, "outlive")
            .set("UNISUM_TRANSPORT", transport)
            .set("MEMBERS", "4 1 3")
            .set("LAST", 3);
        let running = world.start();
        running.wait_for("streaming", members.len(), LIMIT);
        kill_in_turn(&running, 6, &victims);
        for (rank, told) in succeeded(&running.wait(LIMIT), &victims) {
            assert_eq!(told, ["4 [1, 3, 4] true"], "{transport}: rank {rank}");
        }
    }
}

#[test]
fn a_group_goes_on_while_others_die_at_random_moments() {
    let mut random = Random::new();
    let trials = std::env::var("UNISUM_TEST_KILLS").map_or(4, |it| it.parse().unwrap());
    for trial in 0..trials {
        let transport = random.of(&support::transports());
        // Of six that lose one or two the others are a quorum.
        let members = [[1, 2, 4], [3, 5, 1], [5, 4, 2]][random.below(3)];
        let mut others: Vec<Rank> = (0..6).filter(|rank| !members.contains(rank)).collect();
        let first = others.swap_remove(random.below(3));
        let second = Some(others[random.below(2)]).filter(|_| random.below(2) == 0);
        let victims: Vec<Rank> = [first].into_iter().chain(second).collect();
        println!("trial {trial}: {transport}, {members:?}, {victims:?} die");
        let world = World::new(6, "outlive")
            .set("UNISUM_TRANSPORT", transport)
            .set("MEMBERS", members.map(|it| it.to_string()).join(" "))
            .set("LAST", 6 - victims.len());
        let running = world.start();
        running.wait_for("streaming", members.len(), LIMIT);
        for &victim in &victims {
            std::thread::sleep(Duration::from_micros(random.below(20_000) as u64));
            running.signal(victim, libc::SIGKILL);
        }
        for (rank, told) in succeeded(&running.wait(LIMIT), &victims) {
            let is_member = members.contains(&rank);
            assert!(told[0].ends_with(if is_member { " true" } else { "no member" }), "{told:?}");
        }
    }
}

/// The group of even ranks loses one; those of odd ranks, and of some that are in one of these as
/// well, do not. Rank 6 is in none.
fn lose() {
    let communicator = connect();
    let rank = communicator.rank();
    let color = (rank < 6).then_some(rank as u32 % 2);
    let group = communicator.split(color, 0).unwrap();
    let both = communicator.subset(&[5, 4, 1]).unwrap();
    let last = communicator.world() - 1;
    let is_done = AtomicBool::new(false);
    let lost = std::thread::scope(|scope| {
        let other = both.as_ref().map(|both| scope.spawn(|| stream(both, "both", &is_done)));
        let group = group.map(|group| {
            let is_done = &is_done;
            scope.spawn(move || {
                let result = stream(&group, "streaming", is_done);
                if result.is_err() {
                    let again = group.barrier().unwrap_err();
                    assert_eq!(again.kind(), ErrorKind::ViewChanged, "{again}");
                }
                // On even ranks, while the other group is in calls.
                drop(group);
                result
            })
        });
        let rebuilt = rebuild_until(communicator, last).unwrap();
        rebuilt.barrier().unwrap();
        let result = match (group, color) {
            (Some(group), Some(0)) => group.join().unwrap().err(),
            (group, _) => {
                // Release: pairs with the Acquire load of the streams.
                is_done.store(true, Ordering::Release);
                group.and_then(|group| group.join().unwrap().err())
            }
        };
        // Release: as above.
        is_done.store(true, Ordering::Release);
        assert!(other.is_none_or(|it| it.join().unwrap().unwrap() > 20));
        result
    });
    match lost {
        None => tell("no error"),
        Some(error) => {
            tell_error(&error);
            tell(format!("{:?} {:?} {:?}", error.epoch(), error.lost(), error.joined()));
        }
    }
}

#[test]
fn a_group_that_loses_a_member_ends_on_all_others_and_its_siblings_go_on() {
    // Rank 0 coordinates the group as well as the job.
    for (transport, victim, number) in [("tcp", 2, 1), ("tcp", 0, 0), ("shm", 0, 0), ("shm", 2, 1)]
    {
        if !support::transports().contains(&transport) {
            continue;
        }
        let world = World::new(7, "lose").set("UNISUM_TRANSPORT", transport);
        let running = world.start();
        running.wait_for("streaming", 6, LIMIT);
        running.wait_for("both", 3, LIMIT);
        running.signal(victim, libc::SIGKILL);
        for (rank, told) in succeeded(&running.wait(LIMIT), &[victim]) {
            if rank % 2 == 1 || rank == 6 {
                assert_eq!(told, ["no error"], "{transport}: rank {rank}");
                continue;
            }
            let began = format!("ViewChanged [{number}] ");
            assert!(told[0].starts_with(&began), "{transport}: rank {rank}: {told:?}");
            let named = format!("ranks [{number}] of the group are lost");
            assert!(told[0].contains(&named), "{transport}: rank {rank}: {told:?}");
            assert_eq!(told[1], format!("Some(2) [{number}] []"), "{transport}: rank {rank}");
        }
    }
}

/// What this process holds, and the mappings of shared memory among it.
fn held() -> (usize, usize, usize) {
    let (files, threads) = open_files_and_threads();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains(" rw-s ") || line.contains("memfd"));
    (files, threads, shared.count())
}

/// Groups that outlive their epoch are dropped, again and again.
fn come_and_go() {
    let mut communicator = connect();
    // Connections are made by the calls that need them.
    let use_all = |communicator: &Communicator| {
        (1..4).for_each(|number| assert!(step(communicator, number, true).unwrap()));
    };
    use_all(&communicator);
    let (files, threads, shared) = held();
    for round in 0..8_u64 {
        let color = Some(communicator.rank() as u32 / 2);
        let group = communicator.split(color, 0).unwrap().unwrap();
        assert!(step(&group, round + 1, true).unwrap());
        let next = communicator.rebuild().unwrap();
        assert!(step(&group, round + 2, true).unwrap());
        drop(std::mem::replace(&mut communicator, next));
        assert!(step(&group, round + 3, true).unwrap());
    }
    use_all(&communicator);
    // Nor of the communicators of the views before.
    support::wait_until("nothing is left of the groups", Duration::from_secs(20), || {
        let now = held();
        now.0 <= files && now.1 <= threads && now.2 <= shared
    });
    // If one left before, the others would look for another coordinator meanwhile.
    meet("counted", 4);
    tell(view(&communicator).0);
}

#[test]
fn groups_that_are_dropped_after_their_epoch_leave_nothing_behind() {
    for transport in support::transports() {
        let world = World::new(4, "come_and_go")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_REPRODUCIBLE", 1);
        for told in world.succeed(LIMIT) {
            assert_eq!(told, ["9"], "{transport}");
        }
    }
}

/// What a program does to the job's communicator, and what that is to its groups.
fn change() {
    let communicator = connect();
    let rank = communicator.rank();
    let group = communicator.subset(&[1, 2]).unwrap();
    let with_last = communicator.subset(&[3, 4, 0]).unwrap();
    let all = communicator.duplicate().unwrap();
    // A call that one rank has ended may yet fail on another.
    meet("made", 5);
    communicator.revoke().unwrap();
    let again = communicator.rebuild().unwrap();
    // Of all ranks: it ends as the communicator does.
    assert_eq!(all.barrier().unwrap_err().kind(), ErrorKind::ViewChanged);
    drop((communicator, all));
    for group in [&group, &with_last].into_iter().flatten() {
        assert!(step(group, 5, true).unwrap());
    }
    meet("again", 5);
    if rank == 4 {
        // It is left behind.
        let error = with_last.unwrap().barrier().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::RankLost, "{error}");
        return tell_error(&again.barrier().unwrap_err());
    }
    let smaller = again.shrink(&[4]).unwrap();
    if let Some(group) = &group {
        assert!(step(group, 6, true).unwrap());
        assert_eq!(group.rebuild().unwrap_err().kind(), ErrorKind::Configuration);
        assert_eq!(group.revoke().unwrap_err().kind(), ErrorKind::Configuration);
        assert!(group.view().is_none());
    }
    if let Some(group) = &with_last {
        let error = group.barrier().unwrap_err();
        assert_eq!((error.kind(), error.lost()), (ErrorKind::ViewChanged, &[1][..]), "{error}");
    }
    smaller.barrier().unwrap();
    tell(format!("{:?}", view(&smaller)));
}

#[test]
fn revoke_and_shrink_of_the_job_end_no_group_but_those_with_a_rank_that_is_left_behind() {
    for transport in support::transports() {
        let told = World::new(5, "change").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
        for told in &told[..4] {
            assert_eq!(*told, ["(3, [0, 1, 2, 3])"], "{transport}");
        }
        assert!(told[4][0].starts_with("RankLost "), "{transport}: {told:?}");
    }
}

/// Splits again and again, until a rank dies in the middle; then in the next view.
fn split_while_killed() {
    let mut communicator = connect();
    let last = communicator.world() - 1;
    let mut number = 0;
    let mut split = |communicator: &Communicator| -> Result<(), Error> {
        number += 1;
        let color = (communicator.rank() + number) as u32 % 2;
        let group = communicator.split(Some(color), 0)?;
        communicator.barrier()?;
        if number == 2 {
            reach("splitting");
        }
        drop(group);
        Ok(())
    };
    let mut rounds = 0;
    while rounds < 3 {
        match split(&communicator) {
            Ok(()) => rounds += usize::from(communicator.world() == last),
            Err(error) if error.kind() == ErrorKind::ViewChanged => {
                communicator = communicator.rebuild().unwrap();
            }
            Err(error) => return tell_error(&error),
        }
    }
    let world = communicator.world();
    drop(communicator);
    let ended = || open_files_and_threads().1 <= 3;
    support::wait_until("the threads of all groups end", Duration::from_secs(20), ended);
    tell(world);
}

#[test]
fn ranks_that_die_while_groups_are_made_leave_no_group_half_made() {
    let mut random = Random::new();
    for transport in support::transports() {
        for victim in [0, 1 + random.below(4)] {
            let world = World::new(5, "split_while_killed").set("UNISUM_TRANSPORT", transport);
            let running = world.start();
            running.wait_for("splitting", 5, LIMIT);
            let moment = random.below(30_000) as u64;
            println!("{transport}: rank {victim} dies after {moment} us");
            std::thread::sleep(Duration::from_micros(moment));
            running.signal(victim, libc::SIGKILL);
            for (rank, told) in succeeded(&running.wait(LIMIT), &[victim]) {
                assert_eq!(told, ["4"], "{transport}: rank {rank}");
            }
        }
    }
}
