//! Causal attention with several heads: each token takes a weighted mean of what the tokens up to
//! itself offer.
//!
//! Source: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2.

use super::matrix::{Matrix, MatrixMut};
use super::numbers::{dot, exp, largest, sum};
use super::weights::Precision;

/// It has no parameters of its own: queries, keys and values come from a linear layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Tokens of a sequence.
    pub(crate) context: usize,
    /// Numbers of a token, over all heads.
    pub(crate) width: usize,
    /// They divide the width.
    pub(crate) heads: usize,
}

impl Attention {
    /// `asked` has a row for each token of all sequences: queries, keys and values, `width` numbers
    /// each. `attended` gets the attention of each head, a row of `context` for each token;
    /// `output` a row of `width`.
    pub(crate) fn forward(
        self,
        precision: Precision,
        asked: &[f32],
        attended: &mut [f32],
        output: &mut [f32],
    ) {
        let (rows, context, width) = (output.len() / self.width, self.context, self.width);
        let asked = Matrix::new(asked, rows, 3 * width);
        let squares = attended.chunks_exact_mut(context * context);
        for (part, square) in self.parts(rows).zip(squares) {
            let [queries, keys, values] = self.asked(asked, part);
            MatrixMut::new(square, context, context).set(queries, keys.transposed());
            self.softmax(square);
            precision.round(square);
            let (tokens, columns) = self.ranges(part);
            MatrixMut::new(output, rows, width)
                .part(tokens, columns)
                .set(Matrix::new(square, context, context), values);
        }
        precision.round(output);
    }

    /// From the gradient of the output (which is rounded) to that of `asked`, which is overwritten.
    /// `scratch` holds `context` squared numbers.
    pub(crate) fn backward(
        self,
        precision: Precision,
        (asked, attended): (&[f32], &[f32]),
        output_gradient: &mut [f32],
        asked_gradient: &mut [f32],
        scratch: &mut [f32],
    ) {
        precision.round(output_gradient);
        let (context, width) = (self.context, self.width);
        let rows = output_gradient.len() / width;
        let asked = Matrix::new(asked, rows, 3 * width);
        let output_gradient = Matrix::new(output_gradient, rows, width);
        for (part, attended) in self.parts(rows).zip(attended.chunks_exact(context * context)) {
            let [queries, keys, values] = self.asked(asked, part);
            let (tokens, columns) = self.ranges(part);
            let gradient = output_gradient.part(tokens.clone(), columns);
            let [for_queries, for_keys, for_values] =
                [0, 1, 2].map(|which| self.third(which, part.1));
            let mut target = MatrixMut::new(asked_gradient, rows, 3 * width);
            MatrixMut::new(scratch, context, context).set(gradient, values.transposed());
            target
                .part(tokens.clone(), for_values)
                .set(Matrix::new(attended, context, context).transposed(), gradient);
            self.softmax_gradient(attended, scratch);
            precision.round(scratch);
            let scores = Matrix::new(scratch, context, context);
            target.part(tokens.clone(), for_queries).set(scores, keys);
            target.part(tokens, for_keys).set(scores.transposed(), queries);
        }
    }

    /// Sequence and head of each square of the attention.
    fn parts(self, rows: usize) -> impl Iterator<Item = (usize, usize)> {
        let sequences = 0..rows / self.context;
        sequences.flat_map(move |sequence| (0..self.heads).map(move |head| (sequence, head)))
    }

    /// Rows and columns of a part.
    fn ranges(self, (sequence, head): (usize, usize)) -> (Span, Span) {
        let size = self.width / self.heads;
        let row = sequence * self.context;
        (row..row + self.context, head * size..(head + 1) * size)
    }

    fn asked<'a>(self, asked: Matrix<'a>, part: (usize, usize)) -> [Matrix<'a>; 3] {
        let rows = self.ranges(part).0;
        [0, 1, 2].map(|which| asked.part(rows.clone(), self.third(which, part.1)))
    }

    /// The columns of a head's queries, keys or values.
    fn third(self, which: usize, head: usize) -> Span {
        let (start, size) = (which * self.width, self.width / self.heads);
        start + head * size..start + (head + 1) * size
    }

    /// From products of queries and keys to shares that sum to 1, with none for later tokens.
    fn softmax(self, square: &mut [f32]) {
        let scale = self.scale();
        for (token, row) in square.chunks_exact_mut(self.context).enumerate() {
            let (seen, later) = row.split_at_mut(token + 1);
            later.fill(0.0);
            let most = largest(seen);
            for score in &mut *seen {
                *score = exp((*score - most) * scale);
            }
            let whole = 1.0 / sum(seen);
            seen.iter_mut().for_each(|share| *share *= whole);
        }
    }

    /// From the gradient of the shares to that of the products, in place.
    fn softmax_gradient(self, attended: &[f32], gradient: &mut [f32]) {
        let scale = self.scale();
        let rows = attended.chunks_exact(self.context);
        for (shares, gradient) in rows.zip(gradient.chunks_exact_mut(self.context)) {
            // Later tokens have no share, so what stands in their gradient counts for nothing.
            let mean = dot(shares, gradient);
            for (gradient, share) in gradient.iter_mut().zip(shares) {
                *gradient = share * (*gradient - mean) * scale;
            }
        }
    }

    /// Keeps the variance of the scores independent of the heads' size.
    fn scale(self) -> f32 {
        ((self.width / self.heads) as f32).sqrt().recip()
    }
}

type Span = std::ops::Range<usize>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::derivatives::{check, direction, point};

    const LAYER: Attention = Attention { context: 5, width: 6, heads: 2 };
    /// Two sequences.
    const ROWS: usize = 10;

    fn forward(asked: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut attended, mut output) = (vec![0.0; ROWS * 5 * 2], vec![0.0; ROWS * 6]);
        LAYER.forward(Precision::F32, asked, &mut attended, &mut output);
        (attended, output)
    }

    #[test]
    fn its_gradient_is_a_derivative() {
        let backward = |asked: &[f32]| {
            let (mut output, mut gradient) = (direction(ROWS * 6), vec![f32::NAN; ROWS * 18]);
            let (attended, mut scratch) = (forward(asked).0, vec![0.0; 25]);
            let saved = (asked, &attended[..]);
            LAYER.backward(Precision::F32, saved, &mut output, &mut gradient, &mut scratch);
            gradient
        };
        check(&[], ROWS * 18, |_, asked| forward(asked).1, |_, asked, _| backward(asked));
    }

    #[test]
    fn no_token_sees_a_later_one_or_another_sequence() {
        let asked = point(ROWS * 18);
        let before = forward(&asked).1;
        for token in 0..ROWS {
            let mut changed = asked.clone();
            changed[token * 18..(token + 1) * 18].fill(3.0);
            let after = forward(&changed).1;
            for other in 0..ROWS {
                let row = other * 6..(other + 1) * 6;
                let may_see = other >= token && other / 5 == token / 5;
                assert_eq!(before[row.clone()] != after[row], may_see, "{other} sees {token}");
            }
        }
    }
}
