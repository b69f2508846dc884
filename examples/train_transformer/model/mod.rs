//! A small transformer in the manner of GPT-2, with its derivatives written out by hand.
//!
//! Numbers of all tokens lie row by row, a row for each token. A layer knows the numbers of its
//! parameters; their values are in [`Weights`], and their gradients go to a
//! [`Gradients`](crate::gradients::Gradients), the last layer's first.

mod attention;
mod block;
#[cfg(test)]
mod derivatives;
mod embedding;
mod gelu;
mod linear;
mod loss;
mod matrix;
mod norm;
mod numbers;
mod weights;

use attention::Attention;
use block::{Block, BlockPass, Scratch};
use embedding::Embedding;
pub(crate) use loss::Judgement;
use norm::{LayerNorm, NormPass};
pub(crate) use numbers::dot;
#[cfg(test)]
pub(crate) use weights::Start;
pub(crate) use weights::{Parameter, Precision, Weights};

use crate::gradients::Gradients;

/// How large a model is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Tokens that there are.
    pub(crate) vocabulary: usize,
    /// Tokens of a sequence.
    pub(crate) context: usize,
    /// Numbers that run past the blocks for each token.
    pub(crate) width: usize,
    /// Heads of an attention; they divide the width.
    pub(crate) heads: usize,
    /// Blocks, one after the other.
    pub(crate) blocks: usize,
}

/// Embedding, blocks, a last norm, and the embedding again for the scores.
#[derive(Debug)]
pub(crate) struct Model {
    /// In order of registration: that of forward.
    pub(crate) parameters: Vec<Parameter>,
    size: Size,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

/// The memory of a pass through a model: what forward leaves for backward, and scratch.
#[derive(Debug)]
pub(crate) struct Pass {
    stream: Vec<f32>,
    blocks: Vec<BlockPass>,
    norm: NormPass,
    scores: Vec<f32>,
    stream_gradient: Vec<f32>,
    norm_gradient: Vec<f32>,
    scratch: Scratch,
}

impl Size {
    const fn attention(self) -> Attention {
        Attention { context: self.context, width: self.width, heads: self.heads }
    }
}

impl Pass {
    /// Memory for that many sequences.
    pub(crate) fn new(size: Size, sequences: usize) -> Self {
        let rows = sequences * size.context;
        let stream = || vec![0.0; rows * size.width];
        Self {
            stream: stream(),
            blocks: (0..size.blocks).map(|_| BlockPass::new(rows, size.attention())).collect(),
            norm: NormPass::new(rows, size.width),
            scores: vec![0.0; rows * size.vocabulary],
            stream_gradient: stream(),
            norm_gradient: stream(),
            scratch: Scratch::new(rows, size.attention()),
        }
    }
}

impl Model {
    /// A model of that size.
    ///
    /// # Panics
    /// If the heads do not divide the width.
    pub(crate) fn new(size: Size) -> Self {
        assert_eq!(size.width % size.heads, 0, "heads divide the width");
        let mut parameters = Vec::new();
        let shape = (size.vocabulary, size.context, size.width);
        let deviation = (size.width as f32).sqrt().recip();
        let embedding = Embedding::new(&mut parameters, shape, deviation);
        let block = |parameters: &mut Vec<Parameter>, number| {
            let name = format!("blocks.{number}");
            Block::new(parameters, &name, size.attention(), size.blocks)
        };
        let blocks = (0..size.blocks).map(|number| block(&mut parameters, number)).collect();
        let norm = LayerNorm::new(&mut parameters, "norm", size.width);
        Self { parameters, size, embedding, blocks, norm }
    }

    /// How well the model foresees `targets`, the successors of `tokens`: whole sequences, as many
    /// as `pass` has memory for.
    pub(crate) fn judge(
        &self,
        weights: &Weights,
        (tokens, targets): (&[u8], &[u8]),
        pass: &mut Pass,
    ) -> Judgement {
        self.forward(weights, (tokens, targets), 1.0, pass)
    }

    /// The same, and hands the gradients of the sum of the losses, times `scale`, to `gradients`.
    pub(crate) fn learn(
        &self,
        weights: &Weights,
        (tokens, targets): (&[u8], &[u8]),
        scale: f32,
        pass: &mut Pass,
        gradients: &mut dyn Gradients,
    ) -> Judgement {
        let judgement = self.forward(weights, (tokens, targets), scale, pass);
        let Pass { stream_gradient, norm_gradient, scores, norm, blocks, scratch, .. } = pass;
        self.embedding.score_backward(weights, &norm.output, scores, norm_gradient, gradients);
        stream_gradient.fill(0.0);
        self.norm.backward(weights, norm, norm_gradient, stream_gradient, gradients);
        for (block, pass) in self.blocks.iter().zip(blocks).rev() {
            block.backward(weights, stream_gradient, pass, scratch, gradients);
        }
        self.embedding.backward(tokens, stream_gradient, gradients);
        judgement
    }

