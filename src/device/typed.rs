//! Collectives on buffers of a device whose element type is known.

use unisum_kernels::Element;
use unisum_link::Rank;

use super::memories::Owned;
use super::{DeviceBuffer, DeviceCommunicator, DeviceStream, RawDeviceBuffers};
use crate::Error;
use crate::collective::Collective;
use crate::collective::reduction::Reduction;

impl DeviceCommunicator {
    /// Reduces `data` element by element over all ranks and leaves the result on every rank.
    ///
    /// [`DeviceCommunicator::run_raw`] with [`Collective::all_reduce`]; see there.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    #[doc(alias = "allreduce")]
    pub fn all_reduce<T: Element>(
        &self,
        data: &mut DeviceBuffer<T>,
        how: impl Into<Reduction>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::all_reduce(how), None, data, stream)
    }

    /// Reduces `data` over all ranks and leaves the result at `root`; on other ranks, `data` stays
    /// unchanged.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub fn reduce<T: Element>(
        &self,
        data: &mut DeviceBuffer<T>,
        how: impl Into<Reduction>,
        root: Rank,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::reduce(how, root), None, data, stream)
    }

    /// Copies the `data` of `root` to all ranks.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    #[doc(alias = "bcast")]
    pub fn broadcast<T: Element>(
        &self,
        data: &mut DeviceBuffer<T>,
        root: Rank,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::broadcast(root), None, data, stream)
    }

    /// Gathers the `input` of all ranks, in rank order, into the `output` of all ranks, which is
    /// world times as long as `input`.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    #[doc(alias = "allgather")]
    pub fn all_gather<T: Element>(
        &self,
        input: &DeviceBuffer<T>,
        output: &mut DeviceBuffer<T>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::all_gather(), Some(input), output, stream)
    }

    /// Reduces the `input` of all ranks and leaves this rank's block in `output`; `input` is world
    /// times as long.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    #[doc(alias = "reducescatter")]
    pub fn reduce_scatter<T: Element>(
        &self,
        input: &DeviceBuffer<T>,
        output: &mut DeviceBuffer<T>,
        how: impl Into<Reduction>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::reduce_scatter(how), Some(input), output, stream)
    }

    /// Sends block r of `input` to rank r, and receives its block for this rank in block r of
    /// `output`.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    #[doc(alias = "alltoall")]
    pub fn all_to_all<T: Element>(
        &self,
        input: &DeviceBuffer<T>,
        output: &mut DeviceBuffer<T>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::all_to_all(), Some(input), output, stream)
    }

    /// Gathers the `input` of all ranks, in rank order, into the `output` of `root`; on other
    /// ranks, `output` may be empty.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub fn gather<T: Element>(
        &self,
        input: &DeviceBuffer<T>,
        output: &mut DeviceBuffer<T>,
        root: Rank,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::gather(root), Some(input), output, stream)
    }

    /// Sends block r of the `input` of `root` to the `output` of rank r; on other ranks, `input`
    /// may be empty.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub fn scatter<T: Element>(
        &self,
        input: &DeviceBuffer<T>,
        output: &mut DeviceBuffer<T>,
        root: Rank,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        self.run(&Collective::scatter(root), Some(input), output, stream)
    }

    /// No stream goes on before all ranks' streams have come here.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub fn barrier(&self, stream: &DeviceStream) -> Result<(), Error> {
        // SAFETY: there are no elements.
        let nothing = unsafe { RawDeviceBuffers::in_place(unisum_kernels::Dtype::U8, 0, 0) };
        self.run_raw(&Collective::barrier(), nothing, stream)
    }

    /// Runs any collective on device buffers; without `input`, in place.
    ///
    /// # Errors
    /// As [`DeviceCommunicator::run_raw`].
    pub fn run<T: Element>(
        &self,
        collective: &Collective,
        input: Option<&DeviceBuffer<T>>,
        output: &mut DeviceBuffer<T>,
        stream: &DeviceStream,
    ) -> Result<(), Error> {
        let place = |buffer: &DeviceBuffer<T>| (buffer.address(), buffer.len());
        let owners: Vec<&Owned> =
            input.into_iter().chain([&*output]).map(|buffer| &buffer.owned).collect();
        let (dtype, input, output) = (T::DTYPE, input.map(place), place(output));
        self.call(collective, RawDeviceBuffers { dtype, input, output }, &owners, &stream.0)
    }
}
