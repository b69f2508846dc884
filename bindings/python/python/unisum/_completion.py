"""Callbacks of asynchronous calls, on threads of their own.

The threads that move data only put what has completed in a queue. One thread at a time takes it
out and runs callbacks, in the order of completion. A callback may start a collective and wait for
it: once it has started one, or has run for half a second, another thread goes on with the queue,
so that what it waits for can complete.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from typing import Callable, Optional

from . import _ending, _unisum

_lock = threading.Lock()
_local = threading.local()
#: A callback that runs for longer may wait for another.
_PATIENCE_S = 0.5


class _Turn:
    """A thread's right to run callbacks, until it is handed on."""

    def __init__(self) -> None:
        self.handed_on = False
        #: When the callback that runs began.
        self.since: Optional[float] = None


_leader: Optional[_Turn] = None
_process = 0


def call_when_done(work: _unisum.Work, callback: Callable[[], None]) -> None:
    """Has ``callback`` called once ``work`` has ended; here and now if it has."""
    if _process != os.getpid():
        _start()
    if not work.watch(callback):
        _run(callback)


def starts_collective() -> None:
    """A collective is started on this thread: if it is in a callback, others may go on."""
    turn = getattr(_local, "turn", None)
    if turn is not None:
        _hand_on(turn)


def _start() -> None:
    """Starts the threads, once in each process."""
    global _process
    with _lock:
        if _process == os.getpid():
            return
        _start_leader()
        threading.Thread(target=_look_after, name="unisum-callbacks", daemon=True).start()
        _process = os.getpid()


def _start_leader() -> None:
    global _leader
    _leader = turn = _Turn()
    threading.Thread(target=_serve, args=(turn,), name="unisum-callbacks", daemon=True).start()


def _hand_on(turn: _Turn) -> None:
    with _lock:
        if not turn.handed_on:
            turn.handed_on = True
            _start_leader()


def _look_after() -> None:
    """Hands on the turn of a callback that runs for long."""
    while True:
        time.sleep(_PATIENCE_S / 2)
        turn = _leader
        since = turn.since if turn is not None else None
        if turn is not None and since is not None and time.monotonic() - since > _PATIENCE_S:
            _hand_on(turn)


def _serve(turn: _Turn) -> None:
    _local.turn = turn
    while not (turn.handed_on or _ending.is_over()):
        callback = _unisum.next_completed(10.0)
        if callback is not None and _ending.begin():
            turn.since = time.monotonic()
            _run(callback)
            turn.since = None
            _ending.end()


def _run(callback: Callable[[], None]) -> None:
    try:
        callback()
    except BaseException:  # a callback's error must not end the others
        traceback.print_exc()
