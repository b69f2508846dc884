//! Integer arithmetic. It wraps around, as the hardware's does.

use super::{binary, for_integer, ternary, unary};
use crate::machine::{Flow, Handler, Instruction, Scalar, Thread};

/// An integer of a register.
pub(super) trait Integer: Scalar + Ord {
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// The upper half of the product.
    fn mul_high(self, other: Self) -> Self;
    /// The whole product.
    fn mul_wide(self, other: Self) -> u64;
    /// All bits set if `other` is 0, which PTX leaves open.
    fn div(self, other: Self) -> Self;
    fn rem(self, other: Self) -> Self;
    fn neg(self) -> Self;
    fn abs(self) -> Self;
    /// All bits are the sign for a negative number when it is shifted out.
    fn shift_right(self, by: u32) -> Self;
    fn wide(self) -> i128;
    fn truncated(value: i128) -> Self;
    /// The nearest value that the type has.
    fn saturated(value: i128) -> Self;
}

macro_rules! integers {
    ($($type:ident)*) => {$(
        impl Integer for $type {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }

            #[inline(always)]
            fn mul_high(self, other: Self) -> Self {
                let product = (self as i128).wrapping_mul(other as i128);
                // The shift of i128 fills with the sign, which is cut off for unsigned types.
                (product >> Self::BITS) as Self
            }

            #[inline(always)]
            fn mul_wide(self, other: Self) -> u64 {
                (self as i64).wrapping_mul(other as i64) as u64
            }

            #[inline(always)]
            fn div(self, other: Self) -> Self {
                if other == 0 { !0 } else { self.wrapping_div(other) }
            }

            #[inline(always)]
            fn rem(self, other: Self) -> Self {
                if other == 0 { !0 } else { self.wrapping_rem(other) }
            }

            #[inline(always)]
            fn neg(self) -> Self {
                self.wrapping_neg()
            }

            #[inline(always)]
            fn abs(self) -> Self {
                integers!(@abs $type, self)
            }

            #[inline(always)]
            fn shift_right(self, by: u32) -> Self {
                if by < Self::BITS {
                    self >> by
                } else {
                    integers!(@sign $type, self)
                }
            }

            #[inline(always)]
            fn wide(self) -> i128 {
                self as i128
            }

            #[inline(always)]
            fn truncated(value: i128) -> Self {
                value as Self
            }

            #[inline(always)]
            fn saturated(value: i128) -> Self {
                value.clamp(Self::MIN as i128, Self::MAX as i128) as Self
            }
        }
    )*};
    (@abs i8, $value:expr) => { $value.wrapping_abs() };
    (@abs i16, $value:expr) => { $value.wrapping_abs() };
    (@abs i32, $value:expr) => { $value.wrapping_abs() };
    (@abs i64, $value:expr) => { $value.wrapping_abs() };
    (@abs $type:ident, $value:expr) => { $value };
    (@sign i8, $value:expr) => { $value >> 7 };
    (@sign i16, $value:expr) => { $value >> 15 };
    (@sign i32, $value:expr) => { $value >> 31 };
    (@sign i64, $value:expr) => { $value >> 63 };
    (@sign $type:ident, $value:expr) => { 0 };
}

integers!(u8 u16 u32 u64 i8 i16 i32 i64);

