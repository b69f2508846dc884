//! Worlds of real processes: a test starts copies of its own binary as ranks.
//!
//! A copy runs only the test `rank_process`, which looks up the scenario that the environment
//! names. What a scenario wants its test to see it prints with [`tell`].

// Each test binary uses its part of this module.
#![allow(dead_code, unreachable_pub)]

pub mod hosts;
pub mod stopwatch;

use std::collections::HashMap;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Draws the cases of a test that can't walk them all: from `UNISUM_TEST_SEED`, or anew in each
/// run. It prints the seed, so that a failure can be tried again.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let anew = || {
            let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
            now.as_nanos() as u64 ^ u64::from(std::process::id()) << 32
        };
        let seed =
            std::env::var("UNISUM_TEST_SEED").map_or_else(|_| anew(), |it| it.parse().unwrap());
        println!("UNISUM_TEST_SEED={seed}");
        Self(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        // Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) % bound as u64) as usize
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

type Through = std::sync::Arc<dyn Fn(usize) -> Vec<String> + Send + Sync>;

/// What a rank process does.
pub type Scenario = (&'static str, fn());

const SCENARIO: &str = "TEST_SCENARIO";
const MARKS: &str = "TEST_MARKS";
const TOLD: &str = "@told ";

/// Whether this process is a rank of a test.
pub fn is_rank() -> bool {
    std::env::var_os(SCENARIO).is_some()
}

/// The body of each test binary's `rank_process`: nothing unless this process is a rank.
pub fn run_if_rank(scenarios: &[Scenario]) {
    let Ok(name) = std::env::var(SCENARIO) else { return };
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    // A test may have its own.
    let _ = log.try_init();
    let (_, scenario) = scenarios.iter().find(|(known, _)| *known == name).expect("a scenario");
    scenario();
}

/// Prints a line for the test that started this rank.
pub fn tell(line: impl std::fmt::Display) {
    // The harness may have printed a part of a line before this one.
    println!("\n{TOLD}{line}");
}

pub fn tell_error(error: &unisum::Error) {
    tell(format!("{:?} {:?} {error}", error.kind(), error.failed_ranks()));
}

/// What this process holds.
pub fn open_files_and_threads() -> (usize, usize) {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// A setting of the test, from the environment.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

/// The transports that tests of all of them run on: those that need no device, or those that
/// `UNISUM_TEST_TRANSPORTS` names.
pub fn transports() -> Vec<&'static str> {
    let named = std::env::var("UNISUM_TEST_TRANSPORTS").unwrap_or_else(|_| "tcp shm".into());
    let known = ["tcp", "shm", "verbs"].into_iter();
    known.filter(|known| named.split(' ').any(|name| name == *known)).collect()
}

/// Another `UNISUM_TLS` in each run, or the one that `UNISUM_TEST_TLS` says.
pub fn encryption() -> String {
    std::env::var("UNISUM_TEST_TLS").unwrap_or_else(|_| {
        let drawn = ["auto", "token", "off"][(seed() % 3) as usize];
        println!("UNISUM_TEST_TLS={drawn}");
        drawn.into()
    })
}

/// Whether this machine has an RDMA device. Where `UNISUM_TEST_RDMA` is `required`, it must.
pub fn has_rdma() -> bool {
    let devices = std::fs::read_dir("/sys/class/infiniband");
    let found = devices.is_ok_and(|mut devices| devices.next().is_some());
    let required = std::env::var("UNISUM_TEST_RDMA").is_ok_and(|word| word == "required");
    assert!(found || !required, "no RDMA device");
    if !found {
        println!("skipped: this machine has no RDMA device");
    }
    found
}

/// `few` of the cases, another choice in each run; all of them where `UNISUM_TEST_WHOLE` is set.
/// What is printed replays the choice.
pub fn sample<T>(mut cases: Vec<T>, few: usize) -> Vec<T> {
    if std::env::var_os("UNISUM_TEST_WHOLE").is_some() {
        return cases;
    }
    let mut state = seed();
    let mut chosen = Vec::new();
    while chosen.len() < few && !cases.is_empty() {
        // Knuth's generator, of which the upper bits are good.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chosen.push(cases.swap_remove((state >> 33) as usize % cases.len()));
    }
    chosen
}

/// The seed of this run's choices: `UNISUM_TEST_SEED`, else another one each time.
pub fn seed() -> u64 {
    let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = std::env::var("UNISUM_TEST_SEED").map_or_else(|_| clock(), |it| it.parse().unwrap());
    println!("UNISUM_TEST_SEED={seed} replays this");
    seed
}

/// Describes a world to start.
#[derive(Clone)]
pub struct World {
    ranks: usize,
    scenario: &'static str,
    variables: HashMap<String, String>,
    /// Runs a rank's command through another one, like `ip netns exec NAME`.
    through: Through,
    /// Whose the directory of the marks is, if not this user's.
    owner: Option<u32>,
}

/// What one rank did.
#[derive(Debug)]
pub struct Ended {
    /// 0..=255, or 128 + signal.
    pub status: i32,
    pub told: Vec<String>,
    pub log: String,
}

/// Started ranks; killed when dropped.
pub struct Running {
    ranks: Vec<Rank>,
    directory: std::path::PathBuf,
}

struct Rank {
    child: Child,
    output: Option<thread::JoinHandle<String>>,
    log: Option<thread::JoinHandle<String>>,
}

impl World {
    pub fn new(ranks: usize, scenario: &'static str) -> Self {
        let variables = HashMap::from([
            ("UNISUM_CONNECT_TIMEOUT".into(), "60".into()),
            ("UNISUM_TIMEOUT".into(), "60".into()),
            ("UNISUM_TLS".into(), encryption()),
        ]);
        let through = std::sync::Arc::new(|_| Vec::new());
        Self { ranks, scenario, variables, through, owner: None }
    }

    /// For ranks that become another user: the marks and the rendezvous file are theirs.
    pub const fn owned_by(mut self, user: u32) -> Self {
        self.owner = Some(user);
        self
    }

    /// The same ranks with another scenario.
    pub const fn running(mut self, scenario: &'static str) -> Self {
        self.scenario = scenario;
        self
    }

    pub fn set(mut self, name: &str, value: impl ToString) -> Self {
        self.variables.insert(name.into(), value.to_string());
        self
    }

    pub fn through(
        mut self,
        through: impl Fn(usize) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        self.through = std::sync::Arc::new(through);
        self
    }

    /// Starts all ranks.
    pub fn start(&self) -> Running {
        self.start_ranks(&(0..self.ranks).collect::<Vec<_>>())
    }

    /// Starts only some of the world's ranks.
    pub fn start_ranks(&self, ranks: &[usize]) -> Running {
        let name = format!("unisum-test-{}-{:x}", std::process::id(), unique());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        if self.owner.is_some() {
            std::os::unix::fs::chown(&directory, self.owner, self.owner).unwrap();
        }
        let ranks = ranks.iter().map(|&rank| self.start_rank(rank, &directory)).collect();
        Running { ranks, directory }
    }

    fn start_rank(&self, rank: usize, directory: &std::path::Path) -> Rank {
        let program = std::env::current_exe().unwrap();
        let mut words = (self.through)(rank);
        words.push(program.to_str().unwrap().into());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["--exact", "rank_process", "--nocapture", "--test-threads=1"])
            .env(SCENARIO, self.scenario)
            .env("UNISUM_RANK", rank.to_string())
            .env("UNISUM_WORLD", self.ranks.to_string())
            .env("UNISUM_TOKEN", "a token of the tests, long enough")
            .env("UNISUM_RENDEZVOUS", format!("file://{}/world", directory.display()))
            .env(MARKS, directory)
            .env("UNISUM_INTERFACE", "=lo")
            .envs(&self.variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = Some(read(child.stdout.take().unwrap()));
        let log = Some(read(child.stderr.take().unwrap()));
        Rank { child, output, log }
    }

    /// Starts the world and waits until all have ended, at most `limit`.
    pub fn run(&self, limit: Duration) -> Vec<Ended> {
        self.start().wait(limit)
    }

    /// Runs the world; every rank must end with status 0. What they told.
    pub fn succeed(&self, limit: Duration) -> Vec<Vec<String>> {
        self.succeed_as(self.scenario, limit)
    }

    /// As [`World::succeed`], of a world that is called `name` in what a failure prints.
    pub fn succeed_as(&self, name: &str, limit: Duration) -> Vec<Vec<String>> {
        let ended = self.run(limit);
        for (rank, ended) in ended.iter().enumerate() {
            assert_eq!(ended.status, 0, "{name}: rank {rank} of {}: {ended:#?}", self.ranks);
        }
        ended.into_iter().map(|ended| ended.told).collect()
    }
}

fn read(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Free ports, one after the other, below those that the system gives to whoever asks for any: so
/// that nobody has one by the time that a rank wants it.
pub fn free_ports(count: usize) -> Vec<u16> {
    const FROM: usize = 10_000;
    const SPAN: usize = 20_000;
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    // Other tests begin somewhere else.
    let begin = std::process::id() as usize * 127;
    loop {
        // Relaxed: nothing but the number is shared.
        let first = FROM + (begin + GIVEN.fetch_add(count, Ordering::Relaxed)) % SPAN;
        let ports: Vec<u16> = (first..first + count).map(|port| port as u16).collect();
        let is_free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
        if ports.iter().all(is_free) {
            return ports;
        }
    }
}

fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // Relaxed: nothing but the number is shared.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Running {
    /// Starts one more rank, of a world that may be described differently.
    pub fn add(&mut self, world: &World, rank: usize) {
        let rank = world.start_rank(rank, &self.directory);
        self.ranks.push(rank);
    }

    pub fn pid(&self, rank: usize) -> i32 {
        self.ranks[rank].child.id() as i32
    }

    /// Whether a rank's process has not ended.
    pub fn lives(&self, rank: usize) -> bool {
        std::fs::read_to_string(format!("/proc/{}/stat", self.pid(rank)))
            .is_ok_and(|stat| !stat.contains(") Z "))
    }

    pub fn signal(&self, rank: usize, signal: i32) {
        // SAFETY: plain system call on a child that has not been waited for.
        let result = unsafe { libc::kill(self.pid(rank), signal) };
        assert_eq!(result, 0, "signal {signal} to rank {rank}");
    }

    /// Waits until so many ranks have marked the point `name` by [`reach`].
    pub fn wait_for(&self, name: &str, ranks: usize, limit: Duration) {
        wait_for_marks(&self.directory, name, ranks, limit);
    }

    /// Marks a point for the ranks to see by [`await_others`].
    pub fn mark(&self, name: &str) {
        std::fs::create_dir(self.directory.join(format!("{name}.test"))).unwrap();
    }

    /// Waits until all have ended; panics with what they said if that takes longer than `limit`.
    pub fn wait(mut self, limit: Duration) -> Vec<Ended> {
        let deadline = Instant::now() + limit;
        let mut statuses = Vec::new();
        for rank in 0..self.ranks.len() {
            loop {
                if let Some(status) = self.ranks[rank].child.try_wait().unwrap() {
                    statuses.push(status);
                    break;
                }
                if Instant::now() >= deadline {
                    self.kill_all();
                    let ended = self.collect(&[]);
                    panic!("rank {rank} still runs after {limit:?}: {ended:#?}");
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.collect(&statuses)
    }

    fn collect(&mut self, statuses: &[std::process::ExitStatus]) -> Vec<Ended> {
        use std::os::unix::process::ExitStatusExt as _;
        let join = |handle: Option<thread::JoinHandle<String>>| handle.unwrap().join().unwrap();
        let ended = |(index, rank): (usize, &mut Rank)| {
            let code = |status: &std::process::ExitStatus| {
                status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
            };
            let output = join(rank.output.take());
            let told = output.lines().filter_map(|line| line.strip_prefix(TOLD));
            Ended {
                status: statuses.get(index).map_or(-1, code),
                told: told.map(str::to_owned).collect(),
                log: join(rank.log.take()),
            }
        };
        self.ranks.iter_mut().enumerate().map(ended).collect()
    }

    fn kill_all(&mut self) {
        for rank in &mut self.ranks {
            // A rank that has ended can't be killed any more: that is what is wanted.
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}

/// Waits until something that the system counts is as it should be: it goes on with what it was
/// asked to end, so that a count at once says little.
pub fn wait_until(what: &str, limit: Duration, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn wait_for_marks(directory: &std::path::Path, name: &str, ranks: usize, limit: Duration) {
    let deadline = Instant::now() + limit;
    let prefix = format!("{name}.");
    loop {
        let marks = std::fs::read_dir(directory).unwrap();
        let names = marks.map(|mark| mark.unwrap().file_name());
        let reached = names.filter(|name| name.to_string_lossy().starts_with(&prefix)).count();
        if reached >= ranks {
            return;
        }
        assert!(Instant::now() < deadline, "only {reached} of {ranks} ranks reached {name}");
        thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_all();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Waits, in a rank, until so many ranks have marked the point `name` by [`reach`].
pub fn await_others(name: &str, ranks: usize, limit: Duration) {
    wait_for_marks(std::path::Path::new(&setting(MARKS)), name, ranks, limit);
}

/// Marks that this rank reached the point `name`, for [`Running::wait_for`] and [`await_others`].
pub fn reach(name: &str) {
    let mark = format!("{name}.{}", setting("UNISUM_RANK"));
    // A directory, since making one takes no descriptor.
    std::fs::create_dir(std::path::Path::new(&setting(MARKS)).join(mark)).unwrap();
}
