//! Known gradients, to check averages by.

/// Gradients that differ between ranks, parameters, elements and checks, and whose average is
/// known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gradients {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// The number of the check.
    pub(crate) seed: usize,
}

/// Elements repeat after so many, a prime: blocks of encodings and shares of ranks do not.
const PERIOD: usize = 127;

impl Gradients {
    /// Elements of 1/127 to 1, times one more than the rank.
    fn element(&self, parameter: usize, at: usize) -> f32 {
        ((31 * at + 17 * parameter + 53 * self.seed) % PERIOD + 1) as f32 / PERIOD as f32
    }

    /// Writes this rank's gradient of a parameter.
    pub(crate) fn fill(&self, parameter: usize, gradient: &mut [f32]) {
        let factor = (self.rank + 1) as f32;
        for (at, element) in gradient.iter_mut().enumerate() {
            *element = factor * self.element(parameter, at);
        }
    }

    /// How many elements of a parameter's average are off, if each gradient and the average may be
    /// rounded by a share of the largest element, twice: error feedback brings the last step's
    /// roundings.
    pub(crate) fn wrong(&self, parameter: usize, average: &[f32], rounding: f64) -> u64 {
        let factor = (self.world + 1) as f32 / 2.0;
        let most = (4.0 * rounding) as f32 * factor;
        let is_off = |(at, element): &(usize, &f32)| {
            // Not a NaN either.
            let off = (**element - factor * self.element(parameter, *at)).abs();
            off.is_nan() || off > most
        };
        average.iter().enumerate().filter(is_off).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_right_and_everything_else_wrong() {
        let gradients = |rank| Gradients { rank, world: 3, seed: 5 };
        let mut average = vec![0.0_f32; 1000];
        for rank in 0..3 {
            let mut gradient = vec![0.0; 1000];
            gradients(rank).fill(7, &mut gradient);
            average.iter_mut().zip(&gradient).for_each(|(sum, term)| *sum += term / 3.0);
        }
        let wrong = |average: &[f32], parameter| {
            gradients(0).wrong(parameter, average, f64::from(f32::EPSILON))
        };
        assert_eq!(wrong(&average, 7), 0);
        assert_eq!(wrong(&average, 8), 1000);
        // Shifted, of another check, with a rank too few.
        assert_eq!(wrong(&average[1..], 7), 999);
        assert_eq!(Gradients { seed: 6, ..gradients(0) }.wrong(7, &average, 1e-6), 1000);
        assert_eq!(Gradients { world: 2, ..gradients(0) }.wrong(7, &average, 1e-6), 1000);
        average[3] = f32::NAN;
        assert_eq!(wrong(&average, 7), 1);
    }
}
