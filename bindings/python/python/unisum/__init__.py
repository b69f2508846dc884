"""Collective communication for training large models.

A job is a number of processes, its *ranks*, that call the same collectives in the same order::

    import numpy, unisum

    with unisum.connect() as comm:          # under torchrun, mpirun, srun, or unisum.spawn
        data = numpy.full(1 << 20, comm.rank, "float32")
        comm.all_reduce(data, "average")    # in place, on every rank

PyTorch programs say ``torch.distributed.init_process_group("unisum")``; see ``unisum.torch``.
"""

from __future__ import annotations

from ._communicator import OPS, Communicator, Messenger, Work, empty
from ._connect import connect
from ._errors import (
    AbortedError,
    ConfigurationError,
    Error,
    MismatchError,
    RankLostError,
    RendezvousError,
    TimeoutError,
)
from ._spawn import RankFailed, spawn
from ._unisum import Array

__all__ = [
    "AbortedError",
    "Array",
    "Communicator",
    "ConfigurationError",
    "Error",
    "Messenger",
    "MismatchError",
    "OPS",
    "RankFailed",
    "RankLostError",
    "RendezvousError",
    "TimeoutError",
    "Work",
    "connect",
    "empty",
    "spawn",
]
