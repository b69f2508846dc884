//! Whole trainings: of a tiny model on a little text, by copies of this test binary as ranks.

use std::path::Path;
use std::process::Command;

use clap::Parser as _;
use serde_json::{Map, Value};
use tempfile::tempdir;
use unisum::{Communicator, LossScaler};

use crate::checkpoint::{Checkpoints, State};
use crate::model::{Model, Precision, Size, Weights};
use crate::text::Text;
use crate::training::{Plan, Training};
use crate::{Options, connect};

const CHECKPOINTS: &str = "TEST_CHECKPOINTS";
const OPTIONS: &str = "TEST_OPTIONS";
const RANKS: usize = 3;

/// Trains, if this process is a rank.
#[test]
fn rank_process() {
    let Ok(folder) = std::env::var(CHECKPOINTS) else { return };
    let given = std::env::var(OPTIONS).unwrap();
    let options = ["", "--epochs=2", "--checkpoint", &folder].into_iter();
    let options = Options::parse_from(options.chain(given.split_whitespace()));
    let mut text = Text::load().unwrap();
    text.training.truncate(3000);
    text.held_out.truncate(300);
    let communicator = connect(false, false).unwrap();
    let plan = plan(&text);
    let mut training = Training::new(&options, plan, &text, &communicator).unwrap();
    training.run().unwrap();
    training.hash_on_all_ranks().unwrap();
}

fn plan(text: &Text) -> Plan {
    let size = Size { vocabulary: text.vocabulary, context: 16, width: 16, heads: 2, blocks: 2 };
    Plan { size, batch: 7, warm_up: 5, rate: 1e-2, bucket_bytes: 4 << 10 }
}

fn train(folder: &Path, stop_after: usize, options: &str) {
    let program = std::env::current_exe().unwrap();
    let mut ranks = unisum::local::spawn(RANKS, |_rank| {
        let mut command = Command::new(&program);
        command
            .args(["--exact", "tests::rank_process", "--nocapture"])
            .env(CHECKPOINTS, folder)
            .env(OPTIONS, format!("--stop-after={stop_after} {options}"))
            .stdout(std::process::Stdio::null());
        command
    });
    ranks.as_mut().unwrap().wait().unwrap();
}

/// The last checkpoint, all files one after the other.
fn bytes(folder: &Path) -> Vec<u8> {
    let mut checkpoints = std::fs::read_dir(folder).unwrap();
    let checkpoint = checkpoints.next().unwrap().unwrap().path();
    assert!(checkpoints.next().is_none() && checkpoint.ends_with("step-00000040"));
    let files = (0..RANKS).map(|rank| format!("rank-{rank}")).chain(["model.safetensors".into()]);
    files.flat_map(|file| std::fs::read(checkpoint.join(file)).unwrap()).collect()
}

/// With 26 steps in an epoch, the training that goes on begins in the middle of one.
fn assert_resumes(options: &str) {
    let [at_once, in_parts] = [(), ()].map(|()| tempdir().unwrap());
    train(at_once.path(), 40, options);
    train(in_parts.path(), 20, options);
    train(in_parts.path(), 40, options);
    assert!(bytes(at_once.path()) == bytes(in_parts.path()), "{options}: other bits");
}

#[test]
fn a_training_that_was_interrupted_ends_with_the_same_bits() {
    assert_resumes("");
}

/// Buckets are laid out anew after the first step.
#[test]
fn a_training_that_was_interrupted_after_its_first_step_ends_with_the_same_weights() {
    let [at_once, in_parts] = [&[40][..], &[1, 40]].map(|stops| state(stops, "--wire=int8"));
    assert!(at_once.weights == in_parts.weights);
    let (version, buckets) = buckets(&at_once.layout);
    assert!(version == 1 && buckets > 4, "version {version}, {buckets} buckets");
}

/// A layout's version, and how many buckets it has.
fn buckets(layout: &[u8]) -> (u32, usize) {
    let word = |at: usize| u32::from_le_bytes(layout[at..at + 4].try_into().unwrap());
    (word(0), word(4) as usize)
}

#[test]
fn a_trace_has_every_step_and_every_bucket() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let layout = state(&[3], &format!("--trace={}", path.display())).layout;
    let trace: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let count = |start: &str| {
        let is_named = |event: &&Value| event["name"].as_str().unwrap().starts_with(start);
        trace.iter().filter(is_named).count()
    };
    // A bucket is ready, and it travels.
    assert_eq!((count("step "), count("bucket ")), (3, 3 * 2 * buckets(&layout).1));
}

#[test]
fn an_interrupted_training_remembers_what_compression_lost() {
    assert_resumes("--wire=int8");
    assert_resumes("--wire=powersgd:2");
}

/// It overflows first, so the scale changes.
#[test]
fn an_interrupted_training_in_16_bits_remembers_its_loss_scale() {
    assert_resumes("--precision=f16 --wire=f8e4m3 --loss-scale=1e9");
}

/// What a training has that was stopped after so many steps, and resumed.
fn state(stops: &[usize], options: &str) -> State {
    let folder = tempdir().unwrap();
    stops.iter().for_each(|stop| train(folder.path(), *stop, options));
    let alone = Communicator::builder().rank(0).world(1).connect().unwrap();
    let read = Checkpoints::new(folder.path(), &alone).read(&Map::new(), &model().parameters);
    read.unwrap().unwrap().0
}

fn model() -> Model {
    Model::new(plan(&Text::load().unwrap()).size)
}

fn scale(state: &State) -> f32 {
    let mut scaler = LossScaler::new();
    scaler.restore(&state.scaler).unwrap();
    scaler.scale()
}

#[test]
fn a_step_that_overflows_f16_is_skipped_and_halves_the_scale() {
    const START: f32 = 1e9;
    let options = format!("--precision=f16 --loss-scale={START}");
    let parameters = model().parameters;
    let start = Weights::new(&parameters, Precision::F16, 1);
    let first = state(&[1], &options);
    let unchanged = first.weights.iter().enumerate().all(|(it, now)| now == start.exact(it));
    assert!(unchanged, "a step that is not finite changed the weights");
    assert_eq!((first.taken, scale(&first)), (0, START / 2.0));

    let last = state(&[40], &options);
    let skipped = last.step - last.taken;
    assert!((2..20).contains(&skipped), "{skipped} steps were skipped");
    assert_eq!(scale(&last), START / 2_f32.powi(skipped as i32));
    assert!(last.weights.iter().flatten().all(|weight| weight.is_finite()));
    let moved = last.weights.iter().enumerate().all(|(it, now)| now != start.exact(it));
    assert!(moved, "steps that are finite are taken");
}

#[test]
fn f16_takes_all_steps_at_a_scale_that_fits() {
    let last = state(&[40], "--precision=f16 --wire=f16");
    assert_eq!((last.taken, scale(&last)), (40, 65536.0));
}
