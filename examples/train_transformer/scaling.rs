//! The factor of the loss, so that small gradients do not vanish in 16 bits.

use unisum::LossScaler;

use crate::model::Precision;

/// The loss's factor in each step: 1 where nothing is rounded to 16 bits.
#[derive(Clone, Debug)]
pub(crate) struct Scaling {
    scaler: Option<LossScaler>,
}

/// What follows from a step for it and for the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Update {
    /// Whether the optimiser takes the step.
    pub(crate) applies: bool,
    /// How many times as large the loss is in the next step.
    pub(crate) factor: f32,
}

/// Good steps after which the scale doubles: trainings are short here.
const GROWS_AFTER: u32 = 200;

impl Scaling {
    /// Starts from that factor, where one is needed.
    pub(crate) fn new(precision: Precision, start: f32) -> Result<Self, unisum::Error> {
        let scaler = || LossScaler::new().growing(2.0, GROWS_AFTER)?.starting_at(start);
        let scaler = (precision != Precision::F32).then(scaler).transpose()?;
        Ok(Self { scaler })
    }

    /// What the loss is multiplied by in this step.
    pub(crate) fn scale(&self) -> f32 {
        self.scaler.as_ref().map_or(1.0, LossScaler::scale)
    }

    /// The scale, where there is one.
    pub(crate) fn report(&self) -> Option<f32> {
        self.scaler.as_ref().map(LossScaler::scale)
    }

    /// Ends a step. All ranks give and get the same.
    ///
    /// # Errors
    /// If the gradient is not finite, and a smaller scale can't help.
    pub(crate) fn update(&mut self, nonfinite: bool) -> Result<Update, String> {
        let before = self.scale();
        let applies = match &mut self.scaler {
            Some(scaler) => scaler.update(nonfinite),
            None => !nonfinite,
        };
        let factor = self.scale() / before;
        if !applies && factor == 1.0 {
            return Err(format!("the gradient is not finite, with the loss times {before}"));
        }
        Ok(Update { applies, factor })
    }

    /// What a checkpoint keeps of it.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.scaler.as_ref().map_or_else(Vec::new, |scaler| scaler.save().to_vec())
    }

    /// Goes on where [`Scaling::save`] was called.
    ///
    /// # Errors
    /// If the bytes are not those of a state.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> Result<(), unisum::Error> {
        self.scaler.as_mut().map_or(Ok(()), |scaler| scaler.restore(saved))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_is_not_finite_is_skipped_until_no_scale_is_small_enough() {
        let mut scaling = Scaling::new(Precision::F16, 2.0).unwrap();
        assert_eq!(scaling.update(true), Ok(Update { applies: false, factor: 0.5 }));
        assert_eq!(scaling.update(false), Ok(Update { applies: true, factor: 1.0 }));
        assert!(scaling.update(true).is_err());
    }

    #[test]
    fn without_a_scale_no_step_is_skipped() {
        let mut scaling = Scaling::new(Precision::F32, 2.0).unwrap();
        assert_eq!((scaling.scale(), scaling.report()), (1.0, None));
        assert_eq!(scaling.update(false), Ok(Update { applies: true, factor: 1.0 }));
        assert!(scaling.update(true).is_err());
    }
}
