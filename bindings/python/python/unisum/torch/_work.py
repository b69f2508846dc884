"""What PyTorch waits for."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Callable, List, Optional

import torch
from torch._C._distributed_c10d import Work

from .. import _completion, _errors, _unisum
from ._failing import fail


class UnisumWork(Work):
    """A collective under way: some calls of unisum's, the tensors it gives, and what is to be
    done once they have ended."""

    def __init__(
        self,
        works: List[_unisum.Work],
        result: List[torch.Tensor],
        after: Optional[Callable[[], None]] = None,
        limit: Optional[float] = None,
    ) -> None:
        super().__init__()
        self._works = works
        self._tensors = result
        self._after = after
        self._limit = limit
        self._future: Any = None
        self._lock = threading.Lock()
        self._failed: Optional[BaseException] = None
        self._source: Optional[Callable[[], int]] = None

    def wait(self, timeout: Any = None) -> bool:
        """Blocks until it has ended; raises what it failed with, or that it has not in time."""
        limit = seconds(timeout)
        if limit is None:
            limit = self._limit
        try:
            for work in self._works:
                if not work.wait(limit):
                    text = (
                        f"Timed out waiting {round(1000 * (limit or 0))}ms for a collective: it "
                        "goes on, and who is missing is known when the timeout of the process "
                        "group has passed"
                    )
                    raise _errors.TimeoutError(text, "timeout")
        except _errors.Error as error:
            self._failed = overdue(error)
            raise self._failed from None
        self._finish()
        return True

    def _finish(self) -> None:
        with self._lock:
            after, self._after = self._after, None
            if after is not None:
                after()

    def is_completed(self) -> bool:
        return all(work.done() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> Any:
        if self._failed is not None:
            return self._failed
        return next((e for e in (work.exception() for work in self._works) if e), None)

    def result(self) -> List[torch.Tensor]:
        self.wait()
        return self._tensors

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        if self._source is None:
            raise RuntimeError("source_rank() may only be called on work of a receive")
        return self._source()

    _source_rank = source_rank

    def get_future(self) -> Any:
        with self._lock:
            if self._future is not None:
                return self._future
            self._future = future = torch.futures.Future()
        if self.is_completed():
            self._complete(future)
        else:
            # A future's callbacks run where it is completed, and may wait for other collectives:
            # never on a thread that moves data.
            _completion.call_when_done(self._works[-1], lambda: self._complete(future))
        return future

    def _complete(self, future: Any) -> None:
        try:
            self.wait()
        except BaseException as error:
            fail(future, error)
        else:
            future.set_result(self._tensors)


def overdue(error: _errors.Error) -> _errors.Error:
    """The same error, in words that programs look for if it is that time ran out."""
    if not isinstance(error, _errors.TimeoutError) or " timeout " in str(error):
        return error
    text = f"{error}\n(the timeout of the process group has passed)"
    return _errors.TimeoutError(text, error.kind, error.ranks, error.operation, error.step)


def seconds(timeout: Any) -> Optional[float]:
    """A time-out in seconds; None where PyTorch says "none" or "the default"."""
    if timeout is None:
        return None
    if not isinstance(timeout, timedelta):
        return float(timeout) or None
    value = timeout.total_seconds()
    return value if value > 0 else None
