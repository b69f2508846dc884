//! Somebody between the hosts, on every control and data connection: it learns nothing but lengths
//! and times, and whatever it does, no rank has a wrong result or hangs, and errors say whom they
//! concern.
//!
//! `UNISUM_TEST_MEDDLED` says how many changes are made in each world. Up to 2 December 2026 some
//! 10,400 random bits were flipped in this way, in several runs, the last ones 5,000.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/middle.rs"]
mod middle;
mod support;

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::{Range, RangeInclusive};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use certificates::{Authority, Mounted, Says, authority, issue};
use middle::{ANY, Change, Later, Middle, Plan, Seen, address};
use support::hosts::inside;
use support::{Random, Running, World, setting};
use unisum::{Communicator, Error, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work)]);
}

const LIMIT: Duration = Duration::from_secs(100);
/// The ports at which each host is reached: one may be in use for a moment when a job has ended.
const PORTS: RangeInclusive<u16> = 7001..=7004;
const RANKS: usize = 3;
/// What buffers are full of.
const PAYLOAD: &[u8; 32] = b"the weights that nobody may see!";
/// What is said between the ranks at the start.
const SETTINGS: &[u8] = b"UNISUM_TLS=";

/// Joins, calls, makes a group and leaves, again and again; each time as a line says.
fn work() {
    let stream = UnixStream::connect(setting("STEERED_BY")).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut stream = stream;
    writeln!(stream, "{}", setting("UNISUM_RANK")).unwrap();
    while let Some(job) = lines.next().transpose().unwrap() {
        let started = Instant::now();
        let outcome = match once(&job) {
            Ok(()) => "right".to_owned(),
            Err(error) => {
                let text = error.to_string().replace('\n', " | ");
                format!("{:?} {:?} {text}", error.kind(), error.failed_ranks())
            }
        };
        writeln!(stream, "{} {outcome}", started.elapsed().as_millis()).unwrap();
    }
}

fn once(job: &str) -> Result<(), Error> {
    let builder = match job.strip_suffix(PATIENTLY) {
        Some(job) => {
            let builder = Communicator::builder().job(job).timeout(HANG / 2);
            builder.connect_timeout(HANG / 2).heartbeat_timeout(HANG / 2)
        }
        None => Communicator::builder().job(job),
    };
    let communicator = builder.connect()?;
    let (rank, world) = (communicator.rank(), communicator.world());
    for count in [1, 500, 6000] {
        call(&communicator, count)?;
    }
    let messenger = Messenger::new(&communicator)?;
    let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
    for bytes in [40, 40_000] {
        let sent: Vec<u8> = PAYLOAD.iter().copied().cycle().take(bytes).collect();
        let mut received = vec![0; bytes];
        messenger.exchange(&mut [
            Message::Send { data: &sent, to: next, tag: 7 },
            Message::Receive { data: &mut received, from: last, tag: 7 },
        ])?;
        assert!(received == sent, "wrong bytes from rank {last}");
    }
    call(&communicator.duplicate()?, 100)
}

/// Sums that show in any part whether it is right, and of bytes that are known.
fn call(communicator: &Communicator, count: usize) -> Result<(), Error> {
    let (rank, world) = (communicator.rank() as u64, communicator.world() as u64);
    let mut numbers: Vec<u64> = (0..count as u64).map(|at| at * (rank + 1)).collect();
    communicator.all_reduce(&mut numbers, ReduceOp::Sum)?;
    let expected = |at: u64| at * world * (world + 1) / 2;
    assert!((0..).zip(&numbers).all(|(at, &sum)| sum == expected(at)), "a wrong sum");
    let mut bytes: Vec<u8> = PAYLOAD.repeat(count.min(200));
    communicator.all_reduce(&mut bytes, ReduceOp::Max)?;
    assert!(bytes.chunks(PAYLOAD.len()).all(|part| part == PAYLOAD), "wrong bytes");
    Ok(())
}

