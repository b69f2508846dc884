//! Products of a large matrix with few columns, and orthogonal columns.
//!
//! A matrix of `n` rows lies row by row; a factor, of `r` columns, lies column by column, so that
//! all loops run over what lies together. Sums are made in a fixed order, the same on every
//! instruction set.

use unisum_kernels::{Isa, Work};

/// How many sums a dot product is made of: two cache lines of `f32`.
const LANES: usize = 32;

/// Writes the columns of `matrix · right` to `product`; `right` has columns as long as the rows.
pub(super) fn times(matrix: &[f32], row: usize, right: &[f32], product: &mut [f32]) {
    Isa::best().run(Times { matrix, row, right, product });
}

struct Times<'a> {
    matrix: &'a [f32],
    row: usize,
    right: &'a [f32],
    product: &'a mut [f32],
}

impl Work for Times<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let rows = self.matrix.len() / self.row;
        // A row is in the first-level cache when the second column meets it: rows outside.
        for (i, row) in self.matrix.chunks_exact(self.row).enumerate() {
            let columns = self.right.chunks_exact(self.row);
            for (right, product) in columns.zip(self.product.chunks_exact_mut(rows)) {
                product[i] = dot(row, right);
            }
        }
    }
}

#[inline(always)]
fn dot(left: &[f32], right: &[f32]) -> f32 {
    let (lefts, left) = left.as_chunks::<LANES>();
    let (rights, right) = right.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (left, right) in lefts.iter().zip(rights) {
        for lane in 0..LANES {
            sums[lane] += left[lane] * right[lane];
        }
    }
    for ((sum, left), right) in sums.iter_mut().zip(left).zip(right) {
        *sum += left * right;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Writes the columns of `matrixᵀ · left` to `product`; `left` has columns as long as the matrix
/// has rows.
pub(super) fn transposed_times(matrix: &[f32], row: usize, left: &[f32], product: &mut [f32]) {
    Isa::best().run(TransposedTimes { matrix, row, left, product });
}

struct TransposedTimes<'a> {
    matrix: &'a [f32],
    row: usize,
    left: &'a [f32],
    product: &'a mut [f32],
}

impl Work for TransposedTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let rows = self.matrix.len() / self.row;
        self.product.fill(0.0);
        for (i, row) in self.matrix.chunks_exact(self.row).enumerate() {
            let columns = self.left.chunks_exact(rows).zip(self.product.chunks_exact_mut(self.row));
            for (left, product) in columns {
                add_scaled(product, left[i], row);
            }
        }
    }
}

#[inline(always)]
fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// Writes `left · rightᵀ` to `product`, row by row, and takes it from `rest`. Whether all of the
/// product is finite.
pub(super) fn outer(
    left: &[f32],
    right: &[f32],
    row: usize,
    product: &mut [f32],
    rest: &mut [f32],
) -> bool {
    Isa::best().run(Outer { left, right, row, product, rest })
}

struct Outer<'a> {
    left: &'a [f32],
    right: &'a [f32],
    row: usize,
    product: &'a mut [f32],
    rest: &'a mut [f32],
}

impl Work for Outer<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let rows = self.product.len() / self.row;
        let both =
            self.product.chunks_exact_mut(self.row).zip(self.rest.chunks_exact_mut(self.row));
        let mut greatest = 0;
        for (i, (product, rest)) in both.enumerate() {
            product.fill(0.0);
            let columns = self.left.chunks_exact(rows).zip(self.right.chunks_exact(self.row));
            for (left, right) in columns {
                add_scaled(product, left[i], right);
            }
            for (rest, product) in rest.iter_mut().zip(product) {
                *rest -= *product;
                greatest = greatest.max(product.to_bits() & !SIGN);
            }
        }
        greatest < f32::INFINITY.to_bits()
    }
}

const SIGN: u32 = 1 << 31;

/// Makes the columns, each of `length`, orthogonal and of length 1. A column that depends on those
/// before it, or is zero, is replaced by what `another` gives, if it gives something; else it
/// becomes zero.
///
/// Modified Gram–Schmidt, each column twice: that is enough (Giraud et al., "The loss of
/// orthogonality in the Gram-Schmidt orthogonalization process", 2005).
pub(super) fn orthogonalise(
    columns: &mut [f32],
    length: usize,
    mut another: impl FnMut(usize, &mut [f32]) -> bool,
) {
    for at in 0..columns.len() / length {
        let (before, column) = columns.split_at_mut(at * length);
        let column = &mut column[..length];
        while !separate(before, column) {
            if !another(at, column) {
                column.fill(0.0);
                break;
            }
        }
    }
}

/// Takes from `column` what the columns `before` have of it, and makes its length 1. False if
/// nothing is left but what rounding makes.
fn separate(before: &[f32], column: &mut [f32]) -> bool {
    /// Of a column's length: more than rounding leaves of a dependent one.
    const DEPENDENT: f64 = 1e-5;
    let whole = norm(column);
    for _ in 0..2 {
        for other in before.chunks_exact(column.len()) {
            let share = dot64(other, column);
            for (value, other) in column.iter_mut().zip(other) {
                *value = (f64::from(*value) - share * f64::from(*other)) as f32;
            }
        }
    }
    let left = norm(column);
    if !left.is_finite() {
        // What was not finite must not look like a column of zeros.
        column.fill(f32::NAN);
        return true;
    }
    if left == 0.0 || left <= DEPENDENT * whole {
        return false;
    }
    column.iter_mut().for_each(|value| *value = (f64::from(*value) / left) as f32);
    true
}

