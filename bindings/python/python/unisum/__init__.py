"""Collective communication for training large models.

A job is a number of processes, its *ranks*, that call the same collectives in the same order::

    import numpy, unisum

    with unisum.connect() as comm:          # under torchrun, mpirun, srun, or unisum.spawn
        data = numpy.full(1 << 20, comm.rank, "float32")
        comm.all_reduce(data, "average")    # in place, on every rank

PyTorch programs say ``torch.distributed.init_process_group("unisum")``; see ``unisum.torch``.
"""

from __future__ import annotations

from ._buckets import BucketReport, Buckets, Parameter, Step, StepChange, StepReport
from ._communicator import OPS, Communicator, Messenger, View, Work, empty
from ._connect import connect, join
from ._device import DeviceCommunicator
from ._device_buckets import DeviceBuckets, DeviceStep
from ._errors import (
    AbortedError,
    ConfigurationError,
    Error,
    MismatchError,
    RankLostError,
    RendezvousError,
    TimeoutError,
    ViewChanged,
)
from ._observing import (
    AlgorithmRange,
    Description,
    LinkStats,
    MeasuredCost,
    PeerStats,
    RankDescription,
    RunningCall,
    Stats,
)
from ._sharded import Resharded, ShardMove, ShardPiece, ShardState, Weights
from ._spawn import RankFailed, spawn
from ._unisum import Array, DeviceArray, LossScaler, cuda_devices

__all__ = [
    "AbortedError",
    "AlgorithmRange",
    "Array",
    "BucketReport",
    "Buckets",
    "Communicator",
    "ConfigurationError",
    "Description",
    "DeviceArray",
    "DeviceBuckets",
    "DeviceCommunicator",
    "DeviceStep",
    "Error",
    "LinkStats",
    "LossScaler",
    "MeasuredCost",
    "Messenger",
    "MismatchError",
    "OPS",
    "Parameter",
    "PeerStats",
    "RankDescription",
    "RankFailed",
    "RankLostError",
    "RendezvousError",
    "Resharded",
    "RunningCall",
    "ShardMove",
    "ShardPiece",
    "ShardState",
    "Stats",
    "Step",
    "StepChange",
    "StepReport",
    "TimeoutError",
    "View",
    "ViewChanged",
    "Weights",
    "Work",
    "connect",
    "cuda_devices",
    "empty",
    "join",
    "spawn",
]
