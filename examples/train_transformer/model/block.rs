//! A block of the transformer: attention, then two linear layers, each on normalised numbers and
//! added to what came in.
//!
//! Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).

use super::attention::Attention;
use super::gelu;
use super::linear::Linear;
use super::norm::{LayerNorm, NormPass};
use super::numbers::add;
use super::weights::{Parameter, Weights};
use crate::gradients::Gradients;

/// The layers of a block.
#[derive(Debug)]
pub(crate) struct Block {
    norm: LayerNorm,
    ask: Linear,
    attention: Attention,
    answer: Linear,
    second_norm: LayerNorm,
    widen: Linear,
    narrow: Linear,
}

/// What forward leaves for backward.
#[derive(Debug)]
pub(crate) struct BlockPass {
    norm: NormPass,
    asked: Vec<f32>,
    attended: Vec<f32>,
    mixed: Vec<f32>,
    second_norm: NormPass,
    wide: Vec<f32>,
    active: Vec<f32>,
}

/// Memory that all blocks use in turn.
#[derive(Debug)]
pub(crate) struct Scratch {
    narrow: Vec<f32>,
    other: Vec<f32>,
    wide: Vec<f32>,
    square: Vec<f32>,
}

/// How much wider the block is between its last two layers.
const WIDER: usize = 4;

impl BlockPass {
    /// Memory for that many rows.
    pub(crate) fn new(rows: usize, attention: Attention) -> Self {
        let Attention { context, width, heads } = attention;
        let numbers = |columns| vec![0.0; rows * columns];
        Self {
            norm: NormPass::new(rows, width),
            asked: numbers(3 * width),
            attended: numbers(context * heads),
            mixed: numbers(width),
            second_norm: NormPass::new(rows, width),
            wide: numbers(WIDER * width),
            active: numbers(WIDER * width),
        }
    }
}

impl Scratch {
    /// Memory for that many rows.
    pub(crate) fn new(rows: usize, attention: Attention) -> Self {
        let numbers = |columns| vec![0.0; rows * columns];
        Self {
            narrow: numbers(attention.width),
            other: numbers(attention.width),
            wide: numbers(WIDER * attention.width),
            square: vec![0.0; attention.context * attention.context],
        }
    }
}

impl Block {
    /// A block whose parameters are appended to `parameters`. What a block adds starts smaller the
    /// more `blocks` there are, so that the sum of all starts alike.
    pub(crate) fn new(
        parameters: &mut Vec<Parameter>,
        name: &str,
        attention: Attention,
        blocks: usize,
    ) -> Self {
        let width = attention.width;
        let deviation = (width as f32).sqrt().recip();
        let last = deviation / (2.0 * blocks as f32).sqrt();
        let called = |part: &str| format!("{name}.{part}");
        Self {
            norm: LayerNorm::new(parameters, &called("norm"), width),
            ask: Linear::new(parameters, &called("ask"), (width, 3 * width), deviation),
            attention,
            answer: Linear::new(parameters, &called("answer"), (width, width), last),
            second_norm: LayerNorm::new(parameters, &called("second_norm"), width),
            widen: Linear::new(parameters, &called("widen"), (width, WIDER * width), deviation),
            narrow: Linear::new(
                parameters,
                &called("narrow"),
                (WIDER * width, width),
                last / (WIDER as f32).sqrt(),
            ),
        }
    }

    /// Adds what the block finds to `stream`, which has a row for each token.
    pub(crate) fn forward(
        &self,
        weights: &Weights,
        stream: &mut [f32],
        pass: &mut BlockPass,
        scratch: &mut Scratch,
    ) {
        self.norm.forward(weights, stream, &mut pass.norm);
        self.ask.forward(weights, &pass.norm.output, &mut pass.asked);
        let precision = weights.precision;
        self.attention.forward(precision, &pass.asked, &mut pass.attended, &mut pass.mixed);
        self.answer.forward(weights, &pass.mixed, &mut scratch.narrow);
        add(stream, &scratch.narrow);

        self.second_norm.forward(weights, stream, &mut pass.second_norm);
        self.widen.forward(weights, &pass.second_norm.output, &mut pass.wide);
        gelu::forward(&pass.wide, &mut pass.active);
        precision.round(&mut pass.active);
        self.narrow.forward(weights, &pass.active, &mut scratch.narrow);
        add(stream, &scratch.narrow);
    }

    /// From the gradient of the stream after the block to that before it, in place.
    pub(crate) fn backward(
        &self,
        weights: &Weights,
        stream_gradient: &mut [f32],
        pass: &BlockPass,
        scratch: &mut Scratch,
        gradients: &mut dyn Gradients,
    ) {
        let Scratch { narrow, other, wide, square } = scratch;
        narrow.copy_from_slice(stream_gradient);
        self.narrow.backward(weights, &pass.active, narrow, wide, gradients);
        gelu::backward(&pass.wide, wide);
        self.widen.backward(weights, &pass.second_norm.output, wide, narrow, gradients);
        self.second_norm.backward(weights, &pass.second_norm, narrow, stream_gradient, gradients);

        narrow.copy_from_slice(stream_gradient);
        self.answer.backward(weights, &pass.mixed, narrow, other, gradients);
        let asked_gradient = &mut wide[..pass.asked.len()];
        let saved = (&pass.asked[..], &pass.attended[..]);
        self.attention.backward(weights.precision, saved, other, asked_gradient, square);
        self.ask.backward(weights, &pass.norm.output, asked_gradient, narrow, gradients);
        self.norm.backward(weights, &pass.norm, narrow, stream_gradient, gradients);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{Sums, check, direction};

    #[test]
    fn its_gradients_are_derivatives() {
        let attention = Attention { context: 3, width: 8, heads: 2 };
        let (rows, mut parameters) = (6, Vec::new());
        let block = Block::new(&mut parameters, "block", attention, 1);
        let forward = |weights: &Weights, input: &[f32]| {
            let mut stream = input.to_vec();
            let mut pass = BlockPass::new(rows, attention);
            block.forward(weights, &mut stream, &mut pass, &mut Scratch::new(rows, attention));
            (stream, pass)
        };
        let backward = |weights: &Weights, input: &[f32], sums: &mut Sums| {
            let (mut stream, pass) = (direction(rows * 8), forward(weights, input).1);
            let mut scratch = Scratch::new(rows, attention);
            block.backward(weights, &mut stream, &pass, &mut scratch, sums);
            stream
        };
        check(&parameters, rows * 8, |weights, input| forward(weights, input).0, backward);
    }
}
