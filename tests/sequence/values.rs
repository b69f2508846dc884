//! Elements of every type: made from random bits, and reduced one after the other.

use half::{bf16, f16};
use unisum::{Bool, CustomOp, Element, ReduceOp, Reduction, f8e4m3, f8e5m2};

/// How a step reduces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum How {
    Plain(ReduceOp),
    /// A sum of inputs times a factor.
    Scaled(f64),
    /// [`Value::commuting`] as a function of the program.
    Commuting,
    /// [`Value::ordered`] as a function of the program.
    Ordered,
}

impl How {
    pub(crate) fn reduction<T: Value>(self) -> Reduction {
        match self {
            Self::Plain(op) => op.into(),
            Self::Scaled(factor) => Reduction::sum_scaled_by(factor),
            Self::Commuting => CustomOp::commutative(commuting::<T>).into(),
            Self::Ordered => CustomOp::ordered(ordered::<T>).into(),
        }
    }

    /// Whether results are watched for infinities and NaNs if that is asked for.
    pub(crate) fn is_watchable(self) -> bool {
        let told = [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Average];
        match self {
            Self::Plain(op) => told.contains(&op),
            Self::Scaled(_) => true,
            Self::Commuting | Self::Ordered => false,
        }
    }
}

/// A type of elements, with reductions that are exact for the values that [`Value::input`] makes:
/// the order in which a collective folds them is then no part of the result.
pub(crate) trait Value: Element + std::fmt::Debug {
    /// The element of these bits, whatever they mean.
    fn from_bits(bits: u64) -> Self;
    fn bits(self) -> u64;
    /// An input from random bits. At most 7 ranks give one that `is_live` for an element.
    fn input(how: How, random: u64, is_live: bool) -> Self;
    /// An infinity or a NaN, if there is any.
    fn nonfinite(random: u64) -> Option<Self>;
    fn is_finite(self) -> bool;
    /// A ∘ b, and what is done to the inputs before and to the result after all of that.
    fn fold(how: How, a: Self, b: Self) -> Self;
    fn scale(self, factor: f64) -> Self;
    fn divide(self, by: usize) -> Self;
    /// Whether a result is as expected: the same bits, but for the sign of zero and of NaN.
    fn is_same(self, expected: Self) -> bool;
    /// Associative and commutative, bit for bit.
    fn commuting(self, other: Self) -> Self;
    /// Associative, and not commutative.
    fn ordered(self, other: Self) -> Self;
}

fn commuting<T: Value>(acc: &mut [T], other: &[T]) {
    acc.iter_mut().zip(other).for_each(|(acc, &other)| *acc = acc.commuting(other));
}

fn ordered<T: Value>(acc: &mut [T], other: &[T]) {
    acc.iter_mut().zip(other).for_each(|(acc, &other)| *acc = acc.ordered(other));
}

macro_rules! integers {
    ($($type:ty: $wide:ty),*) => {$(
        impl Value for $type {
            fn from_bits(bits: u64) -> Self {
                bits as Self
            }

            fn bits(self) -> u64 {
                self as u64
            }

            // Arithmetic that wraps is exact.
            fn input(_: How, random: u64, _: bool) -> Self {
                random as Self
            }

            fn nonfinite(_: u64) -> Option<Self> {
                None
            }

            fn is_finite(self) -> bool {
                true
            }

            fn fold(how: How, a: Self, b: Self) -> Self {
                match how {
                    How::Plain(ReduceOp::Product) => a.wrapping_mul(b),
                    How::Plain(ReduceOp::Min) => a.min(b),
                    How::Plain(ReduceOp::Max) => a.max(b),
                    How::Plain(ReduceOp::BitAnd) => a & b,
                    How::Plain(ReduceOp::BitOr) => a | b,
                    How::Plain(ReduceOp::BitXor) => a ^ b,
                    How::Plain(_) | How::Scaled(_) => a.wrapping_add(b),
                    How::Commuting => a.commuting(b),
                    How::Ordered => a.ordered(b),
                }
            }

            fn scale(self, _: f64) -> Self {
                panic!("only floats are scaled")
            }

            fn divide(self, by: usize) -> Self {
                (self as $wide / by as $wide) as Self
            }

            fn is_same(self, expected: Self) -> bool {
                self == expected
            }

            // (1 + a)(1 + b) − 1.
            fn commuting(self, other: Self) -> Self {
                self.wrapping_add(other).wrapping_add(self.wrapping_mul(other))
            }

            // The composition of x ↦ p·x + q, with p in the upper half of the bits.
            fn ordered(self, other: Self) -> Self {
                let half = Self::BITS / 2;
                let mask = ((1 as Self) << half).wrapping_sub(1);
                let parts = |of: Self| ((of >> half) & mask, of & mask);
                let ((p, q), (r, s)) = (parts(self), parts(other));
                let (p, q) = (p.wrapping_mul(r), p.wrapping_mul(s).wrapping_add(q));
                ((p & mask) << half) | (q & mask)
            }
        }
    )*};
}

