"""unisum as one of a group's several backends, as in ``"cpu:unisum,cuda:nccl"``.

A group that has no other backend is a process group of unisum's, which PyTorch calls directly.
Beside others it is a backend of PyTorch's own process group, which picks one by a tensor's device.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Optional, Set

import torch
from torch._C._distributed_c10d import Backend, ProcessGroup

from ._group import UnisumProcessGroup

#: PyTorch drops what a Python object overrides once Python has no reference to it.
_alive: Set[Any] = set()

_CALLS = (
    "abort",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "gather_single",
    "get_error",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "send",
    "set_timeout",
    "_set_default_timeout",
)


def is_one_of_several() -> bool:
    """Whether the group that PyTorch is making, in the caller's caller, has other backends."""
    config = sys._getframe(2).f_locals.get("backend_config")
    if config is None:
        return False
    return len(set(config.get_device_backend_map().values())) > 1


def beside_others(group: UnisumProcessGroup) -> Any:
    """The group as a backend, or as itself if this PyTorch takes no backends from Python."""
    try:
        backend = UnisumBackend(group)
    except TypeError:
        # Before 2.14: the group then has the tensors of all devices.
        return group
    _alive.add(backend)
    return backend


def group_of(group: Any) -> Optional[UnisumProcessGroup]:
    """unisum's part of a process group: what reduces tensors of the CPU, if that is unisum."""
    if isinstance(group, UnisumProcessGroup):
        return group
    if not isinstance(group, ProcessGroup):
        # What PyTorch has for groups of which this process is no member.
        return None
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return None
    return backend._group if isinstance(backend, UnisumBackend) else None


class UnisumBackend(Backend):
    """A process group of unisum's, as a backend of another."""

    supports_coalescing = False
    supports_splitting = False
    supports_shrinking = False
    supports_reconfigure = False
    supports_window = False
    _supports_time_estimate = False

    def __init__(self, group: UnisumProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    @property
    def communicator(self) -> Any:
        """The ranks as a ``unisum.Communicator``."""
        return self._group.communicator

    def getBackendName(self) -> str:
        return "unisum"

    def monitored_barrier(self, options: Any, wait_all_ranks: bool = False) -> None:
        self._group.monitored_barrier(options.timeout, wait_all_ranks)

    def shutdown(self) -> None:
        self._group.shutdown()
        _alive.discard(self)


def _forwarding(name: str) -> Callable[..., Any]:
    def call(self: UnisumBackend, *arguments: Any, **options: Any) -> Any:
        return getattr(self._group, name)(*arguments, **options)

    call.__name__ = name
    return call


for _name in _CALLS:
    setattr(UnisumBackend, _name, _forwarding(_name))
