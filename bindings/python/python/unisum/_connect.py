"""Joining a job."""

from __future__ import annotations

import os
from typing import Any, Optional, Union

from . import _unisum
from ._communicator import Communicator, remember


def connect(
    *,
    rank: Optional[int] = None,
    world: Optional[int] = None,
    rendezvous: Optional[str] = None,
    store: Any = None,
    key: str = "unisum",
    token: Optional[str] = None,
    job: Optional[str] = None,
    transport: Optional[str] = None,
    algorithm: Optional[str] = None,
    reproducible: Optional[bool] = None,
    tuning: Optional[str] = None,
    port_range: Optional[str] = None,
    interface: Optional[str] = None,
    timeout: Optional[float] = None,
    connect_timeout: Optional[float] = None,
    heartbeat_timeout: Optional[float] = None,
    elastic: Union[bool, int, None] = None,
) -> Communicator:
    """Joins the job that this process was started in, and waits until all ranks have.

    Rank, world and meeting place come from the launcher (torchrun, mpirun, srun, ...) or the
    ``UNISUM_*`` variables; arguments win over them, and stand for the variables of their names in
    docs/configuration.md. Times are in seconds.

    ``elastic`` is how many ranks the job needs to go on when it loses some; ``True`` is one. Calls
    then end with ``unisum.ViewChanged``, and ``Communicator.rebuild`` gives the communicator of
    those that are left. Without it the job ends with the first rank that is lost.

    ``store`` is a key-value store that all ranks have, with ``set(key, text)`` and ``get(key)``,
    as PyTorch's: rank 0 puts its addresses and a fresh token there, under ``key``. Starts at the
    same time need different keys.
    """
    options = {
        "rank": rank,
        "world": world,
        "rendezvous": rendezvous,
        "token": token,
        "job": job,
        "transport": transport,
        "algorithm": algorithm,
        "reproducible": reproducible,
        "tuning": tuning,
        "port_range": port_range,
        "interface": interface,
        "timeout": timeout,
        "connect_timeout": connect_timeout,
        "heartbeat_timeout": heartbeat_timeout,
        "elastic": None if elastic is None else int(elastic),
    }
    if store is not None and rendezvous is None and not os.environ.get("UNISUM_RENDEZVOUS"):
        options["rendezvous"] = f"store://{key}"
    communicator = Communicator(_unisum.connect(options, store))
    remember(communicator)
    return communicator