    /// Leaves the gradient of the scores in `pass.scores`.
    fn forward(
        &self,
        weights: &Weights,
        (tokens, targets): (&[u8], &[u8]),
        scale: f32,
        pass: &mut Pass,
    ) -> Judgement {
        assert_eq!(tokens.len() * self.size.width, pass.stream.len(), "memory for these tokens");
        self.embedding.forward(weights, tokens, &mut pass.stream);
        for (block, blocks_pass) in self.blocks.iter().zip(&mut pass.blocks) {
            block.forward(weights, &mut pass.stream, blocks_pass, &mut pass.scratch);
        }
        self.norm.forward(weights, &pass.stream, &mut pass.norm);
        self.embedding.score(weights, &pass.norm.output, &mut pass.scores);
        loss::cross_entropy(&mut pass.scores, self.size.vocabulary, targets, scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use derivatives::{Sums, assert_derivative, with};

    const SIZE: Size = Size { vocabulary: 7, context: 4, width: 8, heads: 2, blocks: 2 };

    fn sequences(count: usize) -> (Vec<u8>, Vec<u8>) {
        let mut random = Random::new(5);
        let mut tokens =
            || (0..count * SIZE.context).map(|_| random.below(SIZE.vocabulary) as u8).collect();
        (tokens(), tokens())
    }

    #[test]
    fn gradients_of_the_whole_model_are_derivatives() {
        let model = Model::new(SIZE);
        let weights = Weights::new(&model.parameters, Precision::F32, 1);
        let (tokens, targets) = sequences(2);
        let (batch, mut pass) = ((&tokens[..], &targets[..]), Pass::new(SIZE, 2));
        let mut sums = Sums::new(&model.parameters);
        model.learn(&weights, batch, 0.25, &mut pass, &mut sums);
        for (number, parameter) in model.parameters.iter().enumerate() {
            // Adding the same to all keys changes no attention: those entries are zero.
            let mut loss = |values: &[f32]| {
                let judgement = model.judge(&with(&weights, number, values), batch, &mut pass);
                0.25 * judgement.loss
            };
            let mut values = weights.exact(number).to_vec();
            let gradient = sums.gradient(number);
            assert_derivative(&parameter.name, &mut values, &gradient, &mut loss);
        }
    }

    #[test]
    fn gradients_come_last_layer_first_and_the_shared_embedding_at_the_end() {
        let model = Model::new(SIZE);
        let weights = Weights::new(&model.parameters, Precision::F32, 1);
        let (tokens, targets) = sequences(1);
        let mut sums = Sums::new(&model.parameters);
        let mut pass = Pass::new(SIZE, 1);
        model.learn(&weights, (&tokens, &targets), 1.0, &mut pass, &mut sums);
        let expected: Vec<usize> = (0..model.parameters.len()).rev().collect();
        assert_eq!(sums.ready, expected, "the reverse of the order of registration");
        assert_eq!(model.parameters[0].name, "embedding.tokens");
    }

    /// The same as f32 within the rounding, but not the same.
    #[test]
    fn rounded_gradients_are_near_those_of_f32() {
        let model = Model::new(SIZE);
        let (tokens, targets) = sequences(2);
        let gradients = [Precision::F32, Precision::Bf16, Precision::F16].map(|precision| {
            let weights = Weights::new(&model.parameters, precision, 1);
            let (mut sums, mut pass) = (Sums::new(&model.parameters), Pass::new(SIZE, 2));
            model.learn(&weights, (&tokens, &targets), 1.0, &mut pass, &mut sums);
            (0..model.parameters.len()).flat_map(|it| sums.gradient(it)).collect::<Vec<f32>>()
        });
        let [exact, rounded @ ..] = &gradients;
        for (rounded, limits) in rounded.iter().zip([1e-4..2e-2, 1e-5..2e-3]) {
            let difference: Vec<f32> = exact.iter().zip(rounded).map(|(a, b)| a - b).collect();
            let relative = (dot(&difference, &difference) / dot(exact, exact)).sqrt();
            assert!(limits.contains(&relative), "{relative}");
        }
    }
}
