"""Collectives on CUDA tensors, in the order of PyTorch's streams."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, List, Optional

import torch
from torch._C._distributed_c10d import Work

from .. import _errors
from .._device import DeviceCommunicator
from ._work import overdue


class TorchStreams:
    """What is needed of PyTorch's streams. Tests put others in their place."""

    def current(self, device: Any) -> Any:
        return torch.cuda.current_stream(device)

    def new(self, device: Any) -> Any:
        return torch.cuda.Stream(device)

    def use(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def future(self, device: Any) -> Any:
        # It takes events of the streams that complete it along to those that wait.
        return torch.futures.Future(devices=[device])

    def empty(self, count: int, like: Any) -> Any:
        return torch.empty(count, dtype=like.dtype, device=like.device)


class DeviceWork(Work):
    """A collective in a stream. ``wait`` has the current stream wait for it, and not the host."""

    def __init__(self, streams: Any, device: Any, stream: Any, result: List[Any]) -> None:
        super().__init__()
        self._streams, self._device, self._stream = streams, device, stream
        self._event = stream.record_event()
        self._tensors = result
        self._future: Any = None

    def wait(self, timeout: Any = None) -> bool:
        """What is put into the current stream from here on comes after the collective."""
        self._streams.current(self._device).wait_event(self._event)
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return bool(self._event.query())

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> Any:
        # What fails on a device is told by the next call.
        return None

    def result(self) -> List[Any]:
        self.wait()
        return self._tensors

    def get_future(self) -> Any:
        if self._future is None:
            self._future = self._streams.future(self._device)
            with self._streams.use(self._stream):
                self._future.set_result(self._tensors)
        return self._future


class CudaCalls:
    """The collectives of a process group on CUDA tensors, whose device is the first one's.

    Blocking calls are in the current stream. Asynchronous ones are in a stream of the group's,
    which waits for the current one, so that what the program computes meanwhile goes on.
    """

    def __init__(
        self, on_device: Callable[[int], DeviceCommunicator], streams: Optional[Any] = None
    ) -> None:
        self._on_device = on_device
        self._streams = streams or TorchStreams()
        self._device: Any = None
        self._communicator: Optional[DeviceCommunicator] = None
        self._own_stream: Any = None

    def run(self, request: Any, result: List[Any], is_async: bool) -> DeviceWork:
        """Puts a collective into a stream; ``request`` is that of the native part, but that lists
        of tensors may lie anywhere."""
        kind, op, root, scale, detect, by_rank, received, data, out = request
        given = [it for side in (data, out) for it in _listed(side)]
        communicator = self._joined(given)
        current = self._streams.current(self._device)
        stream = current
        if is_async:
            stream = self._own_stream = self._own_stream or self._streams.new(self._device)
            stream.wait_stream(current)
            for tensor in given:
                # Its memory is not given to others before the stream is done with it.
                tensor.record_stream(stream)
        with self._in(stream, current):
            flat_data, flat_out = self._one_piece(data, True), self._one_piece(out, False)
            native = (kind, op, root, scale, detect, by_rank, received, flat_data, flat_out)
            communicator._native._run(native, stream.cuda_stream)
            if isinstance(out, list) and len(out) > 1:
                start = 0
                for tensor in out:
                    end = start + tensor.numel()
                    tensor.view(-1).copy_(flat_out[start:end])
                    start = end
        return DeviceWork(self._streams, self._device, stream, result)

    def barrier(self) -> None:
        """Waits until all ranks' devices have come here, if the group has used them."""
        if self._communicator is not None:
            stream = self._streams.current(self._device)
            if self._own_stream is not None:
                stream.wait_stream(self._own_stream)
            self._communicator.barrier(stream=stream.cuda_stream)
            self._communicator.synchronize(stream.cuda_stream)

    def close(self) -> None:
        """Waits for what is under way, and for the other ranks."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.close()

    def _joined(self, tensors: List[Any]) -> DeviceCommunicator:
        """The group's device communicator: made in the first call, which all ranks make."""
        device = tensors[0].device
        if self._device is None:
            self._device = device
        for tensor in tensors:
            if tensor.is_sparse:
                raise ValueError("sparse tensors on CUDA devices are not supported")
            if tensor.device != self._device:
                text = f"the tensors of a group are on one device: {self._device}, {tensor.device}"
                raise ValueError(text)
        if self._communicator is None:
            self._communicator = self._on_device(device.index or 0)
        return self._communicator

    @contextlib.contextmanager
    def _in(self, stream: Any, current: Any) -> Iterator[None]:
        try:
            with self._streams.use(stream) if stream is not current else contextlib.nullcontext():
                yield
        except _errors.Error as error:
            raise overdue(error) from None

    def _one_piece(self, given: Any, is_input: bool) -> Any:
        """A list of tensors as one, of which outputs are not read."""
        if not isinstance(given, list) or len(given) < 2:
            return given
        flat = self._streams.empty(sum(it.numel() for it in given), given[0])
        start = 0
        for tensor in given if is_input else ():
            end = start + tensor.numel()
            flat[start:end].copy_(tensor.reshape(-1))
            start = end
        return flat


def _listed(given: Any) -> List[Any]:
    if given is None:
        return []
    return given if isinstance(given, list) else [given]
