//! A network with one hidden layer, trained by stochastic gradient descent with momentum.

use crate::digits::{Image, next_random};

const PIXELS: usize = 64;
const HIDDEN: usize = 64;
const CLASSES: usize = 10;

/// 64 pixels, 64 hidden units (tanh), 10 classes (softmax).
#[derive(Debug)]
pub(crate) struct Network {
    parameters: Layers<Vec<f32>>,
}

/// The parameters, or their gradients: hidden weights, a row per unit, and biases; class weights, a
/// row per class, and biases.
pub(crate) type Layers<T> = [T; 4];

impl Network {
    /// The parameters' names and shapes.
    pub(crate) const PARAMETERS: Layers<(&str, &[usize])> = [
        ("hidden.weight", &[HIDDEN, PIXELS]),
        ("hidden.bias", &[HIDDEN]),
        ("class.weight", &[CLASSES, HIDDEN]),
        ("class.bias", &[CLASSES]),
    ];

    /// The network all ranks start from: small random weights that follow from the seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = seed;
        let mut uniform = || (next_random(&mut random) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let parameters =
            Self::zeros().map(|zeros| zeros.iter().map(|_| uniform() * 0.15).collect());
        Self { parameters }
    }

    /// Zeros for all parameters.
    pub(crate) fn zeros() -> Layers<Vec<f32>> {
        Self::PARAMETERS.map(|(_, shape)| vec![0.0; shape.iter().product()])
    }

    /// Adds the gradients of the image's loss, times `weight`, to `gradients`.
    pub(crate) fn add_gradients(&self, image: &Image, weight: f32, sums: &mut Layers<&mut [f32]>) {
        let [.., class_weights, _] = &self.parameters;
        let [hidden_weight_sums, hidden_bias_sums, class_weight_sums, class_bias_sums] = sums;
        let (hidden, classes) = self.forward(image);

        let mut hidden_errors = [0.0; HIDDEN];
        for (class, probability) in classes.into_iter().enumerate() {
            let target = if class == image.digit { 1.0 } else { 0.0 };
            let error = (probability - target) * weight;
            class_bias_sums[class] += error;
            let row = class * HIDDEN..(class + 1) * HIDDEN;
            add_scaled(&mut class_weight_sums[row.clone()], error, &hidden);
            add_scaled(&mut hidden_errors, error, &class_weights[row]);
        }
        for (unit, (error, output)) in hidden_errors.into_iter().zip(hidden).enumerate() {
            let error = error * (1.0 - output * output);
            hidden_bias_sums[unit] += error;
            let row = unit * PIXELS..(unit + 1) * PIXELS;
            add_scaled(&mut hidden_weight_sums[row], error, &image.pixels);
        }
    }

    /// The mean loss (cross entropy) and the share of images that are recognised.
    pub(crate) fn evaluate(&self, images: &[Image]) -> (f32, f32) {
        let (mut loss, mut right) = (0.0, 0);
        for image in images {
            let (_, classes) = self.forward(image);
            loss -= classes[image.digit].max(f32::MIN_POSITIVE).ln();
            right += usize::from(classes.iter().all(|other| *other <= classes[image.digit]));
        }
        (loss / images.len() as f32, right as f32 / images.len() as f32)
    }

    /// A hash of the parameters' bits.
    pub(crate) fn hash(&self) -> u64 {
        self.parameters.iter().flatten().fold(0, |hash: u64, parameter| {
            let mut state = hash ^ u64::from(parameter.to_bits());
            next_random(&mut state)
        })
    }

    /// The largest difference between two networks' parameters.
    pub(crate) fn largest_difference(&self, other: &Self) -> f32 {
        let pairs = self.parameters.iter().flatten().zip(other.parameters.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// The hidden units' outputs and the classes' probabilities.
    fn forward(&self, image: &Image) -> ([f32; HIDDEN], [f32; CLASSES]) {
        let [hidden_weights, hidden_biases, class_weights, class_biases] = &self.parameters;
        let hidden: [f32; HIDDEN] = std::array::from_fn(|unit| {
            let row = &hidden_weights[unit * PIXELS..(unit + 1) * PIXELS];
            (dot(row, &image.pixels) + hidden_biases[unit]).tanh()
        });
        let scores: [f32; CLASSES] = std::array::from_fn(|class| {
            let row = &class_weights[class * HIDDEN..(class + 1) * HIDDEN];
            dot(row, &hidden) + class_biases[class]
        });
        let highest = scores.iter().copied().fold(f32::MIN, f32::max);
        let powers = scores.map(|score| (score - highest).exp());
        let sum: f32 = powers.iter().sum();
        (hidden, powers.map(|power| power / sum))
    }
}

/// Gradient descent with momentum: every rank keeps the same.
#[derive(Debug)]
pub(crate) struct Optimizer {
    velocity: Layers<Vec<f32>>,
}

impl Optimizer {
    const RATE: f32 = 0.05;
    const MOMENTUM: f32 = 0.9;

    /// At rest.
    pub(crate) fn new() -> Self {
        Self { velocity: Network::zeros() }
    }

    /// Moves the parameters against their gradients.
    pub(crate) fn step(&mut self, network: &mut Network, gradients: &Layers<&[f32]>) {
        let velocities = self.velocity.iter_mut().flatten();
        let moves = velocities.zip(gradients.iter().copied().flatten());
        for (parameter, (velocity, gradient)) in network.parameters.iter_mut().flatten().zip(moves)
        {
            *velocity = Self::MOMENTUM * *velocity - Self::RATE * gradient;
            *parameter += *velocity;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(sums: &mut [f32], scale: f32, values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += scale * value;
    }
}
