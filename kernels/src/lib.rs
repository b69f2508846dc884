//! What unisum computes with: element types, reduction operations, and the kernels that reduce
//! (fold), copy, encode and decode buffers.
//!
//! The crate depends on nothing else of unisum. It knows no ranks, links or plans, only pointers.
//! Start at [`Fold`], one pass of a reduction, and at [`Encoding`], a compressed form of `f32`.
//!
//! The loops are written once (`loops`), generic over the element type (`number`, `floats`), the
//! operation (`operator`) and the instruction set (`isa`). They are compiled again for each
//! instruction set, and the compiler vectorizes them; only 16-bit and 8-bit floats are converted by
//! hand (`x86`). No operation may be fused or reordered, so all instruction sets give the same
//! bits. User functions are called piece by piece (`pieces`). Conversions between `f32` and its
//! encodings are loops of the same kind (`encoding`), and so are plain copies (`copy`). Kernels for
//! NVIDIA devices ([`cuda`]) are written apart, in CUDA C, and give the same bits.

// Here, since all other crates use this one: nothing else is said first.
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("unisum runs on Linux, with 64-bit addresses: x86-64 and aarch64 are tested");

mod buffers;
mod copy;
pub mod cuda;
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