/// Ranks on a host each, which join as often as they are told to.
struct Steered {
    running: Option<Running>,
    /// By rank.
    ranks: Vec<(UnixStream, BufReader<UnixStream>)>,
    jobs: usize,
    _folder: tempfile::TempDir,
}

impl Steered {
    fn new(world: World) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("steer");
        let listener = UnixListener::bind(&path).unwrap();
        let world = world
            .set("STEERED_BY", path.display())
            .set("UNISUM_RENDEZVOUS", format!("tcp://{}:{}", address(0), PORTS.start()))
            .set("UNISUM_INTERFACE", "")
            .set("UNISUM_PORT_RANGE", format!("{}-{}", PORTS.start(), PORTS.end()))
            // Nothing is tried: what a call sends is known.
            .set("UNISUM_ALGORITHM", "ring")
            .set("UNISUM_TIMEOUT", 4)
            .set("UNISUM_HEARTBEAT_TIMEOUT", 2)
            .set("UNISUM_CONNECT_TIMEOUT", 5);
        let running = world.start();
        let mut ranks: Vec<_> = (0..RANKS)
            .map(|_| {
                let stream = listener.accept().unwrap().0;
                stream.set_read_timeout(Some(HANG)).unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut rank = String::new();
                reader.read_line(&mut rank).unwrap();
                (rank.trim().parse::<usize>().unwrap(), stream, reader)
            })
            .collect();
        ranks.sort_by_key(|(rank, ..)| *rank);
        let ranks = ranks.into_iter().map(|(_, stream, reader)| (stream, reader)).collect();
        Self { running: Some(running), ranks, jobs: 0, _folder: folder }
    }

    /// Nobody meddles: they wait as long as a busy machine may take. All have to be right.
    fn clean_job(&mut self, context: &str) {
        let outcomes = self.job_that_waits(PATIENTLY);
        assert!(outcomes.iter().all(|(_, it)| it == "right"), "{context}: {outcomes:?}");
    }

    /// Has all ranks join and work once, with this after the job's name. What each says, and after
    /// how long.
    fn job_that_waits(&mut self, how: &str) -> Vec<(Duration, String)> {
        self.jobs += 1;
        for (stream, _) in &mut self.ranks {
            writeln!(stream, "job {}{how}", self.jobs).unwrap();
        }
        let mut outcomes = Vec::new();
        for rank in 0..RANKS {
            let mut line = String::new();
            let read = self.ranks[rank].1.read_line(&mut line);
            if !read.is_ok_and(|read| read > 0) {
                self.ranks.clear();
                let ended = self.running.take().unwrap().wait(Duration::from_secs(5));
                panic!("rank {rank} has hung or ended: {ended:#?}");
            }
            let (millis, outcome) = line.trim().split_once(' ').unwrap();
            outcomes.push((Duration::from_millis(millis.parse().unwrap()), outcome.to_owned()));
        }
        outcomes
    }

    fn end(mut self) -> Vec<support::Ended> {
        self.ranks.clear();
        let ended = self.running.take().unwrap().wait(LIMIT);
        for ended in &ended {
            assert_eq!(ended.status, 0, "{ended:#?}");
        }
        ended
    }
}

/// How a job is named that waits longer for everything.
const PATIENTLY: &str = " patiently";
/// All time-outs together, and a busy machine.
const HANG: Duration = Duration::from_secs(60);

/// One at a time: the namespaces have fixed names within this process.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn world(tls: &str) -> World {
    World::new(RANKS, "work").set("UNISUM_TLS", tls).through(inside)
}

/// Each rank's certificate.
fn folders(ca: &Authority) -> Vec<Mounted> {
    let folder = |rank| Mounted::new(&issue(ca, &Says::new(format!("rank-{rank}"))), &ca.pem());
    (0..RANKS).map(folder).collect()
}

fn certified(folders: &[Mounted]) -> World {
    let words: Vec<_> = folders.iter().map(Mounted::environment).collect();
    World::new(RANKS, "work").through(move |rank| [inside(rank), words[rank].clone()].concat())
}

