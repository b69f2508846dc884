//! The 8-bit floats of the OCP 8-bit floating point specification (OFP8), revision 1.0.

use std::cmp::Ordering;
use std::fmt;

use crate::float8::{e4m3_to_f32, e5m2_to_f32, f32_to_e4m3, f32_to_e5m2};

macro_rules! float8 {
    ($(#[$doc:meta])* $name:ident, $widen:ident, $narrow:ident, $nan:expr, $max:expr) => {
        $(#[$doc])*
        #[expect(non_camel_case_types, reason = "named like the floats of the language")]
        #[derive(Clone, Copy, Default)]
        #[repr(transparent)]
        pub struct $name(u8);

        impl $name {
            /// The canonical NaN, which results have.
            pub const NAN: Self = Self($nan);
            /// The greatest finite value.
            pub const MAX: Self = Self($max);
            /// The least finite value.
            pub const MIN: Self = Self($max | 0x80);

            /// The float with these bits.
            pub const fn from_bits(bits: u8) -> Self {
                Self(bits)
            }

            /// Its bits.
            pub const fn to_bits(self) -> u8 {
                self.0
            }

            /// The nearest float, ties to even. Nothing saturates: a value that is too large
            /// becomes infinity, or NaN where the type has no infinities, as in training
            /// frameworks. A NaN becomes [`NAN`](Self::NAN).
            pub fn from_f32(value: f32) -> Self {
                Self($narrow(value))
            }

            /// The exact value. A NaN stays a NaN.
            pub fn to_f32(self) -> f32 {
                $widen(self.0)
            }

            /// Whether it is NaN.
            pub fn is_nan(self) -> bool {
                self.to_f32().is_nan()
            }

            /// Whether it is a number and not infinite.
            pub fn is_finite(self) -> bool {
                self.to_f32().is_finite()
            }
        }

        impl From<$name> for f32 {
            fn from(value: $name) -> Self {
                value.to_f32()
            }
        }

        /// Compares as numbers: NaN is unequal to itself, −0 equals +0.
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.to_f32() == other.to_f32()
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                self.to_f32().partial_cmp(&other.to_f32())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.to_f32().fmt(f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.to_f32().fmt(f)
            }
        }
    };
}

float8!(
    /// 4 bits of exponent, 3 of mantissa: up to ±448, no infinities, one NaN of each sign.
    ///
    /// Frameworks call it `float8_e4m3fn`. A value that rounds to more than 448 becomes NaN.
    f8e4m3, e4m3_to_f32, f32_to_e4m3, 0x7f, 0x7e
);
float8!(
    /// 5 bits of exponent, 2 of mantissa: up to ±57344, with infinities and NaN as in IEEE 754.
    ///
    /// A value that rounds to more than 57344 becomes infinite.
    f8e5m2, e5m2_to_f32, f32_to_e5m2, 0x7e, 0x7b
);

impl f8e5m2 {
    /// Positive infinity.
    pub const INFINITY: Self = Self(0x7c);
}
