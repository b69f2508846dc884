//! Lost, stopped, late and contradicting ranks: everybody gets an error that names the failed rank,
//! in bounded time, and nothing is leaked.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::io::Write as _;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use support::stopwatch::Stopwatch;
use support::{
    Ended, World, await_others, open_files_and_threads, reach, setting, tell, tell_error,
};
use unisum::{Collective, Communicator, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("reduce_forever", reduce_forever),
        ("stop_before_second", stop_before_second),
        ("differ", differ),
        ("join_only", join_only),
        ("leave_and_come_again", leave_and_come_again),
        ("fork", fork),
        ("fork_then_die", fork_then_die),
        ("drop_works", drop_works),
        ("late", late),
        ("cut", cut),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// Half the deadline of calls: long for what happens at once, for the machine may be busy.
const SOON: Duration = Duration::from_secs(30);

fn reduce_forever() {
    let communicator = Communicator::from_environment().unwrap();
    let count = setting("COUNT").parse().unwrap();
    let mut data = communicator.allocate::<f32>(count).unwrap();
    reduce_until_error(&communicator, &mut data);
}

fn reduce_until_error(communicator: &Communicator, data: &mut [f32]) {
    for round in 0_u64.. {
        if let Err(error) = communicator.all_reduce(data, ReduceOp::Sum) {
            tell_error(&error);
            let again = communicator.all_reduce(data, ReduceOp::Sum).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Aborted);
            assert_eq!(again.failed_ranks(), error.failed_ranks());
            return;
        }
        if round == 0 {
            reach("reducing");
        }
    }
}

/// Kills one rank at some moment and checks what the others say, and how soon.
fn kill_in_mid_transfer(world: &World, ranks: usize, victim: usize, after: Duration) -> Vec<Ended> {
    let stopwatch = Stopwatch::start();
    let running = world.start();
    running.wait_for("reducing", ranks, LIMIT);
    std::thread::sleep(after);
    running.signal(victim, libc::SIGKILL);
    let killed = Instant::now();
    let ended = running.wait(LIMIT);
    let took = killed.elapsed();
    let expected = format!("RankLost [{victim}] ");
    for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        assert_eq!(ended.status, 0, "rank {rank}, victim {victim}: {ended:#?}");
        let told = &ended.told[0];
        assert!(told.starts_with(&expected), "rank {rank}, victim {victim} said: {told}");
        assert!(told.contains("all_reduce #") && told.contains("step "), "{told}");
    }
    let limits = (Duration::from_secs(2), SOON);
    stopwatch.assert_took(took, limits, &format!("rank {victim} was killed"));
    ended
}

/// Moments spread over a 64 MiB all-reduce of 16 ranks; printed, so that a failure can be tried
/// again.
fn kill_at_twenty_moments(transport: &str) {
    // One at a time: the limit is for one world on this machine, not for two.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let world = World::new(16, "reduce_forever")
        .set("UNISUM_TRANSPORT", transport)
        .set("COUNT", (64 << 20) / 4);
    let mut state = u64::from(std::process::id());
    for trial in 0..20 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(trial);
        let (victim, micros) = ((state >> 40) as usize % 16, (state >> 20) % 700_000);
        println!("{transport}, trial {trial}: rank {victim} dies after {micros} us");
        kill_in_mid_transfer(&world, 16, victim, Duration::from_micros(micros));
    }
}

#[test]
fn a_killed_rank_is_named_by_all_others_within_two_seconds_on_tcp() {
    kill_at_twenty_moments("tcp");
}

#[test]
fn a_killed_rank_is_named_as_soon_where_connections_are_dialled_anew() {
    let world = World::new(4, "reduce_forever")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_RECONNECT_TIMEOUT", 60)
        .set("COUNT", (8 << 20) / 4);
    for victim in 0..4 {
        kill_in_mid_transfer(&world, 4, victim, Duration::from_millis(50));
    }
}

