//! C and C++ programs that are compiled against an installed library, as users do it, and run: the
//! examples, and tests of the interface.
//!
//! Without a C compiler they are skipped, unless `UNISUM_TEST_C` is `required`.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(180);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the tools are there. Where `UNISUM_TEST_C` is `required`, they must.
fn has(tools: &[&str]) -> bool {
    let is_there = |tool: &&&str| {
        let mut asked = Command::new(tool);
        asked.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        asked.status().is_ok_and(|status| status.success())
    };
    let missing: Vec<_> = tools.iter().filter(|tool| !is_there(tool)).collect();
    let required = std::env::var("UNISUM_TEST_C").is_ok_and(|word| word == "required");
    assert!(missing.is_empty() || !required, "missing: {missing:?}");
    if !missing.is_empty() {
        println!("skipped: this machine lacks {missing:?}");
    }
    missing.is_empty()
}

/// Where the library is installed, for all tests of this process: `install` was run.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
        let _ = fs::remove_dir_all(&prefix);
        let mut install = Command::new(root().join("install"));
        install.arg(&prefix).env("UNISUM_STATIC_LIBRARY", static_library());
        succeed(&mut install);
        prefix
    })
}

/// The static library that was built with this test.
fn static_library() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let files = fs::read_dir(tests.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libunisum_c") && name.ends_with(".a")
    };
    let newest = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    files.filter(is_library).max_by_key(newest).expect("cargo builds it for the tests")
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout
}

/// Compiles a program, with what pkg-config says and no more.
fn compile(compiler: &str, source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let packages = prefix().join("lib/pkgconfig");
    let mut config = Command::new("pkg-config");
    config.args(["--cflags", "--libs", "unisum"]).env("PKG_CONFIG_PATH", packages);
    let config = succeed(&mut config);
    let to = prefix().join(name);
    let mut command = Command::new(compiler);
    command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-pthread"]).args(flags);
    command.arg(root().join(source)).arg("-o").arg(&to).args(config.split_whitespace());
    let library = prefix().join("lib");
    command.arg(format!("-Wl,-rpath,{}", library.display()));
    succeed(&mut command);
    to
}

/// Compiles a program that needs no shared library, with what pkg-config says and no more.
fn compile_static(source: &str, name: &str) -> PathBuf {
    let packages = prefix().join("lib/pkgconfig");
    let mut config = Command::new("pkg-config");
    config.args(["--static", "--cflags", "--libs", "unisum"]).env("PKG_CONFIG_PATH", packages);
    let config = succeed(&mut config);
    let to = prefix().join(name);
    let mut command = Command::new("gcc");
    command.arg("-static").arg(root().join(source)).arg("-o").arg(&to);
    succeed(command.args(config.split_whitespace()));
    to
}

/// Processes that are killed when a test fails.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended can't be killed any more: that is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs so many ranks of a program; all have to end well, in time. What they printed.
fn run(command: &[&str], ranks: usize) -> Vec<String> {
    run_with(command, ranks, |_, _| {})
}

/// The same; `set` sets the environment of each rank.
fn run_with(command: &[&str], ranks: usize, set: impl Fn(usize, &mut Command)) -> Vec<String> {
    World::start(command, ranks, set).end(&[])
}

/// Ranks of a program that run.
struct World {
    command: Vec<String>,
    ranks: usize,
    running: Ranks,
    scratch: tempfile::TempDir,
    deadline: Instant,
}

