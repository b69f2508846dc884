//! Collectives on device memory where the devices don't reach each other: to the host, a collective
//! there, and back.

use unisum_cuda_ipc::{CudaError, Pinned, Stream};

use super::buffer::RawDeviceBuffers;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Outcome;
use crate::collective::{Collective, Extents};
use crate::{Communicator, Error};

/// What that needs.
#[derive(Debug)]
pub(super) struct Staging {
    /// A duplicate of its own: its calls try algorithms as the program's own do.
    communicator: Communicator,
    pinned: Option<Pinned>,
}

/// Why it failed.
#[derive(Debug)]
pub(super) enum Failure {
    Device(CudaError),
    Host(Error),
}

impl From<CudaError> for Failure {
    fn from(error: CudaError) -> Self {
        Self::Device(error)
    }
}

/// How large the first pinned memory is.
const FIRST_BYTES: usize = 64 << 10;

impl Staging {
    pub(super) const fn new(communicator: Communicator) -> Self {
        Self { communicator, pinned: None }
    }

    pub(super) const fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    pub(super) fn set_algorithm(&self, name: Option<&str>) -> Result<(), Error> {
        self.communicator.set_algorithm(name)
    }

    /// Runs a collective, the host waiting for the stream and the other ranks, and enqueues the way
    /// back.
    ///
    /// # Safety
    /// The buffers have their elements until the stream has passed.
    pub(super) unsafe fn run(
        &mut self,
        collective: &Collective,
        buffers: &RawDeviceBuffers,
        extents: &Extents,
        stream: &Stream,
    ) -> Result<Outcome, Failure> {
        let dtype = buffers.dtype;
        let length = |count: usize| (count * dtype.bytes()).next_multiple_of(64);
        let (output_at, output_count) = buffers.output;
        let (input_at, input_count) = buffers.input.unwrap_or(buffers.output);
        // The input lies behind the output, if it is not the same.
        let behind = length(output_count);
        let bytes = behind + buffers.input.map_or(0, |(_, count)| length(count));
        // What went back in an earlier call has to be there before this one overwrites it.
        stream.synchronize()?;
        if self.pinned.as_ref().is_none_or(|pinned| pinned.bytes() < bytes) {
            self.pinned = None;
            let room = bytes.max(FIRST_BYTES).next_power_of_two();
            self.pinned = Some(Pinned::zeroed(stream.device(), room)?);
        }
        let pinned = self.pinned.as_ref().expect("made just above").host();
        let (puts, gets) = extents.bytes(dtype);
        let from = if buffers.input.is_some() { behind } else { 0 };
        // SAFETY: the memory has so many bytes.
        let host_input = unsafe { pinned.add(from) };
        if !puts.is_empty() {
            // SAFETY: the range is within the input, for which there is room.
            let to = unsafe { host_input.add(puts.start) };
            let at = input_at + puts.start as u64;
            // SAFETY: as above; the host waits for the copy just below.
            unsafe { stream.copy_to_host(to.as_ptr(), at, puts.len()) }?;
            stream.synchronize()?;
        }
        let lent = match buffers.input {
            // SAFETY: pinned memory is aligned to a page; nobody else has it; all bits of it were
            // copied from elements, or are zero.
            None => unsafe { RawBuffers::in_place(dtype, pinned, output_count) },
            // SAFETY: as above; the two do not overlap.
            Some(_) => unsafe {
                RawBuffers::out_of_place(dtype, (host_input, input_count), (pinned, output_count))
            },
        };
        let outcome = self.communicator.run_raw(collective, lent).map_err(Failure::Host)?;
        if !gets.is_empty() {
            // SAFETY: the range is within the output, for which there is room.
            let back = unsafe { pinned.add(gets.start) };
            let at = output_at + gets.start as u64;
            let copied =
                // SAFETY: as above; the memory stays until the next call has waited for the stream.
                unsafe { stream.copy_to_device(at, back.as_ptr(), gets.len()) };
            copied?;
        }
        Ok(outcome)
    }
}
