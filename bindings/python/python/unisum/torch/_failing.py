"""Futures that fail, in PyTorch's C++ too.

``torch.futures.Future.set_exception`` makes the exception the future's value, which only Python knows
to raise. PyTorch's DDP waits for futures in C++, takes the value for tensors, and crashes. The value
here raises the exception wherever it is looked at.
"""

from __future__ import annotations

from typing import Any, Callable, NoReturn


class Failure:
    """The value of a future that has failed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def _raise(self, *_: Any) -> NoReturn:
        raise self.error

    # DDP shows the value of a hook's future that is no tensor; what is raised there reaches the
    # program as it is.
    __str__ = __repr__ = _raise
    # Without a hook, it looks for tensors in what pickling meets.
    __reduce__ = __reduce_ex__ = _raise


def fail(future: Any, error: BaseException) -> None:
    """Completes a future with an exception."""
    future._set_unwrap_func(_unwrap)
    future.set_result(Failure(error))


def then(future: Any, callback: Callable[[Any], Any]) -> Any:
    """``future.then(callback)``, which fails with what the callback raises: PyTorch's own fails with
    a ``RuntimeError`` that has its text."""

    def run(ended: Any) -> Any:
        try:
            return callback(ended)
        except BaseException as error:
            return Failure(error)

    following = future.then(run)
    following._set_unwrap_func(_unwrap)
    return following


def _unwrap(value: Any) -> None:
    if isinstance(value, Failure):
        raise value.error
