//! Messages between two ranks, between processes.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::stopwatch::Stopwatch;
use support::{World, await_others, reach, setting, tell_error};
use unisum::{Communicator, ErrorKind, Message, Messenger};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("any_order", any_order),
        ("threads", threads),
        ("shift", shift),
        ("to_itself", to_itself),
        ("flood", flood),
        ("differ", differ),
        ("differ_and_leave", differ_and_leave),
        ("talk_forever", talk_forever),
        ("nobody_sends", nobody_sends),
        ("leave_early", leave_early),
        ("busy_waiters", busy_waiters),
        ("fork", fork),
        ("any_rank", any_rank),
    ]);
}

const LIMIT: Duration = Duration::from_secs(180);
/// Half the deadline of calls.
const SOON: Duration = Duration::from_secs(30);

fn on_both(ranks: usize, scenario: &'static str) {
    for transport in support::transports() {
        World::new(ranks, scenario).set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn messenger() -> (Communicator, Messenger) {
    let communicator = Communicator::from_environment().unwrap();
    let messenger = Messenger::new(&communicator).unwrap();
    (communicator, messenger)
}

/// A generator that gives the same numbers on all ranks.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((self.0 >> 33) as usize) % limit
    }
}

/// A message of the model: who sends what to whom.
#[derive(Clone, Copy, Debug)]
struct Letter {
    from: usize,
    to: usize,
    tag: u64,
    len: usize,
    number: u32,
}

impl Letter {
    fn contents(&self) -> Vec<u32> {
        (0..self.len as u32).map(|at| self.number.wrapping_mul(0x9e37_79b9) ^ at).collect()
    }
}

fn letters(random: &mut Random, world: usize, count: usize) -> Vec<Letter> {
    let letter = |number| {
        let len = match random.below(4) {
            0 => random.below(3),
            1 => random.below(3000),
            2 => random.below(20_000),
            _ => random.below(262_144),
        };
        let (from, to, tag) = (random.below(world), random.below(world), random.below(5) as u64);
        Letter { from, to, tag, len, number }
    };
    (0..count as u32).map(letter).collect()
}

/// The order in which a rank posts: any, but that letters of two ranks and a tag keep theirs.
fn shuffled(random: &mut Random, letters: &[Letter]) -> Vec<Letter> {
    let mut rest = letters.to_vec();
    let mut order = Vec::new();
    while !rest.is_empty() {
        let drawn = rest[random.below(rest.len())];
        let key = |letter: &Letter| (letter.from, letter.to, letter.tag);
        let first = rest.iter().position(|letter| key(letter) == key(&drawn)).unwrap();
        order.push(rest.remove(first));
    }
    order
}

#[test]
fn messages_arrive_whatever_the_order_of_posting() {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    for transport in support::transports() {
        for ranks in [1, 2, 5] {
            World::new(ranks, "any_order")
                .set("UNISUM_TRANSPORT", transport)
                .set("SEED", seed)
                .succeed(LIMIT);
        }
    }
}

/// Rounds of letters between random ranks, this rank among them. All are posted at once, half of
/// the rounds from registered memory.
fn any_order() {
    let (communicator, messenger) = messenger();
    let (rank, world) = (messenger.rank(), messenger.world());
    let mut same = Random(setting("SEED").parse().unwrap());
    let mut own = Random(same.0 ^ (rank as u64 + 1) << 40);
    for round in 0..6 {
        let all = letters(&mut same, world, 20 * world);
        let mine: Vec<Letter> =
            all.into_iter().filter(|letter| letter.from == rank || letter.to == rank).collect();
        let sends: Vec<Letter> =
            mine.iter().copied().filter(|letter| letter.from == rank).collect();
        let receives: Vec<Letter> =
            mine.iter().copied().filter(|letter| letter.to == rank).collect();
        let (sends, receives) = (shuffled(&mut own, &sends), shuffled(&mut own, &receives));
        let memory = |len: usize| communicator.allocate::<u32>(len).unwrap();
        let contents: Vec<_> = sends
            .iter()
            .map(|letter| {
                let mut data = memory(if round % 2 == 0 { letter.len } else { 0 });
                if round % 2 == 0 {
                    data.copy_from_slice(&letter.contents());
                }
                (data, letter.contents())
            })
            .collect();
        let mut got: Vec<Vec<u32>> = receives.iter().map(|letter| vec![0; letter.len]).collect();
        let mut messages: Vec<Message<'_, u32>> = Vec::new();
        for ((registered, private), letter) in contents.iter().zip(&sends) {
            let data = if round % 2 == 0 { &registered[..] } else { &private[..] };
            messages.push(Message::Send { data, to: letter.to, tag: letter.tag });
        }
        for (data, letter) in got.iter_mut().zip(&receives) {
            let receive = Message::Receive { data, from: letter.from, tag: letter.tag };
            // Anywhere behind the receives before it.
            let after = messages.iter().rposition(|it| matches!(it, Message::Receive { .. }));
            let first = after.map_or(0, |at| at + 1);
            let at = first + own.below(messages.len() - first + 1);
            messages.insert(at, receive);
        }
        messenger.exchange(&mut messages).unwrap();
        drop(messages);
        for (got, letter) in got.iter().zip(&receives) {
            assert!(*got == letter.contents(), "round {round}: {letter:?}");
        }
    }
}

