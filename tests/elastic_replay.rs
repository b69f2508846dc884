//! Elastic jobs that log their views, and jobs that repeat them: nobody is killed the second time,
//! and the weights have the same bits.
//!
//! `UNISUM_TEST_REPLAYS=N` makes so many trials of each kind, by hand.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::{Ended, Random, Running, World, setting, tell, tell_error};
use unisum::buckets::{Buckets, Compressed, Encoding, LowRank, Parameter, StepReport};
use unisum::{Communicator, Dtype, Elastic, Error};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || train(false)),
        ("newcomer", || train(true)),
        ("connect", connect_only),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn parameters() -> Vec<Parameter> {
    vec![
        Parameter::new("end", &[4], Dtype::F64),
        Parameter::new("first", &[100, 200], Dtype::F32),
        Parameter::new("last", &[3000], Dtype::F32),
    ]
}

/// In the folder that the ranks of a job share with the test.
fn mark(name: &str) -> PathBuf {
    Path::new(&setting("SHARED")).join(name)
}

/// The weights and the number of steps behind them, as bytes.
#[derive(Clone, Debug)]
struct State {
    steps: u64,
    weights: Vec<f32>,
}

impl State {
    fn bytes(&self) -> Vec<u8> {
        let weights = self.weights.iter().flat_map(|it| it.to_le_bytes());
        self.steps.to_le_bytes().into_iter().chain(weights).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let (steps, weights) = bytes.split_first_chunk().unwrap();
        let weights = weights.as_chunks().0.iter().map(|it| f32::from_le_bytes(*it));
        Self { steps: u64::from_le_bytes(*steps), weights: weights.collect() }
    }

    fn hash(&self) -> u64 {
        self.weights.iter().fold(7, |hash: u64, it| {
            hash.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(it.to_bits())
        })
    }
}

struct Training {
    communicator: Communicator,
    state: State,
    process: u64,
    /// In a job that repeats another one, how many steps that made.
    until: Option<u64>,
}

fn build(communicator: &Communicator) -> Buckets {
    let builder = Buckets::builder(communicator).bucket_bytes(16 << 10).end_bucket_bytes(1024);
    let builder = match setting("HOOK").as_str() {
        "int8" => builder.hook(Compressed::new(Encoding::Int8)),
        "low_rank" => builder.hook(LowRank::new(2).starting_at(3)),
        _ => builder,
    };
    builder.build(&parameters()).unwrap()
}

impl Training {
    fn run(&mut self, mut buckets: Buckets) -> Result<(), Error> {
        loop {
            let report = self.step(&mut buckets)?;
            if let Some(communicator) = buckets.take_communicator() {
                self.communicator = communicator;
            }
            self.tell_view();
            let is_over = buckets.gradient::<f64>(0)[0] > 0.0;
            if self.until.map_or(is_over, |until| self.state.steps == until) {
                return Ok(());
            }
            if report.newcomers {
                self.communicator = buckets.admit()?;
                self.communicator.share_state(Some(&self.state.bytes()))?;
            }
        }
    }

    /// This process has ended a step in its view.
    fn tell_view(&self) {
        let (view, own) = (self.communicator.view().unwrap(), std::process::id());
        let name = format!("{} {} {own}", view.epoch, view.processes.len());
        std::fs::create_dir_all(mark(&name)).unwrap();
    }

    /// Gradients that follow from the step, the process, and its rank and world as it began.
    fn step(&mut self, buckets: &mut Buckets) -> Result<StepReport, Error> {
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        let seed = self.state.steps * 31 + self.process % 1009 * 7 + (rank * 3 + world) as u64;
        let step = buckets.begin()?;
        std::thread::sleep(Duration::from_micros(500 + seed % 7 * 200));
        for parameter in [2, 1] {
            let mut gradient = step.view_to_overwrite::<f32>(parameter)?;
            for (at, to) in gradient.iter_mut().enumerate() {
                *to = ((at as u64 * 7 + seed) % 1013) as f32 / 101.0 - 5.0;
            }
            gradient.ready();
        }
        let mut end = step.view::<f64>(0)?;
        end[0] = f64::from(u8::from(self.until.is_none() && mark("over").exists()));
        end.ready();
        let report = step.wait()?;
        let averages = [1, 2].into_iter().flat_map(|it| buckets.gradient::<f32>(it));
        self.state.weights.iter_mut().zip(averages).for_each(|(to, it)| *to = *to * 0.9 + it);
        self.state.steps += 1;
        Ok(report)
    }
}

