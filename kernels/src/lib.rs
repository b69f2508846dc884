//! What unisum computes with: the element types and reduction operations, and the kernels that
//! fold, copy, encode and decode buffers of them.
//!
//! The crate uses nothing else of unisum. It knows no ranks, links or plans: it is given pointers.
//! Start at [`Fold`], one pass of a reduction, and [`Encoding`], what travels instead of `f32`.
//!
//! The loops are written once (`loops`), generic over the element type (`number`, `floats`), the
//! operation (`operator`) and the instruction set (`isa`). Each instruction set compiles them again
//! with its features switched on, and the compiler vectorises them; only floats of 16 and 8 bits
//! are converted by hand (`x86`). No step may be fused or reordered, so all of them give the same
//! bits. Users' functions are called piece by piece (`pieces`). Conversions between `f32` and what
//! travels of it are loops of the same kind (`encoding`), and so is what only copies (`copy`).

mod buffers;
mod copy;
mod custom;
mod element;
mod encoding;
mod float16;
mod float8;
mod floats;
mod fold;
mod isa;
mod loops;
mod number;
mod op;
mod operator;
mod panics;
mod pieces;
mod reciprocal;
mod watch;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use copy::copy;
pub use custom::{Custom, CustomOp, Function};
pub use element::{Bool, Dtype, Element, f8e4m3, f8e5m2};
pub use encoding::Encoding;
pub use fold::{Fold, Folded};
pub use isa::{Isa, Work, isa};
pub use op::{ReduceOp, Undefined};
pub use panics::{Panic, said_by_reduction};