#[test]
fn many_threads_send_and_receive_at_once() {
    on_both(3, "threads");
}

/// A thread for each tag and direction with every rank, each with blocking calls of its own.
fn threads() {
    let (_communicator, messenger) = messenger();
    let (rank, world) = (messenger.rank(), messenger.world());
    let letter = |from, to, tag: u64, number: u32| {
        let len = [0, 5, 1000, 40_000][(number as usize + tag as usize) % 4];
        Letter { from, to, tag, len, number: number + 1000 * tag as u32 }
    };
    thread::scope(|scope| {
        for (peer, tag) in (0..world).flat_map(|peer| (0..3).map(move |tag| (peer, tag))) {
            let messenger = &messenger;
            scope.spawn(move || {
                for number in 0..60 {
                    let letter = letter(rank, peer, tag, number);
                    messenger.send(&letter.contents(), peer, tag).unwrap();
                }
            });
            scope.spawn(move || {
                for number in 0..60 {
                    let letter = letter(peer, rank, tag, number);
                    let mut data = vec![0; letter.len];
                    messenger.receive(&mut data, peer, tag).unwrap();
                    assert!(data == letter.contents(), "{letter:?}");
                }
            });
        }
    });
}

#[test]
fn a_ring_shift_by_exchange_can_not_deadlock() {
    on_both(16, "shift");
}

fn shift() {
    let (communicator, messenger) = messenger();
    let (rank, world) = (messenger.rank(), messenger.world());
    for len in [1, 3000, 200_000] {
        let mut data = communicator.allocate::<u32>(len).unwrap();
        data.fill(rank as u32);
        for step in 1..=world {
            let mut next = communicator.allocate::<u32>(len).unwrap();
            messenger
                .exchange(&mut [
                    Message::Send { data: &data[..], to: (rank + 1) % world, tag: 1 },
                    Message::Receive { data: &mut next, from: (rank + world - 1) % world, tag: 1 },
                ])
                .unwrap();
            data = next;
            let expected = (rank + world - step) % world;
            assert!(data.iter().all(|&element| element == expected as u32), "step {step}");
        }
    }
}

#[test]
fn a_rank_sends_to_itself() {
    World::new(1, "to_itself").succeed(LIMIT);
    on_both(2, "to_itself");
}

