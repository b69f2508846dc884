//! Trains a small transformer on the text of a novel with several processes:
//! `cargo run --release --example train_transformer`.
//!
//! Data parallelism: every rank holds the whole model and works on its share of each batch;
//! gradient buckets average the gradients over the ranks while backward goes on, in fewer bytes if
//! asked to, and all ranks take the same step. Afterwards the weights must be bitwise equal on all
//! ranks.
//!
//! Under a launcher: `mpirun -n 8 train_transformer`.

mod checkpoint;
mod elastic;
mod events;
mod exchange;
mod gradients;
mod model;
mod optimizer;
mod random;
#[path = "../ranks/mod.rs"]
mod ranks;
mod scaling;
#[cfg(test)]
mod tests;
mod text;
mod training;
#[path = "../wire/mod.rs"]
mod wire;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use unisum::{Communicator, Elastic};

use checkpoint::State;
use model::{Model, Precision};
use text::Text;
use training::{Plan, Training};
use wire::Wire;

/// Trains a small transformer on the text of a novel, with several processes.
#[derive(Clone, Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Start this many ranks on this machine, unless a launcher has (mpirun, srun, torchrun, ...)
    #[arg(short = 'n', long, value_name = "N", default_value = "8")]
    ranks: usize,

    /// How often to go through the text
    #[arg(long, value_name = "N", default_value = "8")]
    epochs: usize,

    /// What matrix products are computed from; weights and sums are f32 in any case, and with 16
    /// bits the loss is scaled
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,

    /// The loss's first factor, if products are computed from 16 bits
    #[arg(long, value_name = "FACTOR", default_value = "65536")]
    loss_scale: f32,

    #[arg(long, default_value = "f32", help = wire::HELP)]
    wire: Wire,

    /// Weights and order of the text follow from it
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,

    /// Write a checkpoint to this folder after each epoch and at the end, and start from the one
    /// that is there
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,

    /// End after this many steps, as if interrupted
    #[arg(long, value_name = "STEPS")]
    stop_after: Option<usize>,

    /// Write events for TensorBoard to this folder
    #[arg(long, value_name = "FOLDER")]
    events: Option<PathBuf>,

    /// Write a trace of rank 0's steps to this file, for Perfetto or Chrome: what was computed,
    /// which bucket travelled when, and what was waited for
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Go on without ranks that are lost, as long as half of them are left, and with those that
    /// join
    #[arg(long, conflicts_with_all = ["checkpoint", "trace", "events"])]
    elastic: bool,

    /// Join an elastic training that runs, whose ranks meet by the same UNISUM_RENDEZVOUS: a file
    #[arg(long, requires = "elastic")]
    join: bool,

    /// Fail if the loss on the held-out text is above this in the end
    #[arg(long, value_name = "NATS")]
    at_most: Option<f64>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let launch = if options.elastic { ranks::launch_elastic } else { ranks::launch };
    let is_rank = unisum::local::is_rank();
    let outcome = if is_rank || options.join { join(&options) } else { launch(options.ranks) };
    ranks::report("train_transformer", outcome)
}

/// What each rank does.
fn join(options: &Options) -> Result<(), Box<dyn Error>> {
    let text = Text::load()?;
    let parameters = Model::new(Plan::new(text.vocabulary).size).parameters;
    let mut communicator = connect(options.elastic, options.join)?;
    ranks::tell_launch(&communicator);
    let mut state = None;
    if options.join {
        let (joined, aligned) = elastic::align(communicator, (None, &parameters))?;
        (communicator, state) = (joined, Some(aligned));
    }
    let first = communicator.rank() == 0;
    if first {
        let unigram = text.unigram_loss();
        println!("Knowing only how often each character occurs, loss {unigram:.4}");
    }
    let (loss, hash) = loop {
        let (mut reached, mut entered) = (state.clone(), None);
        match train(options, &text, &communicator, (&mut reached, &mut entered)) {
            Err(error) if options.elastic && elastic::is_change(&*error) => {
                let from = (reached, &parameters[..]);
                let last = entered.unwrap_or(communicator);
                let (next, aligned) = elastic::go_on(last, &*error, from)?;
                (communicator, state) = (next, Some(aligned));
            }
            result => break result?,
        }
    };
    if communicator.rank() == 0 {
        println!("Weights are bitwise equal on all {} ranks: {hash:016x}", communicator.world());
    }
    match options.at_most {
        Some(limit) if loss > limit => Err(format!("loss {loss:.4} is above {limit}").into()),
        _ => Ok(()),
    }
}

/// Trains to the end, from a state if there is one: the loss, and a hash of the weights. If that
/// fails, `state` is how far it came, and `entered` the communicator of a view that it entered.
fn train(
    options: &Options,
    text: &Text,
    communicator: &Communicator,
    (state, entered): (&mut Option<State>, &mut Option<Communicator>),
) -> Result<(f64, u64), Box<dyn Error>> {
    let plan = Plan::new(text.vocabulary);
    let mut training = Training::new(options, plan, text, communicator)?;
    if let Some(state) = state.take() {
        training.set(state)?;
    }
    let result = training.run();
    *state = Some(training.state());
    *entered = training.take_communicator();
    Ok((result?.mean_loss(), training.hash_on_all_ranks()?))
}

/// Joins the world, or a job that runs. Sums take the same way in every run, unless the environment
/// names another: the automatic choice follows from measurements, and floats that are added in
/// another order give other bits.
fn connect(elastic: bool, joins: bool) -> Result<Communicator, unisum::Error> {
    let mut builder = Communicator::builder();
    if elastic {
        builder = builder.elastic(Elastic::default());
    }
    let builder = match std::env::var_os("UNISUM_ALGORITHM") {
        Some(_) => builder,
        None => builder.algorithm("two-shot"),
    };
    if joins { builder.join() } else { builder.connect() }
}