#[test]
fn a_killed_rank_is_named_by_all_others_within_two_seconds_on_shared_memory() {
    kill_at_twenty_moments("shm");
}

#[test]
fn a_killed_rank_is_named_by_every_algorithm() {
    for transport in support::transports() {
        for (trial, algorithm) in
            Collective::all_reduce(ReduceOp::Sum).algorithms().into_iter().enumerate()
        {
            let world = World::new(4, "reduce_forever")
                .set("UNISUM_TRANSPORT", transport)
                .set("UNISUM_ALGORITHM", algorithm)
                .set("COUNT", 200_000);
            kill_in_mid_transfer(&world, 4, trial % 4, Duration::from_millis(5));
        }
    }
}

fn stop_before_second() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = [1_i32; 8];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    if communicator.rank() == setting("STOPS").parse::<usize>().unwrap() {
        reach("stopped");
        // SAFETY: stops this process until the test kills it.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
    let start = Instant::now();
    tell_error(&communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap_err());
    tell(start.elapsed().as_millis());
}

#[test]
fn a_stopped_rank_is_named_after_the_deadline() {
    for (transport, stops) in [("tcp", 2), ("shm", 2), ("tcp", 0), ("shm", 0)] {
        let world = World::new(4, "stop_before_second")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_TIMEOUT", 4)
            .set("STOPS", stops);
        let running = world.start();
        running.wait_for("stopped", 1, LIMIT);
        // The others end by their deadline; only then is the stopped one ended.
        let deadline = Instant::now() + LIMIT;
        while (0..4).any(|rank| rank != stops && running.lives(rank)) {
            assert!(Instant::now() < deadline, "ranks hang: {transport}, rank {stops} stopped");
            std::thread::sleep(Duration::from_millis(20));
        }
        running.signal(stops, libc::SIGKILL);
        for (rank, ended) in
            running.wait(LIMIT).iter().enumerate().filter(|(rank, _)| *rank != stops)
        {
            let told = &ended.told[0];
            let expected = format!("Timeout [{stops}] ");
            assert!(told.starts_with(&expected), "{transport}, rank {rank} said: {told}");
            let millis: u64 = ended.told[1].parse().unwrap();
            assert!((3_900..30_000).contains(&millis), "{transport}: after {millis} ms");
        }
    }
}

fn join_only() {
    match Communicator::from_environment() {
        Ok(communicator) => tell(format!("joined as {}", communicator.rank())),
        Err(error) => tell_error(&error),
    }
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let world = World::new(3, "join_only").set("UNISUM_CONNECT_TIMEOUT", 5);
    for ended in world.start_ranks(&[0, 1]).wait(LIMIT) {
        let told = &ended.told[0];
        assert!(told.starts_with("Rendezvous") && told.contains("rank 2"), "{told}");
    }
    // Without rank 0 nobody can name ranks; the address is named instead.
    for ended in world.start_ranks(&[1, 2]).wait(LIMIT) {
        let told = &ended.told[0];
        assert!(told.starts_with("Rendezvous") && told.contains("/world"), "{told}");
    }
}

/// It begins an answer that fits, and goes on one byte at a time: no read of it waits for long.
#[test]
fn a_listener_that_says_one_byte_at_a_time_is_waited_for_no_longer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let head = [0x16, 3, 3, 0x3e, 0x80].into_iter();
                for byte in head.chain(std::iter::repeat(0)) {
                    if stream.write_all(&[byte]).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
    });
    let world = World::new(2, "join_only")
        .set("UNISUM_RENDEZVOUS", format!("tcp://{address}"))
        .set("UNISUM_TLS", "token")
        .set("UNISUM_CONNECT_TIMEOUT", 2);
    let start = Instant::now();
    for ended in world.start_ranks(&[1]).wait(LIMIT) {
        assert!(ended.told[0].starts_with("Rendezvous"), "{ended:#?}");
    }
    assert!(start.elapsed() < SOON, "after {:?}", start.elapsed());
}

