//! Trains a convolutional network on handwritten digits with burn, with several processes:
//! `cargo run --release -- -n 2`. Under a launcher: `mpirun -n 2 burn-digits`.
//!
//! Every rank works on its share of each batch, and the gradients are averaged by unisum's buckets
//! (`averaging.rs`, which is all that a program of burn's needs). Afterwards the weights must be
//! bitwise equal on all ranks, and as accurate as those of one process that trained on whole
//! batches.

mod averaging;
#[path = "../../train_digits/digits.rs"]
mod digits;
#[path = "../../frameworks/mod.rs"]
mod frameworks;
#[path = "../../ranks/mod.rs"]
mod ranks;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use averaging::Averaging;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{MaxPool2d, MaxPool2dConfig};
use burn::nn::{Linear, LinearConfig, PaddingConfig2d};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use digits::{Digits, Image};
use frameworks::{BATCH, Options, Times};
use unisum::Communicator;

fn main() -> ExitCode {
    let work = |options: Options| {
        if unisum::local::is_rank() { join(&options) } else { ranks::launch(options.ranks) }
    };
    ranks::report("burn-digits", Options::parse().and_then(work))
}

/// What each rank does.
fn join(options: &Options) -> Result<(), Box<dyn Error>> {
    let communicator = Communicator::from_environment()?;
    ranks::tell_launch(&communicator);
    let (rank, world) = (communicator.rank(), communicator.world());
    let digits = Digits::load()?;

    let start = averaging::broadcast(&communicator, Network::new(&Device::flex().autodiff()))?;
    let mut averaging = Averaging::new(&communicator, &start)?;
    let average = |network: &Network, gradients, times: &mut Times| {
        averaging.average(network, gradients, times)
    };
    let (network, times) = train(options, &digits, (rank, world), start.clone(), average)?;

    frameworks::same_on_all_ranks(&communicator, &Weights::of(&network)?)?;
    if rank == 0 {
        println!("burn, {world} ranks: {times}");
        println!("Weights are bitwise equal on all ranks");
        let alone = |_: &Network, gradients, _: &mut Times| Ok(gradients);
        let (one, times) = train(options, &digits, (0, 1), start, alone)?;
        println!("burn, 1 process: {times}");
        let right = (network.right(&digits.held_out), one.right(&digits.held_out));
        frameworks::as_accurate_as_one_process(right, digits.held_out.len())?;
    }
    Ok(())
}

/// The training loop of one rank, where `average` replaces its gradients by those of all ranks.
fn train(
    options: &Options,
    digits: &Digits,
    (rank, world): (usize, usize),
    mut network: Network,
    mut average: impl FnMut(
        &Network,
        GradientsParams,
        &mut Times,
    ) -> Result<GradientsParams, Box<dyn Error>>,
) -> Result<(Network, Times), Box<dyn Error>> {
    let device = Device::flex().autodiff();
    let loss = CrossEntropyLossConfig::new().init(&device);
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let mut times = Times::default();
    for epoch in 1..=options.epochs {
        for batch in digits.shuffled(options.seed, epoch).chunks_exact(BATCH) {
            let start = Instant::now();
            let share = frameworks::share(batch, rank, world);
            let (pixels, labels) = tensors(share, &device);
            let weight = frameworks::weight(BATCH, share.len(), world);
            let loss = loss.forward(network.forward(pixels), labels) * weight;
            let gradients = GradientsParams::from_grads(loss.backward(), &network);
            let gradients = average(&network, gradients, &mut times)?;
            network = optimizer.step(2e-3, network, gradients);
            times.step.end(start);
        }
    }
    Ok((network, times))
}

/// Two convolutions and two linear layers, for images of 8×8.
#[derive(Module, Debug)]
struct Network {
    convolutions: [Conv2d; 2],
    pool: MaxPool2d,
    hidden: Linear,
    classes: Linear,
}

impl Network {
    /// The network, with random weights.
    fn new(device: &Device) -> Self {
        let convolution = |channels| {
            let padded = PaddingConfig2d::Explicit(1, 1, 1, 1);
            Conv2dConfig::new(channels, [3, 3]).with_padding(padded).init(device)
        };
        Self {
            convolutions: [convolution([1, 16]), convolution([16, 32])],
            pool: MaxPool2dConfig::new([2, 2]).init(),
            hidden: LinearConfig::new(32 * 2 * 2, 64).init(device),
            classes: LinearConfig::new(64, 10).init(device),
        }
    }

    /// The scores of the classes.
    fn forward(&self, pixels: Tensor<4>) -> Tensor<2> {
        let mut features = pixels;
        for convolution in &self.convolutions {
            features = self.pool.forward(relu(convolution.forward(features)));
        }
        self.classes.forward(relu(self.hidden.forward(features.flatten(1, 3))))
    }

    /// How many images it recognises.
    fn right(&self, images: &[Image]) -> usize {
        let (pixels, labels) = tensors(&images.iter().collect::<Vec<_>>(), &Device::flex());
        let recognised = self.valid().forward(pixels).argmax(1).flatten::<1>(0, 1).equal(labels);
        recognised.int().sum().into_scalar::<i64>() as usize
    }
}

/// The values of all parameters.
#[derive(Default)]
struct Weights(Vec<TensorData>);

impl Weights {
    fn of(network: &Network) -> Result<Vec<f32>, Box<dyn Error>> {
        let mut weights = Self::default();
        network.visit(&mut weights);
        let slices: Result<Vec<&[f32]>, _> = weights.0.iter().map(TensorData::as_slice).collect();
        Ok(slices?.concat())
    }
}

impl ModuleVisitor for Weights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.val().into_data());
    }
}

/// Images and what they show.
fn tensors(images: &[&Image], device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let pixels: Vec<f32> = images.iter().flat_map(|image| image.pixels).collect();
    let labels: Vec<i64> = images.iter().map(|image| image.digit as i64).collect();
    let count = images.len();
    (
        Tensor::from_data(TensorData::new(pixels, [count, 1, 8, 8]), device),
        Tensor::from_data(TensorData::new(labels, [count]), device),
    )
}