impl World {
    fn start(command: &[&str], ranks: usize, set: impl Fn(usize, &mut Command)) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (running, deadline) = (Ranks(Vec::new()), Instant::now() + LIMIT);
        let command = command.iter().map(|&word| word.to_owned()).collect();
        let mut world = Self { command, ranks, running, scratch, deadline };
        for rank in 0..ranks {
            world.add(|process| set(rank, process));
        }
        world
    }

    /// Another process, whose number here is returned.
    fn add(&mut self, set: impl Fn(&mut Command)) -> usize {
        let (scratch, rank) = (self.scratch.path(), self.running.0.len());
        let log = |what| fs::File::create(scratch.join(format!("{what}-{rank}"))).unwrap();
        let mut process = Command::new(&self.command[0]);
        process.args(&self.command[1..]);
        process.env("UNISUM_RANK", rank.to_string()).env("UNISUM_WORLD", self.ranks.to_string());
        process.env("UNISUM_TOKEN", "a token of the tests, long enough");
        process.env("UNISUM_RENDEZVOUS", format!("file://{}/world", scratch.display()));
        process.env("UNISUM_INTERFACE", "=lo").env("UNISUM_TIMEOUT", "60");
        process.env("TEST_DIRECTORY", scratch);
        set(&mut process);
        let process = process.stdout(log("out")).stderr(log("err")).spawn().unwrap();
        self.running.0.push(process);
        rank
    }

    fn said(&self, what: &str, rank: usize) -> String {
        fs::read_to_string(self.scratch.path().join(format!("{what}-{rank}"))).unwrap()
    }

    fn all(&self) -> String {
        let told = |rank| {
            let [out, err] = ["out", "err"].map(|what| self.said(what, rank));
            format!("rank {rank}: {out}{err}")
        };
        (0..self.running.0.len()).map(told).collect::<Vec<_>>().join("\n")
    }

    /// Fails if it takes too long.
    fn pause(&self) {
        let command = &self.command;
        assert!(Instant::now() < self.deadline, "{command:?} takes too long\n{}", self.all());
        std::thread::sleep(Duration::from_millis(2));
    }

    /// Until all ranks have come to a point; none has ended.
    fn wait_for(&mut self, point: &str) {
        for rank in 0..self.running.0.len() {
            while !self.scratch.path().join(format!("{point}-{rank}")).exists() {
                let ended = self.running.0[rank].try_wait().unwrap();
                assert!(ended.is_none(), "rank {rank}: {ended:?}\n{}", self.all());
                self.pause();
            }
        }
    }

    fn kill(&mut self, rank: usize) {
        self.running.0[rank].kill().unwrap();
    }

    /// Waits until a process has ended.
    fn wait(&mut self, rank: usize) -> ExitStatus {
        loop {
            if let Some(status) = self.running.0[rank].try_wait().unwrap() {
                return status;
            }
            self.pause();
        }
    }

    /// Waits until all have ended, and all but `victims` well: what these printed.
    fn end(mut self, victims: &[usize]) -> Vec<String> {
        let mut survivors = Vec::new();
        for rank in 0..self.running.0.len() {
            let status = self.wait(rank);
            if victims.contains(&rank) {
                assert!(!status.success(), "rank {rank} was killed too late");
                continue;
            }
            let all = || self.all();
            assert!(status.success(), "{:?}, rank {rank}: {status}\n{}", self.command, all());
            survivors.push(self.said("out", rank));
        }
        survivors
    }
}

const TOOLS: [&str; 3] = ["gcc", "g++", "pkg-config"];
const SCENARIOS: [&str; 12] = [
    "observing",
    "reductions",
    "sharding",
    "saving",
    "collectives",
    "asynchronous",
    "groups",
    "training",
    "store",
    "aborting",
    "dying",
    "differing",
];

#[test]
fn examples_compile_from_what_is_installed_and_run() {
    if !has(&TOOLS) {
        return;
    }
    let c = ["-std=c11"];
    let all_reduce = compile("gcc", "examples/all_reduce.c", "all_reduce", &c);
    let buckets = compile("gcc", "examples/buckets.c", "buckets", &c);
    let overlap = compile("g++", "examples/overlap.cpp", "overlap", &["-std=c++17"]);
    let [all_reduce, buckets, overlap] =
        [&all_reduce, &buckets, &overlap].map(|it| it.to_str().unwrap());
    for ranks in [2, 4] {
        let average = (ranks - 1) as f64 / 2.0;
        for (rank, said) in run(&[all_reduce], ranks).iter().enumerate() {
            assert_eq!(*said, format!("rank {rank} of {ranks}: the average is {average}\n"));
        }
        for (rank, said) in run(&[buckets], ranks).iter().enumerate() {
            let last = format!("rank {rank}, step 2: {} of {ranks} ranks\n", average + 1.0);
            assert!(said.ends_with(&last), "{said}");
        }
        run(&[overlap], ranks);
    }
}

