//! Element types: between numbers that Python passes, DLPack's codes, and Rust's types.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use unisum::Dtype;

/// What can be done with the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// They can be reduced in every way that their type has.
    Number,
    /// Pairs of numbers: sums and averages only.
    Complex,
    /// A type that unisum does not know: they can be moved only.
    Opaque,
}

/// A type in memory: so many of `dtype` make one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) dtype: Dtype,
    pub(crate) times: usize,
    pub(crate) meaning: Meaning,
}

impl Element {
    const fn number(dtype: Dtype) -> Self {
        Self { dtype, times: 1, meaning: Meaning::Number }
    }

    const fn complex(dtype: Dtype) -> Self {
        Self { dtype, times: 2, meaning: Meaning::Complex }
    }

    /// Bytes that nobody interprets.
    fn opaque(bytes: usize) -> Self {
        let dtype = match bytes {
            1 => Dtype::U8,
            2 => Dtype::U16,
            4 => Dtype::U32,
            _ if bytes.is_multiple_of(8) => Dtype::U64,
            _ => Dtype::U8,
        };
        Self { dtype, times: (bytes / dtype.bytes()).max(1), meaning: Meaning::Opaque }
    }

    /// The type that DLPack gives a code, so many bits, and lanes.
    pub(crate) fn of_dlpack(code: u8, bits: u8, lanes: u16) -> PyResult<Self> {
        if lanes != 1 || bits == 0 || !bits.is_multiple_of(8) {
            let text = format!("elements of {bits} bits in {lanes} lanes are not supported");
            return Err(PyTypeError::new_err(text));
        }
        Ok(match (code, bits) {
            (0, 8) => Self::number(Dtype::I8),
            (0, 16) => Self::number(Dtype::I16),
            (0, 32) => Self::number(Dtype::I32),
            (0, 64) => Self::number(Dtype::I64),
            (1, 8) => Self::number(Dtype::U8),
            (1, 16) => Self::number(Dtype::U16),
            (1, 32) => Self::number(Dtype::U32),
            (1, 64) => Self::number(Dtype::U64),
            (2, 16) => Self::number(Dtype::F16),
            (2, 32) => Self::number(Dtype::F32),
            (2, 64) => Self::number(Dtype::F64),
            (4, 16) => Self::number(Dtype::Bf16),
            (5, 64) => Self::complex(Dtype::F32),
            (5, 128) => Self::complex(Dtype::F64),
            (6, 8) => Self::number(Dtype::Bool),
            // e4m3fn and e5m2.
            (10, 8) => Self::number(Dtype::F8E4M3),
            (12, 8) => Self::number(Dtype::F8E5M2),
            _ => Self::opaque(usize::from(bits) / 8),
        })
    }

    /// The type that NumPy writes as `kind` and so many bytes, or calls by `name`.
    pub(crate) fn of_numpy(kind: char, bytes: usize, name: &str) -> Self {
        match (kind, bytes, name) {
            (_, 2, "bfloat16") => Self::number(Dtype::Bf16),
            (_, 1, "float8_e4m3fn") => Self::number(Dtype::F8E4M3),
            (_, 1, "float8_e5m2") => Self::number(Dtype::F8E5M2),
            ('f', 2, _) => Self::number(Dtype::F16),
            ('f', 4, _) => Self::number(Dtype::F32),
            ('f', 8, _) => Self::number(Dtype::F64),
            ('i', 1, _) => Self::number(Dtype::I8),
            ('i', 2, _) => Self::number(Dtype::I16),
            ('i', 4, _) => Self::number(Dtype::I32),
            ('i', 8, _) => Self::number(Dtype::I64),
            ('u', 1, _) => Self::number(Dtype::U8),
            ('u', 2, _) => Self::number(Dtype::U16),
            ('u', 4, _) => Self::number(Dtype::U32),
            ('u', 8, _) => Self::number(Dtype::U64),
            ('b', 1, _) => Self::number(Dtype::Bool),
            ('c', 8, _) => Self::complex(Dtype::F32),
            ('c', 16, _) => Self::complex(Dtype::F64),
            _ => Self::opaque(bytes),
        }
    }
}

/// The type that Python calls so.
///
/// # Errors
/// `TypeError` if there is none.
pub(crate) fn by_name(name: &str) -> PyResult<Dtype> {
    let found = NAMES.iter().find(|(known, _)| *known == name);
    found.map(|(_, dtype)| *dtype).ok_or_else(|| {
        let names: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
        PyTypeError::new_err(format!("no element type `{name}`: there are {}", names.join(", ")))
    })
}

/// What Python calls a type.
pub(crate) fn name_of(dtype: Dtype) -> &'static str {
    NAMES.iter().find(|(_, known)| *known == dtype).map_or("uint8", |(name, _)| name)
}

/// The code and bits of DLPack.
pub(crate) fn dlpack_of(dtype: Dtype) -> (u8, u8) {
    let code = match dtype {
        Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => 0,
        Dtype::F16 | Dtype::F32 | Dtype::F64 => 2,
        Dtype::Bf16 => 4,
        Dtype::Bool => 6,
        Dtype::F8E4M3 => 10,
        Dtype::F8E5M2 => 12,
        _ => 1,
    };
    (code, dtype.bytes() as u8 * 8)
}

const NAMES: [(&str, Dtype); 15] = [
    ("float16", Dtype::F16),
    ("bfloat16", Dtype::Bf16),
    ("float32", Dtype::F32),
    ("float64", Dtype::F64),
    ("int8", Dtype::I8),
    ("uint8", Dtype::U8),
    ("int16", Dtype::I16),
    ("uint16", Dtype::U16),
    ("int32", Dtype::I32),
    ("uint32", Dtype::U32),
    ("int64", Dtype::I64),
    ("uint64", Dtype::U64),
    ("float8_e4m3fn", Dtype::F8E4M3),
    ("float8_e5m2", Dtype::F8E5M2),
    ("bool", Dtype::Bool),
];

/// Evaluates an expression with `$T` standing for the Rust type of a [`Dtype`].
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            unisum::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            unisum::Dtype::Bf16 => {
                type $T = half::bf16;
                $body
            }
            unisum::Dtype::F32 => {
                type $T = f32;
                $body
            }
            unisum::Dtype::F64 => {
                type $T = f64;
                $body
            }
            unisum::Dtype::I8 => {
                type $T = i8;
                $body
            }
            unisum::Dtype::U8 => {
                type $T = u8;
                $body
            }
            unisum::Dtype::I16 => {
                type $T = i16;
                $body
            }
            unisum::Dtype::U16 => {
                type $T = u16;
                $body
            }
            unisum::Dtype::I32 => {
                type $T = i32;
                $body
            }
            unisum::Dtype::U32 => {
                type $T = u32;
                $body
            }
            unisum::Dtype::I64 => {
                type $T = i64;
                $body
            }
            unisum::Dtype::U64 => {
                type $T = u64;
                $body
            }
            unisum::Dtype::F8E4M3 => {
                type $T = unisum::f8e4m3;
                $body
            }
            unisum::Dtype::F8E5M2 => {
                type $T = unisum::f8e5m2;
                $body
            }
            unisum::Dtype::Bool => {
                type $T = unisum::Bool;
                $body
            }
            other => {
                return Err(pyo3::exceptions::PyTypeError::new_err(format!(
                    "elements of {other} are not supported"
                )))
            }
        }
    };
}
pub(crate) use with_element;