fn train(joins: bool) {
    let builder = Communicator::builder().elastic(Elastic::default());
    let communicator = if joins { builder.join() } else { builder.connect() };
    let communicator = match communicator {
        Ok(communicator) => communicator,
        Err(error) => return tell_error(&error),
    };
    let buckets = build(&communicator);
    let mut state = State { steps: 0, weights: vec![0.0; 23_000] };
    if joins {
        state = State::from_bytes(&communicator.share_state(None).unwrap().unwrap());
    }
    let process = communicator.view().unwrap().processes[communicator.rank()];
    let until = std::env::var("STEPS").ok().map(|it| it.parse().unwrap());
    let mut training = Training { communicator, state, process, until };
    match training.run(buckets) {
        Ok(()) => {
            let State { steps, .. } = training.state;
            let hash = training.state.hash();
            tell(format!("{steps} {hash:x} {:?}", training.communicator.view().unwrap()));
        }
        Err(error) => tell_error(&error),
    }
}

/// A folder for the logs of jobs.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("unisum-replay-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn of(&self, job: &str) -> String {
        self.0.join(job).display().to_string()
    }

    /// The lines of a process's log.
    fn lines(&self, job: &str, process: u64) -> Vec<String> {
        let path = self.0.join(job).join(format!("{process}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// The processes that have a log.
    fn processes(&self, job: &str) -> Vec<u64> {
        let entries = std::fs::read_dir(self.0.join(job)).unwrap();
        let number = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let mut processes: Vec<u64> = entries.map(|it| number(it.unwrap().path())).collect();
        processes.sort_unstable();
        processes
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }
}

/// A training of which ranks are killed, and into which processes come.
struct Original {
    running: Running,
    world: World,
    /// The folder that its ranks share with the test.
    shared: PathBuf,
    /// By their places in `running`.
    living: Vec<usize>,
    started: usize,
    epoch: u64,
}

impl Original {
    fn start(world: World, shared: PathBuf, ranks: usize) -> Self {
        std::fs::create_dir(&shared).unwrap();
        let world = world.set("SHARED", shared.display());
        let running = world.start();
        let (living, started, epoch) = ((0..ranks).collect(), ranks, 0);
        let mut original = Self { running, world, shared, living, started, epoch };
        original.await_all();
        original
    }

    fn end(self) -> (Vec<Ended>, Vec<usize>) {
        std::fs::create_dir(self.shared.join("over")).unwrap();
        (self.running.wait(LIMIT), self.living)
    }

    fn kill(&mut self, random: &mut Random, victims: usize) {
        std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
        for _ in 0..victims {
            let victim = self.living.remove(random.below(self.living.len()));
            self.running.signal(victim, libc::SIGKILL);
            println!("{victim} is killed");
            std::thread::sleep(Duration::from_micros(random.of(&[0, 300, 5000])));
        }
        self.await_all();
    }

    /// Until all that live have ended a step among themselves, in a view that is new.
    fn await_all(&mut self) {
        let (world, before) = (self.living.len(), self.epoch);
        let mut pids: Vec<i32> = self.living.iter().map(|it| self.running.pid(*it)).collect();
        pids.sort_unstable();
        let met = || {
            let names = std::fs::read_dir(&self.shared).unwrap();
            let names = names.map(|it| it.unwrap().file_name().into_string().unwrap());
            let mut views: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
            for name in names {
                let words: Vec<u64> = name.split(' ').map(|it| it.parse().unwrap()).collect();
                if words[1] == world as u64 {
                    views.entry(words[0]).or_default().push(words[2] as i32);
                }
            }
            views.into_iter().find_map(|(epoch, mut there)| {
                there.sort_unstable();
                (epoch > before && there == pids).then_some(epoch)
            })
        };
        support::wait_until("all that live step in a new view", LIMIT, || met().is_some());
        self.epoch = met().unwrap();
    }

    fn add(&mut self) {
        let newcomer = self.world.clone().running("newcomer").set("UNISUM_RANK", "");
        self.running.add(&newcomer.set("UNISUM_WORLD", ""), self.started);
        self.living.push(self.started);
        self.started += 1;
        self.await_all();
    }
}

fn told_of(ended: &[Ended], places: &[usize]) -> Vec<String> {
    let told = places.iter().map(|&it| {
        assert_eq!((ended[it].status, ended[it].told.len()), (0, 1), "{it}: {ended:#?}");
        ended[it].told[0].clone()
    });
    told.collect()
}

fn trials(name: &str, joins: bool) {
    let mut random = Random::new();
    let trials = std::env::var("UNISUM_TEST_REPLAYS").map_or(3, |it| it.parse().unwrap());
    for trial in 0..trials {
        let folder = Folder::new(&format!("{name}-{trial}"));
        let ranks = 4 + random.below(3);
        let hook = ["all_reduce", "int8", "low_rank"][trial % 3];
        let transport = random.of(&["shm", "tcp"]);
        println!("{name}, trial {trial}: {ranks} ranks, {hook}, {transport}");
        let base = World::new(ranks, "train")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_REPRODUCIBLE", 1)
            .set("HOOK", hook);
        let logged = base.clone().set("UNISUM_EPOCH_LOG", folder.of("original"));
        let mut original = Original::start(logged, folder.0.join("shared"), ranks);
        if joins {
            original.kill(&mut random, 1);
            original.add();
            original.kill(&mut random, 1);
            original.add();
        } else {
            // Two of four may be no quorum.
            let victims = if ranks > 4 { 1 + random.below(2) } else { 1 };
            original.kill(&mut random, victims);
            original.kill(&mut random, 1);
        }
        let (ended, living) = original.end();
        let told = told_of(&ended, &living);
        assert!(told.iter().all(|it| *it == told[0]), "{told:#?}");
        repeat(&folder, &base, (&told[0], living.len()));
    }
}

/// Repeats the job of the folder's `original`, which ended as `told` on so many ranks.
fn repeat(folder: &Folder, base: &World, (told, left): (&str, usize)) {
    let steps = told.split(' ').next().unwrap();
    let world = base
        .clone()
        .set("UNISUM_REPLAY", folder.of("original"))
        .set("UNISUM_EPOCH_LOG", folder.of("repeated"))
        .set("SHARED", folder.of("shared"))
        .set("STEPS", steps);
    let processes = folder.processes("original");
    let mut running = world.start();
    for (place, process) in processes.iter().enumerate().filter(|(_, it)| **it >= 1 << 31) {
        let newcomer = world.clone().running("newcomer").set("UNISUM_REPLAY_PROCESS", process);
        running.add(&newcomer.set("UNISUM_RANK", "").set("UNISUM_WORLD", ""), place);
    }
    let ended = running.wait(LIMIT);
    let places: Vec<usize> = (0..processes.len()).collect();
    let repeated = told_of(&ended, &places);
    let is_end = |it: &&String| it.contains("has process") && it.contains("end here");
    let ends = repeated.iter().filter(is_end).count();
    let same = repeated.iter().filter(|it| *it == told).count();
    assert_eq!((same, ends), (left, processes.len() - left), "{told}: {repeated:#?}");
    let steps = |job: &str, process: u64| -> Vec<String> {
        let lines = folder.lines(job, process).into_iter();
        lines.filter(|it| it.starts_with("{\"step\"")).collect()
    };
    assert_eq!(folder.processes("repeated"), processes);
    for (place, &process) in processes.iter().enumerate() {
        let theirs = steps("original", process);
        let ours = steps("repeated", process);
        // A process that was killed may not have come to write how a step ended.
        assert!(ours.starts_with(&theirs), "{process}: {theirs:#?} {ours:#?}");
        assert!(repeated[place] != *told || ours == theirs, "{process}: {theirs:#?} {ours:#?}");
    }
}

/// One at a time: two worlds slow each other.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_training_whose_ranks_were_killed_is_repeated_to_the_same_bits() {
    let _one = alone();
    trials("kills", false);
}

#[test]
fn a_training_that_processes_joined_is_repeated_to_the_same_bits() {
    let _one = alone();
    trials("joins", true);
}

fn connect_only() {
    let elastic = setting("ELASTIC") == "yes";
    let builder = Communicator::builder();
    let builder = if elastic { builder.elastic(Elastic::default()) } else { builder };
    match builder.connect() {
        Ok(communicator) if std::env::var_os("SHARDED").is_some() => {
            let sharded = Buckets::builder(&communicator).sharded().build(&parameters());
            tell(format!("{:?}", sharded.err().map(|it| it.to_string())));
        }
        Ok(communicator) => tell(format!("{:?}", communicator.barrier().err())),
        Err(error) => tell_error(&error),
    }
}

const FIRST: &str = "{\"epoch\":1,\"processes\":[0,1,2],\"from\":0,\"lost\":[],\"joined\":[],\
    \"layer\":0,\"steps\":null,\"in_steps\":[]}\n";

/// Logs of a job of three ranks, with these settings.
fn written(folder: &Folder, settings: &str, lines: &str) -> String {
    let path = folder.0.join("written");
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    let head = format!("{{\"epoch_log\":1,\"process\":0,\"settings\":\"{settings}\"}}\n");
    std::fs::write(path.join("0.jsonl"), head + lines).unwrap();
    path.display().to_string()
}

#[test]
fn what_can_t_be_logged_or_repeated_is_refused_at_the_start() {
    let _one = alone();
    let folder = Folder::new("refused");
    let base = World::new(3, "connect").set("ELASTIC", "yes").set("UNISUM_REPRODUCIBLE", 1);
    let refuses = |world: &World, why: &str| {
        let ended = world.run(LIMIT);
        for Ended { told, .. } in &ended {
            assert_eq!(told.len(), 1, "{ended:#?}");
            assert!(!told[0].contains("None"), "{ended:#?}");
        }
        assert!(ended.iter().any(|it| it.told[0].contains(why)), "{why}: {ended:#?}");
    };
    let replays = |logs: String| base.clone().set("UNISUM_REPLAY", logs);
    refuses(&replays(folder.of("nowhere")), "reading epoch logs in");
    refuses(&replays(written(&folder, "other", FIRST)), "the job to repeat had other, this one");
    refuses(&replays(written(&folder, "other", "garbage\n")), "0.jsonl, line 2: expected value at");
    let no_elastic = replays(folder.of("nowhere")).set("ELASTIC", "no");
    refuses(&no_elastic, "UNISUM_REPLAY is for elastic jobs");
    refuses(&base.clone().set("UNISUM_EPOCH_LOG", "/dev/null/logs"), "beginning the epoch log");

    // The settings as jobs write them.
    let settings = |world: &World, job: &str| {
        let told = world.clone().set("UNISUM_EPOCH_LOG", folder.of(job)).succeed(LIMIT);
        assert_eq!(told, vec![vec!["None".to_owned()]; 3]);
        let head = folder.lines(job, 0).remove(0);
        head.split('"').nth(7).unwrap().to_owned()
    };
    let own = settings(&base, "own");
    let sharded = replays(written(&folder, &own, FIRST)).set("SHARDED", "yes");
    refuses(&sharded, "a job has sharded buckets, whose steps can't be repeated");
    let four = FIRST.replace("0,1,2", "0,1,2,3");
    let why = "the job to repeat began with 4 ranks, this one with 3";
    refuses(&replays(written(&folder, &own, &four)), why);
    let measured = base.clone().set("UNISUM_REPRODUCIBLE", 0);
    let logs = written(&folder, &settings(&measured, "measured"), FIRST);
    refuses(&measured.set("UNISUM_REPLAY", logs), "only if it had UNISUM_REPRODUCIBLE=1");
    refuses(&base.clone().set("UNISUM_EPOCH_LOG", folder.of("own")), "File exists");
}

/// The log has process 1 end before step 40, and here process 2 dies before.
#[test]
fn a_job_that_strays_from_its_log_says_so() {
    let _one = alone();
    let folder = Folder::new("strays");
    let base = World::new(3, "train").set("UNISUM_REPRODUCIBLE", 1).set("HOOK", "all_reduce");
    let logged = base.clone().set("UNISUM_EPOCH_LOG", folder.of("original"));
    let (ended, _) = Original::start(logged, folder.0.join("shared"), 3).end();
    assert!(ended.iter().all(|it| it.status == 0), "{ended:#?}");
    let head = folder.lines("original", 0).remove(0);
    let change = "{\"epoch\":2,\"processes\":[0,2],\"from\":1,\"lost\":[1],\"joined\":[],\
        \"layer\":1,\"steps\":100000,\"in_steps\":[100000,99999]}\n";
    let logs = written(&folder, head.split('"').nth(7).unwrap(), &format!("{FIRST}{change}"));
    let world = base.set("UNISUM_REPLAY", logs).set("STEPS", 200_000);
    let job = Original::start(world, folder.0.join("shared again"), 3);
    job.running.signal(2, libc::SIGKILL);
    let ended = job.running.wait(LIMIT);
    assert!(
        ended[0].told[0].contains("this job strays from the one that it repeats"),
        "{ended:#?}"
    );
    assert!(ended[1].told[0].starts_with("RankLost"), "{ended:#?}");
}
