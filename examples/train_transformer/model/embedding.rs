//! Tokens as vectors, and back: one matrix does both, so its gradient is final only when backward
//! has arrived at the input.
//!
//! Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016,
//! arXiv:1608.05859.

use super::matrix::{Matrix, MatrixMut};
use super::numbers::add;
use super::weights::{Parameter, Start, Weights};
use crate::gradients::Gradients;

/// Its parameters are a vector for each token of the vocabulary and one for each position.
#[derive(Debug)]
pub(crate) struct Embedding {
    tokens: usize,
    positions: usize,
    vocabulary: usize,
    context: usize,
    width: usize,
}

impl Embedding {
    /// A layer whose parameters are appended to `parameters`.
    pub(crate) fn new(
        parameters: &mut Vec<Parameter>,
        (vocabulary, context, width): (usize, usize, usize),
        deviation: f32,
    ) -> Self {
        let tokens = parameters.len();
        for (name, rows) in [("tokens", vocabulary), ("positions", context)] {
            let (shape, start) = (vec![rows, width], Start::Spread(deviation));
            parameters.push(Parameter { name: format!("embedding.{name}"), shape, start });
        }
        Self { tokens, positions: tokens + 1, vocabulary, context, width }
    }

    /// `output` gets a row for each token: its vector plus that of its position.
    pub(crate) fn forward(&self, weights: &Weights, tokens: &[u8], output: &mut [f32]) {
        let vectors = weights.exact(self.tokens);
        let positions = weights.exact(self.positions).chunks_exact(self.width).cycle();
        let rows = output.chunks_exact_mut(self.width).zip(positions);
        for (token, (row, position)) in tokens.iter().zip(rows) {
            row.copy_from_slice(&vectors[self.row(*token)]);
            add(row, position);
        }
    }

    /// Adds the gradient of the output to that of the vectors, which then are final.
    pub(crate) fn backward(
        &self,
        tokens: &[u8],
        output_gradient: &[f32],
        gradients: &mut dyn Gradients,
    ) {
        let positions = gradients.accumulate(self.positions);
        for sequence in output_gradient.chunks_exact(self.context * self.width) {
            add(positions, sequence);
        }
        gradients.ready(self.positions);
        let vectors = gradients.accumulate(self.tokens);
        for (token, row) in tokens.iter().zip(output_gradient.chunks_exact(self.width)) {
            add(&mut vectors[self.row(*token)], row);
        }
        gradients.ready(self.tokens);
    }

    /// `scores` gets, for each row of `input`, its product with the vector of each token.
    pub(crate) fn score(&self, weights: &Weights, input: &[f32], scores: &mut [f32]) {
        let rows = input.len() / self.width;
        MatrixMut::new(scores, rows, self.vocabulary)
            .set(Matrix::new(input, rows, self.width), self.vectors(weights).transposed());
        weights.precision.round(scores);
    }

    /// From the gradient of the scores (which is rounded) to that of the input, which is
    /// overwritten, and a first part of that of the vectors.
    pub(crate) fn score_backward(
        &self,
        weights: &Weights,
        input: &[f32],
        score_gradient: &mut [f32],
        input_gradient: &mut [f32],
        gradients: &mut dyn Gradients,
    ) {
        weights.precision.round(score_gradient);
        let rows = input.len() / self.width;
        let score_gradient = Matrix::new(score_gradient, rows, self.vocabulary);
        MatrixMut::new(gradients.accumulate(self.tokens), self.vocabulary, self.width)
            .add(score_gradient.transposed(), Matrix::new(input, rows, self.width));
        MatrixMut::new(input_gradient, rows, self.width).set(score_gradient, self.vectors(weights));
    }

    fn row(&self, token: u8) -> std::ops::Range<usize> {
        let start = usize::from(token) * self.width;
        start..start + self.width
    }

    fn vectors<'a>(&self, weights: &'a Weights) -> Matrix<'a> {
        Matrix::new(weights.rounded(self.tokens), self.vocabulary, self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{Sums, check, direction};

    /// Both uses of the vectors at once: their gradients have to add up.
    #[test]
    fn its_gradients_are_derivatives() {
        let mut parameters = Vec::new();
        let layer = Embedding::new(&mut parameters, (4, 3, 5), 0.5);
        let tokens = [0, 3, 3, 1, 0, 3];
        let embed = |weights: &Weights, input: &[f32]| {
            let mut embedded = vec![0.0; 6 * 5];
            layer.forward(weights, &tokens, &mut embedded);
            add(&mut embedded, input);
            embedded
        };
        let forward = |weights: &Weights, input: &[f32]| {
            let mut scores = vec![0.0; 6 * 4];
            layer.score(weights, &embed(weights, input), &mut scores);
            scores
        };
        let backward = |weights: &Weights, input: &[f32], sums: &mut Sums| {
            let (mut scores, mut gradient) = (direction(6 * 4), vec![f32::NAN; 6 * 5]);
            let embedded = embed(weights, input);
            layer.score_backward(weights, &embedded, &mut scores, &mut gradient, sums);
            layer.backward(&tokens, &gradient, sums);
            gradient
        };
        check(&parameters, 6 * 5, forward, backward);
    }
}
