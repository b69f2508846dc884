//! A network with one hidden layer, trained by stochastic gradient descent with momentum.

use crate::digits::{Image, next_random};

const PIXELS: usize = 64;
const HIDDEN: usize = 64;
const CLASSES: usize = 10;

/// 64 pixels, 64 hidden units (tanh), 10 classes (softmax). All parameters lie in one vector, so
/// that one all-reduce takes all their gradients.
#[derive(Debug)]
pub(crate) struct Network {
    parameters: Vec<f32>,
}

/// Where the layers lie in the vector of parameters (or of their gradients): weights, a row per
/// output, then biases.
struct Layers<T> {
    hidden_weights: T,
    hidden_biases: T,
    class_weights: T,
    class_biases: T,
}

impl Network {
    /// How many parameters there are.
    pub(crate) const PARAMETERS: usize = HIDDEN * PIXELS + HIDDEN + CLASSES * HIDDEN + CLASSES;

    /// The network all ranks start from: small random weights.
    pub(crate) fn new() -> Self {
        let mut random = 1;
        let mut uniform = || (next_random(&mut random) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let parameters = (0..Self::PARAMETERS).map(|_| uniform() * 0.15).collect();
        Self { parameters }
    }

    /// Adds the gradients of the image's loss, times `weight`, to `gradients`.
    pub(crate) fn add_gradients(&self, image: &Image, weight: f32, gradients: &mut [f32]) {
        let layers = layers(&self.parameters);
        let (hidden, classes) = self.forward(image);
        let sums = layers_mut(gradients);

        let mut hidden_errors = [0.0; HIDDEN];
        for (class, probability) in classes.into_iter().enumerate() {
            let target = if class == image.digit { 1.0 } else { 0.0 };
            let error = (probability - target) * weight;
            sums.class_biases[class] += error;
            let row = class * HIDDEN..(class + 1) * HIDDEN;
            add_scaled(&mut sums.class_weights[row.clone()], error, &hidden);
            add_scaled(&mut hidden_errors, error, &layers.class_weights[row]);
        }
        for (unit, (error, output)) in hidden_errors.into_iter().zip(hidden).enumerate() {
            let error = error * (1.0 - output * output);
            sums.hidden_biases[unit] += error;
            let row = unit * PIXELS..(unit + 1) * PIXELS;
            add_scaled(&mut sums.hidden_weights[row], error, &image.pixels);
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
        self.parameters.iter().fold(0, |hash: u64, parameter| {
            let mut state = hash ^ u64::from(parameter.to_bits());
            next_random(&mut state)
        })
    }

    /// The largest difference between two networks' parameters.
    pub(crate) fn largest_difference(&self, other: &Self) -> f32 {
        let pairs = self.parameters.iter().zip(&other.parameters);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// The hidden units' outputs and the classes' probabilities.
    fn forward(&self, image: &Image) -> ([f32; HIDDEN], [f32; CLASSES]) {
        let layers = layers(&self.parameters);
        let hidden: [f32; HIDDEN] = std::array::from_fn(|unit| {
            let row = &layers.hidden_weights[unit * PIXELS..(unit + 1) * PIXELS];
            (dot(row, &image.pixels) + layers.hidden_biases[unit]).tanh()
        });
        let scores: [f32; CLASSES] = std::array::from_fn(|class| {
            let row = &layers.class_weights[class * HIDDEN..(class + 1) * HIDDEN];
            dot(row, &hidden) + layers.class_biases[class]
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
    velocity: Vec<f32>,
}

impl Optimizer {
    const RATE: f32 = 0.05;
    const MOMENTUM: f32 = 0.9;

    /// At rest.
    pub(crate) fn new() -> Self {
        Self { velocity: vec![0.0; Network::PARAMETERS] }
    }

    /// Moves the parameters against their gradients.
    pub(crate) fn step(&mut self, network: &mut Network, gradients: &[f32]) {
        let moves = self.velocity.iter_mut().zip(gradients);
        for (parameter, (velocity, gradient)) in network.parameters.iter_mut().zip(moves) {
            *velocity = Self::MOMENTUM * *velocity - Self::RATE * gradient;
            *parameter += *velocity;
        }
    }
}

fn layers(all: &[f32]) -> Layers<&[f32]> {
    let (hidden_weights, rest) = all.split_at(HIDDEN * PIXELS);
    let (hidden_biases, rest) = rest.split_at(HIDDEN);
    let (class_weights, class_biases) = rest.split_at(CLASSES * HIDDEN);
    Layers { hidden_weights, hidden_biases, class_weights, class_biases }
}

fn layers_mut(all: &mut [f32]) -> Layers<&mut [f32]> {
    let (hidden_weights, rest) = all.split_at_mut(HIDDEN * PIXELS);
    let (hidden_biases, rest) = rest.split_at_mut(HIDDEN);
    let (class_weights, class_biases) = rest.split_at_mut(CLASSES * HIDDEN);
    Layers { hidden_weights, hidden_biases, class_weights, class_biases }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(sums: &mut [f32], scale: f32, values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += scale * value;
    }
}
