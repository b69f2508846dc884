//! Layer normalisation: each token's numbers with mean 0 and variance 1, then scaled and shifted.
//!
//! Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

use super::numbers::{dot, sum};
use super::weights::{Parameter, Start, Weights};
use crate::gradients::Gradients;

/// Added to the variance, so that a constant row is no division by zero.
const EPSILON: f32 = 1e-5;

/// Its parameters are `scale` and `shift`, a number for each column.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    scale: usize,
    shift: usize,
    width: usize,
}

/// What forward leaves for backward.
#[derive(Debug)]
pub(crate) struct NormPass {
    /// Mean 0 and variance 1: rows of `width`.
    standard: Vec<f32>,
    /// One over the standard deviation of each row.
    inverse: Vec<f32>,
    /// Scaled, shifted, and rounded for the product that follows.
    pub(crate) output: Vec<f32>,
}

impl NormPass {
    /// Memory for that many rows.
    pub(crate) fn new(rows: usize, width: usize) -> Self {
        let numbers = || vec![0.0; rows * width];
        Self { standard: numbers(), inverse: vec![0.0; rows], output: numbers() }
    }
}

impl LayerNorm {
    /// A layer whose parameters are appended to `parameters`.
    pub(crate) fn new(parameters: &mut Vec<Parameter>, name: &str, width: usize) -> Self {
        let scale = parameters.len();
        for (part, start) in [("scale", 1.0), ("shift", 0.0)] {
            let (name, start) = (format!("{name}.{part}"), Start::Constant(start));
            parameters.push(Parameter { name, shape: vec![width], start });
        }
        Self { scale, shift: scale + 1, width }
    }

    /// `input` has a row of `width` numbers for each token; so has `pass.output`.
    pub(crate) fn forward(&self, weights: &Weights, input: &[f32], pass: &mut NormPass) {
        let (scales, shifts) = (weights.exact(self.scale), weights.exact(self.shift));
        let standard = pass.standard.chunks_exact_mut(self.width);
        let rows = standard.zip(pass.output.chunks_exact_mut(self.width)).zip(&mut pass.inverse);
        for (input, ((standard, output), inverse)) in input.chunks_exact(self.width).zip(rows) {
            let mean = sum(input) / self.width as f32;
            for (standard, input) in standard.iter_mut().zip(input) {
                *standard = input - mean;
            }
            let variance = dot(standard, standard) / self.width as f32;
            *inverse = 1.0 / (variance + EPSILON).sqrt();
            for (standard, (output, (scale, shift))) in
                standard.iter_mut().zip(output.iter_mut().zip(scales.iter().zip(shifts)))
            {
                *standard *= *inverse;
                *output = *standard * scale + shift;
            }
        }
        weights.precision.round(&mut pass.output);
    }

    /// From the gradient of the output, which serves as scratch, to that of the input, which is
    /// added to `input_gradient`, and those of the parameters.
    pub(crate) fn backward(
        &self,
        weights: &Weights,
        pass: &NormPass,
        output_gradient: &mut [f32],
        input_gradient: &mut [f32],
        gradients: &mut dyn Gradients,
    ) {
        self.parameter_gradients(pass, output_gradient, gradients);
        let scales = weights.exact(self.scale);
        let rows = pass.standard.chunks_exact(self.width).zip(&pass.inverse);
        let both = output_gradient
            .chunks_exact_mut(self.width)
            .zip(input_gradient.chunks_exact_mut(self.width));
        for ((standard, inverse), (output, input)) in rows.zip(both) {
            for (gradient, scale) in output.iter_mut().zip(scales) {
                *gradient *= scale;
            }
            // Moving all inputs alike changes nothing, nor does scaling them.
            let mean = sum(output) / self.width as f32;
            let along = dot(output, standard) / self.width as f32;
            for (input, (gradient, standard)) in input.iter_mut().zip(output.iter().zip(standard)) {
                *input += inverse * (gradient - mean - standard * along);
            }
        }
    }

    fn parameter_gradients(
        &self,
        pass: &NormPass,
        output_gradient: &[f32],
        gradients: &mut dyn Gradients,
    ) {
        let shift = gradients.accumulate(self.shift);
        for row in output_gradient.chunks_exact(self.width) {
            super::numbers::add(shift, row);
        }
        gradients.ready(self.shift);
        let scale = gradients.accumulate(self.scale);
        let rows = output_gradient.chunks_exact(self.width);
        for (gradient, standard) in rows.zip(pass.standard.chunks_exact(self.width)) {
            for (sum, (gradient, standard)) in scale.iter_mut().zip(gradient.iter().zip(standard)) {
                *sum += gradient * standard;
            }
        }
        gradients.ready(self.scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{Sums, check, direction};

    #[test]
    fn its_gradients_are_derivatives() {
        let mut parameters = Vec::new();
        let layer = LayerNorm::new(&mut parameters, "layer", 20);
        // Scales that differ, or a wrong use of them could not show.
        parameters[0].start = Start::Spread(1.0);
        let forward = |weights: &Weights, input: &[f32]| {
            let mut pass = NormPass::new(3, 20);
            layer.forward(weights, input, &mut pass);
            pass
        };
        let backward = |weights: &Weights, input: &[f32], sums: &mut Sums| {
            let (mut output, mut gradient) = (direction(3 * 20), vec![0.0; 3 * 20]);
            let pass = forward(weights, input);
            layer.backward(weights, &pass, &mut output, &mut gradient, sums);
            gradient
        };
        check(&parameters, 3 * 20, |weights, input| forward(weights, input).output, backward);
    }
}
