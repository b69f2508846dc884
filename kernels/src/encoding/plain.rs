//! 16-bit floats, value by value. The blocks are only there for the loops.

use super::super::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::loops::Scheme;

macro_rules! plain {
    ($(#[$doc:meta])* $name:ident, $widen:ident, $narrow:ident, $limit:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl<const N: usize> Scheme<N, 0, 2> for $name {
            type Scale = ();

            const LIMIT: u32 = $limit;

            #[inline(always)]
            fn choose(_: u32) -> ((), [u8; 0]) {
                ((), [])
            }
            #[inline(always)]
            fn read(_: [u8; 0]) {}
            #[inline(always)]
            fn code((): (), value: f32) -> [u8; 2] {
                $narrow(value).to_le_bytes()
            }
            #[inline(always)]
            fn value((): (), code: [u8; 2]) -> f32 {
                $widen(u16::from_le_bytes(code))
            }
        }
    };
}

plain!(
    /// IEEE 754 binary16. Half way from its greatest, 65504, to what would be the next, it rounds
    /// to infinity.
    F16, f16_to_f32, f32_to_f16, 65520_f32.to_bits()
);
plain!(
    /// The upper half of a binary32. What has more than half in the lower one rounds to infinity.
    Bf16, bf16_to_f32, f32_to_bf16, 0x7f7f_8000
);