fn to_itself() {
    let (_communicator, messenger) = messenger();
    let rank = messenger.rank();
    let mut short = [0_u8; 3];
    messenger.send(&[1_u8, 2, 3], rank, 5).unwrap();
    messenger.send(&[4_u8, 5, 6], rank, 4).unwrap();
    messenger.receive(&mut short, rank, 4).unwrap();
    assert_eq!(short, [4, 5, 6]);
    messenger.receive(&mut short, rank, 5).unwrap();
    assert_eq!(short, [1, 2, 3]);
    let long = vec![7.5_f64; 100_000];
    let mut got = vec![0.0; 100_000];
    thread::scope(|scope| {
        scope.spawn(|| messenger.send(&long, rank, 0).unwrap());
        messenger.receive(&mut got, rank, 0).unwrap();
    });
    assert_eq!(got, long);
    let error = messenger.send(&[0_u8], messenger.world(), 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    messenger.exchange::<u8>(&mut []).unwrap();
}

#[test]
fn a_flood_that_nobody_receives_yet_takes_bounded_memory() {
    on_both(2, "flood");
}

fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Rank 0 sends 40 MB in short messages and behind them one of another tag, which rank 1 receives
/// first: by then it has heard of all others.
fn flood() {
    const COUNT: usize = 10_000;
    let (_communicator, messenger) = messenger();
    if messenger.rank() == 0 {
        let data: Vec<Vec<u32>> = (0..COUNT as u32).map(|number| vec![number; 1000]).collect();
        let messages = data.iter().map(|data| Message::Send { data, to: 1, tag: 0 });
        let last = Message::Send { data: &[7_u32], to: 1, tag: 1 };
        messenger.exchange(&mut messages.chain([last]).collect::<Vec<_>>()).unwrap();
        return;
    }
    let before = resident_bytes();
    let mut last = [0_u32];
    messenger.receive(&mut last, 0, 1).unwrap();
    assert_eq!(last, [7]);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes more than before the flood");
    for number in 0..COUNT as u32 {
        let mut data = vec![0; 1000];
        messenger.receive(&mut data, 0, 0).unwrap();
        assert!(data.iter().all(|&element| element == number), "message {number}");
    }
}

#[test]
fn ends_that_differ_are_an_error_on_both() {
    let transports = support::transports().into_iter();
    for (transport, what) in transports.flat_map(|it| [(it, "length"), (it, "type")]) {
        for len in [10, 10_000] {
            let ended = World::new(3, "differ")
                .set("UNISUM_TRANSPORT", transport)
                .set("WHAT", what)
                .set("LEN", len)
                .run(LIMIT);
            for (rank, ended) in ended.iter().enumerate() {
                assert_eq!(ended.status, 0, "rank {rank}, {transport}, {what}: {ended:#?}");
                let told = &ended.told[0];
                assert!(told.starts_with("Mismatch [0, 1] "), "rank {rank}: {told}");
                assert!(
                    told.contains("rank 1 receives") && told.contains("rank 0, which"),
                    "{told}"
                );
                assert!(told.contains("with tag 77"), "{told}");
            }
        }
    }
}

/// The sender does not wait for anybody, and its process may have ended: also that of the rank that
/// tells all others what went wrong.
#[test]
fn ends_that_differ_are_an_error_when_the_sender_has_left() {
    for (transport, sender) in
        support::transports().into_iter().flat_map(|it| [0, 1].map(|sender| (it, sender)))
    {
        let world = World::new(3, "differ_and_leave").set("UNISUM_TRANSPORT", transport);
        let told = world.set("SENDER", sender).succeed(LIMIT);
        for (rank, told) in told.iter().enumerate().filter(|(rank, _)| *rank != sender) {
            let context = format!("{transport}, {sender} sends, rank {rank}: {}", told[0]);
            assert!(told[0].starts_with("Mismatch [0, 1] "), "{context}");
            let says = format!("receives 44 bytes of f32 with tag 77 from rank {sender}");
            assert!(told[0].contains(&says) && told[0].contains("sent 40 bytes"), "{context}");
        }
    }
}

fn differ_and_leave() {
    let (communicator, messenger) = messenger();
    let sender: usize = setting("SENDER").parse().unwrap();
    drop(communicator);
    if messenger.rank() == sender {
        return messenger.send(&[1.0_f32; 10], 1 - sender, 77).unwrap();
    }
    let error = if messenger.rank() == 2 {
        messenger.receive(&mut [0_u8], 1 - sender, 5)
    } else {
        thread::sleep(Duration::from_millis(700));
        messenger.receive(&mut [0.0_f32; 11], sender, 77)
    };
    tell_error(&error.unwrap_err());
}

fn differ() {
    let (_communicator, messenger) = messenger();
    let len: usize = setting("LEN").parse().unwrap();
    let error = match (messenger.rank(), setting("WHAT").as_str()) {
        (0, _) => messenger
            .send(&vec![1.0_f32; len], 1, 77)
            // A short message is gone; the next wait finds out.
            .and_then(|()| messenger.receive(&mut [0.0_f32], 1, 0)),
        (1, "length") => messenger.receive(&mut vec![0.0_f32; len + 1], 0, 77),
        (1, _) => messenger.receive(&mut vec![0_i32; len], 0, 77),
        _ => messenger.receive(&mut [0_u8], 0, 5),
    };
    tell_error(&error.unwrap_err());
    let again = messenger.send(&[0_u8], 0, 0).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Aborted, "{again}");
}

