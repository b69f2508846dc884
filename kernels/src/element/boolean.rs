//! Truth values that any byte represents.

use std::fmt;

/// One byte: false if it is 0, true otherwise. Reductions and [`Bool::new`] give 0 or 1.
///
/// Peers write into buffers of this type, and a `bool` that is neither 0 nor 1 would be undefined
/// behaviour: hence a separate type. [`Bool::from_slice`] reinterprets a slice of `bool`.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bool(u8);

impl Bool {
    /// False.
    pub const FALSE: Self = Self::new(false);
    /// True.
    pub const TRUE: Self = Self::new(true);

    /// 1 if `value`, 0 otherwise.
    pub const fn new(value: bool) -> Self {
        Self(value as u8)
    }

    /// Whether the byte is not 0.
    pub const fn get(self) -> bool {
        self.0 != 0
    }

    /// The value with this byte, unchanged.
    pub const fn from_byte(byte: u8) -> Self {
        Self(byte)
    }

    /// The byte, unchanged.
    pub const fn to_byte(self) -> u8 {
        self.0
    }

    /// The same memory, as truth values.
    pub const fn from_slice(values: &[bool]) -> &[Self] {
        // SAFETY: both have the layout of `u8`, and every `bool` is a value of `Self`.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
    }
}

impl PartialEq for Bool {
    /// By truth, not by byte.
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for Bool {}

impl From<bool> for Bool {
    fn from(value: bool) -> Self {
        Self::new(value)
    }
}

impl From<Bool> for bool {
    fn from(value: Bool) -> Self {
        value.get()
    }
}

impl fmt::Debug for Bool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl fmt::Display for Bool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_a_truth_value() {
        for byte in 0..=u8::MAX {
            let value = Bool::from_byte(byte);
            assert_eq!((value.get(), value.to_byte()), (byte != 0, byte));
            assert_eq!(value, Bool::new(byte != 0));
        }
        assert_eq!(Bool::from_slice(&[true, false]), [Bool::TRUE, Bool::FALSE]);
    }
}
