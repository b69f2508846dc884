//! A step as the program sees it: marking gradients ready in streams, and waiting in one.

use std::fmt;
use std::sync::Arc;

use unisum_kernels::Element;

use super::flight::Flight;
use super::launcher::Core;
use crate::{DeviceCommunicator, DeviceStream, Error, ErrorKind};

/// A step under way ([`DeviceBuckets::begin`](super::DeviceBuckets::begin)): threads put kernels
/// that write gradients into streams and mark the gradients ready, in any order.
///
/// Dropping it without waiting fails the step on all ranks.
pub struct DeviceStep<'b> {
    flight: Arc<Flight>,
    core: &'b Core,
}

impl<'b> DeviceStep<'b> {
    pub(super) const fn new(flight: Arc<Flight>, core: &'b Core) -> Self {
        Self { flight, core }
    }

    /// The device of the buckets, as [`DeviceBuckets::device`](super::DeviceBuckets::device).
    pub fn device(&self) -> &'b DeviceCommunicator {
        &self.core.device
    }

    /// As [`DeviceBuckets::address`](super::DeviceBuckets::address).
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn address(&self, parameter: usize) -> u64 {
        self.core.address(parameter)
    }

    /// Marks a gradient ready: what is in the stream now is what it waits for before it is
    /// averaged. Nothing may write it from then on, until a stream has waited for the step
    /// ([`DeviceStep::wait`]). Does not block. A tied parameter ([`Parameter::used`]) is marked as
    /// often as it is used, in any streams.
    ///
    /// [`Parameter::used`]: super::Parameter::used
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if there is no such parameter, it was marked before, or the
    /// stream is of another device or is being captured; the step then fails on all ranks.
    /// [`ErrorKind::Device`], which ends the job, if the driver fails.
    pub fn ready(&self, parameter: usize, stream: &DeviceStream) -> Result<(), Error> {
        let parameters = &self.core.parameters;
        let Some(known) = parameters.get(parameter) else {
            let text = format!("there is no parameter {parameter} among {}", parameters.len());
            return Err(self.refuse(text));
        };
        let moment =
            self.core.moment(stream).inspect_err(|error| self.flight.fail(error.to_string()))?;
        let bucket = self.core.layout.home(parameter).bucket;
        let marked = self.flight.mark(parameter, bucket, moment);
        marked.map_err(|why| self.refuse(format!("{known} {why}")))
    }

    /// Copies a gradient from the host into its place, after what is in the stream, and marks it
    /// ready. Blocks until it is copied.
    ///
    /// # Errors
    /// As [`DeviceStep::ready`], and [`ErrorKind::Configuration`] if the parameter has another type
    /// or length; the step then fails on all ranks.
    pub fn put<T: Element>(
        &self,
        parameter: usize,
        gradient: &[T],
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        let failed = |error: &Error| self.flight.fail(error.to_string());
        let place = self.core.place(parameter, T::DTYPE, gradient.len());
        let (bucket, start) = place.inspect_err(failed)?;
        self.core.device.usable(stream).inspect_err(failed)?;
        bucket.write_elements(start, gradient, stream).inspect_err(failed)?;
        self.ready(parameter, stream)
    }

    /// Hands the step in: what is put into `stream` from now on comes after all averages. Blocks
    /// until all ranks have handed it in, not until it has ended on the devices. A failure of a
    /// device after that is the error of the next step, or of
    /// [`DeviceCommunicator::synchronize`](crate::DeviceCommunicator::synchronize).
    ///
    /// # Errors
    /// [`ErrorKind::StepFailed`], on all ranks, if a rank has not marked all gradients ready, has
    /// marked one too often, or dropped its step: the gradients are unspecified, and the next step
    /// may begin. [`ErrorKind::Configuration`] if the stream is of another device or is being
    /// captured: the step has ended as on the other ranks, and the next one waits for it. As
    /// [`DeviceCommunicator::run_raw`](crate::DeviceCommunicator::run_raw) if the job ended.
    pub fn wait(self, stream: &DeviceStream) -> Result<(), Error> {
        self.close("");
        let end = self.flight.await_end();
        if end.as_ref().is_err_and(|error| error.kind() != ErrorKind::StepFailed) {
            return end;
        }
        // Also if it has failed: the averages are made all the same.
        let followed = self.core.follow_averages(stream);
        if followed.is_ok() {
            self.flight.followed();
        }
        end.and(followed)
    }

    /// Drops the step, which fails on all ranks, and says why in the error.
    pub fn abandon(self, why: &str) {
        self.close(if why.is_empty() { "the step was abandoned" } else { why });
    }

    fn close(&self, why: &str) {
        let missing = self.flight.missing();
        self.flight.close(|| match &missing[..] {
            _ if !why.is_empty() => Some(why.to_owned()),
            [] => None,
            [first, others @ ..] => {
                let others = match others.len() {
                    0 => String::new(),
                    others => format!(", nor had {others} others"),
                };
                let first = &self.core.parameters[*first];
                Some(format!("{first} had no gradient when the step ended{others}"))
            }
        });
    }

    /// The error for the caller; the step fails with it.
    fn refuse(&self, text: String) -> Error {
        self.flight.fail(text.clone());
        Error::new(ErrorKind::Configuration, text).on(self.core.device.rank())
    }
}

impl Drop for DeviceStep<'_> {
    fn drop(&mut self) {
        // After `wait` there is nothing left to close.
        self.close(match std::thread::panicking() {
            true => "the step was dropped by a panic of the thread that had it",
            false => "the step was dropped before it was waited for",
        });
    }
}

impl fmt::Debug for DeviceStep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceStep").finish_non_exhaustive()
    }
}
