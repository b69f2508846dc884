//! Gradient buckets of jobs that processes enter between two steps, and in which they are killed:
//! all that are there in the end have the same weights.
//!
//! `UNISUM_TEST_JOINS=N` makes so many trials for each transport, by hand.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::path::Path;
use std::time::Duration;

use support::{Ended, Random, Running, World, setting, tell, tell_error};
use unisum::buckets::{Buckets, Compressed, Encoding, LowRank, Parameter, StepReport};
use unisum::{Communicator, Dtype, Elastic, Error, ErrorKind};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("train", || run(false)),
        ("newcomer", || run(true)),
        ("other_parameters", other_parameters),
        ("outside", outside),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

fn parameters() -> Vec<Parameter> {
    vec![
        Parameter::new("end", &[4], Dtype::F64),
        Parameter::new("first", &[200, 300], Dtype::F32),
        Parameter::new("last", &[3000], Dtype::F32),
    ]
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

/// The weights and the number of steps behind them, as bytes.
#[derive(Clone, Debug, Default)]
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
}

struct Training {
    communicator: Communicator,
    /// `None` on a newcomer.
    state: Option<State>,
    /// How often it entered a view within buckets, and the divisor of its last step.
    admitted: usize,
    participants: usize,
}

fn build(communicator: &Communicator) -> Result<Buckets, Error> {
    let builder = Buckets::builder(communicator).bucket_bytes(64 << 10).end_bucket_bytes(1024);
    match setting("HOOK").as_str() {
        "int8" => builder.hook(Compressed::new(Encoding::Int8)),
        "low_rank" => builder.hook(LowRank::new(2).starting_at(3)),
        _ => builder,
    }
    .build(&parameters())
}