fn finds(seen: &Seen, what: &[u8]) -> bool {
    let has = |said: &Vec<u8>| said.windows(what.len()).any(|part| part == what);
    seen.said.values().any(has)
}

#[test]
fn whoever_reads_the_wire_finds_nothing_that_is_known() {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let folders = folders(&authority());
    let worlds = [
        ("off", world("off")),
        ("auto", world("auto")),
        ("token", world("token")),
        ("mtls", certified(&folders)),
    ];
    for (tls, world) in worlds {
        let mut steered = Steered::new(world);
        middle.begin(None);
        steered.clean_job(tls);
        steered.end();
        let seen = middle.seen();
        let bytes: usize = seen.said.values().map(Vec::len).sum();
        println!("{tls}: {bytes} bytes on {} connections", seen.said.len() / 2);
        // Both control and data go through here; in clear text both can be read.
        let is_clear = tls == "off";
        let job = unisum_link::handshake::job_hash("job 1");
        let token = b"a token of the tests";
        let certificate = b"rank-1";
        for known in [&PAYLOAD[..16], &PAYLOAD[7..], SETTINGS, b"allreduce", &job[..8]] {
            let may_be = is_clear && known != b"allreduce";
            assert_eq!(finds(&seen, known), may_be, "{tls}: {}", String::from_utf8_lossy(known));
        }
        assert!(!finds(&seen, token) && !finds(&seen, certificate), "{tls}");
        let sums: Vec<u8> = (1000_u64..1004).flat_map(|at| (at * 6).to_le_bytes()).collect();
        assert_eq!(finds(&seen, &sums), is_clear, "{tls}: a result");
    }
}

/// What a job says when nobody meddles: the places where one can.
fn places(seen: &Seen) -> Vec<(usize, bool, usize)> {
    let of = |(&(connection, dialer), said): (&(usize, bool), &Vec<u8>)| {
        (connection, dialer, said.len())
    };
    seen.said.iter().map(of).filter(|(.., bytes)| *bytes > 0).collect()
}

/// One class of what can be done.
const FLIP: usize = 0;
/// All the others.
const OTHERS: RangeInclusive<usize> = 1..=14;
/// Those after which all is right: see `Change::is_harmless`.
const HARMLESS: RangeInclusive<usize> = 11..=13;

fn draw(random: &mut Random, places: &[(usize, bool, usize)], clean: &Seen, class: usize) -> Plan {
    // Half of them anywhere in a connection, else data would have them all.
    let (connection, is_of_dialer, bytes) = random.of(places);
    let at = match random.below(4) {
        0 => random.below(bytes.min(2000)),
        _ => random.below(bytes),
    };
    let length = [1, 4, 20, 100, 1000][random.below(5)];
    let mut noise = || (0..length).map(|_| random.below(256) as u8).collect::<Vec<_>>();
    let noise = noise();
    let (other, dialer, _) = random.of(places);
    let change = match class {
        FLIP => Change::Flip(random.below(8) as u8),
        1 => Change::Cut,
        2 => Change::Drop(length),
        3 => Change::Repeat(length),
        4 => Change::Swap(length),
        5 => Change::Inject(noise),
        // What was said here before, in an earlier job, or on another connection.
        6 => Change::Replay(clean.said[&(connection, is_of_dialer)][at..].to_vec()),
        7 => Change::Replay(clean.said[&(other, dialer)].clone()),
        8 => Change::Reflect,
        9 => Change::Redirect,
        10 => Change::End,
        11 => Change::Delay(Duration::from_millis(random.below(500) as u64)),
        12 => Change::Trickle(length),
        13 => Change::Double,
        _ => Change::Withhold,
    };
    Plan { connection, is_of_dialer, at, change }
}

