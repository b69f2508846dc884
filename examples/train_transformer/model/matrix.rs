//! Matrices that lie in slices, and their product.
//!
//! The product is that of the crate `matrixmultiply`, which takes the instructions that the
//! processor has: about 100 GFLOP/s on one core of a Zen 4 for the sizes of this model, where plain
//! loops get 20 to 27 out of the instructions that every x86-64 has.

use std::ops::Range;

/// A matrix in borrowed memory: row by row, a part of one, or one transposed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    /// From one row to the next, from one column to the next.
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// All of `data`, row by row.
    ///
    /// # Panics
    /// If it is not `rows` times `columns` long.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of {rows} rows and {columns} columns");
        Self { data, rows, columns, strides: [columns, 1] }
    }

    /// The part in these rows and columns.
    pub(crate) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "part of a matrix");
        let data = &self.data[rows.start * self.strides[0] + columns.start * self.strides[1]..];
        Self { data, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// Rows as columns.
    pub(crate) fn transposed(self) -> Self {
        let [row, column] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [column, row], ..self }
    }

    fn is_inside(&self) -> bool {
        let last = |count: usize, stride| count.saturating_sub(1) * stride;
        let end = last(self.rows, self.strides[0]) + last(self.columns, self.strides[1]) + 1;
        self.rows == 0 || self.columns == 0 || end <= self.data.len()
    }
}

/// A matrix to write to: row by row, or a part of one.
#[derive(Debug)]
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// All of `data`, row by row.
    ///
    /// # Panics
    /// If it is not `rows` times `columns` long.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of {rows} rows and {columns} columns");
        Self { data, rows, columns, stride: columns }
    }

    /// The part in these rows and columns.
    pub(crate) fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'_> {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "part of a matrix");
        let data = &mut self.data[rows.start * self.stride + columns.start..];
        MatrixMut { data, rows: rows.len(), columns: columns.len(), stride: self.stride }
    }

    /// Becomes the product of `a` and `b`.
    pub(crate) fn set(&mut self, a: Matrix<'_>, b: Matrix<'_>) {
        self.product(a, b, 0.0);
    }

    /// The product of `a` and `b` is added to it.
    pub(crate) fn add(&mut self, a: Matrix<'_>, b: Matrix<'_>) {
        self.product(a, b, 1.0);
    }

    /// self = keep · self + a · b
    fn product(&mut self, a: Matrix<'_>, b: Matrix<'_>, keep: f32) {
        let shapes = (a.rows, a.columns, b.columns) == (self.rows, b.rows, self.columns);
        let end = self.rows.saturating_sub(1) * self.stride + self.columns;
        let inside = a.is_inside() && b.is_inside() && end <= self.data.len();
        assert!(shapes && inside, "{a:?} times {b:?}");
        let ([a_row, a_column], [b_row, b_column]) = (a.strides, b.strides);
        // SAFETY: the strides lead to no element outside of the slices, as was asserted; rows of
        // the result don't overlap, because its stride is at least its number of columns.
        unsafe {
            matrixmultiply::sgemm(
                self.rows,
                a.columns,
                self.columns,
                1.0,
                a.data.as_ptr(),
                a_row as isize,
                a_column as isize,
                b.data.as_ptr(),
                b_row as isize,
                b_column as isize,
                keep,
                self.data.as_mut_ptr(),
                self.stride as isize,
                1,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_parts_and_transposes_are_those_of_the_definition() {
        let a: Vec<f32> = (0..6 * 5).map(|number| number as f32).collect();
        let b: Vec<f32> = (0..4 * 7).map(|number| (number % 11) as f32).collect();
        let (left, right) = (Matrix::new(&a, 6, 5), Matrix::new(&b, 4, 7));
        // 3×2 times 2×3, into the middle of a 4×5 matrix that holds ones.
        let mut c = vec![1.0; 4 * 5];
        let (left, right) = (left.part(2..5, 3..5), right.part(1..4, 4..6).transposed());
        MatrixMut::new(&mut c, 4, 5).part(1..4, 1..4).add(left, right);
        for (place, value) in c.iter().enumerate() {
            let (row, column) = (place / 5, place % 5);
            let inside = (1..4).contains(&row) && (1..4).contains(&column);
            let term = |k| a[(row + 1) * 5 + 3 + k] * b[column * 7 + 4 + k];
            let expected = if inside { 1.0 + term(0) + term(1) } else { 1.0 };
            assert_eq!(*value, expected, "row {row}, column {column}");
        }
    }

    #[test]
    #[should_panic(expected = "times")]
    fn shapes_that_do_not_fit_are_refused() {
        let (a, b, mut c) = ([0.0; 6], [0.0; 6], [0.0; 4]);
        MatrixMut::new(&mut c, 2, 2).set(Matrix::new(&a, 2, 3), Matrix::new(&b, 2, 3));
    }
}
