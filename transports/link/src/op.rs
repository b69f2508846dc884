//! Reduction operations: their names, wire codes and meaning.

use std::fmt;
use std::str::FromStr;

use crate::dtype::{UnknownCode, UnknownName};

/// How the elements of the ranks become one.
///
/// The discriminant is the wire code. Every result is the same in every bit on every machine:
///
/// | | integers | floats |
/// |---|---|---|
/// | sum, product | wrap around (two's complement) | IEEE 754, rounded to nearest even |
/// | average | sum, then division truncated toward zero | sum, then one division |
/// | min, max | the usual order | IEEE 754-2019 `minimum`, `maximum`: NaN wins, −0 < +0 |
/// | NaN result | – | the positive quiet NaN without payload |
///
/// `f16` and `bf16` are summed, multiplied and divided in `f32` and rounded once at the end of a
/// pass; what is too large becomes infinity. An integer sum that wrapped is averaged as it is.
///
/// A NaN result is `7e00`, `7fc0`, `7fc00000` or `7ff8000000000000`, for `f16`, `bf16`, `f32` and
/// `f64`: x86 keeps the payload of the first operand and compilers may swap operands, so that
/// without this two ranks could differ. Infinities and subnormal numbers follow IEEE 754, provided
/// that each thread has the default floating-point environment, as Rust requires: if a host
/// flushes subnormals on some ranks only, their bits differ.
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
    /// Adds the elements and divides by their count.
    Average = 5,
}

impl ReduceOp {
    /// Every operation, in the order of the wire codes.
    pub const ALL: [Self; 5] = [Self::Sum, Self::Product, Self::Min, Self::Max, Self::Average];

    /// What users may call it, the name it is printed with first.
    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Sum => &["sum"],
            Self::Product => &["prod", "product"],
            Self::Min => &["min", "minimum"],
            Self::Max => &["max", "maximum"],
            Self::Average => &["avg", "average", "mean"],
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

    /// Reads a name in any letter case: `sum`, `prod` or `product`, `avg` or `average`.
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
        assert_eq!(ReduceOp::ALL.map(|op| op as u8), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn unknown_names_and_codes_are_errors_that_say_what_was_given() {
        assert_eq!(ReduceOp::try_from(9).unwrap_err().to_string(), "unknown operation code 9");
        assert_eq!(
            "xor".parse::<ReduceOp>().unwrap_err().to_string(),
            "unknown operation `xor`, expected one of sum, prod, min, max, avg"
        );
    }
}