pub(super) fn select(opcode: &[&str]) -> Option<Handler> {
    match *opcode {
        ["add", name] => for_integer!(name, add),
        ["add", "sat", "s32"] => Some(add_saturating),
        ["sub", "sat", "s32"] => Some(sub_saturating),
        ["sub", name] => for_integer!(name, sub),
        ["mul", "lo", name] => for_integer!(name, mul),
        ["mul", "hi", name] => for_integer!(name, mul_high),
        ["mul", "wide", name] => for_integer!(name, mul_wide),
        ["mad", "lo", name] => for_integer!(name, mad),
        ["mad", "hi", name] => for_integer!(name, mad_high),
        ["mad", "wide", name] => for_integer!(name, mad_wide),
        ["div", name] => for_integer!(name, div),
        ["rem", name] => for_integer!(name, rem),
        ["neg", name] => for_integer!(name, neg),
        ["abs", name] => for_integer!(name, abs),
        ["min", name] => for_integer!(name, min),
        ["max", name] => for_integer!(name, max),
        ["sad", name] => for_integer!(name, sad),
        ["shr", name] => match name {
            "b16" => Some(shift_right::<u16>),
            "b32" => Some(shift_right::<u32>),
            "b64" => Some(shift_right::<u64>),
            _ => for_integer!(name, shift_right),
        },
        ["add" | "sub" | "addc" | "subc" | "mad" | "madc", ..] => select_carrying(opcode),
        _ => None,
    }
}

/// Arithmetic with a carry, of numbers in several registers.
fn select_carrying(opcode: &[&str]) -> Option<Handler> {
    Some(match *opcode {
        ["add", "cc", "u32" | "s32"] => add_carry::<u32, false>,
        ["add", "cc", "u64" | "s64"] => add_carry::<u64, false>,
        ["addc", "u32" | "s32"] | ["addc", "cc", "u32" | "s32"] => add_carry::<u32, true>,
        ["addc", "u64" | "s64"] | ["addc", "cc", "u64" | "s64"] => add_carry::<u64, true>,
        ["sub", "cc", "u32" | "s32"] => sub_borrow::<u32, false>,
        ["sub", "cc", "u64" | "s64"] => sub_borrow::<u64, false>,
        ["subc", "u32" | "s32"] | ["subc", "cc", "u32" | "s32"] => sub_borrow::<u32, true>,
        ["subc", "u64" | "s64"] | ["subc", "cc", "u64" | "s64"] => sub_borrow::<u64, true>,
        _ => return None,
    })
}

fn add<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::add)
}

fn sub<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::sub)
}

fn add_saturating(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, i32::saturating_add)
}

fn sub_saturating(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, i32::saturating_sub)
}

fn mul<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::mul)
}

fn mul_high<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::mul_high)
}

fn mul_wide<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::mul_wide)
}

fn mad<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, c: T| a.mul(b).add(c))
}

fn mad_high<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, c: T| a.mul_high(b).add(c))
}

fn mad_wide<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, c: u64| a.mul_wide(b).wrapping_add(c))
}

fn div<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::div)
}

fn rem<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::rem)
}

fn neg<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::neg)
}

fn abs<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    unary(thread, instruction, T::abs)
}

fn min<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::min)
}

fn max<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, T::max)
}

/// Adds the distance of two numbers to a third.
fn sad<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    ternary(thread, instruction, |a: T, b: T, c: T| c.add(a.max(b).sub(a.min(b))))
}

fn shift_right<T: Integer>(thread: &mut Thread<'_>, instruction: &Instruction) -> Flow {
    binary(thread, instruction, |a: T, by: u32| a.shift_right(by))
}

fn add_carry<T: Integer, const CARRIES: bool>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    let (a, b): (T, T) = (thread.read(instruction.a), thread.read(instruction.b));
    let sum = a.wide() + b.wide() + i128::from(CARRIES && thread.carry);
    let value = T::truncated(sum);
    thread.carry = value.wide() != sum;
    thread.write(instruction.d, value);
    Flow::Next
}

fn sub_borrow<T: Integer, const BORROWS: bool>(
    thread: &mut Thread<'_>,
    instruction: &Instruction,
) -> Flow {
    let (a, b): (T, T) = (thread.read(instruction.a), thread.read(instruction.b));
    let difference = a.wide() - b.wide() - i128::from(BORROWS && thread.carry);
    let value = T::truncated(difference);
    thread.carry = value.wide() != difference;
    thread.write(instruction.d, value);
    Flow::Next
}
