//! A rank of a training that the harness kills ranks of. It tells in a journal what it sees: the
//! harness believes nothing else.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use unisum::buckets::{Buckets, Parameter, StepReport};
use unisum::{Communicator, Dtype, Elastic, Error, ErrorKind};

use super::support::setting;

/// Of the monotonic clock, which all processes of the machine share.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Where a process writes its journal, and where the harness says that it is over.
pub(crate) const DIRECTORY: &str = "TEST_JOURNALS";
pub(crate) const END: &str = "end";

/// Elements of the two parameters.
const WEIGHTS: [usize; 2] = [30_000, 3_000];

/// The weights, and the number of steps behind them.
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

/// One line for each event, by one write: a process that is killed leaves whole lines, or a last
/// one without an end.
struct Journal(File);

impl Journal {
    fn open() -> Self {
        let path = Path::new(&setting(DIRECTORY)).join(format!("{}.journal", std::process::id()));
        Self(File::create(path).unwrap())
    }

    fn write(&mut self, line: String) {
        self.0.write_all(format!("{line} {}\n", now_ns()).as_bytes()).unwrap();
    }
}

struct Training {
    communicator: Communicator,
    /// `None` on a newcomer, and on a rank that is behind.
    state: Option<State>,
    journal: Journal,
    /// This process's number in all views.
    process: u64,
    /// How long a step computes, on average.
    computing: Duration,
    over: std::path::PathBuf,
}

fn parameters() -> Vec<Parameter> {
    vec![
        Parameter::new("end", &[4], Dtype::F64),
        Parameter::new("first", &[WEIGHTS[0] / 100, 100], Dtype::F32),
        Parameter::new("last", &[WEIGHTS[1]], Dtype::F32),
    ]
}

fn build(communicator: &Communicator) -> Result<Buckets, Error> {
    let builder = Buckets::builder(communicator).bucket_bytes(64 << 10).end_bucket_bytes(1024);
    builder.build(&parameters())
}

impl Training {
    /// The epoch, and the members by rank; those of a job that is not elastic never change.
    fn view(&self) -> (u64, Vec<u64>) {
        let ranks = || (1, (0..self.communicator.world() as u64).collect());
        self.communicator.view().map_or_else(ranks, |it| (it.epoch, it.processes))
    }

    fn tell_view(&mut self) {
        let (epoch, members) = self.view();
        let members: Vec<String> = members.iter().map(u64::to_string).collect();
        self.journal.write(format!("view {epoch} {}", members.join(",")));
    }

    fn run(&mut self) -> Result<(), Error> {
        loop {
            match self.run_in_buckets() {
                Err(error) if error.kind() == ErrorKind::ViewChanged => {
                    self.journal.write(format!("outside {}", error.epoch().unwrap()));
                    self.communicator = self.communicator.rebuild()?;
                }
                result => return result,
            }
        }
    }

    /// All have the state of those that are furthest.
    fn align(&mut self) -> Result<(), Error> {
        let own = self.state.as_ref().map_or(0, |state| state.steps + 1);
        let mut steps = vec![0; self.communicator.world()];
        self.communicator.all_gather(&[own], &mut steps)?;
        if own < *steps.iter().max().unwrap() {
            self.state = None;
        }
        let bytes = self.state.as_ref().map(State::bytes);
        if let Some(told) = self.communicator.share_state(bytes.as_deref())? {
            self.state = Some(State::from_bytes(&told));
        }
        Ok(())
    }

    fn run_in_buckets(&mut self) -> Result<(), Error> {
        let mut buckets = build(&self.communicator)?;
        self.tell_view();
        self.align()?;
        loop {
            let report = self.step(&mut buckets)?;
            if let Some(communicator) = buckets.take_communicator() {
                self.communicator = communicator;
                self.tell_view();
                let redone = report.change.as_ref().unwrap().redone;
                self.journal.write((if redone { "redone" } else { "committed" }).to_owned());
            }
            let State { steps, .. } = self.state.as_ref().unwrap();
            let (epoch, _) = self.view();
            let (participants, hash) = (report.participants, self.state.as_ref().unwrap().hash());
            self.journal.write(format!("step {steps} {epoch} {participants} {hash:x}"));
            if buckets.gradient::<f64>(0)[0] > 0.0 {
                return Ok(());
            }
            if report.newcomers {
                self.communicator = buckets.admit()?;
                self.tell_view();
                self.align()?;
            }
        }
    }

