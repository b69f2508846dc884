//! A two-dimensional mesh of ranks: data parallel one way, model parallel the other.

use crate::{Communicator, Error, ErrorKind};

/// The ranks of a communicator in rows and columns, with a group along each.
///
/// Rank r is in row r / columns and column r % columns. The usual use: the ranks of a row hold the
/// parts of one copy of the model (tensor parallelism), and the ranks of a column hold the same
/// part of different copies (data parallelism).
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
    /// Collective, like [`Communicator::split`]; it is called twice.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there are not rows times columns ranks, and as
    /// [`Communicator::split`].
    pub fn new(communicator: &Communicator, rows: usize, columns: usize) -> Result<Self, Error> {
        let (rank, world) = (communicator.rank(), communicator.world());
        if rows.checked_mul(columns) != Some(world) {
            let text = format!("{world} ranks make no {rows} rows of {columns}");
            return Err(Error::new(ErrorKind::Configuration, text).on(rank));
        }
        let (row, column) = (rank / columns, rank % columns);
        let group = |color: usize, key: usize| {
            let group = communicator.split(Some(color as u32), key as i64)?;
            Ok(group.unwrap_or_else(|| unreachable!("every rank gave a color")))
        };
        Ok(Self { row: group(row, column)?, column: group(column, row)? })
    }
}
