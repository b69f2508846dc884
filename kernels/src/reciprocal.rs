//! Division of many integers by one, without a division.
//!
//! Source: Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI
//! 1994, figure 4.1.

use std::num::NonZeroU32;

/// What the quotients by one divisor need to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reciprocal<U> {
    /// 2ᴺ · (2ˡ / divisor − 1), rounded up, for N bits and the least l with 2ˡ ≥ divisor.
    factor: U,
    /// 1, or 0 if the divisor is 1.
    first_shift: u32,
    second_shift: u32,
}

macro_rules! reciprocals {
    ($($uint:ty, $double:ty;)*) => {$(
        impl Reciprocal<$uint> {
            pub(super) fn new(divisor: NonZeroU32) -> Self {
                let divisor = u128::from(divisor.get());
                if divisor > <$uint>::MAX.into() {
                    // All quotients are 0: what the two shifts leave.
                    return Self { factor: 0, first_shift: 1, second_shift: <$uint>::BITS - 1 };
                }
                let power = divisor.next_power_of_two();
                let bits = power.trailing_zeros();
                let factor = ((power - divisor) << <$uint>::BITS) / divisor + 1;
                Self {
                    factor: factor as $uint,
                    first_shift: bits.min(1),
                    second_shift: bits.saturating_sub(1),
                }
            }

            /// `x` by the divisor, truncated; exact for every `x`.
            #[inline(always)]
            pub(super) fn quotient(self, x: $uint) -> $uint {
                let product = x as $double * self.factor as $double;
                let high = (product >> <$uint>::BITS) as $uint;
                let half = x.wrapping_sub(high).wrapping_shr(self.first_shift);
                high.wrapping_add(half).wrapping_shr(self.second_shift)
            }
        }
    )*};
}

reciprocals! {
    u16, u32;
    u32, u64;
    u64, u128;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_quotient_is_exact() {
        let step = if cfg!(miri) { 997 } else { 1 };
        let divisors = (1..300).chain([641, 32767, 32768, 32769, 65534, 65535, 65536, u32::MAX]);
        for divisor in divisors.step_by(if cfg!(miri) { 50 } else { 1 }) {
            let reciprocal = Reciprocal::<u16>::new(NonZeroU32::new(divisor).unwrap());
            for x in (0..=u16::MAX).step_by(step) {
                assert_eq!(u32::from(reciprocal.quotient(x)), u32::from(x) / divisor);
            }
        }
    }

    #[test]
    fn quotients_next_to_multiples_are_exact() {
        let powers = (0..32).map(|bits| 1_u32 << bits);
        let divisors = powers.flat_map(|power| [power.max(2) - 1, power, power + 1, power / 3 + 1]);
        for divisor in divisors.chain([u32::MAX, u32::MAX - 1]) {
            let nonzero = NonZeroU32::new(divisor).unwrap();
            let (half, whole) = (Reciprocal::<u32>::new(nonzero), Reciprocal::<u64>::new(nonzero));
            let greatest = u64::MAX / u64::from(divisor);
            let multiples = (0..64).flat_map(|bits| [greatest >> bits, 1 << bits]);
            for multiple in multiples.filter(|&multiple| multiple <= greatest) {
                for offset in [-1, 0, 1] {
                    let x = (multiple * u64::from(divisor)).wrapping_add_signed(offset);
                    assert_eq!(whole.quotient(x), x / u64::from(divisor), "{x} / {divisor}");
                    let x = x as u32;
                    assert_eq!(half.quotient(x), x / divisor, "{x} / {divisor}");
                }
            }
        }
    }
}
