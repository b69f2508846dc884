//! The kernels for NVIDIA devices give the bits of the host's: their source, compiled for the host,
//! and the PTX that is shipped, as an emulated driver interprets it.
//!
//! Without a C++ compiler the former is skipped, unless `UNISUM_TEST_C` is `required`.

#![cfg(not(miri))]
#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod copies;
mod device;
mod emulated;
mod flags;
mod folds;
#[allow(dead_code, reason = "much of it is for the kernels of the host")]
#[path = "../kernels/harness.rs"]
mod harness;
#[path = "../kernels/reference.rs"]
mod reference;
mod staged;

use unisum_kernels::Dtype;

use crate::reference::{Reference, for_each_element, samples};

/// Elements for each of `sources`, as bytes: corner cases and others.
fn inputs(dtype: Dtype, sources: usize, count: usize) -> Vec<Vec<u8>> {
    fn of<T: Reference>(dtype: Dtype, sources: usize, count: usize, all: &mut Vec<Vec<u8>>) {
        for source in (0..sources).filter(|_| T::DTYPE == dtype) {
            let values = samples::<T>(count, (source * 7919 + count) as u64);
            // SAFETY: an element is plain data without padding, so its bytes may be read.
            let bytes = unsafe {
                std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(&values[..]))
            };
            all.push(bytes.to_vec());
        }
    }
    let mut all = Vec::new();
    for_each_element!(of(dtype, sources, count, &mut all));
    all
}
