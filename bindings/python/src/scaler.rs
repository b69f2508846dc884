//! The loss scaler.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use unisum::Error;

use crate::errors::exception;

/// Finds the factor that the loss is multiplied by, so that the gradients of a model in 16 bits
/// neither vanish nor overflow.
///
/// The loss is multiplied by ``scale`` before the backward pass, the averaged gradients are divided
/// by it after. ``update(nonfinite)`` ends a step: all ranks tell it the same, such as
/// ``StepReport.nonfinite``, so the scale is the same on all. It starts at ``scale``, is multiplied
/// by ``growth`` after ``growth_interval`` good steps in a row and by ``backoff`` after a bad one,
/// and stays within ``limits``.
#[pyclass(frozen, name = "LossScaler", module = "unisum")]
pub(crate) struct LossScaler(Mutex<unisum::LossScaler>);

impl LossScaler {
    fn lock(&self) -> MutexGuard<'_, unisum::LossScaler> {
        // Its methods do not panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl LossScaler {
    #[new]
    #[pyo3(signature = (
        scale=65536.0,
        *,
        growth=2.0,
        growth_interval=2000,
        backoff=0.5,
        limits=(1.0, 4_294_967_296.0)
    ))]
    fn new(
        py: Python<'_>,
        scale: f32,
        growth: f32,
        growth_interval: u32,
        backoff: f32,
        limits: (f32, f32),
    ) -> PyResult<Self> {
        let wrong = |error: Error| exception(py, &error);
        let scaler = unisum::LossScaler::new()
            .within(limits.0..=limits.1)
            .and_then(|scaler| scaler.starting_at(scale))
            .and_then(|scaler| scaler.growing(growth, growth_interval))
            .and_then(|scaler| scaler.backing_off_by(backoff))
            .map_err(wrong)?;
        Ok(Self(Mutex::new(scaler)))
    }

    /// What the loss is multiplied by in this step.
    #[getter]
    fn scale(&self) -> f32 {
        self.lock().scale()
    }

    /// Ends a step and finds the scale of the next. Whether the optimizer is to apply the step: not
    /// if a gradient was infinite or NaN.
    fn update(&self, nonfinite: bool) -> bool {
        self.lock().update(nonfinite)
    }

    /// The scale and the good steps so far, for a checkpoint: 8 bytes.
    fn save(&self) -> [u8; 8] {
        self.lock().save()
    }

    /// Goes on where ``save`` was called.
    fn restore(&self, py: Python<'_>, saved: &[u8]) -> PyResult<()> {
        self.lock().restore(saved).map_err(|error| exception(py, &error))
    }

    fn __repr__(&self) -> String {
        format!("unisum.LossScaler(scale={})", self.scale())
    }
}
