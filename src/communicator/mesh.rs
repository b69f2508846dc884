//! A two-dimensional mesh of ranks: data parallel along one axis, model parallel along the other.

use crate::communicator::groups::Making;
use crate::{Communicator, Error};

/// The ranks of a communicator in rows and columns, with a group along each.
///
/// Rank r is in row r / columns and column r % columns. Usually, the ranks of a row hold the parts
/// of one copy of the model (tensor parallelism), and the ranks of a column hold the same part of
/// different copies (data parallelism).
#[derive(Debug)]
pub struct Mesh {
    /// The ranks of this rank's row, numbered by column.
    pub row: Communicator,
    /// The ranks of this rank's column, numbered by row.
    pub column: Communicator,
}

impl Mesh {
    /// Arranges the ranks of `communicator` in `rows` rows of `columns` ranks.
    ///
    /// Collective, like [`Communicator::split`], which it calls twice.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`](crate::ErrorKind::Mismatch) if ranks pass different numbers,
    /// [`ErrorKind::Configuration`](crate::ErrorKind::Configuration) if there are not rows times
    /// columns ranks, both on all ranks; and as [`Communicator::split`].
    pub fn new(communicator: &Communicator, rows: usize, columns: usize) -> Result<Self, Error> {
        let (rank, making) = (communicator.rank(), Making::Mesh { rows, columns });
        // Without columns it is refused, by all ranks alike.
        let (row, column) = (rank / columns.max(1), rank % columns.max(1));
        let group = |color: usize, key: usize| {
            let group = communicator.make(&making, Some(color as u32), key as i64)?;
            Ok(group.unwrap_or_else(|| unreachable!("every rank gave a color")))
        };
        Ok(Self { row: group(row, column)?, column: group(column, row)? })
    }
}
