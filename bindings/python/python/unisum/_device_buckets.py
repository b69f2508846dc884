"""Gradient buckets in the memory of CUDA devices."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Union

from . import _unisum
from ._buckets import Parameter, described, place_of
from ._communicator import Communicator
from ._device import stream_handle
from ._unisum import DeviceArray


class DeviceBuckets:
    """The gradients of a model in buckets in the memory of this rank's CUDA device, which are
    averaged over all ranks while the backward pass goes on::

        buckets = unisum.DeviceBuckets(comm, [unisum.Parameter("weight", (128, 64)),
                                              unisum.Parameter("bias", (64,))])
        bias = cupy.asarray(buckets.gradient("bias"))       # or buckets.gradient("bias").torch()
        with buckets.begin(stream=s) as step:
            ...                         # kernels in `s` write gradients
            step.ready("bias")          # is averaged once `s` has come here and its bucket is full
            step.ready("weight")
        ...                             # what is put into `s` now comes after the averages

    A bucket is averaged in a stream of their own as soon as the program's streams have written all
    of its gradients; no call waits for a device. Gradients are zero at first, stay where they are,
    and keep their averages after a step: a program whose kernels add zeroes them.

    Collective: every rank makes them, with the same parameters, in the order in which they were
    registered, and the same settings; ``device`` is the number of this rank's device, by default as
    ``Communicator.on_device``. Streams are given as to ``DeviceCommunicator``; without one, it is
    the legacy default stream. ``detect_nonfinite``: averages are looked at for ``take_nonfinite``.
    """

    def __init__(
        self,
        communicator: Communicator,
        parameters: Sequence[Union[Parameter, Tuple[Any, ...]]],
        *,
        device: Optional[int] = None,
        bucket_bytes: Optional[int] = None,
        end_bucket_bytes: Optional[int] = None,
        detect_nonfinite: bool = True,
    ) -> None:
        #: The parameters, as they were given.
        self.parameters: List[Parameter] = [Parameter(*it) for it in parameters]
        self._places = {it.name: place for place, it in enumerate(self.parameters)}
        self._native = _unisum.make_device_buckets(
            communicator._native,
            communicator._ordinal(device),
            described(self.parameters),
            bucket_bytes,
            end_bucket_bytes,
            detect_nonfinite,
        )

    @property
    def ordinal(self) -> int:
        """The number of the device in this process."""
        return self._native.ordinal

    def describe(self) -> str:
        """The device, and how data moves: as ``DeviceCommunicator.describe``."""
        return self._native.describe()

    def gradient(self, parameter: Union[int, str]) -> DeviceArray:
        """A parameter's gradient where it lies: the program's from ``begin`` until it is marked
        ready, and after a step in a stream that has waited for it."""
        return self._native._gradient(place_of(self._places, parameter))

    def begin(self, *, stream: Any = None) -> "DeviceStep":
        """Begins a step, whose gradients are averaged over all ranks; ``stream`` is that of its
        calls where they name none. Collective. Waits until all ranks have handed in the step
        before."""
        handle = stream_handle(stream)
        self._native._begin()
        return DeviceStep(self, handle)

    def read(self, parameter: Union[int, str], out: Any, *, stream: Any = None) -> Any:
        """Copies a gradient to ``out``, an array of the host with its type and length, after what
        is in the stream. Blocks until it is copied."""
        place = place_of(self._places, parameter)
        self._native._read(place, out, stream_handle(stream))
        return out

    def synchronize(self, stream: Any = None, timeout: Optional[float] = None) -> None:
        """Waits as ``DeviceCommunicator.synchronize``."""
        self._native._synchronize(stream_handle(stream), timeout)

    def take_nonfinite(self, stream: Any = None, timeout: Optional[float] = None) -> bool:
        """Waits for the averages and the stream, and says whether an average since this was last
        asked is infinite or NaN: the same on all ranks that ask after the same steps."""
        return self._native._take_nonfinite(stream_handle(stream), timeout)

    @property
    def buckets(self) -> List[List[int]]:
        """The parameters of each bucket, by their places."""
        return self._native._layout()

    def close(self) -> None:
        """Ends them. A step under way fails on all ranks. Waits for others, 2 s at most."""
        self._native.close()

    def __enter__(self) -> "DeviceBuckets":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"unisum.DeviceBuckets({len(self.parameters)} parameters)"


class DeviceStep:
    """A step under way. Threads put kernels that write gradients into streams and mark the
    gradients ready, in any order.

    As a ``with`` block it waits at the end; if the block raises, the step fails on all ranks, and
    their error names this one.
    """

    def __init__(self, buckets: DeviceBuckets, stream: int) -> None:
        self._buckets = buckets
        self._native = buckets._native
        self._stream = stream
        self._is_open = True

    def _handle(self, stream: Any) -> int:
        return self._stream if stream is None else stream_handle(stream)

    def _place(self, parameter: Union[int, str]) -> int:
        return place_of(self._buckets._places, parameter)

    def ready(self, parameter: Union[int, str], *, stream: Any = None) -> None:
        """The gradient is final once what is in the stream now has ended. Not blocking."""
        self._native._ready(self._place(parameter), self._handle(stream))

    def put(self, parameter: Union[int, str], gradient: Any, *, stream: Any = None) -> None:
        """Copies a gradient from the memory of the host, after what is in the stream, and marks it
        ready. It has the parameter's type. Blocks until it is copied."""
        self._native._put(self._place(parameter), gradient, self._handle(stream))

    def wait(self, *, stream: Any = None) -> None:
        """Ends the step: what is put into the stream from here on comes after all averages. Blocks
        until all ranks have handed it in, not until it has ended on the devices.

        Raises ``unisum.Error`` of kind ``"step_failed"``, on all ranks alike, if a rank has not
        marked all gradients ready, marked one twice, or gave its step up: the next can be begun.
        """
        handle = self._handle(stream)
        self._is_open = False
        self._native._wait(handle)

    def __enter__(self) -> "DeviceStep":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self._is_open:
            return
        if error is None:
            self.wait()
            return
        self._is_open = False
        self._native._drop_step(f"the step was given up: {kind.__name__}: {error}")

    def __repr__(self) -> str:
        return f"unisum.DeviceStep(open={self._is_open})"
