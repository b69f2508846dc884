//! Element types: their names, wire codes and sizes.

use std::fmt;
use std::str::FromStr;

/// The type of the elements of a buffer.
///
/// The discriminant is the wire code. Peers compare it, so a code never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE 754 binary16.
    F16 = 1,
    /// The upper half of an IEEE 754 binary32.
    Bf16 = 2,
    /// IEEE 754 binary32.
    F32 = 3,
    /// IEEE 754 binary64.
    F64 = 4,
    /// Signed, 8 bits.
    I8 = 5,
    /// Unsigned, 8 bits.
    U8 = 6,
    /// Signed, 16 bits.
    I16 = 7,
    /// Unsigned, 16 bits.
    U16 = 8,
    /// Signed, 32 bits.
    I32 = 9,
    /// Unsigned, 32 bits.
    U32 = 10,
    /// Signed, 64 bits.
    I64 = 11,
    /// Unsigned, 64 bits.
    U64 = 12,
    /// 4 bits of exponent and 3 of mantissa, without infinities ([`f8e4m3`](crate::f8e4m3)).
    F8E4M3 = 13,
    /// 5 bits of exponent and 2 of mantissa ([`f8e5m2`](crate::f8e5m2)).
    F8E5M2 = 14,
    /// A byte that is true unless it is 0 ([`Bool`](crate::Bool)). Results are 0 or 1.
    Bool = 15,
}

impl Dtype {
    /// Every dtype, in the order of the wire codes.
    pub const ALL: [Self; 15] = [
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::F64,
        Self::I8,
        Self::U8,
        Self::I16,
        Self::U16,
        Self::I32,
        Self::U32,
        Self::I64,
        Self::U64,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::Bool,
    ];

    /// The size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::F8E4M3 | Self::F8E5M2 | Self::Bool => 1,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether the elements are floating-point numbers.
    pub const fn is_float(self) -> bool {
        match self {
            Self::F8E4M3 | Self::F8E5M2 | Self::F16 | Self::Bf16 | Self::F32 | Self::F64 => true,
            Self::I8 | Self::U8 | Self::I16 | Self::U16 | Self::I32 | Self::U32 => false,
            Self::I64 | Self::U64 | Self::Bool => false,
        }
    }

    /// The names users may use; the first is the one that is printed.
    const fn names(self) -> &'static [&'static str] {
        match self {
            Self::F16 => &["f16", "half", "float16", "fp16"],
            Self::Bf16 => &["bf16", "bfloat16"],
            Self::F32 => &["f32", "float", "float32", "fp32"],
            Self::F64 => &["f64", "double", "float64", "fp64"],
            Self::I8 => &["i8", "int8", "char"],
            Self::U8 => &["u8", "uint8", "byte"],
            Self::I16 => &["i16", "int16", "short"],
            Self::U16 => &["u16", "uint16"],
            Self::I32 => &["i32", "int32", "int"],
            Self::U32 => &["u32", "uint32"],
            Self::I64 => &["i64", "int64", "long"],
            Self::U64 => &["u64", "uint64"],
            Self::F8E4M3 => &["f8e4m3", "float8_e4m3fn", "fp8_e4m3", "e4m3"],
            Self::F8E5M2 => &["f8e5m2", "float8_e5m2", "fp8_e5m2", "e5m2"],
            Self::Bool => &["bool", "boolean"],
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.names()[0])
    }
}

impl FromStr for Dtype {
    type Err = UnknownName;

    /// Parses a name in any letter case: `f32`, or the name in other libraries (`float`,
    /// `float32`).
    fn from_str(name: &str) -> Result<Self, UnknownName> {
        UnknownName::find("dtype", name, &Self::ALL, |dtype| dtype.names())
    }
}

impl TryFrom<u8> for Dtype {
    type Error = UnknownCode;

    fn try_from(code: u8) -> Result<Self, UnknownCode> {
        UnknownCode::find("dtype", code, &Self::ALL, |dtype| dtype as u8)
    }
}