/// What the outcomes of a job may be that somebody has meddled with.
fn check(outcomes: &[(Duration, String)], plan: &Plan) {
    for (rank, (took, outcome)) in outcomes.iter().enumerate() {
        let told = || format!("{plan:?}: rank {rank}: {outcomes:#?}");
        let names_one = ["rank ", "ranks "].iter().any(|it| outcome.contains(it))
            && outcome.chars().any(|c| c.is_ascii_digit());
        assert!(outcome == "right" || names_one, "{}", told());
        // Slow or heard twice is not altered.
        assert!(outcome == "right" || !plan.change.is_harmless(), "{}", told());
        // Joining takes a time-out, and the call that fails another one, at most.
        assert!(*took < HANG / 2 || plan.change.is_harmless(), "{}", told());
    }
}

/// Does these classes, each until it was done: a connection may end before the place.
fn meddle(what: &str, world: World, classes: Vec<usize>) {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let mut random = Random::new();
    let mut steered = Steered::new(world);
    middle.begin(None);
    steered.clean_job("before");
    let clean = middle.seen();
    let places = places(&clean);
    let harmful: Vec<_> = classes.iter().copied().filter(|it| !HARMLESS.contains(it)).collect();
    // How many of the trials fail is a matter of chance.
    let few = if what == RESUMES || harmful.is_empty() { None } else { Some(harmful.len() / 4) };
    let (trials, started) = (classes.len(), Instant::now());
    let (mut made, mut changed, mut failed) = (0, 0, 0);
    let mut left = VecDeque::from(classes);
    while let Some(class) = left.pop_front() {
        let told = || format!("{changed} changed, {failed} failed, to do: {class} {left:?}");
        assert!(made < 4 * trials + 20, "it does next to nothing: {}", told());
        made += 1;
        let plan = draw(&mut random, &places, &clean, class);
        assert_eq!(plan.change.is_harmless(), HARMLESS.contains(&class));
        middle.begin(Some(plan.clone()));
        // Who is only slow is waited for, however busy the machine is.
        let how = if plan.change.is_harmless() { PATIENTLY } else { "" };
        let outcomes = steered.job_that_waits(how);
        let is_changed = middle.seen().is_changed;
        changed += usize::from(is_changed);
        failed += usize::from(outcomes.iter().any(|(_, outcome)| outcome != "right"));
        check(&outcomes, &plan);
        if is_changed && changed % 500 == 0 {
            println!("{what}: of {made}, {changed} changed and {failed} failed so far");
        }
        if !is_changed {
            left.push_back(class);
        } else if left.is_empty() && few.is_some_and(|few| failed <= few) {
            left.push_back(random.of(&harmful));
        }
    }
    println!("{what}: of {made}, {changed} changed and {failed} failed in {:?}", started.elapsed());
    // One that was meddled with does not disturb the next.
    middle.begin(None);
    steered.clean_job("after");
    steered.end();
}

/// How many trials `UNISUM_TEST_MEDDLED` wants in each world.
fn wanted() -> Option<usize> {
    std::env::var("UNISUM_TEST_MEDDLED").ok().map(|trials| trials.parse().unwrap())
}

/// What is done in the world of this number: unless much is wanted, each class in one of the
/// worlds, and it is chance in which, so that in time each is done in all.
fn dealt(world: usize) -> Vec<usize> {
    static DEALT: OnceLock<Vec<usize>> = OnceLock::new();
    if let Some(trials) = wanted() {
        return OTHERS.cycle().take(trials).collect();
    }
    let deal = || {
        let (mut random, mut classes) = (Random::new(), OTHERS.collect::<Vec<_>>());
        (0..classes.len()).map(|_| classes.swap_remove(random.below(classes.len()))).collect()
    };
    DEALT.get_or_init(deal).iter().skip(world).step_by(WORLDS).copied().collect()
}

/// Of those in which something else is done than flipping bits.
const WORLDS: usize = 4;
/// A world in which connections that break are made anew: less fails than is changed.
const RESUMES: &str = "connections that resume";

#[test]
fn a_flipped_bit_is_never_a_wrong_result_or_a_hang() {
    meddle("flips", world("auto"), vec![FLIP; wanted().unwrap_or(12)]);
}

