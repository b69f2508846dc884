"""Collectives on the memory of CUDA devices."""

from __future__ import annotations

import sys
from typing import Any, Optional, Sequence

from . import _unisum
from ._communicator import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, BARRIER, BROADCAST, GATHER
from ._communicator import REDUCE, REDUCE_SCATTER, SCATTER, _op
from ._types import DeviceData


def stream_handle(stream: Any, data: Any = None) -> int:
    """The driver's handle of a stream: of a number, an object of PyTorch's or CuPy's, or any with
    ``__cuda_stream__``. ``None`` is PyTorch's current stream for tensors of PyTorch's, else the
    legacy default stream."""
    if stream is None:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(data, torch.Tensor):
            return 0
        stream = torch.cuda.current_stream(data.device)
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise TypeError(f"version {version} of __cuda_stream__ is not known")
        return int(handle)
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise TypeError(f"`{type(stream).__name__}` is no CUDA stream")


class DeviceCommunicator:
    """A rank's CUDA device: collectives on its memory, in the order of streams.

    Made by ``Communicator.on_device``. Arrays are any objects with ``__cuda_array_interface__`` or
    DLPack: CuPy's, PyTorch's, Numba's. They are used where they lie and have no gaps. ``stream``
    is a number (a ``CUstream``, a ``cudaStream_t``), an object of PyTorch's or CuPy's, or any with
    ``__cuda_stream__``; without, PyTorch's current stream for its tensors, else the legacy default
    stream.

    A call returns when the collective is in the stream, after all ranks have called; what is put
    there later comes after it. The program keeps arrays, and leaves them alone outside of the
    stream, until it has ended: ``synchronize`` waits for that and says whether all went well. After
    a failure the job is aborted, and streams do not hang.
    """

    def __init__(self, native: _unisum.Device) -> None:
        self._native = native
        #: This process's number, from 0.
        self.rank: int = native.rank
        #: How many ranks there are.
        self.world: int = native.world

    @property
    def ordinal(self) -> int:
        """The number of the device in this process."""
        return self._native.ordinal

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._native.closed

    def describe(self) -> str:
        """The device, and how data moves: by CUDA IPC, or staged through the hosts, and why."""
        return self._native.describe()

    def set_algorithm(self, name: Optional[str]) -> None:
        """Fixes the algorithm of later calls, or has it chosen (``None``). All ranks call it."""
        self._native.set_algorithm(name)

    def close(self) -> None:
        """Waits for what is under way, and for the other ranks to close theirs, 2 s at most."""
        self._native.close()

    def __enter__(self) -> "DeviceCommunicator":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"unisum.DeviceCommunicator(rank={self.rank}, world={self.world})"

    def _call(
        self,
        kind: int,
        data: Any,
        out: Any,
        stream: Any,
        op: int = 0,
        root: int = 0,
        scale: Optional[float] = None,
        detect: bool = False,
        counts: Optional[Sequence[int]] = None,
        receive_counts: Optional[Sequence[int]] = None,
    ) -> Any:
        request = (
            kind,
            op,
            root,
            scale,
            detect,
            None if counts is None else list(counts),
            None if receive_counts is None else list(receive_counts),
            data,
            out,
        )
        self._native._run(request, stream_handle(stream, out if data is None else data))
        return data if out is None else out

    def all_reduce(
        self,
        data: DeviceData,
        op: str = "sum",
        *,
        out: Optional[DeviceData] = None,
        scale: Optional[float] = None,
        detect_nonfinite: bool = False,
        stream: Any = None,
    ) -> Any:
        """Reduces ``data`` of all ranks, element by element, for all: in ``out``, or in place.

        Arguments as of ``Communicator.all_reduce``. What ``detect_nonfinite`` finds,
        ``take_nonfinite`` tells.
        """
        number = _op(op)
        return self._call(ALL_REDUCE, data, out, stream, number, 0, scale, detect_nonfinite)

    def reduce(
        self,
        data: DeviceData,
        root: int = 0,
        op: str = "sum",
        *,
        out: Optional[DeviceData] = None,
        stream: Any = None,
    ) -> Any:
        """Reduces ``data`` of all ranks for ``root``; elsewhere it stays as it is."""
        return self._call(REDUCE, data, out, stream, _op(op), root)

    def broadcast(self, data: DeviceData, root: int = 0, *, stream: Any = None) -> Any:
        """Gives all ranks the ``data`` of ``root``."""
        return self._call(BROADCAST, data, None, stream, 0, root)

    def all_gather(
        self,
        data: DeviceData,
        out: DeviceData,
        *,
        counts: Optional[Sequence[int]] = None,
        stream: Any = None,
    ) -> Any:
        """Gives all ranks the ``data`` of all, in rank order, in ``out``; ``counts`` says how many
        elements each rank has, if not all have as many."""
        return self._call(ALL_GATHER, data, out, stream, counts=counts)

    def reduce_scatter(
        self,
        data: DeviceData,
        out: DeviceData,
        op: str = "sum",
        *,
        counts: Optional[Sequence[int]] = None,
        scale: Optional[float] = None,
        detect_nonfinite: bool = False,
        stream: Any = None,
    ) -> Any:
        """Reduces ``data`` of all ranks and gives each its block of the result, in ``out``."""
        number = _op(op)
        return self._call(
            REDUCE_SCATTER, data, out, stream, number, 0, scale, detect_nonfinite, counts
        )

    def all_to_all(
        self,
        data: DeviceData,
        out: DeviceData,
        *,
        counts: Optional[Sequence[int]] = None,
        receive_counts: Optional[Sequence[int]] = None,
        stream: Any = None,
    ) -> Any:
        """Sends block r of ``data`` to rank r, and gets in ``out`` a block from each rank."""
        if (counts is None) != (receive_counts is None):
            raise ValueError("give counts and receive_counts, or neither")
        return self._call(
            ALL_TO_ALL, data, out, stream, counts=counts, receive_counts=receive_counts
        )

    def gather(
        self,
        data: DeviceData,
        out: Optional[DeviceData] = None,
        root: int = 0,
        *,
        counts: Optional[Sequence[int]] = None,
        stream: Any = None,
    ) -> Any:
        """Gives ``root`` the ``data`` of all ranks, in rank order, in its ``out``."""
        given: Any = [] if out is None else out
        return self._call(GATHER, data, given, stream, 0, root, counts=counts)

    def scatter(
        self,
        data: Optional[DeviceData],
        out: DeviceData,
        root: int = 0,
        *,
        counts: Optional[Sequence[int]] = None,
        stream: Any = None,
    ) -> Any:
        """Gives each rank its block of the ``data`` of ``root``, which others leave ``None``."""
        return self._call(SCATTER, data, out, stream, 0, root, counts=counts)

    def barrier(self, *, stream: Any = None) -> None:
        """No stream goes on before all ranks' streams have come here."""
        self._call(BARRIER, None, [], stream)

    def synchronize(self, stream: Any = None, timeout: Optional[float] = None) -> None:
        """Waits until everything in the stream has ended, ``timeout`` seconds at most (``None``:
        as long as a call may take), and raises what went wrong."""
        self._native._synchronize(stream_handle(stream), timeout)

    def take_nonfinite(self, stream: Any = None, timeout: Optional[float] = None) -> bool:
        """Waits as ``synchronize``, and says whether a result of the calls with
        ``detect_nonfinite`` since this was last asked has an infinity or a NaN: the same on all
        ranks after all-reduces; of the rank's own block after a reduce-scatter."""
        return self._native._take_nonfinite(stream_handle(stream), timeout)
