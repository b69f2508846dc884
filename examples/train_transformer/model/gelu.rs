//! The activation between the two linear layers of a block.
//!
//! Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415; the
//! approximation by tanh, written as x · sigmoid(2y).

use super::numbers::exp;

/// √(8/π): twice the factor in the approximation's tanh.
const FACTOR: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

/// `output` gets the activation of each input.
pub(crate) fn forward(input: &[f32], output: &mut [f32]) {
    for (output, x) in output.iter_mut().zip(input) {
        *output = x * gate(*x);
    }
}

/// From the gradient of the output to that of the input, in place.
pub(crate) fn backward(input: &[f32], gradient: &mut [f32]) {
    for (gradient, x) in gradient.iter_mut().zip(input) {
        let gate = gate(*x);
        let slope = FACTOR * (1.0 + 3.0 * CUBIC * x * x);
        *gradient *= gate + x * gate * (1.0 - gate) * slope;
    }
}

fn gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-FACTOR * (x + CUBIC * x * x * x)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{check, direction};

    #[test]
    fn its_gradient_is_a_derivative() {
        let activation = |input: &[f32]| {
            let mut output = vec![0.0; 50];
            forward(input, &mut output);
            output
        };
        let gradient = |input: &[f32]| {
            let mut gradient = direction(50);
            backward(input, &mut gradient);
            gradient
        };
        check(&[], 50, |_, input| activation(input), |_, input, _| gradient(input));
        assert_eq!(activation(&[0.0; 50]), [0.0; 50]);
        assert!((activation(&[1.0; 50])[0] - 0.841_192).abs() < 1e-6);
    }
}
