//! Whole trainings: of a tiny model on a little text, by copies of this test binary as ranks.

use std::path::Path;
use std::process::Command;

use clap::Parser as _;

use crate::model::Size;
use crate::text::Text;
use crate::training::{Plan, Training};
use crate::{Options, connect};

const CHECKPOINTS: &str = "TEST_CHECKPOINTS";
const STOP_AFTER: &str = "TEST_STOP_AFTER";
const RANKS: usize = 3;

/// Trains, if this process is a rank.
#[test]
fn rank_process() {
    let Ok(folder) = std::env::var(CHECKPOINTS) else { return };
    let stop_after = std::env::var(STOP_AFTER).unwrap();
    let options = ["", "--epochs=2", "--checkpoint", &folder, "--stop-after", &stop_after];
    let (options, mut text) = (Options::parse_from(options), Text::load().unwrap());
    text.training.truncate(3000);
    text.held_out.truncate(300);
    let size = Size { vocabulary: text.vocabulary, context: 16, width: 16, heads: 2, blocks: 2 };
    let plan = Plan { size, batch: 7, warm_up: 5, rate: 1e-2 };
    let communicator = connect().unwrap();
    let mut training = Training::new(&options, plan, &text, &communicator).unwrap();
    training.run().unwrap();
    training.hash_on_all_ranks().unwrap();
}

fn train(folder: &Path, stop_after: usize) {
    let program = std::env::current_exe().unwrap();
    let mut ranks = unisum::local::spawn(RANKS, |_rank| {
        let mut command = Command::new(&program);
        command
            .args(["--exact", "tests::rank_process", "--nocapture"])
            .env(CHECKPOINTS, folder)
            .env(STOP_AFTER, stop_after.to_string())
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
#[test]
fn a_training_that_was_interrupted_ends_with_the_same_bits() {
    let [at_once, in_parts] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    train(at_once.path(), 40);
    train(in_parts.path(), 20);
    train(in_parts.path(), 40);
    assert!(bytes(at_once.path()) == bytes(in_parts.path()));
}
