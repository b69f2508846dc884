//! Gradient buckets: what a training framework calls during the backward pass.

#[cfg_attr(not(test), expect(dead_code, reason = "the buckets that encode are not there yet"))]
mod codec;
mod scaler;

pub use scaler::LossScaler;
