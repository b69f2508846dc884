//! Sharded gradient buckets of jobs that lose ranks and gain others: what each rank keeps for its
//! shards follows the elements, so that the training goes on as if nothing had happened.
//!
//! All ranks have the same gradients, so that weights and momenta are known for each element and
//! step, whoever takes part; each rank compares all that it has after each layout, and the weights
//! of all after some steps. `UNISUM_TEST_SHARDS=N` makes so many trials for each transport.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use support::{Ended, Random, Running, World, setting, tell, tell_error};
use unisum::buckets::{Buckets, Parameter, Resharded, ShardState};
use unisum::{Communicator, Dtype, Elastic, Error, ErrorKind, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || run(false, VECTORS)),
        ("newcomer", || run(true, VECTORS)),
        ("other_vectors", || run(true, 3)),
        ("wrong", wrong),
        ("measure", measure),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// Weights and momenta.
const VECTORS: usize = 2;

fn parameters() -> Vec<Parameter> {
    let shapes: &[&[usize]] = match setting("SHAPES").as_str() {
        "few" => &[&[3], &[0], &[]],
        _ => &[&[1000, 7], &[3], &[], &[40, 40], &[1], &[257]],
    };
    let new = |(at, shape): (usize, &&[usize])| Parameter::new(at.to_string(), shape, Dtype::F32);
    shapes.iter().enumerate().map(new).collect()
}

fn is_marked(name: &str) -> bool {
    Path::new(&setting("TEST_MARKS")).join(format!("{name}.test")).exists()
}

fn reach(name: &str) {
    let mark = Path::new(&setting("TEST_MARKS")).join(format!("{name}.{}", std::process::id()));
    if let Err(error) = std::fs::create_dir(mark) {
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    }
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
}

enum Next {
    End,
    Admit,
}