/// As for a container without anything else in it.
#[test]
fn a_program_may_need_no_shared_library() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile_static("examples/all_reduce.c", "all_reduce-static");
    let mut headers = Command::new("readelf");
    let headers = succeed(headers.arg("--program-headers").arg(&program));
    assert!(!headers.contains("INTERP"), "{headers}");
    for (rank, said) in run(&[program.to_str().unwrap()], 2).iter().enumerate() {
        assert_eq!(*said, format!("rank {rank} of 2: the average is 0.5\n"));
    }
}

#[test]
fn ranks_in_c_get_what_ranks_in_rust_get() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/worlds.c", "worlds", &["-std=c11"]);
    for scenario in SCENARIOS {
        for ranks in [2, 4] {
            run(&[program.to_str().unwrap(), scenario], ranks);
        }
    }
}

/// Random moments; repeated with the same `UNISUM_TEST_SEED`.
fn drawn(what: &str) -> impl FnMut(usize) -> usize {
    let seed = std::env::var("UNISUM_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let clock = || std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into();
    let mut state: u64 = seed.unwrap_or_else(clock);
    println!("{what}: UNISUM_TEST_SEED={state}");
    move |below| {
        // Knuth's generator, of which the upper bits are good.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

/// `UNISUM_TEST_KILLS=N` makes so many trials, by hand.
#[test]
fn survivors_of_kills_go_on_with_the_same_bits() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/elastic.c", "elastic", &["-std=c11"]);
    let program = program.to_str().unwrap();
    let trials = std::env::var("UNISUM_TEST_KILLS").map_or(8, |it| it.parse().unwrap());
    let mut draw = drawn("kills");
    for trial in 0..trials {
        let ranks = 3 + draw(3);
        // Rank 0 no less often than others; two where a quorum is left.
        let mut victims = vec![if trial % 2 == 0 { 0 } else { draw(ranks) }];
        if ranks > 4 {
            victims.push((victims[0] + 1 + draw(ranks - 1)) % ranks);
        }
        let scenario = ["training", "calls"][trial / 2 % 2];
        let transport = ["tcp", "shm"][trial / 4 % 2];
        println!("trial {trial}: {scenario} over {transport}, of {ranks} {victims:?} die");
        let after = Duration::from_micros(draw(30_000) as u64);
        kill_some(&[program, scenario], ranks, &victims, transport, after);
    }
}

/// Kills these ranks a while after all have begun; the others tell the same in the end.
fn kill_some(command: &[&str], ranks: usize, victims: &[usize], transport: &str, after: Duration) {
    let mut world = World::start(command, ranks, |_, process| {
        process.env("LAST", (ranks - victims.len()).to_string());
        process.env("UNISUM_TRANSPORT", transport);
    });
    world.wait_for("training");
    std::thread::sleep(after);
    for &victim in victims {
        world.kill(victim);
    }
    let told = world.end(victims);
    assert!(told.iter().all(|it| *it == told[0] && it.starts_with("epoch ")), "{told:#?}");
}

#[test]
fn views_change_when_they_are_told_to_and_only_in_elastic_jobs() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/elastic.c", "views", &["-std=c11"]);
    run(&[program.to_str().unwrap(), "changes"], 4);
    run(&[program.to_str().unwrap(), "otherwise"], 2);
}

/// Starts ranks, and newcomers once all have come to a point: which of these die as soon as they
/// are in a view. All others tell the same in the end.
fn let_join(command: &[&str], ranks: usize, point: &str, dies: &[bool], transport: &str) {
    let last = ranks + dies.iter().filter(|&&it| !it).count();
    let set = |process: &mut Command| {
        process.env("LAST", last.to_string()).env("UNISUM_TRANSPORT", transport);
    };
    let mut world = World::start(command, ranks, |_, process| set(process));
    world.wait_for(point);
    let mut victims = Vec::new();
    for &dies in dies {
        let newcomer = world.add(|process| {
            set(process);
            process.env("TEST_JOIN", if dies { "die" } else { "live" }).env_remove("UNISUM_WORLD");
        });
        if dies {
            // The others learn of it while they wait for it.
            let status = world.wait(newcomer);
            assert_eq!(status.signal(), Some(9), "{status}\n{}", world.all());
            victims.push(newcomer);
        }
    }
    let told = world.end(&victims);
    assert!(told.len() == last && told[0].contains(&format!(" of {last}")), "{told:#?}");
    assert!(told.iter().all(|it| *it == told[0]), "{told:#?}");
}

#[test]
fn processes_join_jobs_in_c() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/joining.c", "joining", &["-std=c11"]);
    let program = program.to_str().unwrap();
    for transport in ["tcp", "shm"] {
        let_join(&[program, "training"], 2, "training", &[false, false], transport);
        let_join(&[program, "between"], 2, "running", &[false], transport);
    }
    let_join(&[program, "training"], 1, "training", &[true, false], "tcp");
}

