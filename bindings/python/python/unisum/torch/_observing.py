"""What a process group has done, is doing and consists of."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .._observing import Description, Stats
from ._backend import group_of
from ._elastic import _group


def _part(group: Any) -> Any:
    group = dist.group.WORLD if group is None else group
    part = group_of(group)
    return _group(group) if part is None else part


def stats(group: Any = None) -> Stats:
    """What this process has done so far in the group's collectives, and what it is doing, as
    ``unisum.Communicator.stats``: of the default group, unless another one is given. Of a group with a backend for each
    kind of device, it is the one for the CPU.

    Not collective. Any thread may call it at any time, also while a call is stuck. Messages and
    collectives of CUDA tensors are not counted.
    """
    return _part(group).communicator.stats()  # type: ignore[no-any-return]


def describe(group: Any = None) -> Description:
    """Where the group's processes are, what the links between them cost, and which algorithm is
    chosen for which size: as data, which ``print`` gives for people. Not collective."""
    return _part(group).communicator.describe()  # type: ignore[no-any-return]
