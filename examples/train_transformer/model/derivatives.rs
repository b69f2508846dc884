//! For tests: whether gradients are derivatives, by finite differences.

use super::weights::{Parameter, Precision, Weights};
use crate::gradients::Gradients;
use crate::random::Random;

/// Keeps gradients, and fails if they are not handed over as the trait says.
#[derive(Debug)]
pub(crate) struct Sums {
    sums: Vec<Vec<f32>>,
    /// The parameters in the order in which they were ready.
    pub(crate) ready: Vec<usize>,
}

impl Sums {
    /// Starts from ones, so that a gradient that is not added shows.
    pub(crate) fn new(parameters: &[Parameter]) -> Self {
        let ones = |parameter: &Parameter| vec![1.0; parameter.count()];
        Self { sums: parameters.iter().map(ones).collect(), ready: Vec::new() }
    }

    /// What was added for a parameter.
    pub(crate) fn gradient(&self, parameter: usize) -> Vec<f32> {
        self.sums[parameter].iter().map(|sum| sum - 1.0).collect()
    }
}

impl Gradients for Sums {
    fn accumulate(&mut self, parameter: usize) -> &mut [f32] {
        assert!(!self.ready.contains(&parameter), "parameter {parameter} was ready already");
        &mut self.sums[parameter]
    }

    fn ready(&mut self, parameter: usize) {
        assert!(!self.ready.contains(&parameter), "parameter {parameter} was ready already");
        self.ready.push(parameter);
    }
}

/// Numbers between −1 and 1, always the same: the direction along which outputs are watched.
pub(crate) fn direction(count: usize) -> Vec<f32> {
    numbers(count, 1)
}

/// Other such numbers: an input.
pub(crate) fn point(count: usize) -> Vec<f32> {
    numbers(count, 2)
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.spread(3_f32.sqrt().recip())).collect()
}

/// Fails unless `backward` gives the derivatives of `forward`'s output along [`direction`], by its
/// input of `inputs` numbers and by every parameter, and makes every parameter ready.
pub(crate) fn check(
    parameters: &[Parameter],
    inputs: usize,
    forward: impl Fn(&Weights, &[f32]) -> Vec<f32>,
    backward: impl Fn(&Weights, &[f32], &mut Sums) -> Vec<f32>,
) {
    let input = point(inputs);
    let weights = Weights::new(parameters, Precision::F32, 3);
    let mut sums = Sums::new(parameters);
    let input_gradient = backward(&weights, &input, &mut sums);
    let mut ready = sums.ready.clone();
    ready.sort_unstable();
    assert!(ready.into_iter().eq(0..parameters.len()), "not all parameters were ready");

    let loss = |weights: &Weights, input: &[f32]| {
        let output = forward(weights, input);
        let along = direction(output.len());
        output.iter().zip(along).map(|(a, b)| f64::from(*a) * f64::from(b)).sum::<f64>()
    };
    let mut of_input = |input: &[f32]| loss(&weights, input);
    assert_derivative("the input", &mut input.clone(), &input_gradient, &mut of_input);
    for (number, parameter) in parameters.iter().enumerate() {
        let mut of_parameter = |values: &[f32]| loss(&with(&weights, number, values), &input);
        let mut values = weights.exact(number).to_vec();
        let gradient = sums.gradient(number);
        assert_derivative(&parameter.name, &mut values, &gradient, &mut of_parameter);
    }
}

/// The weights with other values of one parameter.
pub(crate) fn with(weights: &Weights, changed: usize, values: &[f32]) -> Weights {
    let mut weights = weights.clone();
    weights.change(|number, old| {
        if number == changed {
            old.copy_from_slice(values);
        }
    });
    weights
}

/// Fails unless each entry of `gradient` is the derivative of `loss` at `point`.
pub(crate) fn assert_derivative(
    name: &str,
    point: &mut [f32],
    gradient: &[f32],
    loss: &mut dyn FnMut(&[f32]) -> f64,
) {
    const STEP: f32 = 1e-2;
    let largest = gradient.iter().fold(0.0, |most: f32, entry| most.max(entry.abs()));
    assert!(largest > 1e-4, "{name} has no gradient");
    for place in 0..point.len() {
        let middle = point[place];
        let mut at = |value| {
            point[place] = value;
            loss(point)
        };
        // Steps are as long as f32 makes them.
        let (above, below) = (middle + STEP, middle - STEP);
        let derivative = (at(above) - at(below)) / f64::from(above - below);
        point[place] = middle;
        let error = (derivative - f64::from(gradient[place])).abs();
        let limit = 2e-3 * f64::from(largest);
        assert!(error < limit, "{name}[{place}]: {} instead of {derivative}", gradient[place]);
    }
}