integers!(i8: i64, u8: u64, i16: i64, u16: u64, i32: i64, u32: u64, i64: i128, u64: u128);

macro_rules! floats {
    ($($type:ty, $wide:ty, $bits:ty, $magnitude:expr, $to:expr, $from:expr;)*) => {$(
        impl Value for $type {
            fn from_bits(bits: u64) -> Self {
                <$type>::from_bits(bits as $bits)
            }

            fn bits(self) -> u64 {
                self.to_bits().into()
            }

            fn input(how: How, random: u64, is_live: bool) -> Self {
                let small = (random % $magnitude) as $wide;
                let signed = if random & (1 << 40) == 0 { small } else { -small };
                $from(match how {
                    How::Plain(ReduceOp::Product) if is_live && random & 1 == 0 => 2.0,
                    How::Plain(ReduceOp::Product) if random & 2 == 0 => -1.0,
                    How::Plain(ReduceOp::Product) => 1.0,
                    How::Plain(ReduceOp::Min | ReduceOp::Max) | How::Commuting => signed,
                    How::Ordered if random & (1 << 41) == 0 => 0.0,
                    How::Ordered => signed,
                    _ if is_live => signed,
                    _ => 0.0,
                })
            }

            fn nonfinite(random: u64) -> Option<Self> {
                let value = if random & 1 == 0 { <$wide>::NAN } else { <$wide>::INFINITY };
                Some($from(value))
            }

            fn is_finite(self) -> bool {
                let value: $wide = $to(self);
                value.is_finite()
            }

            fn fold(how: How, a: Self, b: Self) -> Self {
                let (x, y): ($wide, $wide) = ($to(a), $to(b));
                $from(match how {
                    How::Plain(ReduceOp::Product) => x * y,
                    How::Plain(ReduceOp::Min | ReduceOp::Max) if x.is_nan() || y.is_nan() => x + y,
                    How::Plain(ReduceOp::Min) => x.min(y),
                    How::Plain(ReduceOp::Max) => x.max(y),
                    How::Plain(_) | How::Scaled(_) => x + y,
                    How::Commuting => return a.commuting(b),
                    How::Ordered => return a.ordered(b),
                })
            }

            fn scale(self, factor: f64) -> Self {
                $from($to(self) * factor as $wide)
            }

            fn divide(self, by: usize) -> Self {
                $from($to(self) / by as $wide)
            }

            fn is_same(self, expected: Self) -> bool {
                let (x, y): ($wide, $wide) = ($to(self), $to(expected));
                x == y || (x.is_nan() && y.is_nan())
            }

            // The greater, and of zeros the positive one: the same bits either way.
            fn commuting(self, other: Self) -> Self {
                let (x, y) = ($to(self), $to(other));
                if x < y || (x == y && x.is_sign_negative()) { other } else { self }
            }

            // The first that is not 0.
            fn ordered(self, other: Self) -> Self {
                if $to(self) == 0.0 { other } else { self }
            }
        }
    )*};
}

// With at most 7 inputs of magnitude 1 that are not 0, sums have at most 3 significant bits.
floats! {
    f8e4m3, f32, u8, 2, f8e4m3::to_f32, f8e4m3::from_f32;
    f8e5m2, f32, u8, 2, f8e5m2::to_f32, f8e5m2::from_f32;
    f16, f32, u16, 9, f16::to_f32, f16::from_f32;
    bf16, f32, u16, 9, bf16::to_f32, bf16::from_f32;
    f32, f32, u32, 1000, |it: f32| it, |it: f32| it;
    f64, f64, u64, 100_000, |it: f64| it, |it: f64| it;
}

impl Value for Bool {
    fn from_bits(bits: u64) -> Self {
        Self::from_byte(bits as u8)
    }

    fn bits(self) -> u64 {
        self.to_byte().into()
    }

    fn input(_: How, random: u64, _: bool) -> Self {
        // Mostly alike, or every `and` of many ranks would be false.
        Self::from_byte(if random & 0x700 == 0 { 0 } else { random as u8 })
    }

    fn nonfinite(_: u64) -> Option<Self> {
        None
    }

    fn is_finite(self) -> bool {
        true
    }

    fn fold(how: How, a: Self, b: Self) -> Self {
        use ReduceOp::{BitAnd, BitXor, Min, Product};
        Self::new(match how {
            How::Plain(Product | Min | BitAnd) => a.get() & b.get(),
            How::Plain(BitXor) => a.get() ^ b.get(),
            How::Plain(_) | How::Scaled(_) => a.get() | b.get(),
            How::Commuting => a.commuting(b).get(),
            How::Ordered => a.ordered(b).get(),
        })
    }

    fn scale(self, _: f64) -> Self {
        panic!("only floats are scaled")
    }

    fn divide(self, _: usize) -> Self {
        panic!("truth has no average")
    }

    fn is_same(self, expected: Self) -> bool {
        self == expected
    }

    fn commuting(self, other: Self) -> Self {
        Self::new(self.get() ^ other.get())
    }

    // There is none but the projections.
    fn ordered(self, _: Self) -> Self {
        self
    }
}
