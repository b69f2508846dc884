//! Dynamic loss scaling.
//!
//! Source: Micikevicius et al., "Mixed precision training", ICLR 2018, arXiv:1710.03740, section
//! 3.2.

use std::ops::RangeInclusive;

use crate::{Error, ErrorKind};

/// Finds the factor by which the loss is multiplied so that the gradients of a model in 16 bits
/// neither vanish nor overflow.
///
/// The loss is multiplied by [`scale`](Self::scale) before the backward pass, and the summed
/// gradients are divided by it afterwards. A step whose gradients are not all finite on all ranks
/// is skipped, and the scale decreases; after many good steps in a row it increases. All ranks pass
/// the same value to [`update`](Self::update), such as
/// [`Outcome::nonfinite`](crate::Outcome::nonfinite) of an all-reduce, so that the scale is the
/// same on all ranks.
///
/// ```
/// let mut scaler = unisum::LossScaler::new();
/// # let nonfinite = true;
/// // … backward with the loss times `scaler.scale()`, then the all-reduce
/// if scaler.update(nonfinite) {
///     // … the optimizer's step
/// }
/// assert_eq!(scaler.scale(), 32768.0);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    scale: f32,
    growth: f32,
    growth_interval: u32,
    backoff: f32,
    limits: RangeInclusive<f32>,
    good_steps: u32,
}

impl LossScaler {
    /// Starts at 2¹⁶, doubles after 2000 good steps, halves after a bad one, and stays between 1
    /// and 2³².
    pub const fn new() -> Self {
        Self {
            scale: 65536.0,
            growth: 2.0,
            growth_interval: 2000,
            backoff: 0.5,
            limits: 1.0..=4_294_967_296.0,
            good_steps: 0,
        }
    }

    /// Starts at `scale`, or at the nearest limit.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] unless it is positive and finite.
    pub fn starting_at(self, scale: f32) -> Result<Self, Error> {
        let scale = positive("the loss scale", scale)?;
        Ok(Self { scale: self.limited(scale), good_steps: 0, ..self })
    }

    /// Multiplies the scale by `factor` after `good_steps` good steps in a row. Powers of two are
    /// best: they round nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the factor is not finite or below 1, or there are no steps.
    pub fn growing(self, factor: f32, good_steps: u32) -> Result<Self, Error> {
        let growth = positive("the growth of the loss scale", factor)?;
        if growth < 1.0 || good_steps == 0 {
            return Err(wrong(format!(
                "a loss scale can't grow by {factor} in {good_steps} steps"
            )));
        }
        Ok(Self { growth, growth_interval: good_steps, ..self })
    }

    /// Multiplies the scale by `factor` after a step that was not finite.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] unless the factor is positive and below 1.
    pub fn backing_off_by(self, factor: f32) -> Result<Self, Error> {
        let backoff = positive("the back-off of the loss scale", factor)?;
        if backoff >= 1.0 {
            return Err(wrong(format!("a loss scale can't back off by {factor}")));
        }
        Ok(Self { backoff, ..self })
    }

    /// Keeps the scale within `limits`.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is nothing between the limits, or unless they are
    /// positive and finite.
    pub fn within(self, limits: RangeInclusive<f32>) -> Result<Self, Error> {
        positive("the least loss scale", *limits.start())?;
        positive("the greatest loss scale", *limits.end())?;
        if limits.is_empty() {
            return Err(wrong(format!("there is no loss scale in {limits:?}")));
        }
        let unlimited = self.scale;
        let limited = Self { limits, ..self };
        Ok(Self { scale: limited.limited(unlimited), ..limited })
    }

    /// The factor for the loss in this step.
    pub const fn scale(&self) -> f32 {
        self.scale
    }

    /// Ends a step and determines the scale of the next. Returns whether the optimizer must apply
    /// the step: not if a gradient was `nonfinite`.
    #[must_use = "a step that is not finite must not be applied"]
    pub fn update(&mut self, nonfinite: bool) -> bool {
        if nonfinite {
            self.scale = self.limited(self.scale * self.backoff);
            self.good_steps = 0;
        } else {
            self.good_steps += 1;
            if self.good_steps >= self.growth_interval {
                self.scale = self.limited(self.scale * self.growth);
                self.good_steps = 0;
            }
        }
        !nonfinite
    }

    /// The scale and the good steps so far, for a checkpoint: 8 bytes, little endian.
    pub fn save(&self) -> [u8; 8] {
        let bytes = u64::from(self.good_steps) << 32 | u64::from(self.scale.to_bits());
        bytes.to_le_bytes()
    }

