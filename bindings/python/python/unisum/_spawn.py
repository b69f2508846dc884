"""Starting the ranks of a job on this host."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import secrets
import tempfile
import traceback
from typing import Any, Callable, Dict, List, Optional, Sequence


class RankFailed(RuntimeError):
    """A rank that ``spawn`` started has failed: ``rank`` says which came first."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def spawn(
    function: Callable[..., Any],
    ranks: int,
    args: Sequence[Any] = (),
    *,
    grace: float = 10.0,
) -> List[Any]:
    """Runs ``function(*args)`` in so many fresh processes, which ``unisum.connect`` makes a job.

    Gives what they return, by rank. ``function`` is importable: at the top level of a module, and
    a script that calls this does so under ``if __name__ == "__main__":``. If a rank fails, the
    others have ``grace`` seconds to find out and are then killed; ``RankFailed`` names the first
    and has its traceback.
    """
    if ranks < 1:
        raise ValueError("a job has at least one rank")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="unisum-") as folder:
        meeting = {
            "UNISUM_WORLD": str(ranks),
            "UNISUM_LOCAL_SIZE": str(ranks),
            "UNISUM_RENDEZVOUS": f"file://{folder}/world",
            "UNISUM_TOKEN": secrets.token_hex(16),
        }
        if not os.environ.get("UNISUM_INTERFACE"):
            meeting["UNISUM_INTERFACE"] = "=lo"
        started = []
        try:
            for rank in range(ranks):
                receiver, sender = context.Pipe(duplex=False)
                own = {**meeting, "UNISUM_RANK": str(rank), "UNISUM_LOCAL_RANK": str(rank)}
                process = context.Process(
                    target=_run, args=(sender, own, function, tuple(args)), daemon=True
                )
                process.start()
                sender.close()
                started.append((process, receiver))
            return _collect(started, grace)
        finally:
            for process, receiver in started:
                if process.is_alive():
                    process.kill()
                process.join()
                receiver.close()


def _run(sender: Any, environment: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        sender.close()


def _collect(started: Any, grace: float) -> List[Any]:
    results: List[Any] = [None] * len(started)
    failure: Optional[RankFailed] = None
    open_ranks: Dict[Any, int] = {receiver: rank for rank, (_, receiver) in enumerate(started)}
    while open_ranks:
        timeout = None if failure is None else grace
        ready: List[Any] = multiprocessing.connection.wait(list(open_ranks), timeout)
        if not ready:
            break
        for receiver in ready:
            rank = open_ranks.pop(receiver)
            try:
                is_well, value = receiver.recv()
            except EOFError:
                process = started[rank][0]
                process.join()
                is_well, value = False, f"it ended with exit status {process.exitcode}"
            if is_well:
                results[rank] = value
            elif failure is None:
                failure = RankFailed(rank, f"rank {rank} failed: {value}")
    if failure is not None:
        raise failure
    return results