/// A Rust type whose slices can be reduced. Sealed: there is one for each [`Dtype`].
///
/// Any bytes are a valid value, because peers write them.
pub trait Element: Copy + Send + Sync + 'static + private::Sealed {
    /// The dtype that describes this type to peers.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),* $(,)?) => {$(
        impl private::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )*};
}

elements! {
    half::f16 => F16, half::bf16 => Bf16, f32 => F32, f64 => F64,
    i8 => I8, u8 => U8, i16 => I16, u16 => U16, i32 => I32, u32 => U32, i64 => I64, u64 => U64,
    crate::f8e4m3 => F8E4M3, crate::f8e5m2 => F8E5M2, crate::Bool => Bool,
}

mod private {
    /// Keeps [`Element`](super::Element) to the types of this crate.
    pub trait Sealed {}
}

/// A name that is no dtype or operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} `{given}`, expected one of {}", .expected.join(", "))]
pub struct UnknownName {
    what: &'static str,
    given: String,
    expected: Vec<&'static str>,
}

impl UnknownName {
    /// Finds the value one of whose `names` is `given`, in any letter case.
    pub(crate) fn find<T: Copy>(
        what: &'static str,
        given: &str,
        all: &[T],
        names: impl Fn(T) -> &'static [&'static str],
    ) -> Result<T, Self> {
        let matches = |value: T| names(value).iter().any(|name| name.eq_ignore_ascii_case(given));
        all.iter().copied().find(|&value| matches(value)).ok_or_else(|| Self {
            what,
            given: given.to_owned(),
            expected: all.iter().map(|&value| names(value)[0]).collect(),
        })
    }
}

/// A wire code of no dtype or operation: the peer is newer, or the bytes are damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} code {code}")]
pub struct UnknownCode {
    what: &'static str,
    code: u8,
}

impl UnknownCode {
    /// Finds the value whose wire code is `code`.
    pub(crate) fn find<T: Copy>(
        what: &'static str,
        code: u8,
        all: &[T],
        code_of: impl Fn(T) -> u8,
    ) -> Result<T, Self> {
        all.iter().copied().find(|&value| code_of(value) == code).ok_or(Self { what, code })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_lead_back_to_the_dtype() {
        for dtype in Dtype::ALL {
            assert_eq!(Dtype::try_from(dtype as u8), Ok(dtype));
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
            for name in dtype.names() {
                assert_eq!(name.to_uppercase().parse(), Ok(dtype));
            }
        }
    }

    #[test]
    fn wire_codes_are_fixed() {
        let codes = Dtype::ALL.map(|dtype| dtype as u8);
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    }

    #[test]
    fn unknown_names_and_codes_are_errors_that_say_what_was_given() {
        assert_eq!(Dtype::try_from(0).unwrap_err().to_string(), "unknown dtype code 0");
        assert_eq!(Dtype::try_from(16).unwrap_err().to_string(), "unknown dtype code 16");
        assert_eq!(
            "f8".parse::<Dtype>().unwrap_err().to_string(),
            "unknown dtype `f8`, expected one of \
             f16, bf16, f32, f64, i8, u8, i16, u16, i32, u32, i64, u64, f8e4m3, f8e5m2, bool"
        );
    }

    #[test]
    fn an_element_is_as_large_as_its_dtype_says() {
        fn check<T: Element>() {
            assert_eq!(T::DTYPE.bytes(), size_of::<T>());
        }
        check::<half::f16>();
        check::<half::bf16>();
        check::<f32>();
        check::<f64>();
        check::<i8>();
        check::<u8>();
        check::<i16>();
        check::<u16>();
        check::<i32>();
        check::<u32>();
        check::<i64>();
        check::<u64>();
        check::<crate::f8e4m3>();
        check::<crate::f8e5m2>();
        check::<crate::Bool>();
    }
}
