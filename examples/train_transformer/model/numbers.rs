//! Loops over numbers, written so that the compiler makes vector instructions of them.

/// Numbers that are added side by side.
const LANES: usize = 16;

/// The sum of all values.
pub(crate) fn sum(values: &[f32]) -> f32 {
    fold(values, 0.0, |sum, value| sum + value)
}

/// The largest value; −∞ if there is none.
pub(crate) fn largest(values: &[f32]) -> f32 {
    fold(values, f32::NEG_INFINITY, |most, value| if value > most { value } else { most })
}

/// The sum of the products.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (mut lanes, whole) = ([0.0; LANES], a.len() / LANES * LANES);
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    let rest = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b);
    lanes.into_iter().chain(rest).sum()
}

/// Adds each value to its sum.
pub(crate) fn add(sums: &mut [f32], values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value;
    }
}

/// e to the x, to within 2 units in the last place; below −87 and above 88 what it is there. The
/// same bits on every machine.
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it rounds to the nearest integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts: the first has few enough bits that its small multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    // x = whole · ln 2 + rest, with |rest| ≤ ln 2 / 2, where eight terms of the series suffice.
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = x - whole * LN_2[0] - whole * LN_2[1];
    let factors = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let series = factors.into_iter().fold(1.0 / 5040.0, |sum, factor| sum * rest + factor);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    series * power
}

fn fold(values: &[f32], start: f32, each: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = each(*lane, *value);
        }
    }
    lanes.iter().chain(rest).fold(start, |all, value| each(all, *value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_last_place() {
        for step in -8_700..8_800 {
            let x = step as f32 / 100.0;
            let right = f64::from(x).exp();
            let error = (f64::from(exp(x)) - right).abs() / right;
            assert!(error <= 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error}");
        }
        assert!(exp(f32::NAN).is_nan() && exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn folds_take_every_value() {
        for count in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..count).map(|number| number as f32 - 50.0).collect();
            let expected: f32 = values.iter().sum();
            let squares: f32 = values.iter().map(|value| value * value).sum();
            assert_eq!((sum(&values), dot(&values, &values)), (expected, squares));
            let last = values.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(largest(&values), last);
        }
    }
}
