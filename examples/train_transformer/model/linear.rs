//! A linear layer: output = input · weight + bias.

use super::matrix::{Matrix, MatrixMut};
use super::numbers::add;
use super::weights::{Parameter, Start, Weights};
use crate::gradients::Gradients;

/// Its parameters are `weight`, a row per input, and `bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: usize,
    bias: usize,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// A layer whose parameters are appended to `parameters`, with weights that start from this
    /// standard deviation.
    pub(crate) fn new(
        parameters: &mut Vec<Parameter>,
        name: &str,
        (inputs, outputs): (usize, usize),
        deviation: f32,
    ) -> Self {
        let weight = parameters.len();
        let (name, shape) = (format!("{name}.weight"), vec![inputs, outputs]);
        let bias = name.replace("weight", "bias");
        parameters.push(Parameter { name, shape, start: Start::Spread(deviation) });
        let (shape, start) = (vec![outputs], Start::Constant(0.0));
        parameters.push(Parameter { name: bias, shape, start });
        Self { weight, bias: weight + 1, inputs, outputs }
    }

    /// `input` has a row of `inputs` numbers for each token, already rounded; `output` gets a row
    /// of `outputs`.
    pub(crate) fn forward(&self, weights: &Weights, input: &[f32], output: &mut [f32]) {
        for row in output.chunks_exact_mut(self.outputs) {
            row.copy_from_slice(weights.exact(self.bias));
        }
        let rows = output.len() / self.outputs;
        MatrixMut::new(output, rows, self.outputs)
            .add(Matrix::new(input, rows, self.inputs), self.weight(weights));
        weights.precision.round(output);
    }

    /// From the gradient of the output (which is rounded) to that of the input, which is
    /// overwritten, and those of the parameters.
    pub(crate) fn backward(
        &self,
        weights: &Weights,
        input: &[f32],
        output_gradient: &mut [f32],
        input_gradient: &mut [f32],
        gradients: &mut dyn Gradients,
    ) {
        weights.precision.round(output_gradient);
        let bias = gradients.accumulate(self.bias);
        output_gradient.chunks_exact(self.outputs).for_each(|row| add(bias, row));
        gradients.ready(self.bias);

        let rows = output_gradient.len() / self.outputs;
        let output_gradient = Matrix::new(output_gradient, rows, self.outputs);
        let input = Matrix::new(input, rows, self.inputs);
        MatrixMut::new(gradients.accumulate(self.weight), self.inputs, self.outputs)
            .add(input.transposed(), output_gradient);
        gradients.ready(self.weight);
        MatrixMut::new(input_gradient, rows, self.inputs)
            .set(output_gradient, self.weight(weights).transposed());
    }

    fn weight<'a>(&self, weights: &'a Weights) -> Matrix<'a> {
        Matrix::new(weights.rounded(self.weight), self.inputs, self.outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{Sums, check, direction};

    #[test]
    fn its_gradients_are_derivatives() {
        let mut parameters = Vec::new();
        let layer = Linear::new(&mut parameters, "layer", (5, 7), 0.5);
        let forward = |weights: &Weights, input: &[f32]| {
            let mut output = vec![0.0; 3 * 7];
            layer.forward(weights, input, &mut output);
            output
        };
        let backward = |weights: &Weights, input: &[f32], sums: &mut Sums| {
            let (mut output, mut gradient) = (direction(3 * 7), vec![f32::NAN; 3 * 5]);
            layer.backward(weights, input, &mut output, &mut gradient, sums);
            gradient
        };
        check(&parameters, 3 * 5, forward, backward);
    }
}
