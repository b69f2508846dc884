"""Joining a job."""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Union

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
    reconnect_timeout: Optional[float] = None,
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
        "reconnect_timeout": reconnect_timeout,
        "elastic": None if elastic is None else int(elastic),
    }
    return _connected(options, store, key)


def join(
    *,
    rendezvous: Optional[str] = None,
    store: Any = None,
    key: str = "unisum",
    elastic: Union[bool, int, None] = None,
    **options: Any,
) -> Communicator:
    """Joins an elastic job that runs, as a new rank behind the others, and waits until its ranks let
    this process in: ``Communicator.admit`` or ``Buckets.admit``.

    The job is found by ``rendezvous`` (a file) or ``store``, the same as its ranks were given; it needs
    neither rank nor world. Other options are those of ``connect``, and ``elastic`` is what the job's
    ranks give. Waits ``connect_timeout`` at most. Raises ``unisum.RendezvousError`` if there is no
    such job, it ends, refuses this process, or lets nobody in.
    """
    options.update(rendezvous=rendezvous, elastic=None if elastic is None else int(elastic))
    return _connected(options, store, key, is_newcomer=True)


def _connected(
    options: Dict[str, Any], store: Any, key: str, is_newcomer: bool = False
) -> Communicator:
    if (
        store is not None
        and options["rendezvous"] is None
        and not os.environ.get("UNISUM_RENDEZVOUS")
    ):
        options["rendezvous"] = f"store://{key}"
    communicator = Communicator(_unisum.connect(options, store, is_newcomer))
    remember(communicator)
    return communicator