    /// Continues from a saved state ([`save`](Self::save)), with the factors and limits of this
    /// one.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the bytes are not those of a state.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), Error> {
        let bytes: [u8; 8] = saved
            .try_into()
            .map_err(|_| wrong(format!("a saved loss scaler has 8 bytes, not {}", saved.len())))?;
        let bytes = u64::from_le_bytes(bytes);
        let scale = positive("the saved loss scale", f32::from_bits(bytes as u32))?;
        self.scale = self.limited(scale);
        self.good_steps = (bytes >> 32) as u32;
        // With a shorter interval than the saved one's this is no more than one step before growth.
        self.good_steps = self.good_steps.min(self.growth_interval - 1);
        Ok(())
    }

    fn limited(&self, scale: f32) -> f32 {
        scale.clamp(*self.limits.start(), *self.limits.end())
    }
}

impl Default for LossScaler {
    fn default() -> Self {
        Self::new()
    }
}

fn positive(what: &str, value: f32) -> Result<f32, Error> {
    let good = value.is_finite() && value > 0.0;
    good.then_some(value).ok_or_else(|| wrong(format!("{what} must be positive, not {value}")))
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::Configuration, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_doubles_after_as_many_good_steps_in_a_row_as_were_asked_for() {
        let mut scaler = LossScaler::new();
        let mut good = |steps: u32| {
            assert!((0..steps).all(|_| scaler.update(false)));
            scaler.scale()
        };
        assert_eq!(good(1999), 65536.0);
        assert_eq!(good(1), 131_072.0);
        assert_eq!(good(1999), 131_072.0);
        assert_eq!(good(1), 262_144.0);
    }

    #[test]
    fn a_step_that_is_not_finite_is_skipped_halves_the_scale_and_begins_the_count_anew() {
        let mut scaler = LossScaler::new().growing(4.0, 3).unwrap();
        assert!(scaler.update(false) && scaler.update(false));
        assert!(!scaler.update(true));
        assert_eq!(scaler.scale(), 32768.0);
        assert!(scaler.update(false) && scaler.update(false));
        assert_eq!(scaler.scale(), 32768.0);
        assert!(scaler.update(false));
        assert_eq!(scaler.scale(), 131_072.0);
    }

    #[test]
    fn the_scale_stays_within_its_limits() {
        let mut scaler = LossScaler::new()
            .growing(2.0, 1)
            .and_then(|scaler| scaler.backing_off_by(0.125))
            .and_then(|scaler| scaler.within(4096.0..=100_000.0))
            .unwrap();
        let mut after = |nonfinite| {
            assert_eq!(scaler.update(nonfinite), !nonfinite);
            scaler.scale()
        };
        assert_eq!([after(false), after(false)], [100_000.0; 2]);
        assert_eq!([after(true), after(true), after(true)], [12_500.0, 4096.0, 4096.0]);
        let limited = LossScaler::new().within(2.0..=8.0).unwrap();
        assert_eq!(limited.scale(), 8.0);
        assert_eq!(limited.starting_at(1.0).unwrap().scale(), 2.0);
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let new = LossScaler::new;
        let refused = [
            new().starting_at(0.0),
            new().starting_at(f32::NAN),
            new().growing(0.5, 10),
            new().growing(2.0, 0),
            new().growing(f32::INFINITY, 10),
            new().backing_off_by(1.0),
            new().backing_off_by(-0.5),
            new().within(2.0..=1.0),
            new().within(0.0..=1.0),
            new().within(1.0..=f32::INFINITY),
        ];
        for outcome in refused {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Configuration);
        }
    }

    #[test]
    fn a_restored_scaler_goes_on_where_the_saved_one_was() {
        let mut scaler = LossScaler::new();
        assert!(!scaler.update(true));
        (0..1500).for_each(|_| assert!(scaler.update(false)));
        let mut restored = LossScaler::new();
        restored.restore(&scaler.save()).unwrap();
        for step in 0..1000 {
            assert_eq!(restored, scaler);
            assert_eq!(restored.update(step == 700), scaler.update(step == 700));
        }
    }

    #[test]
    fn bytes_that_are_no_state_are_refused_and_change_nothing() {
        let mut scaler = LossScaler::new();
        for bytes in [&[][..], &[0; 7], &[0; 8], &[0xff; 8], &[0; 9]] {
            assert!(scaler.restore(bytes).is_err());
        }
        assert_eq!(scaler, LossScaler::new());
    }

    #[test]
    fn more_saved_good_steps_than_the_interval_grow_with_the_next() {
        let mut long = LossScaler::new();
        (0..100).for_each(|_| assert!(long.update(false)));
        let mut short = LossScaler::new().growing(2.0, 10).unwrap();
        short.restore(&long.save()).unwrap();
        assert!(short.update(false));
        assert_eq!(short.scale(), 131_072.0);
    }
}
