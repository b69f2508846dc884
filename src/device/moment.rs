//! Moments in streams, for what orders streams among each other across calls.

use std::sync::Arc;

use unisum_cuda_ipc::{CudaError, Event};
use unisum_kernels::Dtype;

use super::{DeviceBuffer, DeviceCommunicator, DeviceStream, RawDeviceBuffers};
use crate::collective::Collective;
use crate::{Error, ErrorKind};

/// A moment in a stream: when all has ended that was in it then.
#[derive(Debug)]
pub(crate) struct Moment(Event);

impl DeviceCommunicator {
    /// Now, in a stream. `spare` is used for it: what waits for the moment that it was goes on
    /// doing that.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if the stream is of another device, or is being captured;
    /// [`ErrorKind::Device`], which ends the job, if the driver fails.
    pub(crate) fn moment(
        &self,
        stream: &DeviceStream,
        spare: Option<Moment>,
    ) -> Result<Moment, Error> {
        self.usable(stream)?;
        let made = || {
            let event = spare.map_or_else(|| Event::new(&self.device, false), |it| Ok(it.0))?;
            event.record(&stream.0)?;
            Ok(Moment(event))
        };
        made().map_err(|error: CudaError| self.fail(&error))
    }

    /// Whether the stream can be ordered with the collectives of this communicator.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] if it is of another device, or is being captured, or another
    /// one is that it would wait for; [`ErrorKind::Device`], which ends the job, if the driver
    /// fails.
    pub(crate) fn usable(&self, stream: &DeviceStream) -> Result<(), Error> {
        self.check()?;
        if !Arc::ptr_eq(stream.0.device(), &self.device) {
            let text = "the stream is of another device than the communicator";
            return Err(Error::new(ErrorKind::Configuration, text).on(self.rank()));
        }
        self.refuse_capture(stream, "gradients can't be")
    }

    /// The same moment, now.
    ///
    /// # Errors
    /// [`ErrorKind::Device`], which ends the job, if the driver fails.
    pub(crate) fn again(&self, moment: &Moment, stream: &DeviceStream) -> Result<(), Error> {
        moment.0.record(&stream.0).map_err(|error| self.fail(&error))
    }

    /// What is put into the stream from now on comes after that moment.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::again`].
    pub(crate) fn follow(&self, stream: &DeviceStream, moment: &Moment) -> Result<(), Error> {
        stream.0.wait(&moment.0).map_err(|error| self.fail(&error))
    }

    /// Runs a collective in place on bytes that are elements of this type.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub(crate) fn run_as(
        &self,
        collective: &Collective,
        dtype: Dtype,
        bytes: &DeviceBuffer<u8>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        let output = (bytes.address(), bytes.len() / dtype.bytes());
        let buffers = RawDeviceBuffers { dtype, input: None, output };
        self.call(collective, buffers, &[&bytes.owned], &stream.0)
    }
}
