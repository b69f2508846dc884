//! Trains a convolutional network on handwritten digits with candle, with several processes:
//! `cargo run --release -- -n 2`. Under a launcher: `mpirun -n 2 candle-digits`.
//!
//! Every rank works on its share of each batch, and the gradients are averaged by unisum's buckets
//! (`averaging.rs`, which is all that a program of candle's needs). Afterwards the weights must be
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
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{
    AdamW, Conv2d, Conv2dConfig, Linear, Module as _, Optimizer as _, ParamsAdamW, VarBuilder,
    VarMap, conv2d, linear, loss,
};
use digits::{Digits, Image};
use frameworks::{BATCH, Options, Times};
use unisum::Communicator;

fn main() -> ExitCode {
    let work = |options: Options| {
        if unisum::local::is_rank() { join(&options) } else { ranks::launch(options.ranks) }
    };
    ranks::report("candle-digits", Options::parse().and_then(work))
}

/// What each rank does.
fn join(options: &Options) -> Result<(), Box<dyn Error>> {
    let communicator = Communicator::from_environment()?;
    ranks::tell_launch(&communicator);
    let (rank, world) = (communicator.rank(), communicator.world());
    let digits = Digits::load()?;

    let (variables, network) = Network::new()?;
    averaging::broadcast(&communicator, &variables)?;
    let start = weights(&variables)?;
    let mut averaging = Averaging::new(&communicator, &variables)?;
    let average = |gradients: &mut _, times: &mut _| averaging.average(gradients, times);
    let times = train(options, &digits, (rank, world), (&variables, &network), average)?;

    frameworks::same_on_all_ranks(&communicator, &weights(&variables)?.concat())?;
    if rank == 0 {
        println!("candle, {world} ranks: {times}");
        println!("Weights are bitwise equal on all ranks");
        let (variables, one) = Network::new()?;
        for ((_, variable), values) in averaging::sorted(&variables).iter().zip(start) {
            variable.set(&Tensor::from_vec(values, variable.shape(), variable.device())?)?;
        }
        let times = train(options, &digits, (0, 1), (&variables, &one), |_, _| Ok(()))?;
        println!("candle, 1 process: {times}");
        let right = (network.right(&digits.held_out)?, one.right(&digits.held_out)?);
        frameworks::as_accurate_as_one_process(right, digits.held_out.len())?;
    }
    Ok(())
}

/// The training loop of one rank, where `average` replaces its gradients by those of all ranks.
fn train(
    options: &Options,
    digits: &Digits,
    (rank, world): (usize, usize),
    (variables, network): (&VarMap, &Network),
    mut average: impl FnMut(&mut GradStore, &mut Times) -> Result<(), Box<dyn Error>>,
) -> Result<Times, Box<dyn Error>> {
    let settings = ParamsAdamW { lr: 2e-3, ..ParamsAdamW::default() };
    let in_order = averaging::sorted(variables).into_iter().map(|(_, variable)| variable);
    let mut optimizer = AdamW::new(in_order.collect(), settings)?;
    let mut times = Times::default();
    for epoch in 1..=options.epochs {
        for batch in digits.shuffled(options.seed, epoch).chunks_exact(BATCH) {
            let start = Instant::now();
            let share = frameworks::share(batch, rank, world);
            let (pixels, labels) = tensors(share)?;
            let loss = loss::cross_entropy(&network.forward(&pixels)?, &labels)?;
            let weight = frameworks::weight(BATCH, share.len(), world);
            let mut gradients = (loss * weight)?.backward()?;
            average(&mut gradients, &mut times)?;
            optimizer.step(&gradients)?;
            times.step.end(start);
        }
    }
    Ok(times)
}

/// Two convolutions and two linear layers, for images of 8×8.
struct Network {
    convolutions: [Conv2d; 2],
    hidden: Linear,
    classes: Linear,
}

impl Network {
    /// The network, with random weights, and its variables.
    fn new() -> candle_core::Result<(VarMap, Self)> {
        let variables = VarMap::new();
        let at = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let padded = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        let network = Self {
            convolutions: [
                conv2d(1, 16, 3, padded, at.pp("conv1"))?,
                conv2d(16, 32, 3, padded, at.pp("conv2"))?,
            ],
            hidden: linear(32 * 2 * 2, 64, at.pp("hidden"))?,
            classes: linear(64, 10, at.pp("classes"))?,
        };
        Ok((variables, network))
    }

    /// The scores of the classes.
    fn forward(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        let mut features = pixels.clone();
        for convolution in &self.convolutions {
            features = convolution.forward(&features)?.relu()?.max_pool2d(2)?;
        }
        let hidden = self.hidden.forward(&features.flatten_from(1)?)?.relu()?;
        self.classes.forward(&hidden)
    }

    /// How many images it recognises.
    fn right(&self, images: &[Image]) -> candle_core::Result<usize> {
        let (pixels, labels) = tensors(&images.iter().collect::<Vec<_>>())?;
        let recognised = self.forward(&pixels)?.argmax(D::Minus1)?.eq(&labels)?;
        Ok(recognised.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? as usize)
    }
}

/// The values of each variable.
fn weights(variables: &VarMap) -> candle_core::Result<Vec<Vec<f32>>> {
    let values = |(_, variable): (_, candle_core::Var)| variable.flatten_all()?.to_vec1::<f32>();
    averaging::sorted(variables).into_iter().map(values).collect()
}

/// Images and what they show.
fn tensors(images: &[&Image]) -> candle_core::Result<(Tensor, Tensor)> {
    let pixels: Vec<f32> = images.iter().flat_map(|image| image.pixels).collect();
    let labels: Vec<u32> = images.iter().map(|image| image.digit as u32).collect();
    Ok((
        Tensor::from_vec(pixels, (images.len(), 1, 8, 8), &Device::Cpu)?,
        Tensor::from_vec(labels, images.len(), &Device::Cpu)?,
    ))
}