/// What ranks keep for their shards outlives them, by its copies, and comes to newcomers.
#[test]
fn state_of_shards_follows_them_in_c() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/sharding.c", "sharding", &["-std=c11"]);
    let program = program.to_str().unwrap();
    run(&[program, "refused"], 2);
    let trials = std::env::var("UNISUM_TEST_KILLS").map_or(2, |it| it.parse().unwrap());
    let mut draw = drawn("shards");
    for transport in ["tcp", "shm"] {
        for trial in 0..trials {
            let victim = if trial % 2 == 0 { 0 } else { draw(4) };
            println!("{transport}: {victim} dies");
            let after = Duration::from_micros(draw(30_000) as u64);
            kill_some(&[program, "training"], 4, &[victim], transport, after);
        }
        let_join(&[program, "training"], 2, "training", &[false, false], transport);
    }
}

#[test]
fn who_can_not_join_in_c_gets_a_status() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/joining.c", "refused", &["-std=c11"]);
    run(&[program.to_str().unwrap(), "refused"], 1);
}

/// On the devices of an emulated driver.
#[test]
fn collectives_on_devices_are_right_and_their_failures_a_status() {
    if !has(&TOOLS) {
        return;
    }
    let program = compile("gcc", "tests/device.c", "device", &["-std=c11"]);
    let program = program.to_str().unwrap();
    let installed = prefix().join("lib").display().to_string();
    let libraries = cuda_emulator::library_dir().display().to_string();
    let on_devices = |scenario: &str, ranks: usize| {
        run_with(&[program, scenario], ranks, |rank, process| {
            process.env("LD_LIBRARY_PATH", format!("{libraries}:{installed}"));
            process.env("CUDA_EMULATOR_DEVICES", ranks.to_string());
            match (scenario, rank) {
                ("failing", 1) => process.env("CUDA_EMULATOR_FAIL", "cuLaunchKernel:7:719"),
                ("failing", _) => process.env("CUDA_EMULATOR_LEAKS", "report"),
                _ => process.env("CUDA_EMULATOR_LEAKS", "fail"),
            };
        })
    };
    on_devices("collectives", 2);
    on_devices("collectives", 3);
    on_devices("refusals", 2);
    on_devices("buckets", 2);
    on_devices("buckets", 3);
    on_devices("failing", 3);
    if !Path::new("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists() {
        run(&[program, "absent"], 2);
    }
}

