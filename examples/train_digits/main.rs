//! Trains a small network on handwritten digits with several processes:
//! `cargo run --release --example train_digits -- -n 8`.
//!
//! Data parallelism: every rank holds the whole network and works on its share of each batch;
//! gradient buckets average the gradients, and all ranks take the same step. Afterwards the weights
//! must be bitwise equal on all ranks, and close to those of one process that trained alone on
//! the same batches (not equal: floats were added in another order).
//!
//! With `--wire` gradients travel in fewer bytes, and weights end further from those of one
//! process.
//!
//! Under a launcher: `mpirun -n 8 train_digits`.

mod digits;
mod network;
#[path = "../ranks/mod.rs"]
mod ranks;
#[path = "../wire/mod.rs"]
mod wire;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use digits::{Digits, Image};
use network::{Layers, Network, Optimizer};
use unisum::buckets::{Buckets, Parameter};
use unisum::{Communicator, Dtype, ReduceOp};
use wire::Wire;

const EPOCHS: usize = 20;
const BATCH: usize = 64;
/// How far the weights may be from those of a single process, if nothing is compressed.
const TOLERANCE: f32 = 1e-4;

/// Trains a small network on handwritten digits, with several processes.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Start this many ranks on this machine, unless a launcher has (mpirun, srun, torchrun, ...)
    #[arg(short = 'n', long, value_name = "N", default_value = "8")]
    ranks: usize,

    #[arg(long, default_value = "f32", help = wire::HELP)]
    wire: Wire,

    /// Weights and order of the images follow from it
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome =
        if unisum::local::is_rank() { join(&options) } else { ranks::launch(options.ranks) };
    ranks::report("train_digits", outcome)
}

/// What each rank does.
fn join(options: &Options) -> Result<(), Box<dyn Error>> {
    let communicator = Communicator::from_environment()?;
    ranks::tell_launch(&communicator);
    let digits = Digits::load()?;
    let (rank, world) = (communicator.rank(), communicator.world());

    let parameter =
        |(name, shape): (&'static str, &[usize])| Parameter::new(name, shape, Dtype::F32);
    let parameters = Network::PARAMETERS.map(parameter);
    let builder = Buckets::builder(&communicator).hook(options.wire.hook());
    let mut buckets = builder.build(&parameters)?;
    let report = |epoch: usize, network: &Network| {
        if rank == 0 {
            let (loss, accuracy) = network.evaluate(&digits.held_out);
            println!("Epoch {epoch}, loss {loss:.4}, accuracy {:.1}%", accuracy * 100.0);
        }
    };
    let network = train(&digits, options.seed, (rank, world), &mut buckets, report)?;
    same_on_all_ranks(&communicator, &network)?;
    if rank == 0 {
        println!("Weights are bitwise equal on all {world} ranks");
        near_those_of_one_process(options, &digits, &network)?;
    }
    Ok(())
}

/// Averages gradients over the ranks.
trait Average {
    /// Has `add` add this rank's gradients to zeros; gives the averages.
    fn average(
        &mut self,
        add: impl FnOnce(&mut Layers<&mut [f32]>),
    ) -> Result<Layers<&[f32]>, unisum::Error>;
}

impl Average for Buckets {
    fn average(
        &mut self,
        add: impl FnOnce(&mut Layers<&mut [f32]>),
    ) -> Result<Layers<&[f32]>, unisum::Error> {
        let step = self.begin()?;
        let view = |parameter| step.view::<f32>(parameter);
        let mut views = [view(0)?, view(1)?, view(2)?, view(3)?];
        add(&mut views.each_mut().map(|view| &mut view[..]));
        views.into_iter().rev().for_each(unisum::buckets::View::ready);
        step.wait()?;
        Ok([0, 1, 2, 3].map(|parameter| self.gradient(parameter)))
    }
}

/// One process has nothing to average.
impl Average for Layers<Vec<f32>> {
    fn average(
        &mut self,
        add: impl FnOnce(&mut Layers<&mut [f32]>),
    ) -> Result<Layers<&[f32]>, unisum::Error> {
        *self = Network::zeros();
        add(&mut self.each_mut().map(|sums| &mut sums[..]));
        Ok(self.each_ref().map(|sums| &sums[..]))
    }
}

/// The training loop of one rank.
fn train(
    digits: &Digits,
    seed: u64,
    (rank, world): (usize, usize),
    gradients: &mut impl Average,
    report: impl Fn(usize, &Network),
) -> Result<Network, unisum::Error> {
    let mut network = Network::new(seed);
    let mut optimizer = Optimizer::new();
    for epoch in 1..=EPOCHS {
        for batch in digits.shuffled(seed, epoch).chunks(BATCH) {
            // Shares may differ by an image, so each rank weighs its images by the whole batch:
            // the average over the ranks is then the average over the batch.
            let weight = world as f32 / batch.len() as f32;
            let averages = gradients.average(|sums| {
                for image in share(batch, rank, world) {
                    network.add_gradients(image, weight, sums);
                }
            })?;
            optimizer.step(&mut network, &averages);
        }
        report(epoch, &network);
    }
    Ok(network)
}

/// The rank's part of a batch.
fn share<'a, 'b>(batch: &'b [&'a Image], rank: usize, world: usize) -> &'b [&'a Image] {
    &batch[batch.len() * rank / world..batch.len() * (rank + 1) / world]
}

/// Fails if the weights' bits differ between ranks: their hash must be its own minimum and
/// maximum over the ranks.
fn same_on_all_ranks(communicator: &Communicator, network: &Network) -> Result<(), Box<dyn Error>> {
    let hash = network.hash();
    let (mut least, mut most) = ([hash], [hash]);
    communicator.all_reduce(&mut least, ReduceOp::Min)?;
    communicator.all_reduce(&mut most, ReduceOp::Max)?;
    if least == most { Ok(()) } else { Err("weights differ between ranks".into()) }
}

/// Fails if a process that trains alone on the same batches ends far away, unless gradients were
/// compressed.
fn near_those_of_one_process(
    options: &Options,
    digits: &Digits,
    network: &Network,
) -> Result<(), Box<dyn Error>> {
    let alone = train(digits, options.seed, (0, 1), &mut Network::zeros(), |_, _| {})?;
    let difference = network.largest_difference(&alone);
    println!("Largest difference to the weights of one process: {difference:.1e}");
    if difference <= TOLERANCE || options.wire != Wire::F32 {
        Ok(())
    } else {
        Err(format!("the difference is above {TOLERANCE:.1e}").into())
    }
}
