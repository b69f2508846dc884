//! Buckets of which each rank averages its shard only, weights in their memory, and what ranks keep
//! for their shards; `unisum._sharded` is built on this.

use std::sync::{RwLock, RwLockWriteGuard};

use pyo3::exceptions::{PyIndexError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use unisum::buckets::Weights as Lent;
use unisum::buckets::{Buckets as Layer, Parameter, Place, Resharded, ShardMove, ShardPiece};
use unisum::{Dtype, Element, Error};

use crate::array::Array;
use crate::buckets::{Buckets, parameter_of, with_gradient};
use crate::elements::by_name;
use crate::errors::block;

/// The fields of `unisum.ShardPiece`, in their order: parameter, start, stop, at.
type Piece = (usize, usize, usize, usize);
/// The fields of `unisum.ShardMove`, in their order: parameter, start, stop, source, destination.
type Move = (usize, usize, usize, Option<usize>, usize);

fn told(piece: ShardPiece) -> Piece {
    (piece.parameter, piece.elements.start, piece.elements.end, piece.at)
}

/// # Errors
/// `IndexError` if there is no such thing.
fn check_index(index: usize, count: usize, what: &str) -> PyResult<()> {
    match index < count {
        true => Ok(()),
        false => Err(PyIndexError::new_err(format!("there is no {what} {index} among {count}"))),
    }
}

/// An array of one dimension.
fn array(place: Place) -> Array {
    let (count, dtype) = (place.count(), place.dtype());
    Array::of_place(place, vec![count], dtype)
}

impl Buckets {
    /// # Errors
    /// `ValueError` if the buckets are not sharded, `IndexError` if there is no such bucket.
    fn check_bucket(&self, layer: &Layer, bucket: usize) -> PyResult<()> {
        self.check_sharded()?;
        check_index(bucket, layer.layout().buckets().len(), "bucket")
    }

    fn check_sharded(&self) -> PyResult<()> {
        match self.is_sharded {
            true => Ok(()),
            false => Err(PyValueError::new_err("these buckets are not sharded: `sharded=True`")),
        }
    }
}

/// The elements of a bucket that this rank averages, the first and the one behind the last, and
/// what they consist of.
#[pyfunction]
pub(crate) fn shard_of(buckets: &Buckets, bucket: usize) -> PyResult<(usize, usize, Vec<Piece>)> {
    let mut state = buckets.alone()?;
    let layer = state.idle()?;
    buckets.check_bucket(layer, bucket)?;
    let shard = layer.shard(bucket);
    Ok((shard.start, shard.end, layer.shard_pieces(bucket).into_iter().map(told).collect()))
}

/// This rank's shard of a bucket's gradients.
#[pyfunction]
pub(crate) fn shard_gradient(py: Python<'_>, buckets: &Buckets, bucket: usize) -> PyResult<Array> {
    let mut state = buckets.alone()?;
    let layer = state.idle()?;
    buckets.check_bucket(layer, bucket)?;
    Ok(array(py.detach(|| layer.shard_place(bucket))))
}

/// Memory for the parameters themselves.
#[pyfunction]
pub(crate) fn make_weights(py: Python<'_>, buckets: &Buckets) -> PyResult<Weights> {
    let mut state = buckets.alone()?;
    let layer = state.idle()?;
    buckets.check_sharded()?;
    let weights = block(py, || layer.weights())?;
    let (count, parameters) = (layer.layout().buckets().len(), buckets.parameters.clone());
    Ok(Weights { lent: RwLock::new(weights), parameters, buckets: count })
}

/// A model's parameters themselves, in the memory and the layout of sharded buckets.
#[pyclass(frozen, name = "Weights", module = "unisum._unisum")]
pub(crate) struct Weights {
    lent: RwLock<Lent>,
    parameters: Vec<Parameter>,
    buckets: usize,
}

fn weights_busy<T>(_: T) -> PyErr {
    PyRuntimeError::new_err("another call of these weights is under way")
}

#[pymethods]
impl Weights {
    /// A parameter.
    fn _parameter(&self, parameter: usize) -> PyResult<Array> {
        let known = parameter_of(&self.parameters, parameter)?;
        let place = self.lent.try_read().map_err(weights_busy)?.place(parameter);
        Ok(Array::of_place(place, known.shape().to_vec(), known.dtype()))
    }

    /// This rank's shard of a bucket.
    fn _shard(&self, bucket: usize) -> PyResult<Array> {
        check_index(bucket, self.buckets, "bucket")?;
        Ok(array(self.lent.try_read().map_err(weights_busy)?.shard_place(bucket)))
    }

    /// Gathers all shards on all ranks.
    fn _gather(&self, py: Python<'_>, buckets: &Buckets) -> PyResult<()> {
        let mut state = buckets.alone()?;
        let layer = state.idle()?;
        buckets.check_sharded()?;
        let mut lent = self.lent.try_write().map_err(weights_busy)?;
        let lent = &mut *lent;
        block(py, || layer.gather(lent)?.wait())
    }
}

/// State whose elements are of any type of gradients.
trait Vectors: Send + Sync {
    fn reshard(&mut self, buckets: &mut Layer) -> Result<Resharded, Error>;
    fn copy(&mut self, buckets: &mut Layer) -> Result<(), Error>;
    fn version(&self) -> u64;
    fn set_version(&mut self, version: u64);
    fn place(&self, bucket: usize, vector: usize) -> Place;
}

impl<T: Element + Default> Vectors for unisum::buckets::ShardState<T> {
    fn reshard(&mut self, buckets: &mut Layer) -> Result<Resharded, Error> {
        buckets.reshard(self)
    }

    fn copy(&mut self, buckets: &mut Layer) -> Result<(), Error> {
        buckets.copy_shards(self)
    }

    fn version(&self) -> u64 {
        self.version()
    }

    fn set_version(&mut self, version: u64) {
        self.set_version(version);
    }

    fn place(&self, bucket: usize, vector: usize) -> Place {
        self.place(bucket, vector)
    }
}

/// What a rank keeps for its shards from step to step.
#[pyclass(frozen, name = "ShardState", module = "unisum._unisum")]
pub(crate) struct ShardState {
    kept: RwLock<Kept>,
    /// How many vectors.
    count: usize,
}

struct Kept {
    vectors: Box<dyn Vectors>,
    /// By bucket, what this rank's shards consist of.
    pieces: Vec<Vec<ShardPiece>>,
}

/// More is a count that went wrong: optimizers have two or three.
const MOST_VECTORS: usize = 1024;

impl ShardState {
    fn alone(&self) -> PyResult<RwLockWriteGuard<'_, Kept>> {
        let busy = "another call of this state of shards is under way";
        self.kept.try_write().map_err(|_| PyRuntimeError::new_err(busy))
    }
}