#[test]
fn nothing_that_is_done_to_a_connection_is_a_wrong_result_or_a_hang() {
    meddle("auto", world("auto"), dealt(0));
}

#[test]
fn nor_is_what_is_done_to_connections_with_certificates() {
    let folders = folders(&authority());
    meddle("mtls", certified(&folders), dealt(1));
}

#[test]
fn nor_is_what_is_done_to_several_sockets_of_a_pair() {
    meddle("sockets", world("token").set("UNISUM_TCP_SOCKETS", 3), dealt(2));
}

#[test]
fn nor_is_what_is_done_to_connections_that_resume() {
    let world = world("token").set("UNISUM_RECONNECT_TIMEOUT", 2);
    meddle(RESUMES, world, dealt(3));
}

/// What a dialer says before its first TLS record.
const PREAMBLE_BYTES: usize = 20;
/// Those of three ranks that come first: a control connection and a pulse of each that dials.
const DATA: RangeInclusive<usize> = 4..=6;

/// The TLS records with which a connection begins, in one direction.
fn records(said: &[u8], is_of_dialer: bool) -> Vec<Range<usize>> {
    let (mut found, mut at) = (Vec::new(), if is_of_dialer { PREAMBLE_BYTES } else { 0 });
    while let Some([20..=23, 3, _, high, low]) = said.get(at..at + 5) {
        let end = at + 5 + usize::from(u16::from_be_bytes([*high, *low]));
        found.push(at..end);
        at = end;
    }
    found
}

/// A place in a handshake, before the listener's last word: that of who has admitted the dialer.
fn early_place(random: &mut Random, clean: &Seen, connections: &[usize]) -> (usize, bool, usize) {
    let (connection, is_of_dialer) = (random.of(connections), random.below(2) == 0);
    let records = records(&clean.said[&(connection, is_of_dialer)], is_of_dialer);
    let last = records.last().expect("a handshake");
    (connection, is_of_dialer, random.below(if is_of_dialer { last.end } else { last.start }))
}

fn all_are_right(outcomes: &[(Duration, String)], context: &str) {
    assert!(outcomes.iter().all(|(_, it)| it == "right"), "{context}: {outcomes:#?}");
}

/// Whatever the connection is for: a new one takes its place.
fn alter_handshakes(world: World, trials: usize) {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let (mut random, mut steered) = (Random::new(), Steered::new(world));
    middle.begin(None);
    steered.clean_job("before");
    let clean = middle.seen();
    let connections: Vec<_> = places(&clean).iter().map(|(connection, ..)| *connection).collect();
    for _ in 0..trials {
        let (connection, is_of_dialer, at) = early_place(&mut random, &clean, &connections);
        // What comes back after the proof is not told from an answer that was altered.
        let hello = records(&clean.said[&(connection, true)], true)[0].end;
        let change = match is_of_dialer && at < hello && random.below(2) == 0 {
            true => Change::Reflect,
            false => Change::Flip(random.below(8) as u8),
        };
        let plan = Plan { connection, is_of_dialer, at, change };
        middle.begin(Some(plan.clone()));
        let outcomes = steered.job_that_waits(PATIENTLY);
        assert!(middle.seen().is_changed, "{plan:?}");
        all_are_right(&outcomes, &format!("{plan:?}"));
    }
    middle.begin(None);
    steered.end();
}

#[test]
fn a_handshake_that_is_altered_once_is_made_anew() {
    alter_handshakes(world("token"), wanted().unwrap_or(3));
    let folders = folders(&authority());
    alter_handshakes(certified(&folders), wanted().unwrap_or(2));
}