fn norm(column: &[f32]) -> f64 {
    dot64(column, column).sqrt()
}

/// A dot product that neither overflows nor vanishes, whatever the values.
fn dot64(left: &[f32], right: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    for (left, right) in left.chunks(LANES).zip(right.chunks(LANES)) {
        for ((sum, left), right) in sums.iter_mut().zip(left).zip(right) {
            *sum += f64::from(*left) * f64::from(*right);
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_orthogonal_and_dependent_ones_are_replaced_or_zero() {
        let columns = [3.0, 4.0, 0.0, 6.0, 8.0, 0.0, 1.0, 1.0, 1e-3];
        let (mut zeroed, mut replaced) = (columns, columns);
        orthogonalise(&mut zeroed, 3, |_, _| false);
        assert_eq!(zeroed[3..6], [0.0; 3]);
        orthogonalise(&mut replaced, 3, |at, column| {
            column.copy_from_slice(&[0.0, 0.0, 2.0]);
            at == 1
        });
        assert_eq!(replaced[3..6], [0.0, 0.0, 1.0]);
        for columns in [zeroed, replaced] {
            for (i, left) in columns.chunks(3).enumerate() {
                for (j, right) in columns.chunks(3).enumerate() {
                    let expected = f64::from(i == j && left != [0.0; 3]);
                    assert!((dot64(left, right) - expected).abs() < 1e-6, "{columns:?}");
                }
            }
        }
    }

    #[test]
    fn columns_nearly_parallel_become_orthogonal() {
        let mut columns: Vec<f32> = (0..3000).map(|i| 1.0 + 1e-3 * (i as f32).sin()).collect();
        orthogonalise(&mut columns, 1000, |_, _| false);
        let (first, others) = columns.split_at(1000);
        assert!(others.chunks(1000).all(|other| dot64(first, other).abs() < 1e-5));
    }

    #[test]
    fn what_is_not_finite_does_not_become_zero() {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut columns = [1.0, bad, 2.0, 3.0];
            orthogonalise(&mut columns, 2, |_, _| false);
            assert!(columns.iter().all(|value| value.is_nan()), "{bad}: {columns:?}");
        }
    }

    #[test]
    fn products_have_the_same_bits_on_every_instruction_set() {
        for (rows, row, rank) in [(3, 5, 2), (20, 333, 3)] {
            let values = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
            let matrix: Vec<f32> = values(rows * row);
            let (left, right): (Vec<f32>, Vec<f32>) = (values(rows * rank), values(row * rank));
            let on = |isa: Isa| {
                let (mut first, mut second) = (vec![0.0; rows * rank], vec![0.0; row * rank]);
                isa.run(Times { matrix: &matrix, row, right: &right, product: &mut first });
                let product = &mut second;
                isa.run(TransposedTimes { matrix: &matrix, row, left: &left, product });
                let (mut product, mut rest) = (vec![0.0; rows * row], matrix.clone());
                let (product, rest) = (&mut product, &mut rest);
                isa.run(Outer { left: &left, right: &right, row, product, rest });
                let all = [&first[..], &second, product, rest].concat();
                all.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            };
            let bits: Vec<_> = Isa::available().map(on).collect();
            assert!(bits.iter().all(|other| *other == bits[0]));
        }
    }

    /// The reference multiplies and adds in f64, one by one.
    #[test]
    fn products_are_those_of_the_definition() {
        for (rows, row, rank) in [(1, 1, 1), (3, 5, 2), (7, 64, 3), (33, 100, 4)] {
            let value = |seed: usize| (seed as f32 * 0.7).sin();
            let matrix: Vec<f32> = (0..rows * row).map(value).collect();
            let right: Vec<f32> = (0..row * rank).map(|i| value(i + 9)).collect();
            let left: Vec<f32> = (0..rows * rank).map(|i| value(i + 99)).collect();
            let near = |got: f32, terms: &mut dyn Iterator<Item = (f32, f32)>| {
                let sum: f64 = terms.map(|(a, b)| f64::from(a) * f64::from(b)).sum();
                assert!((f64::from(got) - sum).abs() < 1e-4, "{rows}×{row}, {rank}: {got} {sum}");
            };
            let mut product = vec![9.0; rows * rank];
            times(&matrix, row, &right, &mut product);
            for (at, got) in product.iter().enumerate() {
                let (k, i) = (at / rows, at % rows);
                near(*got, &mut (0..row).map(|j| (matrix[i * row + j], right[k * row + j])));
            }
            let mut product = vec![9.0; row * rank];
            transposed_times(&matrix, row, &left, &mut product);
            for (at, got) in product.iter().enumerate() {
                let (k, j) = (at / row, at % row);
                near(*got, &mut (0..rows).map(|i| (matrix[i * row + j], left[k * rows + i])));
            }
            let (mut product, mut rest) = (vec![9.0; rows * row], matrix.clone());
            assert!(outer(&left, &right, row, &mut product, &mut rest));
            for (at, got) in product.iter().enumerate() {
                let (i, j) = (at / row, at % row);
                near(*got, &mut (0..rank).map(|k| (left[k * rows + i], right[k * row + j])));
                assert_eq!(rest[at], matrix[at] - got);
            }
        }
    }
}