#[test]
fn ranks_with_another_token_or_another_world_are_refused() {
    for (name, value) in [("UNISUM_TOKEN", "another token, long enough"), ("UNISUM_JOB", "other")] {
        let world = World::new(2, "join_only").set("UNISUM_CONNECT_TIMEOUT", 2);
        let mut running = world.start_ranks(&[0]);
        running.add(&world.clone().set(name, value), 1);
        for ended in running.wait(LIMIT) {
            assert!(ended.told[0].starts_with("Rendezvous"), "{name}: {ended:#?}");
        }
    }
}

#[test]
fn settings_that_differ_are_named_and_others_are_not() {
    let world = World::new(2, "join_only").set("UNISUM_TRANSPORT", "tcp");
    for (name, usual, other) in [("ALGORITHM", "auto", "ring"), ("TIMEOUT", "60", "7.5")] {
        let mut running = world.start_ranks(&[0]);
        running.add(&world.clone().set(&format!("UNISUM_{name}"), other), 1);
        let says = format!("rank 0 has UNISUM_{name}={usual}, rank 1 has UNISUM_{name}={other}");
        for ended in running.wait(LIMIT) {
            assert!(ended.told[0].contains(&says), "{}", ended.told[0]);
        }
    }
}

/// Rank 1 calls something else than the others.
fn differ() {
    let communicator = Communicator::from_environment().unwrap();
    let other = communicator.rank() == 1;
    let mut data = vec![1_f32; 100];
    let result = match setting("HOW").as_str() {
        "count" => {
            communicator.all_reduce(&mut data[..if other { 99 } else { 100 }], ReduceOp::Sum)
        }
        "large" => {
            data.resize(1 << 20, 1.0);
            let end = if other { data.len() } else { 64 };
            communicator.all_reduce(&mut data[..end], ReduceOp::Sum)
        }
        "empty" => communicator.all_reduce(&mut data[..if other { 0 } else { 100 }], ReduceOp::Sum),
        "dtype" if other => communicator.all_reduce(&mut [1_i32; 100], ReduceOp::Sum),
        "op" if other => communicator.all_reduce(&mut data, ReduceOp::Max),
        "order" => {
            let (mut a, mut b) = ([1_f64; 3], [1_u8; 7]);
            let first = |a: &mut [f64]| communicator.all_reduce(a, ReduceOp::Sum);
            let second = |b: &mut [u8]| communicator.all_reduce(b, ReduceOp::Sum);
            match other {
                true => second(&mut b).and_then(|()| first(&mut a)),
                false => first(&mut a).and_then(|()| second(&mut b)),
            }
        }
        _ => communicator.all_reduce(&mut data, ReduceOp::Sum),
    };
    tell_error(&result.unwrap_err());
}

#[test]
fn differing_calls_are_an_error_on_every_rank_that_prints_both() {
    for transport in support::transports() {
        for (how, ours, theirs) in [
            ("count", "(f32 x 100, sum", "(f32 x 99, sum"),
            ("large", "(f32 x 64, sum", "(f32 x 1048576, sum"),
            ("empty", "(f32 x 100, sum", "(f32 x 0, sum"),
            ("dtype", "(f32 x 100, sum", "(i32 x 100, sum"),
            ("op", "(f32 x 100, sum", "(f32 x 100, max"),
            ("order", "(f64 x 3, sum", "(u8 x 7, sum"),
        ] {
            let start = Stopwatch::start();
            let world = World::new(3, "differ").set("UNISUM_TRANSPORT", transport).set("HOW", how);
            for told in world.succeed(LIMIT) {
                let text = &told[0];
                assert!(text.starts_with("Mismatch"), "{transport}, {how}: {text}");
                assert!(text.contains(ours) && text.contains(theirs), "{transport}, {how}: {text}");
            }
            let limit = Duration::from_secs(10);
            start.assert_within(limit, SOON, &format!("{transport}, {how}"));
        }
    }
}