impl Training {
    fn run(mut self) -> Result<Self, Error> {
        loop {
            match self.run_in_buckets() {
                Ok(()) => return Ok(self),
                Err(error) if error.kind() == ErrorKind::ViewChanged => {
                    self.communicator = self.communicator.rebuild()?;
                }
                Err(error) => return Err(error),
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
        reach(&format!("world-{}", self.communicator.world()));
        Ok(())
    }

    fn run_in_buckets(&mut self) -> Result<(), Error> {
        let mut buckets = build(&self.communicator)?;
        self.align()?;
        loop {
            let report = self.step(&mut buckets)?;
            if let Some(communicator) = buckets.take_communicator() {
                self.communicator = communicator;
                reach(&format!("world-{}", self.communicator.world()));
            }
            if buckets.gradient::<f64>(0)[0] > 0.0 {
                return Ok(());
            }
            if report.newcomers {
                self.communicator = buckets.admit()?;
                self.admitted += 1;
                self.align()?;
            }
        }
    }

    fn step(&mut self, buckets: &mut Buckets) -> Result<StepReport, Error> {
        let state = self.state.as_mut().unwrap();
        let is_killed = is_marked("killed");
        let factor = (self.communicator.rank() + 1) as f32 * (state.steps + 1) as f32;
        let step = buckets.begin()?;
        for parameter in [2, 1] {
            let mut gradient = step.view_to_overwrite::<f32>(parameter)?;
            let values = (0..).map(|it| factor * ((it * 37 + 11) % 101) as f32);
            gradient.iter_mut().zip(values).for_each(|(to, value)| *to = value);
            gradient.ready();
        }
        let mut end = step.view::<f64>(0)?;
        end[0] = f64::from(u8::from(is_marked("end")));
        end.ready();
        let report = step.wait()?;
        let sums = [2, 1].into_iter().flat_map(|it| buckets.gradient::<f32>(it));
        state.weights.iter_mut().zip(sums).for_each(|(to, sum)| *to = *to * 0.9 + sum);
        state.steps += 1;
        self.participants = report.participants;
        if is_killed {
            reach("step-after-kill");
        }
        Ok(report)
    }
}

fn run(joins: bool) {
    reach("started");
    let builder = Communicator::builder().elastic(Elastic::default());
    let communicator = if joins { builder.join() } else { builder.connect() }.unwrap();
    reach(if joins { "joined" } else { "training" });
    let state = State { steps: 0, weights: vec![0.0; 63_000] };
    let state = (!joins).then_some(state);
    let training = Training { communicator, state, admitted: 0, participants: 0 };
    match training.run() {
        Ok(Training { communicator, state, participants, admitted }) => {
            let State { steps, weights } = state.unwrap();
            let hash = weights.iter().fold(7_u64, |hash, it| {
                hash.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(it.to_bits())
            });
            let world = communicator.world();
            assert!(weights.iter().all(|it| it.is_finite()));
            tell(format!("of {world} after {steps} steps by {participants}: {hash:x}"));
            tell(format!("admitted {admitted}"));
        }
        Err(error) => tell_error(&error),
    }
}

fn members(ranks: usize, transport: &str, hook: &str) -> World {
    World::new(ranks, "train")
        .set("UNISUM_TRANSPORT", transport)
        .set("UNISUM_REPRODUCIBLE", 1)
        .set("UNISUM_TLS", "off")
        .set("HOOK", hook)
}

fn newcomers(members: &World) -> World {
    members.clone().running("newcomer").set("UNISUM_RANK", "").set("UNISUM_WORLD", "")
}

fn alike(ended: &[Ended], dead: &[usize]) -> String {
    let mut told = ended.iter().enumerate().filter(|(it, _)| !dead.contains(it)).map(|(_, it)| {
        assert_eq!((it.status, it.told.len()), (0, 2), "{ended:#?}");
        it.told[0].clone()
    });
    let first = told.next().unwrap();
    assert!(told.all(|it| it == first), "{ended:#?}");
    first
}

fn finish(running: Running) -> Vec<Ended> {
    running.mark("end");
    running.wait(LIMIT)
}

fn enter_between_steps(transport: &str, hook: &str) {
    let world = members(2, transport, hook);
    let mut running = world.start();
    running.wait_for("training", 2, LIMIT);
    running.add(&newcomers(&world), 2);
    running.wait_for("world-3", 3, LIMIT);
    running.add(&newcomers(&world), 3);
    running.wait_for("world-4", 4, LIMIT);
    // A step that is made again tells whether all agree on its number.
    running.signal(1, libc::SIGKILL);
    running.wait_for("world-3", 4, LIMIT);
    let ended = finish(running);
    let told = alike(&ended, &[1]);
    assert!(told.starts_with("of 3 after ") && told.contains(" by 3: "), "{ended:#?}");
    assert_eq!(ended[0].told[1], "admitted 2", "the buckets stayed: {ended:#?}");
}

#[test]
fn newcomers_enter_between_two_steps() {
    for transport in support::transports() {
        enter_between_steps(transport, "all_reduce");
    }
}

#[test]
fn newcomers_have_what_the_hooks_of_the_others_know() {
    for hook in ["int8", "low_rank"] {
        enter_between_steps("tcp", hook);
    }
}

#[test]
fn deaths_while_newcomers_enter_are_survived() {
    let trials = std::env::var("UNISUM_TEST_JOINS").map_or(4, |it| it.parse().unwrap());
    let mut random = Random::new();
    for transport in support::transports() {
        for trial in 0..trials {
            let world = members(4, transport, "all_reduce");
            let mut running = world.start();
            running.wait_for("training", 4, LIMIT);
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
            assert!(alike(&ended, &[victim]).starts_with("of 4 after "), "{ended:#?}");
        }
    }
}

/// A newcomer with other parameters ends all buckets with an error that says what differs.
fn other_parameters() {
    let communicator = Communicator::builder().elastic(Elastic::default()).join().unwrap();
    let parameters = [Parameter::new("end", &[5], Dtype::F64)];
    let builder = Buckets::builder(&communicator).bucket_bytes(64 << 10).end_bucket_bytes(1024);
    tell_error(&builder.build(&parameters).unwrap_err());
}

#[test]
fn a_newcomer_with_other_parameters_is_found_out() {
    let world = members(2, "tcp", "all_reduce");
    let mut running = world.start();
    running.wait_for("training", 2, LIMIT);
    running.add(&newcomers(&world).running("other_parameters"), 2);
    for ended in running.wait(LIMIT) {
        let told = &ended.told[0];
        assert!(told.starts_with("Mismatch [0, 2] "), "{told}");
    }
}

/// Where nobody can enter, that is an error, and nothing else ends.
fn outside() {
    let communicator = Communicator::from_environment().unwrap();
    assert_eq!(communicator.newcomers(), 0);
    assert_eq!(communicator.admit().unwrap_err().kind(), ErrorKind::Configuration);
    let mut buckets = Buckets::builder(&communicator).build(&parameters()).unwrap();
    assert_eq!(buckets.admit().unwrap_err().kind(), ErrorKind::Configuration);
    let step = buckets.begin().unwrap();
    (0..3).for_each(|it| step.ready(it).unwrap());
    assert!(!step.wait().unwrap().newcomers);
    let refused = Communicator::builder().join().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    tell("fine");
}

#[test]
fn nobody_enters_a_job_that_is_not_elastic() {
    for told in World::new(2, "outside").succeed(LIMIT) {
        assert_eq!(told, ["fine"]);
    }
}
