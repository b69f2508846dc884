//! Element values whose reduction over all ranks is known exactly, in whatever order it is folded.

use half::{bf16, f16};
use unisum::{Bool, Element, ReduceOp, f8e4m3, f8e5m2};

/// An element type that the check can make, predict and compare bit by bit.
pub(crate) trait Value: Element {
    /// What `rank` of `world` contributes at a position; `noise` is random and differs by rank
    /// and position.
    fn contribution(op: ReduceOp, world: usize, rank: usize, position: usize, noise: u64) -> Self;

    /// The exact reduction of all ranks' contributions.
    fn expected(op: ReduceOp, contributions: &[Self]) -> Self;

    /// A value that reducing it with itself any number of times leaves as it is.
    fn fixed_point(op: ReduceOp) -> Self;

    /// The value's bits.
    fn bits(self) -> u64;
}

/// Values that many ranks can add up without leaving what a type holds exactly: whole numbers
/// from -`largest` to `largest`, not 0 on at most `active` ranks.
///
/// Few bits and many ranks leave room for a few ranks only; which ones differs by position.
struct Share {
    largest: u64,
    active: usize,
}

impl Share {
    fn of(exact: u64, world: usize) -> Self {
        let active = usize::try_from(exact).map_or(world, |exact| exact.min(world));
        Self { largest: (exact / active as u64).min(1000), active }
    }

    /// A whole number, of either sign if `signed`.
    fn value(&self, world: usize, rank: usize, position: usize, noise: u64, signed: bool) -> i64 {
        if (rank + position) % world >= self.active {
            return 0;
        }
        let magnitudes = self.largest + 1;
        let magnitude = (noise % magnitudes) as i64;
        if signed && noise >> 63 == 1 { -magnitude } else { magnitude }
    }
}

macro_rules! integers {
    ($($t:ty)*) => { $(
        impl Value for $t {
            /// Sums and products wrap, so any value does; odd factors keep all bits of a product
            /// alive, and few ranks touch the same bit. Averages stay clear of wrapping.
            fn contribution(
                op: ReduceOp,
                world: usize,
                rank: usize,
                position: usize,
                noise: u64,
            ) -> Self {
                match op {
                    ReduceOp::Average => {
                        let signed = Self::MIN != 0;
                        let share = Share::of(Self::MAX as u64, world);
                        share.value(world, rank, position, noise, signed) as Self
                    }
                    ReduceOp::Product => noise as Self | 1,
                    ReduceOp::BitOr => 1 << (noise % u64::from(Self::BITS)),
                    ReduceOp::BitAnd => !(1 << (noise % u64::from(Self::BITS))),
                    _ => noise as Self,
                }
            }

            fn expected(op: ReduceOp, contributions: &[Self]) -> Self {
                let values = contributions.iter().map(|value| *value as i128);
                match op {
                    ReduceOp::Sum => values.sum::<i128>() as Self,
                    ReduceOp::Product => values.fold(1, i128::wrapping_mul) as Self,
                    ReduceOp::Min => values.min().unwrap_or(0) as Self,
                    ReduceOp::Max => values.max().unwrap_or(0) as Self,
                    ReduceOp::BitAnd => values.fold(-1, |all, value| all & value) as Self,
                    ReduceOp::BitOr => values.fold(0, |all, value| all | value) as Self,
                    ReduceOp::BitXor => values.fold(0, |all, value| all ^ value) as Self,
                    _ => (values.sum::<i128>() / contributions.len() as i128) as Self,
                }
            }

            fn fixed_point(op: ReduceOp) -> Self {
                !matches!(op, ReduceOp::Sum | ReduceOp::BitXor) as Self
            }

            fn bits(self) -> u64 {
                self as u64
            }
        }
    )* };
}

integers!(i8 u8 i16 u16 i32 u32 i64 u64);

/// How many powers of two a product of f64 contributions may span: the check computes in f64.
const F64_EXPONENTS: usize = 1000;

/// A float contribution, exact in a type that holds whole numbers up to `exact` and normal powers
/// of two up to `exponents` either way. Factors are powers of two, ±1 on all but `exponents`
/// ranks.
fn float_contribution(
    op: ReduceOp,
    (exact, exponents): (u64, usize),
    (world, rank, position): (usize, usize, usize),
    noise: u64,
) -> f64 {
    if op == ReduceOp::Product {
        let scaled = (rank + position) % world < exponents;
        let magnitude = if scaled { [0.5, 1.0, 2.0][(noise % 3) as usize] } else { 1.0 };
        return if noise >> 63 == 1 { -magnitude } else { magnitude };
    }
    let adds = matches!(op, ReduceOp::Sum | ReduceOp::Average);
    let share = Share::of(exact, if adds { world } else { 1 });
    let (ranks, rank) = if adds { (world, rank) } else { (1, 0) };
    share.value(ranks, rank, position, noise, true) as f64
}

fn float_expected(op: ReduceOp, values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let ranks = values.len() as f64;
    match op {
        // An empty or all-zero `sum()` is -0.0; ranks never contribute that.
        ReduceOp::Sum => values.sum::<f64>() + 0.0,
        ReduceOp::Product => values.product(),
        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
        _ => (values.sum::<f64>() + 0.0) / ranks,
    }
}

macro_rules! floats {
    ($($t:ident: $exact:expr, $exponents:expr, $from:expr, $to:expr;)*) => { $(
        impl Value for $t {
            fn contribution(
                op: ReduceOp,
                world: usize,
                rank: usize,
                position: usize,
                noise: u64,
            ) -> Self {
                let limits = ($exact, $exponents);
                $from(float_contribution(op, limits, (world, rank, position), noise))
            }

            fn expected(op: ReduceOp, contributions: &[Self]) -> Self {
                $from(float_expected(op, contributions.iter().map(|value| $to(*value))))
            }

            fn fixed_point(op: ReduceOp) -> Self {
                $from(if op == ReduceOp::Sum { 0.0 } else { 1.0 })
            }

            fn bits(self) -> u64 {
                self.to_bits() as u64
            }
        }
    )* };
}

floats! {
    f16: 1 << 11, 14, f16::from_f64, f16::to_f64;
    bf16: 1 << 8, 126, bf16::from_f64, bf16::to_f64;
    f32: 1 << 24, 126, |value| value as f32, f64::from;
    f64: 1 << 53, F64_EXPONENTS, f64::from, f64::from;
    f8e4m3: 1 << 4, 6, |value| Self::from_f32(value as f32), |value: Self| value.to_f32().into();
    f8e5m2: 1 << 3, 14, |value| Self::from_f32(value as f32), |value: Self| value.to_f32().into();
}

impl Value for Bool {
    /// One rank in all, on average, is what decides an "and" or an "or".
    fn contribution(op: ReduceOp, world: usize, _: usize, _: usize, noise: u64) -> Self {
        let rare = noise.is_multiple_of(world as u64);
        Self::new(match op {
            ReduceOp::BitXor => noise >> 63 == 1,
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => !rare,
            _ => rare,
        })
    }

    fn expected(op: ReduceOp, contributions: &[Self]) -> Self {
        let mut values = contributions.iter().map(|value| value.get());
        Self::new(match op {
            ReduceOp::BitXor => values.filter(|value| *value).count() % 2 == 1,
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => values.all(|value| value),
            _ => values.any(|value| value),
        })
    }

    fn fixed_point(op: ReduceOp) -> Self {
        Self::new(op != ReduceOp::BitXor)
    }

    fn bits(self) -> u64 {
        self.to_byte().into()
    }
}