#[pymethods]
impl ShardState {
    #[new]
    fn new(vectors: usize, dtype: &str) -> PyResult<Self> {
        if vectors > MOST_VECTORS {
            let text = format!("{vectors} vectors, of at most {MOST_VECTORS}");
            return Err(PyValueError::new_err(text));
        }
        let dtype = by_name(dtype)?;
        if !dtype.is_float() || dtype.bytes() < 2 {
            return Err(PyTypeError::new_err(format!("gradients have no elements of {dtype}")));
        }
        let made: Box<dyn Vectors> = with_gradient!(dtype, T => {
            Box::new(unisum::buckets::ShardState::<T>::new(vectors))
        });
        let kept = RwLock::new(Kept { vectors: made, pieces: Vec::new() });
        Ok(Self { kept, count: vectors })
    }

    #[getter]
    fn version(&self) -> PyResult<u64> {
        Ok(self.alone()?.vectors.version())
    }

    fn set_version(&self, version: u64) -> PyResult<()> {
        self.alone()?.vectors.set_version(version);
        Ok(())
    }

    /// Lays the state out for these buckets' shards: the version that all ranks have now, and what
    /// became of each element.
    fn _reshard(&self, py: Python<'_>, buckets: &Buckets) -> PyResult<(u64, Vec<Move>)> {
        let mut state = buckets.alone()?;
        let layer = state.idle()?;
        buckets.check_sharded()?;
        let mut kept = self.alone()?;
        let vectors = &mut kept.vectors;
        let Resharded { version, moves, .. } = block(py, || vectors.reshard(layer))?;
        let count = layer.layout().buckets().len();
        kept.pieces = (0..count).map(|bucket| layer.shard_pieces(bucket)).collect();
        let told =
            |it: ShardMove| (it.parameter, it.elements.start, it.elements.end, it.from, it.to);
        Ok((version, moves.into_iter().map(told).collect()))
    }

    /// Copies the state to the next rank.
    fn _copy(&self, py: Python<'_>, buckets: &Buckets) -> PyResult<()> {
        let mut state = buckets.alone()?;
        let layer = state.idle()?;
        buckets.check_sharded()?;
        let mut kept = self.alone()?;
        let vectors = &mut kept.vectors;
        block(py, || vectors.copy(layer))
    }

    /// A vector of this rank's shard of a bucket.
    fn _vector(&self, bucket: usize, vector: usize) -> PyResult<Array> {
        let kept = self.alone()?;
        check_index(vector, self.count, "vector")?;
        check_index(bucket, kept.pieces.len(), "bucket")?;
        Ok(array(kept.vectors.place(bucket, vector)))
    }

    /// Some elements of a parameter in one of this rank's shards.
    fn _elements(
        &self,
        vector: usize,
        parameter: usize,
        start: usize,
        stop: usize,
    ) -> PyResult<Array> {
        let kept = self.alone()?;
        check_index(vector, self.count, "vector")?;
        let is_in = |piece: &&ShardPiece| {
            let whole = &piece.elements;
            piece.parameter == parameter
                && (whole.start..=whole.end).contains(&start)
                && (start..=whole.end).contains(&stop)
        };
        let found = kept.pieces.iter().enumerate();
        let mut found = found.filter_map(|(bucket, them)| Some((bucket, them.iter().find(is_in)?)));
        let Some((bucket, piece)) = found.next() else {
            return Err(PyValueError::new_err(format!(
                "elements {start} to {stop} of parameter {parameter} are in no shard of this rank"
            )));
        };
        let first = piece.at + start - piece.elements.start;
        Ok(array(kept.vectors.place(bucket, vector).part(first..first + stop - start)))
    }
}
