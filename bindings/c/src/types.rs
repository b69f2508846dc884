//! The numbers of element types, operations and collectives, and what becomes of them.

use unisum::{Dtype, ReduceOp};

use crate::status::{Outcome, invalid};

/// The type of the elements of a buffer.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_dtype {
    /// IEEE 754 binary16.
    UNISUM_F16 = 1,
    /// The upper half of an IEEE 754 binary32.
    UNISUM_BF16 = 2,
    /// float
    UNISUM_F32 = 3,
    /// double
    UNISUM_F64 = 4,
    /// int8_t
    UNISUM_I8 = 5,
    /// uint8_t
    UNISUM_U8 = 6,
    /// int16_t
    UNISUM_I16 = 7,
    /// uint16_t
    UNISUM_U16 = 8,
    /// int32_t
    UNISUM_I32 = 9,
    /// uint32_t
    UNISUM_U32 = 10,
    /// int64_t
    UNISUM_I64 = 11,
    /// uint64_t
    UNISUM_U64 = 12,
    /// 8 bits, 4 of exponent and 3 of mantissa, without infinities.
    UNISUM_F8E4M3 = 13,
    /// 8 bits, 5 of exponent and 2 of mantissa.
    UNISUM_F8E5M2 = 14,
    /// A byte that is true unless it is 0. Results are 0 or 1.
    UNISUM_BOOL = 15,
}

/// How the elements of the ranks become one.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_op {
    /// Adds them. Integers wrap around.
    UNISUM_SUM = 1,
    /// Multiplies them. Integers wrap around.
    UNISUM_PRODUCT = 2,
    /// The least; NaN wins.
    UNISUM_MIN = 3,
    /// The greatest; NaN wins.
    UNISUM_MAX = 4,
    /// Adds them and divides by their number, once, at the end.
    UNISUM_AVERAGE = 5,
    /// The bits that are set in all.
    UNISUM_BIT_AND = 6,
    /// The bits that are set in any.
    UNISUM_BIT_OR = 7,
    /// The bits that are set in an odd number of them.
    UNISUM_BIT_XOR = 8,
}

/// The collectives, for unisum_collective. A block is what one rank puts in, or gets.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_kind {
    /// Reduces all ranks' elements; every rank gets the result.
    UNISUM_ALL_REDUCE = 1,
    /// Reduces all ranks' elements; the root gets the result.
    UNISUM_REDUCE = 2,
    /// Every rank gets the elements of the root.
    UNISUM_BROADCAST = 3,
    /// Every rank gets the blocks of all ranks, in rank order.
    UNISUM_ALL_GATHER = 4,
    /// Reduces all ranks' blocks; each rank gets its own.
    UNISUM_REDUCE_SCATTER = 5,
    /// Each rank has a block for each rank.
    UNISUM_ALL_TO_ALL = 6,
    /// The root gets the blocks of all ranks.
    UNISUM_GATHER = 7,
    /// Each rank gets its block of what the root has.
    UNISUM_SCATTER = 8,
    /// Nobody goes on before everybody has come.
    UNISUM_BARRIER = 9,
}

/// The element type with this number.
pub(crate) fn dtype(code: u32) -> Outcome<Dtype> {
    let known = Dtype::ALL.into_iter().find(|dtype| *dtype as u32 == code);
    known.map_or_else(|| invalid(format!("{code} is no dtype")), Ok)
}

/// The operation with this number.
pub(crate) fn op(code: u32) -> Outcome<ReduceOp> {
    let known = ReduceOp::ALL.into_iter().find(|op| *op as u32 == code);
    known.map_or_else(|| invalid(format!("{code} is no reduction operation")), Ok)
}

/// Evaluates an expression in which `$element` is the Rust type of the elements.
macro_rules! for_dtype {
    ($dtype:expr, $element:ident => $body:expr) => {
        $crate::types::for_dtype!(@ $dtype, $element, $body,
            F16 half::f16, Bf16 half::bf16, F32 f32, F64 f64, I8 i8, U8 u8, I16 i16, U16 u16,
            I32 i32, U32 u32, I64 i64, U64 u64, F8E4M3 unisum::f8e4m3, F8E5M2 unisum::f8e5m2,
            Bool unisum::Bool)
    };
    (@ $dtype:expr, $element:ident, $body:expr, $($name:ident $rust:ty),*) => {
        match $dtype {
            $(unisum::Dtype::$name => {
                type $element = $rust;
                $body
            })*
            other => $crate::status::invalid(format!("{other} is not known to this interface")),
        }
    };
}
pub(crate) use for_dtype;

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of the facade, whatever they are called here.
    #[test]
    fn numbers_mean_what_they_are_called() {
        use unisum_dtype::*;
        use unisum_op::*;
        let dtypes = [
            UNISUM_F16,
            UNISUM_BF16,
            UNISUM_F32,
            UNISUM_F64,
            UNISUM_I8,
            UNISUM_U8,
            UNISUM_I16,
            UNISUM_U16,
            UNISUM_I32,
            UNISUM_U32,
            UNISUM_I64,
            UNISUM_U64,
            UNISUM_F8E4M3,
            UNISUM_F8E5M2,
            UNISUM_BOOL,
        ];
        assert_eq!(dtypes.len(), Dtype::ALL.len());
        for known in dtypes {
            let name = format!("{known:?}").replace("UNISUM_", "").to_lowercase();
            assert_eq!(dtype(known as u32).unwrap().to_string(), name);
        }
        let ops = [
            UNISUM_SUM,
            UNISUM_PRODUCT,
            UNISUM_MIN,
            UNISUM_MAX,
            UNISUM_AVERAGE,
            UNISUM_BIT_AND,
            UNISUM_BIT_OR,
            UNISUM_BIT_XOR,
        ];
        assert_eq!(ops.len(), ReduceOp::ALL.len());
        for known in ops {
            let name = format!("{known:?}").replace(['_'], "").replace("UNISUM", "").to_lowercase();
            let found = format!("{:?}", op(known as u32).unwrap()).to_lowercase();
            assert_eq!(found, name);
        }
        for code in [0, 16, u32::MAX] {
            assert!(dtype(code).is_err() && op(code).is_err());
        }
    }

    #[test]
    fn every_dtype_has_its_rust_type() {
        for dtype in Dtype::ALL {
            let found = for_dtype!(dtype, T => Ok((<T as unisum::Element>::DTYPE, size_of::<T>())));
            assert_eq!(found.unwrap(), (dtype, dtype.bytes()));
        }
    }
}
