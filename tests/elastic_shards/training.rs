//! The training of the ranks.

use std::path::Path;

use unisum::buckets::{Buckets, Parameter, Resharded, ShardMove, ShardState};
use unisum::{Communicator, Dtype, Elastic, Error, ErrorKind, ReduceOp};

use super::support::{setting, tell, tell_error};

/// Weights and momenta.
pub(crate) const VECTORS: usize = 2;

pub(crate) fn parameters() -> Vec<Parameter> {
    let shapes: &[&[usize]] = match setting("SHAPES").as_str() {
        "large" => &[&[9000], &[1], &[100, 300], &[50, 50], &[20_001]],
        "few" => &[&[3], &[0], &[]],
        _ => &[&[1000, 7], &[3], &[], &[40, 40], &[1], &[257]],
    };
    let new = |(at, shape): (usize, &&[usize])| Parameter::new(at.to_string(), shape, Dtype::F32);
    shapes.iter().enumerate().map(new).collect()
}

fn is_marked(name: &str) -> bool {
    Path::new(&setting("TEST_MARKS")).join(format!("{name}.test")).exists()
}

pub(crate) fn reach(name: &str) {
    let mark = Path::new(&setting("TEST_MARKS")).join(format!("{name}.{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(mark) {
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    }
}

/// Whether any process has come to it.
fn is_reached(name: &str) -> bool {
    let marks = std::fs::read_dir(setting("TEST_MARKS")).unwrap();
    let is_one = |mark: &str| mark.rsplit_once('.').is_some_and(|(point, _)| point == name);
    marks.map(|it| it.unwrap().file_name()).any(|it| is_one(&it.to_string_lossy()))
}

fn gradient(number: u64, parameter: usize, at: usize) -> f32 {
    ((3 * number as usize + 5 * parameter + 7 * at) % 11) as f32 - 5.0
}

/// The optimizer.
fn update([weight, momentum]: &mut [f32; VECTORS], gradient: f32) {
    *momentum = 0.5 * *momentum - gradient;
    *weight += *momentum;
}

/// All weights and momenta, by parameter and element, after so many steps.
struct Expected {
    steps: u64,
    state: Vec<Vec<[f32; VECTORS]>>,
}

impl Expected {
    fn new() -> Self {
        let first = |at: usize| [at as f32, 0.0];
        let of = |it: &Parameter| (0..it.count()).map(first).collect();
        Self { steps: 0, state: parameters().iter().map(of).collect() }
    }

    fn after(&mut self, steps: u64) -> &[Vec<[f32; VECTORS]>] {
        if steps < self.steps {
            *self = Self::new();
        }
        for number in self.steps..steps {
            for (parameter, state) in self.state.iter_mut().enumerate() {
                let elements = state.iter_mut().enumerate();
                elements.for_each(|(at, it)| update(it, gradient(number, parameter, at)));
            }
        }
        self.steps = steps;
        &self.state
    }
}

struct Training {
    communicator: Communicator,
    state: ShardState<f32>,
    expected: Expected,
    /// Elements that nobody had any more.
    lost: usize,
    /// Steps that were made again.
    again: u64,
    /// In how many layouts.
    layouts: usize,
    /// How many this rank tried to get in its view.
    attempts: usize,
    /// The marks of those that it did not get.
    failed: Vec<String>,
    /// Those that own the elements, and those that did when they were last copied.
    owners: Option<Owners>,
    copied: Option<Owners>,
}

/// Who had which elements.
#[derive(Clone)]
struct Owners {
    version: u64,
    processes: Vec<u64>,
    moves: Vec<ShardMove>,
}

enum Next {
    Again,
    Admit,
    End,
}

impl Training {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            self.communicator = match self.run_in_view() {
                Ok(Next::Again) => continue,
                Ok(Next::Admit) => self.communicator.admit()?,
                Ok(Next::End) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::ViewChanged => {
                    self.communicator.rebuild()?
                }
                Err(error) => return Err(error),
            };
            self.attempts = 0;
        }
    }

    /// All that this rank has is what it should be; what is lost is restored.
    fn restore(&mut self, buckets: &Buckets, resharded: &Resharded, before: u64) {
        let (rank, version) = (self.communicator.rank(), resharded.version);
        let expected = self.expected.after(version);
        let mut seen: Vec<Vec<usize>> = expected.iter().map(|it| vec![0; it.len()]).collect();
        for it in &resharded.moves {
            seen[it.parameter][it.elements.clone()].iter_mut().for_each(|seen| *seen += 1);
            for at in it.elements.clone().filter(|_| it.to == rank) {
                for vector in [0, 1] {
                    let element = &mut self.state.elements_mut(vector, it.parameter, at..at + 1)[0];
                    let value = expected[it.parameter][at][vector];
                    if it.from.is_none() {
                        assert_eq!(*element, 0.0);
                        *element = value;
                    }
                    let what = (version, it.parameter, at, vector);
                    assert_eq!(element.to_bits(), value.to_bits(), "{what:?}");
                }
            }
        }
        assert!(seen.iter().flatten().all(|&seen| seen == 1), "{resharded:?}");
        self.check(buckets, version);
        self.check_lost(resharded);
        if self.layouts > 0 {
            self.lost += resharded.lost().map(|it| it.elements.len()).sum::<usize>();
            // All were equally far.
            assert!(setting("COPIES") != "0" || before == version, "{before} and {version}");
            self.again += before - version;
        }
        self.layouts += 1;
        self.failed.clear();
        self.state.set_version(version);
    }

    /// Only what one that is gone had is lost, and if it was copied, only if the next is gone, too.
    fn check_lost(&self, resharded: &Resharded) {
        let is_copied = setting("COPIES") != "0";
        let had = if is_copied { &self.copied } else { &self.owners };
        let Some(had) = had else { return };
        // Others may have got a layout that this rank does not know.
        if had.version != resharded.version || self.failed.iter().any(|it| is_reached(it)) {
            return;
        }
        let living = self.communicator.view().unwrap().processes;
        let is_gone = |rank: usize| !living.contains(&had.processes[rank % had.processes.len()]);
        for lost in resharded.lost() {
            for at in lost.elements.clone() {
                let of =
                    |it: &&ShardMove| it.parameter == lost.parameter && it.elements.contains(&at);
                let owner = had.moves.iter().find(of).unwrap().to;
                let is_lost = is_gone(owner) && (!is_copied || is_gone(owner + 1));
                assert!(is_lost, "{at} of {lost:?} was of rank {owner}, {living:?} live");
            }
        }
    }

    /// The shards that the buckets tell are those that the state has.
    fn check(&mut self, buckets: &Buckets, version: u64) {
        let expected = self.expected.after(version);
        for bucket in 0..buckets.layout().buckets().len() {
            for piece in buckets.shard_pieces(bucket) {
                for (number, at) in piece.elements.enumerate() {
                    let element = |vector| self.state.vector(bucket, vector)[piece.at + number];
                    assert_eq!([0, 1].map(element), expected[piece.parameter][at]);
                }
            }
        }
    }

    fn run_in_view(&mut self) -> Result<Next, Error> {
        let builder = Buckets::builder(&self.communicator);
        let is_moving = std::env::var_os("MOVING").is_some();
        let end = if self.attempts % 2 == 1 { 1 << 20 } else { 900 };
        let bytes = if end > 900 { end } else { 4000 };
        let builder = builder.bucket_bytes(bytes).end_bucket_bytes(end).sharded();
        let mut buckets = builder.build(&parameters())?;
        let before = self.state.version();
        let resharded = self.reshard(&mut buckets)?;
        self.restore(&buckets, &resharded, before);
        let processes = self.communicator.view().unwrap().processes;
        let owners = Owners { version: resharded.version, processes, moves: resharded.moves };
        self.owners = Some(owners);
        let mut weights = buckets.weights()?;
        let copies: u64 = setting("COPIES").parse().unwrap();
        let world = self.communicator.world();
        reach(&format!("world-{world}"));
        loop {
            let newcomers = self.step(&mut buckets)?;
            let steps = self.state.version();
            if let Some(owners) = &mut self.owners {
                owners.version = steps;
            }
            if steps.is_multiple_of(7) {
                self.gather(&mut buckets, &mut weights)?;
            }
            if copies > 0 && steps.is_multiple_of(copies) {
                buckets.copy_shards(&mut self.state)?;
                self.copied.clone_from(&self.owners);
                reach(&format!("copied-{world}"));
            }
            let mut end = [u8::from(is_marked("end"))];
            self.communicator.all_reduce(&mut end, ReduceOp::Max)?;
            if end == [1] {
                self.check(&buckets, self.state.version());
                return Ok(Next::End);
            }
            if newcomers {
                return Ok(Next::Admit);
            }
            if is_moving {
                reach("moving");
                return Ok(Next::Again);
            }
        }
    }

    fn reshard(&mut self, buckets: &mut Buckets) -> Result<Resharded, Error> {
        let epoch = self.communicator.view().unwrap().epoch;
        let mark = format!("laid-out-{epoch}-{}", self.attempts);
        self.attempts += 1;
        match buckets.reshard(&mut self.state) {
            Ok(resharded) => {
                reach(&mark);
                Ok(resharded)
            }
            Err(error) => {
                self.failed.push(mark);
                Err(error)
            }
        }
    }

    fn step(&mut self, buckets: &mut Buckets) -> Result<bool, Error> {
        let (number, is_killed) = (self.state.version(), is_marked("killed"));
        let step = buckets.begin()?;
        for (parameter, known) in parameters().iter().enumerate().rev() {
            let values = (0..known.count()).map(|at| gradient(number, parameter, at));
            step.put(parameter, &values.collect::<Vec<f32>>())?;
        }
        let report = step.wait()?;
        for bucket in 0..buckets.layout().buckets().len() {
            for (at, &gradient) in buckets.shard_gradient::<f32>(bucket).iter().enumerate() {
                let mut element = [0, 1].map(|vector| self.state.vector(bucket, vector)[at]);
                update(&mut element, gradient);
                for (vector, element) in element.into_iter().enumerate() {
                    self.state.vector_mut(bucket, vector)[at] = element;
                }
            }
        }
        self.state.set_version(number + 1);
        if is_killed {
            reach("step-after-kill");
        }
        Ok(report.newcomers)
    }

    fn gather(
        &mut self,
        buckets: &mut Buckets,
        weights: &mut unisum::buckets::Weights,
    ) -> Result<(), Error> {
        for bucket in 0..buckets.layout().buckets().len() {
            weights.shard_mut::<f32>(bucket).copy_from_slice(self.state.vector(bucket, 0));
        }
        buckets.gather(weights)?.wait()?;
        let expected = self.expected.after(self.state.version());
        for (parameter, expected) in expected.iter().enumerate() {
            let weights = weights.get::<f32>(parameter).iter().copied();
            assert!(weights.eq(expected.iter().map(|it| it[0])), "{parameter}");
        }
        Ok(())
    }
}

pub(crate) fn run(joins: bool, vectors: usize) {
    reach("started");
    let builder = Communicator::builder().elastic(Elastic::default());
    let communicator = if joins { builder.join() } else { builder.connect() }.unwrap();
    reach(if joins { "joined" } else { "training" });
    let (state, expected) = (ShardState::new(vectors), Expected::new());
    let mut training = Training {
        communicator,
        state,
        expected,
        lost: 0,
        again: 0,
        layouts: 0,
        attempts: 0,
        failed: Vec::new(),
        owners: None,
        copied: None,
    };
    match training.run() {
        Ok(()) => {
            let Training { communicator, state, lost, again, layouts, .. } = training;
            tell(format!("{} ranks, {} steps", communicator.world(), state.version()));
            tell(format!("lost {lost}"));
            println!("{again} steps made again, {layouts} layouts");
        }
        Err(error) => tell_error(&error),
    }
}
