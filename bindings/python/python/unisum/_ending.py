"""The end of the process, for threads of unisum's that run Python.

Where the interpreter has ended, a thread that comes back to it from C++ ends the process with an
abort. So no such thread begins anything then, and those that are in something are waited for.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Set

#: So long at most the end of the process waits.
_LIMIT_S = 5.0

_is_over = False
#: Threads in something.
_busy: Set[int] = set()


def is_over() -> bool:
    """Whether the process ends."""
    return _is_over


def begin() -> bool:
    """Whether this thread may run Python; if so, the process does not end before ``end``."""
    thread = threading.get_ident()
    # Before it is asked, so that one of the two sees the other.
    _busy.add(thread)
    if _is_over:
        _busy.discard(thread)
    return not _is_over


def end() -> None:
    """What this thread has begun is over."""
    _busy.discard(threading.get_ident())


def _wait() -> None:
    global _is_over
    _is_over = True
    own = threading.get_ident()
    until = time.monotonic() + _LIMIT_S
    while _busy - {own} and time.monotonic() < until:
        time.sleep(0.002)


atexit.register(_wait)
# Other threads are not there in a child.
os.register_at_fork(after_in_child=_busy.clear)