/// A connection is cut, and the first ones in its place are altered.
#[test]
fn nor_does_it_end_a_connection_that_resumes() {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let world = world("token").set("UNISUM_RECONNECT_TIMEOUT", HANG.as_secs() / 2);
    let (mut random, mut steered) = (Random::new(), Steered::new(world));
    middle.begin(None);
    steered.clean_job("before");
    let clean = middle.seen();
    let data: Vec<_> = DATA.collect();
    let (mut cut, trials) = (0, wanted().unwrap_or(1));
    for _ in 0..10 * trials {
        let (_, is_of_dialer, at) = early_place(&mut random, &clean, &data);
        let change = Change::Flip(random.below(8) as u8);
        let later = Later { from: 0, times: 5, is_of_dialer, at, change };
        // More is said on those of data alone; the last job's may come back yet.
        let (connection, at, change) = (ANY, 4000 + random.below(40_000), Change::Cut);
        let plan = Plan { connection, is_of_dialer: true, at, change };
        middle.begin_both(Some(plan.clone()), Some(later.clone()));
        let outcomes = steered.job_that_waits(PATIENTLY);
        all_are_right(&outcomes, &format!("{plan:?}, {later:?}"));
        // Less may have been said on it this time.
        cut += usize::from(middle.seen().is_changed);
        if cut >= trials {
            break;
        }
    }
    assert_eq!(cut, trials);
    middle.begin(None);
    steered.end();
}

/// The error says what has been altered, and on whose link, when the time for the connection is up.
#[test]
fn if_all_handshakes_are_altered_the_error_says_so_in_time() {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let mut steered = Steered::new(world("token"));
    let (from, is_of_dialer) = (*DATA.start(), true);
    // Within the random number of the ClientHello: the two ends have different keys.
    let (at, change) = (PREAMBLE_BYTES + 20, Change::Flip(0));
    middle.begin_both(None, Some(Later { from, times: usize::MAX, is_of_dialer, at, change }));
    for (took, outcome) in steered.job_that_waits("") {
        assert!(outcome.contains("reports: link to rank"), "{outcome}");
        assert!(outcome.contains(" attempts, the last one"), "{outcome}");
        assert!(outcome.contains("was altered on its way"), "{outcome}");
        assert!(took < HANG / 2, "{took:?}: {outcome}");
    }
    middle.begin(None);
    steered.clean_job("after");
    steered.end();
}

/// Once the listener has said its last word, its connection stands: the dialer is the one that
/// finds it altered.
#[test]
fn the_end_that_hears_altered_bytes_is_the_one_that_reports_them() {
    let _one = alone();
    let Some(middle) = Middle::new(RANKS, PORTS) else { return };
    let (mut random, mut steered) = (Random::new(), Steered::new(world("token")));
    middle.begin(None);
    steered.clean_job("before");
    let clean = middle.seen();
    for connection in [*DATA.start(), *DATA.end()] {
        let last = records(&clean.said[&(connection, false)], false).pop().unwrap();
        let at = last.start + 5 + random.below(last.len() - 5);
        let change = Change::Flip(random.below(8) as u8);
        let plan = Plan { connection, is_of_dialer: false, at, change };
        middle.begin(Some(plan.clone()));
        for (_, outcome) in steered.job_that_waits("") {
            let (before, after) = outcome.split_once(" reports: link to rank ").expect(&outcome);
            let (by, of) = (before.chars().last(), after.chars().next());
            assert!(by > of, "the higher rank dials: {plan:?}: {outcome}");
            assert!(after.contains("after byte 0 of socket 0 was altered"), "{plan:?}: {outcome}");
        }
    }
    // The same of control, of which either end hears something.
    for is_of_dialer in [true, false] {
        let bytes = clean.said[&(0, is_of_dialer)].len();
        let (at, change) = (bytes - 1 - random.below(bytes / 4), Change::Flip(0));
        let plan = Plan { connection: 0, is_of_dialer, at, change };
        middle.begin(Some(plan.clone()));
        for (_, outcome) in steered.job_that_waits("") {
            if outcome != "right" {
                assert!(outcome.contains(" reports: control connection to rank "), "{outcome}");
                assert!(outcome.contains("was altered on its way"), "{plan:?}: {outcome}");
            }
        }
    }
    middle.begin(None);
    steered.end();
}
