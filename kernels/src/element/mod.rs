//! The types of elements.

mod boolean;
mod dtype;
mod float8;

pub use boolean::Bool;
pub use dtype::{Dtype, Element};
pub use float8::{f8e4m3, f8e5m2};

pub(crate) use dtype::{UnknownCode, UnknownName};