#[test]
fn wrong_use_is_a_status() {
    if !has(&TOOLS) {
        return;
    }
    // What the header says is C of 1999, and C++.
    for (compiler, standard) in [("gcc", "-std=c99"), ("g++", "-std=c++11")] {
        compile(compiler, "tests/empty.c", "empty", &[standard]);
    }
    let program = compile("gcc", "tests/edges.c", "edges", &["-std=c11"]);
    run(&[program.to_str().unwrap()], 1);
}

#[test]
fn sanitizers_find_nothing() {
    if !has(&TOOLS) {
        return;
    }
    let flags = ["-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let edges = compile("gcc", "tests/edges.c", "edges-sanitized", &flags);
    run(&[edges.to_str().unwrap()], 1);
    let worlds = compile("gcc", "tests/worlds.c", "worlds-sanitized", &flags);
    for scenario in SCENARIOS {
        run(&[worlds.to_str().unwrap(), scenario], 2);
    }
    let elastic = compile("gcc", "tests/elastic.c", "elastic-sanitized", &flags);
    let elastic = elastic.to_str().unwrap();
    for scenario in ["training", "calls"] {
        kill_some(&[elastic, scenario], 3, &[0], "shm", Duration::from_millis(5));
    }
    run(&[elastic, "changes"], 4);
    run(&[elastic, "otherwise"], 2);
    let joining = compile("gcc", "tests/joining.c", "joining-sanitized", &flags);
    let joining = joining.to_str().unwrap();
    let_join(&[joining, "training"], 2, "training", &[false], "shm");
    let_join(&[joining, "between"], 2, "running", &[false], "tcp");
    run(&[joining, "refused"], 1);
}

#[test]
fn valgrind_finds_nothing() {
    if !has(&TOOLS) || !has(&["valgrind"]) {
        return;
    }
    // In a world of one: in others, rustix calls into the vDSO, which valgrind takes away.
    let edges = compile("gcc", "tests/edges.c", "edges-valgrind", &["-std=c11"]);
    run(&["valgrind", "-q", "--error-exitcode=9", "--fair-sched=yes", edges.to_str().unwrap()], 1);
}

#[test]
fn symbols_have_versions_and_nothing_else_is_exported() {
    if !has(&TOOLS) || !has(&["nm", "readelf"]) {
        return;
    }
    let library = prefix().join("lib/libunisum.so");
    let symbols = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let names = symbols.lines().filter_map(|line| line.split(' ').nth(2));
    let names: Vec<_> = names.filter(|name| !name.starts_with("UNISUM_")).collect();
    let map = fs::read_to_string(root().join("unisum.map")).unwrap();
    assert_eq!(names.len(), map.matches("unisum_").count(), "{names:?}");
    for name in names {
        let (name, version) = name.split_once("@@").unwrap();
        assert!(name.starts_with("unisum_") && version == "UNISUM_0.1", "{name}@@{version}");
    }
    let dynamic = succeed(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("Library soname: [libunisum.so.0]"), "{dynamic}");
}

#[test]
fn cmake_finds_it() {
    if !has(&TOOLS) || !has(&["cmake"]) {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let project = format!(
        "cmake_minimum_required(VERSION 3.16)\nproject(user C)\n\
         find_package(unisum 0.1 REQUIRED)\n\
         add_executable(shared {source})\ntarget_link_libraries(shared unisum::unisum)\n\
         add_executable(static {source})\ntarget_link_libraries(static unisum::static)\n",
        source = root().join("examples/all_reduce.c").display()
    );
    fs::write(scratch.path().join("CMakeLists.txt"), project).unwrap();
    let build = scratch.path().join("build");
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(scratch.path()).arg("-B").arg(&build);
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display()));
    succeed(&mut configure);
    succeed(Command::new("cmake").arg("--build").arg(&build));
    for program in ["shared", "static"] {
        run(&[build.join(program).to_str().unwrap()], 2);
    }
}
