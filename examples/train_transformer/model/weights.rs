//! The parameters of a model: what they are, and their values.

use clap::ValueEnum;
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use crate::random::{Random, mix};

/// What a parameter is called, what shape it has, and what it starts from.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    /// Unique, as `blocks.0.attention.weight`.
    pub(crate) name: String,
    /// Rows and columns of a matrix, or the length of a vector.
    pub(crate) shape: Vec<usize>,
    /// What it starts from.
    pub(crate) start: Start,
}

/// What the values of a parameter start from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start {
    /// All the same.
    Constant(f32),
    /// Random, with mean 0 and this standard deviation.
    Spread(f32),
}

impl Parameter {
    /// How many values it has.
    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a matrix: the optimiser lets only these decay.
    pub(crate) fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }
}

/// The numbers that matrix products are computed from, and rounded to after. Products accumulate
/// in f32; norms, softmax, loss, the sum that runs past the blocks, gradients of parameters and
/// the weights that the optimiser moves are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// 24 bits of precision.
    F32,
    /// 8 bits of precision, the range of f32.
    Bf16,
    /// 11 bits of precision, infinite from 65520 on.
    F16,
}

impl Precision {
    /// Rounds each value to the nearest that there is.
    pub(crate) fn round(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => {
                values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32())
            }
            Self::F16 => {
                let mut narrow = [f16::ZERO; 64];
                for values in values.chunks_mut(narrow.len()) {
                    let narrow = &mut narrow[..values.len()];
                    narrow.convert_from_f32_slice(values);
                    narrow.convert_to_f32_slice(values);
                }
            }
        }
    }
}

/// The values of a model's parameters, in f32, and its matrices as products take them.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// How matrix products are computed.
    pub(crate) precision: Precision,
    values: Vec<Vec<f32>>,
    rounded: Vec<Vec<f32>>,
}

impl Weights {
    /// What a training starts from: follows from the seed.
    pub(crate) fn new(parameters: &[Parameter], precision: Precision, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let values = |parameter: &Parameter| {
            let mut value = || match parameter.start {
                Start::Constant(value) => value,
                Start::Spread(deviation) => random.spread(deviation),
            };
            (0..parameter.count()).map(|_| value()).collect()
        };
        Self::from_values(parameters.iter().map(values).collect(), precision)
    }

    /// These values, a vector per parameter.
    pub(crate) fn from_values(values: Vec<Vec<f32>>, precision: Precision) -> Self {
        let mut weights = Self { precision, rounded: values.clone(), values };
        weights.change(|_, _| {});
        weights
    }

    /// The values of the parameter of that number.
    pub(crate) fn exact(&self, parameter: usize) -> &[f32] {
        &self.values[parameter]
    }

    /// The values as matrix products take them.
    pub(crate) fn rounded(&self, parameter: usize) -> &[f32] {
        &self.rounded[parameter]
    }

    /// Calls `change` with the number and the values of each parameter.
    pub(crate) fn change(&mut self, mut change: impl FnMut(usize, &mut [f32])) {
        let both = self.values.iter_mut().zip(&mut self.rounded);
        for (parameter, (values, rounded)) in both.enumerate() {
            change(parameter, values);
            rounded.copy_from_slice(values);
            self.precision.round(rounded);
        }
    }

    /// A hash of all bits.
    pub(crate) fn hash(&self) -> u64 {
        let bits = self.values.iter().flatten().map(|value| u64::from(value.to_bits()));
        bits.fold(0, |hash, bits| mix(hash ^ bits))
    }
}
