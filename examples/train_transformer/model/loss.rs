//! Cross entropy: how surprised the model is by what comes next.

use super::numbers::{exp, largest, sum};

/// How a model did on some tokens. Sums, so that those of several ranks can be added.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Judgement {
    /// The sum of the losses, in nats.
    pub(crate) loss: f64,
    /// How many tokens had the highest score.
    pub(crate) right: f64,
    /// How many tokens there were.
    pub(crate) tokens: f64,
}

impl Judgement {
    /// The mean loss of a token, in nats.
    pub(crate) fn mean_loss(&self) -> f64 {
        self.loss / self.tokens
    }

    /// The share of tokens that had the highest score.
    pub(crate) fn accuracy(&self) -> f64 {
        self.right / self.tokens
    }
}

/// Judges `scores`, a row of `vocabulary` for each target, and turns them into the gradient of the
/// sum of the losses, times `scale`.
pub(crate) fn cross_entropy(
    scores: &mut [f32],
    vocabulary: usize,
    targets: &[u8],
    scale: f32,
) -> Judgement {
    let mut judgement = Judgement { tokens: targets.len() as f64, ..Judgement::default() };
    for (row, target) in scores.chunks_exact_mut(vocabulary).zip(targets) {
        let target = usize::from(*target);
        let (most, score) = (largest(row), row[target]);
        for score in &mut *row {
            *score = exp(*score - most);
        }
        let whole = sum(row);
        judgement.loss += f64::from(whole.ln() + most - score);
        judgement.right += if score == most { 1.0 } else { 0.0 };
        let scale_of_row = scale / whole;
        row.iter_mut().for_each(|power| *power *= scale_of_row);
        row[target] -= scale;
    }
    judgement
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{assert_derivative, point};

    #[test]
    fn its_gradient_is_a_derivative() {
        let targets = [0, 6, 3];
        let mut gradient = point(3 * 7);
        cross_entropy(&mut gradient, 7, &targets, 0.5);
        let mut loss =
            |scores: &[f32]| 0.5 * cross_entropy(&mut scores.to_vec(), 7, &targets, 1.0).loss;
        assert_derivative("scores", &mut point(3 * 7), &gradient, &mut loss);
    }

    #[test]
    fn equal_scores_cost_the_logarithm_of_their_number() {
        let judgement = cross_entropy(&mut [2.5; 8], 4, &[1, 2], 1.0);
        assert!((judgement.mean_loss() - 4_f64.ln()).abs() < 1e-6);
        assert_eq!(judgement.accuracy(), 1.0);
    }
}