impl Training {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            self.communicator = match self.run_in_view() {
                Ok(Next::End) => return Ok(()),
                Ok(Next::Admit) => self.communicator.admit()?,
                Err(error) if error.kind() == ErrorKind::ViewChanged => {
                    self.communicator.rebuild()?
                }
                Err(error) => return Err(error),
            }
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
        if self.layouts > 0 {
            self.lost += resharded.lost().map(|it| it.elements.len()).sum::<usize>();
            // All were equally far.
            assert!(setting("COPIES") != "0" || before == version, "{before} and {version}");
            self.again += before - version;
        }
        self.layouts += 1;
        self.state.set_version(version);
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
        let builder = builder.bucket_bytes(4000).end_bucket_bytes(900).sharded();
        let mut buckets = builder.build(&parameters())?;
        let before = self.state.version();
        let resharded = buckets.reshard(&mut self.state)?;
        self.restore(&buckets, &resharded, before);
        let mut weights = buckets.weights()?;
        let copies: u64 = setting("COPIES").parse().unwrap();
        let world = self.communicator.world();
        reach(&format!("world-{world}"));
        loop {
            let newcomers = self.step(&mut buckets)?;
            let steps = self.state.version();
            if steps.is_multiple_of(7) {
                self.gather(&mut buckets, &mut weights)?;
            }
            if copies > 0 && steps.is_multiple_of(copies) {
                buckets.copy_shards(&mut self.state)?;
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

fn run(joins: bool, vectors: usize) {
    reach("started");
    let builder = Communicator::builder().elastic(Elastic::default());
    let communicator = if joins { builder.join() } else { builder.connect() }.unwrap();
    reach(if joins { "joined" } else { "training" });
    let (state, expected) = (ShardState::new(vectors), Expected::new());
    let mut training = Training { communicator, state, expected, lost: 0, again: 0, layouts: 0 };
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

fn members(ranks: usize, transport: &str, copies: usize) -> World {
    World::new(ranks, "train")
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_REPRODUCIBLE", 1)
        .set("UNISUM_TLS", "off")
        .set("COPIES", copies)
        .set("SHAPES", "many")
}

fn newcomers(members: &World) -> World {
    members.clone().running("newcomer").set("UNISUM_RANK", "").set("UNISUM_WORLD", "")
}

fn finish(running: Running) -> Vec<Ended> {
    running.mark("end");
    running.wait(LIMIT)
}

/// All that live tell the same number of ranks and steps; how many elements were lost, by process.
fn alike(ended: &[Ended], dead: &[usize], world: usize) -> Vec<usize> {
    let living = ended.iter().enumerate().filter(|(it, _)| !dead.contains(it));
    let living: Vec<&Ended> = living.map(|(_, it)| it).collect();
    assert!(living.iter().all(|it| it.status == 0 && it.told.len() == 2), "{ended:#?}");
    assert!(living.iter().all(|it| it.told[0] == living[0].told[0]), "{ended:#?}");
    assert!(living[0].told[0].starts_with(&format!("{world} ranks, ")), "{ended:#?}");
    let lost = |it: &&Ended| it.told[1].strip_prefix("lost ").unwrap().parse().unwrap();
    living.iter().map(lost).collect()
}

/// They end together, before any other can do anything.
fn kill_at_once(running: &Running, victims: &[usize]) {
    victims.iter().for_each(|it| running.signal(*it, libc::SIGSTOP));
    victims.iter().for_each(|it| running.signal(*it, libc::SIGKILL));
}

#[test]
fn newcomers_take_over_their_shards_between_two_steps() {
    for transport in support::transports() {
        let world = members(1, transport, 0);
        let mut running = world.start();
        running.wait_for("world-1", 1, LIMIT);
        for ranks in 1..4 {
            running.add(&newcomers(&world), ranks);
            running.wait_for(&format!("world-{}", ranks + 1), ranks + 1, LIMIT);
        }
        assert_eq!(alike(&finish(running), &[], 4), [0; 4]);
    }
}

#[test]
fn without_copies_the_shards_of_a_lost_rank_are_lost_and_no_others() {
    let running = members(4, "tcp", 0).start();
    running.wait_for("world-4", 4, LIMIT);
    running.signal(1, libc::SIGKILL);
    running.wait_for("world-3", 3, LIMIT);
    let lost = alike(&finish(running), &[1], 3);
    // A quarter of each bucket, of which some is padding.
    let elements: usize = 7000 + 3 + 1 + 1600 + 1 + 257;
    assert!(lost.iter().all(|it| *it == lost[0]), "{lost:?}");
    assert!(lost[0].abs_diff(elements / 4) < 500, "{lost:?}");
}

/// Whenever it dies, those that are left have made the same steps, and lose nothing of their own.
#[test]
fn steps_end_in_the_same_way_on_all_that_are_left() {
    let trials = std::env::var("UNISUM_TEST_SHARDS").map_or(3, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for _ in 0..trials {
            let running = members(3, transport, 0).set("SHAPES", "few").start();
            running.wait_for("world-3", 3, LIMIT);
            let victim = random.below(3);
            let moment = Duration::from_micros(random.below(50_000) as u64);
            println!("{transport}: {victim} dies after {moment:?}");
            std::thread::sleep(moment);
            running.signal(victim, libc::SIGKILL);
            running.wait_for("world-2", 2, LIMIT);
            let lost = alike(&finish(running), &[victim], 2);
            // Gradients lie 64 bytes apart, and so do these shards.
            assert_eq!(lost, [[1, 3, 0][victim]; 2]);
        }
    }
}

#[test]
fn with_copies_nothing_is_lost_down_to_one_rank() {
    for (transport, copies) in [("shm", 1), ("tcp", 3)] {
        let running = members(4, transport, copies).start();
        running.wait_for("copied-4", 4, LIMIT);
        running.signal(0, libc::SIGKILL);
        running.wait_for("copied-3", 3, LIMIT);
        running.signal(3, libc::SIGKILL);
        running.wait_for("copied-2", 2, LIMIT);
        // The first of two goes on without the second.
        running.signal(2, libc::SIGKILL);
        running.wait_for("copied-1", 1, LIMIT);
        assert_eq!(alike(&finish(running), &[0, 2, 3], 1), [0]);
    }
}

#[test]
fn of_two_that_die_at_once_only_neighbours_take_something_with_them() {
    for (victims, loses) in [([1, 3], false), ([2, 3], true), ([0, 4], true)] {
        let running = members(5, "tcp", 2).start();
        running.wait_for("copied-5", 5, LIMIT);
        kill_at_once(&running, &victims);
        running.wait_for("world-3", 3, LIMIT);
        let lost = alike(&finish(running), &victims, 3);
        assert!(lost.iter().all(|it| (*it > 0) == loses), "{victims:?}: {lost:?}");
    }
}

#[test]
fn more_ranks_than_elements() {
    let world = members(3, "tcp", 1).set("SHAPES", "few");
    let mut running = world.start();
    running.wait_for("copied-3", 3, LIMIT);
    running.add(&newcomers(&world), 3);
    running.wait_for("copied-4", 4, LIMIT);
    running.signal(0, libc::SIGKILL);
    running.wait_for("world-3", 4, LIMIT);
    assert_eq!(alike(&finish(running), &[0], 3), [0; 3]);
}

#[test]
fn deaths_while_newcomers_enter_lose_nothing_that_was_copied() {
    let trials = std::env::var("UNISUM_TEST_SHARDS").map_or(4, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for trial in 0..trials {
            let world = members(4, transport, 1 + trial % 2);
            let mut running = world.start();
            running.wait_for("copied-4", 4, LIMIT);
            running.add(&newcomers(&world), 4);
            running.wait_for("started", 5, LIMIT);
            let victim = [0, random.below(4), 4][trial % 3];
            let moment = Duration::from_micros(random.below(80_000) as u64);
            println!("{transport}: {victim} dies after {moment:?}");
            std::thread::sleep(moment);
            running.signal(victim, libc::SIGKILL);
            running.mark("killed");
            if victim < 4 {
                running.wait_for("joined", 1, LIMIT);
            }
            // The victim may have taken part in that step, and in none after it.
            running.wait_for("step-after-kill", 4, LIMIT);
            let ended = finish(running);
            assert_eq!(alike(&ended, &[victim], 4), [0; 4], "{ended:#?}");
        }
    }
}

/// What can't be done is an error, and the next call works.
fn wrong() {
    let communicator = Communicator::builder().elastic(Elastic::default()).connect().unwrap();
    let builder = || Buckets::builder(&communicator);
    let mut buckets = builder().sharded().build(&parameters()).unwrap();
    let mut state = ShardState::<f32>::new(VECTORS);
    let kind = |error: Result<(), Error>| error.unwrap_err().kind();
    assert_eq!(kind(buckets.copy_shards(&mut state)), ErrorKind::Configuration, "not laid out");
    let mut other = ShardState::<f32>::new(1 + communicator.rank());
    let error = buckets.reshard(&mut other).unwrap_err();
    assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Mismatch, &[0, 1][..]));
    let resharded = buckets.reshard(&mut state).unwrap();
    assert_eq!(resharded.version, 0);
    assert!(resharded.moves.iter().all(|it| it.from.is_none()));
    if resharded.lost().any(|it| it.to == 0) {
        let copied = kind(buckets.copy_shards(&mut state));
        assert_eq!(copied, ErrorKind::Configuration, "not initialized");
    }
    state.set_version(communicator.rank() as u64);
    assert_eq!(kind(buckets.copy_shards(&mut state)), ErrorKind::Mismatch);
    state.set_version(9);
    buckets.copy_shards(&mut state).unwrap();
    let again = buckets.reshard(&mut state).unwrap();
    assert!(again.version == 9 && again.moves.iter().all(|it| it.from == Some(it.to)));
    assert_eq!(buckets.admit().unwrap_err().kind(), ErrorKind::Configuration);
    tell("fine");
}

#[test]
fn what_cannot_be_laid_out_or_copied_is_an_error() {
    let world = World::new(2, "wrong").set("SHAPES", "many").set("UNISUM_TLS", "off");
    for told in world.succeed(LIMIT) {
        assert_eq!(told, ["fine"]);
    }
}

#[test]
fn a_newcomer_with_other_vectors_is_found_out() {
    let world = members(2, "tcp", 0);
    let mut running = world.start();
    running.wait_for("world-2", 2, LIMIT);
    running.add(&newcomers(&world).running("other_vectors"), 2);
    for ended in running.wait(LIMIT) {
        assert!(ended.told[0].starts_with("Mismatch [0, 2] "), "{ended:#?}");
    }
}

/// How long copies take, and the layout after a loss.
fn measure() {
    let communicator = Communicator::builder().elastic(Elastic::default()).connect().unwrap();
    let parameters = [Parameter::new("all", &[8_000_000], Dtype::F32)];
    let build = |communicator: &Communicator| {
        Buckets::builder(communicator).sharded().build(&parameters).unwrap()
    };
    let mut buckets = build(&communicator);
    let mut state = ShardState::<f32>::new(3);
    buckets.reshard(&mut state).unwrap();
    for version in 1..7 {
        state.set_version(version);
        communicator.barrier().unwrap();
        let started = Instant::now();
        buckets.copy_shards(&mut state).unwrap();
        tell(format!("copied in {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
    }
    reach("copied");
    let lost = loop {
        match communicator.barrier() {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(lost.kind(), ErrorKind::ViewChanged);
    let communicator = communicator.rebuild().unwrap();
    let mut buckets = build(&communicator);
    communicator.barrier().unwrap();
    let started = Instant::now();
    let resharded = buckets.reshard(&mut state).unwrap();
    tell(format!("laid out in {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
    assert_eq!(resharded.lost().count(), 0);
}

#[test]
#[ignore = "prints figures"]
fn what_copies_cost() {
    for transport in support::transports() {
        let running = World::new(4, "measure").set("UNISUM_TRANSPORT", transport).start();
        running.wait_for("copied", 4, LIMIT);
        running.signal(3, libc::SIGKILL);
        let ended = running.wait(LIMIT);
        println!("{transport}: {:#?}", ended[0].told);
    }
}
