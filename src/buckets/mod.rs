//! Gradient buckets: what a training framework calls during the backward pass.

#[cfg_attr(not(test), expect(dead_code, reason = "the buckets that encode are not there yet"))]
mod codec;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg_attr(not(test), expect(dead_code, reason = "the hook that calls it is not there yet"))]
mod power;
mod scaler;

pub use scaler::LossScaler;
