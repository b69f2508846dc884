//! Values in registers and in memory.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A value that fits into a register, which has 64 bits. What is above the value is not looked at.
pub(crate) trait Scalar: Copy + PartialOrd {
    fn from_register(register: u64) -> Self;
    fn into_register(self) -> u64;
}

macro_rules! integers_are_scalars {
    ($($type:ty)*) => {$(
        impl Scalar for $type {
            #[inline(always)]
            fn from_register(register: u64) -> Self {
                register as Self
            }

            #[inline(always)]
            fn into_register(self) -> u64 {
                self as u64
            }
        }
    )*};
}

integers_are_scalars!(u8 u16 u32 u64 i8 i16 i32 i64);

impl Scalar for f32 {
    #[inline(always)]
    fn from_register(register: u64) -> Self {
        Self::from_bits(u32::from_register(register))
    }

    #[inline(always)]
    fn into_register(self) -> u64 {
        u64::from(self.to_bits())
    }
}

impl Scalar for f64 {
    #[inline(always)]
    fn from_register(register: u64) -> Self {
        Self::from_bits(register)
    }

    #[inline(always)]
    fn into_register(self) -> u64 {
        self.to_bits()
    }
}

impl Scalar for bool {
    #[inline(always)]
    fn from_register(register: u64) -> Self {
        register & 1 == 1
    }

    #[inline(always)]
    fn into_register(self) -> u64 {
        u64::from(self)
    }
}

/// Bytes that stay mapped while a kernel runs, aligned to their number. Other threads and processes
/// may access them at the same time: all accesses are atomic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(*mut u8);

impl Place {
    pub(crate) fn new(pointer: *mut u8) -> Self {
        Self(pointer)
    }

    /// The element at `index`, of a place that holds more than one.
    #[inline(always)]
    pub(crate) fn element<W: Word>(self, index: usize) -> Self {
        Self(self.0.wrapping_add(index * size_of::<W>()))
    }

    #[inline(always)]
    pub(crate) fn load<W: Word>(self, ordering: Ordering) -> W {
        W::load(self, ordering)
    }

    #[inline(always)]
    pub(crate) fn store<W: Word>(self, value: W, ordering: Ordering) {
        value.store(self, ordering);
    }
}

/// An unsigned integer in memory.
pub(crate) trait Word: Scalar + Eq {
    fn load(place: Place, ordering: Ordering) -> Self;
    fn store(self, place: Place, ordering: Ordering);
    /// Stores `new` if the place holds `old`. Returns what it held.
    fn compare_exchange(place: Place, old: Self, new: Self) -> Self;
}

macro_rules! words {
    ($($word:ty, $atomic:ty);*) => {$(
        impl Word for $word {
            #[inline(always)]
            fn load(place: Place, ordering: Ordering) -> Self {
                // SAFETY: a `Place` is mapped and aligned, as its type says.
                unsafe { <$atomic>::from_ptr(place.0.cast()) }.load(ordering)
            }

            #[inline(always)]
            fn store(self, place: Place, ordering: Ordering) {
                // SAFETY: a `Place` is mapped and aligned, as its type says.
                unsafe { <$atomic>::from_ptr(place.0.cast()) }.store(self, ordering);
            }

            #[inline(always)]
            fn compare_exchange(place: Place, old: Self, new: Self) -> Self {
                // SAFETY: a `Place` is mapped and aligned, as its type says.
                let cell = unsafe { <$atomic>::from_ptr(place.0.cast()) };
                // The strongest ordering: it covers whatever the instruction asks for.
                match cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(before) | Err(before) => before,
                }
            }
        }
    )*};
}

words!(u8, AtomicU8; u16, AtomicU16; u32, AtomicU32; u64, AtomicU64);