#[test]
fn a_killed_rank_is_named_by_those_that_wait() {
    for transport in support::transports() {
        for victim in [0, 2] {
            let running = World::new(4, "talk_forever").set("UNISUM_TRANSPORT", transport).start();
            running.wait_for("talking", 4, LIMIT);
            thread::sleep(Duration::from_millis(37));
            running.signal(victim, libc::SIGKILL);
            let killed = Stopwatch::start();
            let ended = running.wait(LIMIT);
            killed.assert_within(Duration::from_secs(3), SOON, "from the kill on");
            for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
                assert_eq!(ended.status, 0, "rank {rank}, victim {victim}: {ended:#?}");
                // Who comes back after the other thread heard of it is told that it is over.
                let [lost, over] = ["RankLost", "Aborted"].map(|it| format!("{it} [{victim}] "));
                let all_name_it =
                    |told: &String| told.starts_with(&lost) || told.starts_with(&over);
                assert!(ended.told.iter().all(all_name_it), "rank {rank}: {:?}", ended.told);
                assert!(ended.told.iter().any(|told| told.starts_with(&lost)), "rank {rank}");
                assert_eq!(ended.told.len(), 2);
            }
        }
    }
}

/// Large messages in a ring, and a second thread that waits for what never comes.
fn talk_forever() {
    let (_communicator, messenger) = messenger();
    let (rank, world) = (messenger.rank(), messenger.world());
    thread::scope(|scope| {
        scope.spawn(|| {
            let error = messenger.receive(&mut [0_u8], (rank + 1) % world, 99).unwrap_err();
            tell_error(&error);
        });
        let data = vec![rank as u64; 1 << 20];
        let mut got = vec![0; 1 << 20];
        for round in 0.. {
            let result = messenger.exchange(&mut [
                Message::Send { data: &data, to: (rank + 1) % world, tag: 0 },
                Message::Receive { data: &mut got, from: (rank + world - 1) % world, tag: 0 },
            ]);
            match result {
                Ok(()) if round == 0 => reach("talking"),
                Ok(()) => {}
                Err(error) => return tell_error(&error),
            }
        }
    });
}

#[test]
fn what_never_comes_is_named_at_the_deadline_and_costs_no_time() {
    for transport in support::transports() {
        let told = World::new(2, "nobody_sends")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_TIMEOUT", 4)
            .succeed(LIMIT);
        assert!(told[0][0].starts_with("Timeout [1] "), "{told:?}");
        assert!(told[0][0].contains("receive of 12 bytes of f32 from rank 1 with tag 31"));
    }
}

fn nobody_sends() {
    let (_communicator, messenger) = messenger();
    if messenger.rank() == 0 {
        let cpu = support_cpu();
        let start = Instant::now();
        let error = messenger.receive(&mut [0.0_f32; 3], 1, 31).unwrap_err();
        reach("over");
        tell_error(&error);
        assert!(start.elapsed() < SOON);
        let used = support_cpu() - cpu;
        assert!(used < Duration::from_millis(50), "{used:?} of processor time");
        assert_eq!(messenger.send(&[0_u8], 1, 0).unwrap_err().kind(), ErrorKind::Aborted);
    } else {
        await_others("over", 1, LIMIT);
    }
}

