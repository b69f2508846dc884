//! Buckets of which each rank averages its shard only.

use std::ffi::c_void;
use std::sync::{RwLock, RwLockWriteGuard};

use unisum::buckets::Weights;
use unisum::{Dtype, Element};

use crate::buckets::{Layer, State, for_gradient, give_gradient, unisum_buckets};
use crate::handles::{self, Object};
use crate::memory::{check_place, put};
use crate::status::{Outcome, guard, invalid, unisum_status};

/// A model's parameters themselves, in the memory and the layout of sharded buckets.
#[derive(Debug)]
pub struct unisum_weights {
    _private: [u8; 0],
}

/// The elements of a parameter in a rank's shard of a bucket.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_shard_piece {
    /// The parameter, by its number in the list.
    pub parameter: usize,
    /// The first of its elements.
    pub start: usize,
    /// How many.
    pub count: usize,
    /// Where the first of them is in the shard.
    pub at: usize,
}

struct Kept {
    weights: RwLock<Weights>,
    /// Of each parameter.
    dtypes: Vec<Dtype>,
    /// Of each bucket.
    bucket_dtypes: Vec<Dtype>,
}

impl Object for Kept {
    const KIND: usize = 8;
    const NAME: &'static str = "weights";
}

impl Kept {
    fn alone(&self) -> Outcome<RwLockWriteGuard<'_, Weights>> {
        let busy = "another call of these weights is under way or panicked";
        self.weights.try_write().or_else(|_| invalid(busy))
    }
}

/// How many buckets there are; a step may lay them out anew, unless they are sharded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_count(
    buckets: *const unisum_buckets,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let now = layer.shared()?.layout().buckets().len();
        // SAFETY: C promises that it may be written.
        unsafe { put(count, now, "the count") }
    })
}

/// This rank's shard of a bucket's gradients: after a step, the averages. The program may read it
/// until the next step begins. `count`, which may be NULL, gets how many elements that are, with
/// padding. Needs UNISUM_SHARDED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_shard(
    buckets: *const unisum_buckets,
    bucket: usize,
    gradients: *mut *const c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(gradients, "the gradients")?;
        let mut state = layer.alone()?;
        let dtype = state.dtype_of_bucket(bucket)?;
        check_sharded(&state)?;
        let buckets = state.idle()?;
        let (start, len) = for_gradient!(dtype, T => {
            let shard = buckets.shard_gradient::<T>(bucket);
            Ok((shard.as_ptr().cast::<c_void>(), shard.len()))
        })?;
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient((start.cast_mut(), len), gradients.cast(), count) }
    })
}

/// What this rank's shard of a bucket consists of, besides padding: `count` gets how many pieces
/// there are, of which `capacity` at most are written to `pieces`, which may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_shard_pieces(
    buckets: *const unisum_buckets,
    bucket: usize,
    pieces: *mut unisum_shard_piece,
    capacity: usize,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(count, "the count")?;
        let mut state = layer.alone()?;
        state.dtype_of_bucket(bucket)?;
        check_sharded(&state)?;
        let all = state.idle()?.shard_pieces(bucket);
        if !pieces.is_null() {
            check_place(pieces, "the pieces")?;
            for (index, piece) in all.iter().enumerate().take(capacity) {
                let told = unisum_shard_piece {
                    parameter: piece.parameter,
                    start: piece.elements.start,
                    count: piece.elements.len(),
                    at: piece.at,
                };
                // SAFETY: C promises room for so many.
                let place = unsafe { pieces.add(index) };
                // SAFETY: as above.
                unsafe { place.write(told) };
            }
        }
        // SAFETY: C promises that it may be written.
        unsafe { put(count, all.len(), "the count") }
    })
}

pub(crate) fn check_sharded(state: &State) -> Outcome {
    match state.is_sharded() {
        true => Ok(()),
        false => invalid("these buckets are not sharded: UNISUM_SHARDED makes them so"),
    }
}

/// Allocates memory for the parameters of sharded buckets, zeroed: each rank updates its shards,
/// and unisum_buckets_gather completes them. Freed by unisum_weights_free. Not collective.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_weights_create(
    buckets: *const unisum_buckets,
    weights: *mut *mut unisum_weights,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(weights, "the weights")?;
        let mut state = layer.alone()?;
        check_sharded(&state)?;
        let made = RwLock::new(state.idle()?.weights()?);
        let dtypes = state.dtypes();
        let first = |parameters: &[usize]| dtypes[parameters[0]];
        let bucket_dtypes = state.layout().buckets().map(first).collect();
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Kept { weights: made, dtypes, bucket_dtypes }, weights) };
        Ok(())
    })
}

/// A parameter, to be initialised in the same way on all ranks, or read. It stays in place as long
/// as the weights. `count` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_weights_get(
    weights: *const unisum_weights,
    parameter: usize,
    elements: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let kept = handles::get::<Kept, _>(weights)?;
        let dtype = known(&kept.dtypes, parameter, "parameter")?;
        check_place(elements, "the elements")?;
        let mut weights = kept.alone()?;
        let found = for_gradient!(dtype, T => Ok(lent(weights.get_mut::<T>(parameter))))?;
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient(found, elements, count) }
    })
}

/// This rank's shard of a bucket of the weights, for the optimiser to update: as many elements as
/// unisum_buckets_shard gives.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_weights_shard(
    weights: *const unisum_weights,
    bucket: usize,
    elements: *mut *mut c_void,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let kept = handles::get::<Kept, _>(weights)?;
        let dtype = known(&kept.bucket_dtypes, bucket, "bucket")?;
        check_place(elements, "the elements")?;
        let mut weights = kept.alone()?;
        let found = for_gradient!(dtype, T => Ok(lent(weights.shard_mut::<T>(bucket))))?;
        // SAFETY: C promises that both may be written.
        unsafe { give_gradient(found, elements, count) }
    })
}

fn known(dtypes: &[Dtype], index: usize, what: &str) -> Outcome<Dtype> {
    let none = || invalid(format!("there is no {what} {index} among {}", dtypes.len()));
    dtypes.get(index).copied().map_or_else(none, Ok)
}

fn lent<T: Element>(elements: &mut [T]) -> (*mut c_void, usize) {
    (elements.as_mut_ptr().cast(), elements.len())
}

/// Gathers all shards of the weights on all ranks. Collective: every rank calls it, between the
/// same steps. Blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_gather(
    buckets: *const unisum_buckets,
    weights: *const unisum_weights,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let kept = handles::get::<Kept, _>(weights)?;
        let (mut state, mut weights) = (layer.alone()?, kept.alone()?);
        Ok(state.idle()?.gather(&mut weights)?.wait()?)
    })
}

/// Frees weights.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_weights_free(weights: *const unisum_weights) -> unisum_status {
    guard(|| handles::remove::<Kept, _>(weights).map(drop))
}
