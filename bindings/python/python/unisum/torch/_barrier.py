"""The monitored barrier: it names the ranks that do not come.

It goes by the store, not by collectives: that a rank is missing harms nothing.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any, List

from .. import _errors

# How long rank 0's verdict may be under way, in seconds.
VERDICT = 1.0


def monitored_barrier(
    store: Any, rank: int, world: int, number: int, timeout: float, wait_all_ranks: bool
) -> None:
    """Returns when rank 0 has seen all ranks come, else raises on those that did."""
    key = f"unisum/monitored_barrier/{number}"
    until = time.monotonic() + timeout
    if rank != 0:
        store.set(f"{key}/{rank}", "here")
        reached = f"Rank {rank} successfully reached monitoredBarrier, but received errors while "
        reached += "waiting for send/recv from rank 0"
        if not _comes(store, f"{key}/outcome", timeout):
            # Rank 0 may have come late: then it still waits for others, and knows for whom.
            is_here = timeout > 0 and store.check([f"{key}/0"])
            if not is_here or not _comes(store, f"{key}/outcome", timeout + VERDICT):
                text = f"{reached}: it did not come in {round(1000 * timeout)} ms"
                raise _errors.TimeoutError(text, "timeout", [0])
        text, missing = json.loads(store.get(f"{key}/outcome"))
        if text:
            raise _errors.TimeoutError(f"{reached}: {text}", "timeout", missing)
        return
    store.set(f"{key}/0", "here")
    if timeout <= 0:
        text = f"Rank 0 timed out in monitoredBarrier after {round(1000 * timeout)} ms"
        store.set(f"{key}/outcome", json.dumps([text, [0]]))
        raise _errors.TimeoutError(text, "timeout", [0])
    missing = _missing(store, key, world, until, wait_all_ranks)
    if not missing:
        store.set(f"{key}/outcome", json.dumps(["", []]))
        return
    names = ", ".join(str(rank) for rank in missing)
    text = f"Rank {names} failed to pass monitoredBarrier in {round(1000 * timeout)} ms"
    if wait_all_ranks:
        text = f"Ranks {names} failed to pass monitoredBarrier in {round(1000 * timeout)} ms"
    store.set(f"{key}/outcome", json.dumps([text, missing]))
    raise _errors.TimeoutError(text, "timeout", missing)


def _missing(store: Any, key: str, world: int, until: float, wait_all: bool) -> List[int]:
    missing = []
    for rank in range(1, world):
        left = max(until - time.monotonic(), 0.001)
        if not _comes(store, f"{key}/{rank}", left):
            missing.append(rank)
            if not wait_all:
                break
    return missing


def _comes(store: Any, key: str, seconds: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True
