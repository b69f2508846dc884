//! What belongs into a checkpoint of buckets.

use std::ffi::c_void;

use crate::buckets::{Layer, unisum_buckets};
use crate::handles;
use crate::memory::{list, put_bytes};
use crate::status::{guard, invalid, unisum_status};

/// The layout of buckets, for unisum_bucket_options: `length` gets how many bytes it has, of which
/// `capacity` at most are written to `bytes`, which may be NULL. It is rank 0's order of the first
/// step, after that: the same on all ranks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_layout(
    buckets: *const unisum_buckets,
    bytes: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let saved = layer.shared()?.layout().to_bytes();
        // SAFETY: C promises that both may be written.
        unsafe { put_bytes(&saved, bytes, capacity, length) }
    })
}

/// What an encoding or a low rank keeps from step to step, for a checkpoint: this rank's own.
/// Written as by unisum_buckets_layout.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_save(
    buckets: *const unisum_buckets,
    bytes: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        let saved = layer.alone()?.idle()?.save_hook();
        // SAFETY: C promises that both may be written.
        unsafe { put_bytes(&saved, bytes, capacity, length) }
    })
}

/// Goes on from what unisum_buckets_save gave on this rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_restore(
    buckets: *const unisum_buckets,
    bytes: *const c_void,
    length: usize,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        // SAFETY: C promises so many.
        let saved = unsafe { list(bytes.cast::<u8>(), length, "what was saved") }?;
        Ok(layer.alone()?.idle()?.restore_hook(saved)?)
    })
}

/// Says that from the next step on gradients have a loss scale that is `factor` times the last one:
/// what an encoding or a low rank keeps of them is multiplied. Every rank says the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_rescale(
    buckets: *const unisum_buckets,
    factor: f32,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        if !(factor.is_finite() && factor > 0.0) {
            return invalid(format!("a loss scale does not change by {factor}"));
        }
        layer.alone()?.idle()?.rescale_hook(factor);
        Ok(())
    })
}
