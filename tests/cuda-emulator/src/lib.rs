//! A CUDA driver for tests. README.md says what it doubles, what it can't show, and how to set it.
//!
//! The crate is two things: the library itself, which a process under test loads as its driver, and
//! this Rust library, which tells a test where that one is ([`library_dir`]).
//!
//! Start reading at `api`, the entry points. Below it, `driver` is the state of a process (devices,
//! memory, streams, events), `ptx` reads kernels, `ops` knows the instructions, and `machine`
//! executes them.

mod api;
mod backoff;
mod driver;
mod locate;
mod machine;
mod ops;
mod ptx;

pub use locate::library_dir;