    /// How long this rank computes before its gradients are there: never as long as others.
    fn compute(&self, steps: u64) {
        let drawn = (steps * 31 + self.process % 1009 * 17) % 41;
        std::thread::sleep(self.computing * (80 + drawn as u32) / 200);
    }

    fn step(&mut self, buckets: &mut Buckets) -> Result<StepReport, Error> {
        let steps = self.state.as_ref().unwrap().steps;
        let repeated = (steps % 17 + 1) as f32;
        let factor = repeated * weight(self.process);
        let step = buckets.begin()?;
        for parameter in [2, 1] {
            self.compute(steps);
            let mut gradient = step.view_to_overwrite::<f32>(parameter)?;
            let values = (0..).map(|at| factor * value(at));
            gradient.iter_mut().zip(values).for_each(|(to, value)| *to = value);
            gradient.ready();
        }
        let mut end = step.view::<f64>(0)?;
        end[0] = f64::from(u8::from(self.over.exists()));
        end.ready();
        let report = step.wait()?;
        if report.change.is_none() {
            check(buckets, repeated, &self.view().1);
        }
        let state = self.state.as_mut().unwrap();
        let averages = [1, 2].into_iter().flat_map(|it| buckets.gradient::<f32>(it));
        state.weights.iter_mut().zip(averages).for_each(|(to, it)| *to = *to * 0.9 + it);
        state.steps += 1;
        Ok(report)
    }
}

/// What a process multiplies its gradients by: it does not follow from ranks, which may change when
/// a step is made again.
fn weight(process: u64) -> f32 {
    (process % 8 + 1) as f32
}

/// The averages are what follows from the gradients of these processes.
fn check(buckets: &Buckets, repeated: f32, processes: &[u64]) {
    let sum: f32 = processes.iter().map(|it| weight(*it)).sum();
    let average = repeated * sum / processes.len() as f32;
    for parameter in [1, 2] {
        let gradient = buckets.gradient::<f32>(parameter);
        let is_right = |(at, it): (usize, &f32)| {
            let expected = average * value(at);
            (*it - expected).abs() <= expected * 1e-6
        };
        assert!(gradient.iter().enumerate().all(is_right), "a wrong average");
    }
}

/// What the gradients of all ranks are multiples of.
fn value(at: usize) -> f32 {
    ((at * 37 + 11) % 101) as f32
}

/// Trains until the harness says that it is over.
pub(crate) fn train(joins: bool) {
    let mut journal = Journal::open();
    journal.write("started".to_owned());
    let mut builder = Communicator::builder();
    if setting("ELASTIC") == "yes" {
        builder = builder.elastic(Elastic::default());
    }
    let communicator = if joins { builder.join() } else { builder.connect() }.unwrap();
    let rank = communicator.rank();
    let process = communicator.view().map_or(rank as u64, |it| it.processes[rank]);
    journal.write(format!("process {process}"));
    let weights = vec![0.0; WEIGHTS.iter().sum()];
    let computing = Duration::from_micros(setting("COMPUTING_US").parse().unwrap());
    let mut training = Training {
        communicator,
        state: (!joins).then_some(State { steps: 0, weights }),
        journal,
        process,
        computing,
        over: Path::new(&setting(DIRECTORY)).join(END),
    };
    if let Err(error) = training.run() {
        training.journal.write(format!("error {:?} {error}", error.kind()));
        panic!("{:?} {error}", error.kind());
    }
    training.journal.write("over".to_owned());
}
