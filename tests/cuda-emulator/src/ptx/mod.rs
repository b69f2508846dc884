//! Reads PTX text and turns it into code for the [machine](crate::machine).
//!
//! [`Module::load`] parses the text once ([`parser`]), gives the variables of the module addresses,
//! and decodes each function into compact instructions ([`decoder`]). Text that uses anything the
//! machine does not know is refused here, never when it runs.

mod decoder;
mod lexer;
mod module;
mod operands;
mod parser;
mod symbols;

use std::fmt;

pub(crate) use decoder::Decoder;
pub(crate) use module::Module;
pub(crate) use parser::Operand;

/// Why PTX text was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    line: u32,
    reason: String,
}

impl Refusal {
    pub(crate) fn new(line: u32, reason: impl Into<String>) -> Self {
        Self { line, reason: reason.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

impl Space {
    /// The space that a directive or modifier names, without its dot.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "global" => Self::Global,
            "const" => Self::Const,
            "shared" | "shared::cta" => Self::Shared,
            "local" => Self::Local,
            "param" | "param::entry" | "param::func" => Self::Param,
            _ => return None,
        })
    }
}

/// How many bytes an element of a type takes.
pub(crate) fn size_of_type(name: &str) -> Option<usize> {
    Some(match name {
        "b8" | "u8" | "s8" | "pred" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}
