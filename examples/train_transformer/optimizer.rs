//! AdamW: steps that follow the gradient's running mean, scaled by its running size.
//!
//! Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.

use crate::model::{Parameter, Weights, dot};

const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.99;
const WEIGHT_DECAY: f32 = 0.1;
const EPSILON: f32 = 1e-8;
/// A gradient longer than this is shortened to it.
const LONGEST: f64 = 1.0;

/// Every rank keeps the same.
#[derive(Clone, Debug)]
pub(crate) struct Optimizer {
    /// Running means of the gradients.
    pub(crate) means: Vec<Vec<f32>>,
    /// Running means of their squares.
    pub(crate) squares: Vec<Vec<f32>>,
    /// Steps that were taken.
    pub(crate) steps: usize,
    /// Which parameters decay: matrices.
    decays: Vec<bool>,
}

impl Optimizer {
    /// At rest.
    pub(crate) fn new(parameters: &[Parameter]) -> Self {
        let zeros = || parameters.iter().map(|parameter| vec![0.0; parameter.count()]).collect();
        let decays = parameters.iter().map(Parameter::is_matrix).collect();
        Self { means: zeros(), squares: zeros(), steps: 0, decays }
    }

    /// Moves the weights against `gradient`, which gives that of each parameter, `scale` times too
    /// large. `rate` is the length of a typical move.
    ///
    /// # Errors
    /// If the gradient is not finite; nothing was changed.
    pub(crate) fn step<'a>(
        &mut self,
        weights: &mut Weights,
        gradient: impl Fn(usize) -> &'a [f32],
        (rate, scale): (f32, f32),
    ) -> Result<(), String> {
        let squares = (0..self.means.len()).map(|number| {
            let gradient = gradient(number);
            f64::from(dot(gradient, gradient))
        });
        let length = squares.sum::<f64>().sqrt() / f64::from(scale);
        if !length.is_finite() {
            return Err("the gradient is not finite".into());
        }
        self.steps += 1;
        let clip = ((LONGEST / length).min(1.0) / f64::from(scale)) as f32;
        // The running means start from 0: what they lack is known.
        let known = |decay: f32| (1.0 - f64::from(decay).powi(self.steps as i32)) as f32;
        let (mean_known, square_known) = (known(MEAN_DECAY), known(SQUARE_DECAY));
        weights.change(|number, values| {
            let decay = if self.decays[number] { 1.0 - rate * WEIGHT_DECAY } else { 1.0 };
            let running = self.means[number].iter_mut().zip(&mut self.squares[number]);
            for ((value, gradient), (mean, square)) in
                values.iter_mut().zip(gradient(number)).zip(running)
            {
                let gradient = gradient * clip;
                *mean = MEAN_DECAY * *mean + (1.0 - MEAN_DECAY) * gradient;
                *square = SQUARE_DECAY * *square + (1.0 - SQUARE_DECAY) * gradient * gradient;
                let size = (*square / square_known).sqrt() + EPSILON;
                *value = decay * *value - rate * (*mean / mean_known) / size;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Precision;

    fn one_weight(gradients: &[f32], scale: f32) -> Result<f32, String> {
        let start = crate::model::Start::Constant(1.0);
        let parameter = Parameter { name: "weight".into(), shape: vec![1], start };
        let mut weights = Weights::new(std::slice::from_ref(&parameter), Precision::F32, 0);
        let mut optimizer = Optimizer::new(&[parameter]);
        for gradient in gradients {
            let gradient = [*gradient * scale];
            optimizer.step(&mut weights, |_| &gradient, (0.1, scale))?;
        }
        Ok(weights.exact(0)[0])
    }

    #[test]
    fn steps_are_as_long_as_the_rate_whatever_the_gradient_is() {
        for gradient in [1e-3, 0.5, 100.0] {
            assert!((one_weight(&[gradient; 3], 1.0).unwrap() - 0.7).abs() < 1e-4);
        }
    }

    #[test]
    fn a_gradient_that_is_too_long_counts_as_one_of_the_longest() {
        let clipped = one_weight(&[0.5, 50.0], 1.0).unwrap();
        assert_eq!(clipped, one_weight(&[0.5, 1.0], 1.0).unwrap());
        assert_ne!(clipped, one_weight(&[0.5, 0.5], 1.0).unwrap());
    }

    #[test]
    fn a_scale_that_is_a_power_of_two_changes_no_bit() {
        let gradients = [0.5, 50.0, -0.3];
        assert_eq!(one_weight(&gradients, 65536.0), one_weight(&gradients, 1.0));
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_refused() {
        for gradient in [f32::NAN, f32::INFINITY] {
            assert!(one_weight(&[gradient], 1.0).is_err());
        }
    }
}