/// Algorithms differ with the size, so that the calls' messages may go different ways.
#[test]
fn differing_calls_that_never_meet_are_found_long_before_the_deadline() {
    let start = Stopwatch::start();
    let world = World::new(9, "differ").set("UNISUM_TRANSPORT", "tcp").set("HOW", "large");
    for told in world.succeed(LIMIT) {
        let text = &told[0];
        assert!(text.starts_with("Mismatch"), "{text}");
        assert!(text.contains("(f32 x 64, sum") && text.contains("(f32 x 1048576, sum"), "{text}");
    }
    start.assert_within(Duration::from_secs(20), SOON, "of 60 s");
}

/// Joins, reduces and leaves many times; in the end as many descriptors and threads are there as
/// after the first time.
fn leave_and_come_again() {
    let mut before = None;
    let base = setting("UNISUM_RENDEZVOUS");
    for round in 0..6 {
        let communicator =
            Communicator::builder().rendezvous(&format!("{base}.{round}")).connect().unwrap();
        let mut data = communicator.allocate::<f32>(100_000).unwrap();
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        let work = communicator.all_reduce_async(vec![1_u8; 10], ReduceOp::Sum);
        assert_eq!(work.wait().unwrap(), [3; 10]);
        drop((communicator, data));
        let deadline = Instant::now() + SOON;
        let before = *before.get_or_insert_with(|| settle(deadline));
        while open_files_and_threads() > before {
            let now = open_files_and_threads();
            assert!(Instant::now() < deadline, "round {round}: {now:?}, was {before:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The counts once threads that are ending have ended.
fn settle(deadline: Instant) -> (usize, usize) {
    let mut last = open_files_and_threads();
    let mut same_for = 0;
    while same_for < 40 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
        let now = open_files_and_threads();
        same_for = if now == last { same_for + 1 } else { 0 };
        last = now;
    }
    last
}

#[test]
fn leaving_gives_descriptors_threads_and_memory_back() {
    for transport in support::transports() {
        World::new(3, "leave_and_come_again").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

/// A forked child can't use the communicator and does not disturb the parent's.
fn fork() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 1000];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    // SAFETY: the child calls only what the library promises to refuse, and leaves by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = communicator.all_reduce(&mut data, ReduceOp::Sum);
        let is_refused = refused.is_err_and(|error| error.kind() == ErrorKind::Forked);
        drop(communicator);
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(!is_refused)) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made; `status` is valid.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child was refused and left quietly");
    for _ in 0..10 {
        communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
    }
}

#[test]
fn a_forked_child_is_refused_and_the_parent_goes_on() {
    for transport in support::transports() {
        World::new(3, "fork").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

/// The victim forks a child that outlives it, as a data loader's workers do.
fn fork_then_die() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 200_000];
    // Its connections are open before it forks.
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    if communicator.rank() == setting("VICTIM").parse::<usize>().unwrap() {
        tell(fork_sleeper());
    }
    reduce_until_error(&communicator, &mut data);
}

/// The process id of a child that sleeps, for two minutes at most.
fn fork_sleeper() -> i32 {
    // SAFETY: the child makes only async-signal-safe calls.
    let child = unsafe { libc::fork() };
    if child == 0 {
        for output in [1, 2] {
            // SAFETY: the test waits until all outputs of its ranks are closed.
            unsafe { libc::close(output) };
        }
        // SAFETY: ends the child if the test doesn't.
        unsafe { libc::alarm(120) };
        loop {
            // SAFETY: sleeps until a signal.
            unsafe { libc::pause() };
        }
    }
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    child
}

#[test]
fn a_killed_rank_is_named_though_a_forked_child_of_it_lives() {
    for transport in support::transports() {
        for victim in [0, 2] {
            let world = World::new(4, "fork_then_die")
                .set("UNISUM_TRANSPORT", transport)
                .set("VICTIM", victim);
            let ended = kill_in_mid_transfer(&world, 4, victim, Duration::from_millis(5));
            let child: i32 = ended[victim].told[0].parse().unwrap();
            // SAFETY: plain system call; the child still has its number unless it ended long ago.
            let result = unsafe { libc::kill(child, libc::SIGKILL) };
            assert_eq!(result, 0, "the child lived all the while");
        }
    }
}

fn cpu_time() -> Duration {
    // SAFETY: an all-zero rusage is valid, and the call fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writes.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// The last rank comes to a collective 2 s after the others.
fn late() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; setting("COUNT").parse().unwrap()];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    let others = communicator.world() - 1;
    let start = Instant::now();
    if communicator.rank() == others {
        await_others("waiting", others, LIMIT);
        std::thread::sleep(Duration::from_secs(2));
    } else {
        reach("waiting");
    }
    let before = cpu_time();
    communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
    if communicator.rank() != others {
        assert!(start.elapsed() >= Duration::from_secs(2), "it was late");
        tell((cpu_time() - before).as_micros());
    }
}

#[test]
fn waiting_for_a_late_rank_burns_no_processor_time() {
    for transport in support::transports() {
        for count in [2, 50_000] {
            let world =
                World::new(8, "late").set("UNISUM_TRANSPORT", transport).set("COUNT", count);
            for told in &world.succeed(LIMIT)[..7] {
                let micros: u64 = told[0].parse().unwrap();
                assert!(micros < 20_000, "{transport}, {count} elements: {micros} us");
            }
        }
    }
}

/// Cuts one of this rank's data connections, from within.
fn cut() {
    let communicator = Communicator::from_environment().unwrap();
    let mut data = vec![1_f32; 100_000];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    if communicator.rank() == 1 {
        assert!(cut_connection_of_ring_neighbour() > 0);
    }
    loop {
        if let Err(error) = communicator.all_reduce(&mut data, ReduceOp::Sum) {
            return tell_error(&error);
        }
    }
}

/// Shuts down all TCP connections of this process but the oldest, which is the one to rank 0's
/// control thread.
fn cut_connection_of_ring_neighbour() -> usize {
    let mut connected = Vec::new();
    for descriptor in 3..256 {
        // SAFETY: an all-zero address is valid, and the call fills it.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: address and length are valid for writes; other descriptors give an error.
        let result =
            unsafe { libc::getpeername(descriptor, (&raw mut address).cast(), &raw mut length) };
        if result == 0 && i32::from(address.sin_family) == libc::AF_INET {
            connected.push(descriptor);
        }
    }
    for &descriptor in &connected[1..] {
        // SAFETY: shutting a socket down is harmless to memory.
        assert_eq!(unsafe { libc::shutdown(descriptor, libc::SHUT_RDWR) }, 0);
    }
    connected.len() - 1
}

/// The main thread ends right after it has dropped the communicator.
#[test]
fn works_under_way_end_before_the_rank_leaves() {
    for transport in support::transports() {
        World::new(3, "drop_works").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn drop_works() {
    let communicator = Communicator::from_environment().unwrap();
    if communicator.rank() == 2 {
        std::thread::sleep(Duration::from_millis(1500));
    }
    let start = |_| communicator.all_reduce_async(vec![1_f32; 100_000], ReduceOp::Sum);
    let works: Vec<_> = (0..5).map(start).collect();
    if communicator.rank() == 1 {
        return drop(works);
    }
    for work in works {
        assert_eq!(work.wait().unwrap()[7], 3.0);
    }
}

#[test]
fn a_cut_connection_ends_the_operation_on_every_rank() {
    let world = World::new(4, "cut").set("UNISUM_TRANSPORT", "tcp").set("UNISUM_ALGORITHM", "ring");
    let told = world.succeed(LIMIT);
    for told in &told {
        assert!(told[0].starts_with("RankLost") && told[0].contains("link to rank"), "{told:?}");
    }
}
