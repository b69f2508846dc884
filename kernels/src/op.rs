//! Reduction operations: their names, wire codes and meaning.

use std::fmt;
use std::str::FromStr;

use crate::Dtype;
use crate::element::{UnknownCode, UnknownName};

/// How the elements of the ranks are combined into one.
///
/// The discriminant is the wire code. Every result has the same bits on every machine:
///
/// | | integers | floats | bool |
/// |---|---|---|---|
/// | sum | wraps around (two's complement) | IEEE 754, rounded to nearest even | or |
/// | product | wraps around | IEEE 754, rounded to nearest even | and |
/// | min, max | the usual order | IEEE 754-2019 `minimum`, `maximum`: NaN wins, −0 < +0 | and, or |
/// | average | sum, then division truncated toward zero | sum, then one division | undefined |
/// | bitand, bitor, bitxor | bit by bit | undefined | and, or, exclusive or |
///
/// Undefined operations are refused before anything is sent ([`Fold::check_defined`]).
///
/// 16-bit and 8-bit floats are summed, multiplied and divided in `f32`, and rounded once at the end
/// of a pass, to nearest even. A value that is then too large becomes infinity, or NaN in `f8e4m3`,
/// which has no infinities: nothing saturates. The sum of an average is also divided before it is
/// rounded, so it may exceed the range of the type where the average does not. Between the passes
/// of several ranks, it is rounded undivided. An integer sum that wrapped is averaged as it is.
///
/// A NaN result is the positive quiet NaN without payload: `7f`, `7e`, `7e00`, `7fc0`, `7fc00000`
/// or `7ff8000000000000`, for `f8e4m3`, `f8e5m2`, `f16`, `bf16`, `f32` and `f64`. x86 keeps the
/// payload of the first operand, and compilers may swap operands, so two ranks could differ
/// otherwise. Infinities and subnormal numbers follow IEEE 754, provided that each thread has the
/// default floating-point environment, as Rust requires: if a host flushes subnormals on some ranks
/// only, their bits differ.
///
/// [`Fold::check_defined`]: crate::Fold::check_defined
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum ReduceOp {
    /// Adds the elements.
    Sum = 1,
    /// Multiplies the elements.
    Product = 2,
    /// Keeps the least element.
    Min = 3,
    /// Keeps the greatest element.
    Max = 4,
    /// Adds the elements and divides by their count, once, at the end. 16-bit and 8-bit floats are
    /// added in `f32` within each fold and rounded between the folds of an algorithm. With several
    /// folds (ring, tree), a sum beyond the range of the type is infinite even though the average
    /// is not (of four times 40000 in `f16`, for example); if all ranks' elements are folded at
    /// once (one-shot, two-shot, direct), it is not. A sum of inputs scaled by 1/n stays in range
    /// everywhere.
    Average = 5,
    /// Keeps the bits that are set in all elements.
    BitAnd = 6,
    /// Keeps the bits that are set in any element.
    BitOr = 7,
    /// Keeps the bits that are set in an odd number of elements.
    BitXor = 8,
}

impl ReduceOp {
    /// Every operation, in the order of the wire codes.
    pub const ALL: [Self; 8] = [
        Self::Sum,
        Self::Product,
        Self::Min,
        Self::Max,
        Self::Average,
        Self::BitAnd,
        Self::BitOr,
        Self::BitXor,
    ];

    /// Whether the operation is defined for elements of this type.
    pub const fn is_defined_for(self, dtype: Dtype) -> bool {
        match self {
            Self::Sum | Self::Product | Self::Min | Self::Max => true,
            Self::Average => !matches!(dtype, Dtype::Bool),
            Self::BitAnd | Self::BitOr | Self::BitXor => !dtype.is_float(),
        }
    }

    /// The names users may use; the first is the one that is printed.
    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Sum => &["sum"],
            Self::Product => &["prod", "product"],
            Self::Min => &["min", "minimum"],
            Self::Max => &["max", "maximum"],
            Self::Average => &["avg", "average", "mean"],
            Self::BitAnd => &["bitand", "band", "and"],
            Self::BitOr => &["bitor", "bor", "or"],
            Self::BitXor => &["bitxor", "bxor", "xor"],
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.names()[0])
    }
}

impl FromStr for ReduceOp {
    type Err = UnknownName;

    /// Parses a name in any letter case: `sum`, `prod` or `product`, `bitand` or `and`.
    fn from_str(name: &str) -> Result<Self, UnknownName> {
        UnknownName::find("operation", name, &Self::ALL, |op| op.names())
    }
}

impl TryFrom<u8> for ReduceOp {
    type Error = UnknownCode;

    fn try_from(code: u8) -> Result<Self, UnknownCode> {
        UnknownCode::find("operation", code, &Self::ALL, |op| op as u8)
    }
}

/// A reduction that is not defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Undefined {
    /// The operation is not defined for the type.
    #[error("{op} is not defined for {dtype}, {}", why(*.op))]
    Operation {
        /// The requested operation.
        op: ReduceOp,
        /// The type of the elements.
        dtype: Dtype,
    },
    /// A factor for elements that are not floats.
    #[error("a sum with a factor is not defined for {0}, only for floats")]
    FactorOfType(Dtype),
    /// A factor for an operation other than a sum.
    #[error("a factor goes with a sum, not with {0}")]
    FactorOf(ReduceOp),
}

const fn why(op: ReduceOp) -> &'static str {
    match op {
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => "only for integers and bool",
        _ => "only for numbers",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_lead_back_to_the_operation() {
        for op in ReduceOp::ALL {
            assert_eq!(ReduceOp::try_from(op as u8), Ok(op));
            for name in op.names() {
                assert_eq!(name.to_uppercase().parse(), Ok(op));
            }
        }
        assert_eq!(ReduceOp::ALL.map(|op| op as u8), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn unknown_names_and_codes_are_errors_that_say_what_was_given() {
        assert_eq!(ReduceOp::try_from(9).unwrap_err().to_string(), "unknown operation code 9");
        assert_eq!(
            "nand".parse::<ReduceOp>().unwrap_err().to_string(),
            "unknown operation `nand`, expected one of \
             sum, prod, min, max, avg, bitand, bitor, bitxor"
        );
    }
}