/// Processor time of this process.
fn support_cpu() -> Duration {
    // SAFETY: all zeros is a value of this plain structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: plain system call that fills the structure.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    assert_eq!(result, 0);
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

#[test]
fn a_rank_that_has_done_its_part_may_leave_and_one_that_is_awaited_is_named() {
    for transport in support::transports() {
        let told = World::new(3, "leave_early").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
        assert!(told[0][0].starts_with("RankLost [2] "), "{told:?}");
    }
}

/// Ranks 1 and 2 send and leave; rank 0 receives it all only after they are gone, and then waits
/// for more.
fn leave_early() {
    let (_communicator, messenger) = messenger();
    let rank = messenger.rank();
    if rank > 0 {
        messenger.receive(&mut [0_u8], 0, 0).unwrap();
        let data = vec![rank as u32; 1500];
        (0..6).for_each(|tag| messenger.send(&data, 0, tag).unwrap());
        return;
    }
    for peer in 1..3 {
        messenger.send(&[1_u8], peer, 0).unwrap();
        let mut data = vec![0_u32; 1500];
        for tag in (0..6).rev() {
            messenger.receive(&mut data, peer, tag).unwrap();
            assert_eq!(data, vec![peer as u32; 1500]);
        }
    }
    let error = messenger.receive(&mut [0_u8], 2, 9).unwrap_err();
    tell_error(&error);
}

#[test]
fn threads_that_wait_do_not_keep_others_from_sending() {
    on_both(2, "busy_waiters");
}

/// Each rank has threads parked in receives that end last; a ping-pong goes on meanwhile.
fn busy_waiters() {
    let (_communicator, messenger) = messenger();
    let peer = 1 - messenger.rank();
    thread::scope(|scope| {
        for tag in 100..104 {
            let messenger = &messenger;
            scope.spawn(move || {
                let mut data = [0_u64; 2];
                messenger.receive(&mut data, peer, tag).unwrap();
                assert_eq!(data, [tag; 2]);
            });
        }
        let (mut start, mut quickest) = (Instant::now(), Duration::MAX);
        for round in 0..2000_u64 {
            if round % 100 == 0 && round > 0 {
                quickest = quickest.min(start.elapsed());
                start = Instant::now();
            }
            let mut got = [0_u64];
            if peer == 1 {
                messenger.send(&[round], peer, 0).unwrap();
                messenger.receive(&mut got, peer, 0).unwrap();
            } else {
                messenger.receive(&mut got, peer, 0).unwrap();
                messenger.send(&[round], peer, 0).unwrap();
            }
            assert_eq!(got, [round]);
        }
        // Others may have the processors for most of the time.
        assert!(quickest < Duration::from_secs(2), "{quickest:?} for 100 rounds");
        (100..104).for_each(|tag| messenger.send(&[tag; 2], peer, tag).unwrap());
    });
}

#[test]
fn a_forked_child_is_refused() {
    on_both(2, "fork");
}

fn fork() {
    let (communicator, messenger) = messenger();
    // SAFETY: the child only calls what is refused, and ends at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let error = messenger.send(&[0_u8], 0, 0).unwrap_err();
        drop(messenger);
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(i32::from(error.kind() != ErrorKind::Forked)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!((waited, status), (child, 0));
    let peer = 1 - messenger.rank();
    messenger.send(&[5_u8], peer, 0).unwrap();
    messenger.receive(&mut [0_u8], peer, 0).unwrap();
    communicator.barrier().unwrap();
}

/// All others send to rank 0, which does not know in which order, and leave one after another.
fn any_rank() {
    let (communicator, post) = messenger();
    let (rank, world) = (communicator.rank(), communicator.world());
    let lengths = [1_usize, 100_000];
    if rank > 0 {
        thread::sleep(Duration::from_millis(100 * rank as u64));
        lengths.iter().for_each(|&len| post.send(&vec![rank as u32; len], 0, len as u64).unwrap());
        return;
    }
    for len in lengths {
        let mut heard: Vec<usize> = (1..world)
            .map(|_| {
                let from = post.probe(len as u64).unwrap();
                let mut data = vec![0_u32; len];
                post.receive(&mut data, from, len as u64).unwrap();
                assert!(data.iter().all(|&it| it as usize == from));
                from
            })
            .collect();
        heard.sort_unstable();
        assert_eq!(heard, (1..world).collect::<Vec<_>>());
    }
}

#[test]
fn messages_of_any_rank_are_found_and_who_leaves_disturbs_nobody() {
    on_both(4, "any_rank");
}
