"""Communication hooks whose exceptions reach all ranks.

The ranks of PyTorch's DDP do not agree on how a step ends. If a hook raises on one rank, the others
wait for the collective that it would have started. Here the process group is aborted, for a reason
that names the rank and the exception.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable

import torch

from . import _failing


class AbortingHook:
    """A hook that aborts its process group when it, or the future that it returns, raises."""

    def __init__(self, hook: Callable[..., Any], group_of: Callable[[Any], Any]) -> None:
        # PyTorch reads a hook's name and signature.
        functools.update_wrapper(self, hook)
        self._hook = hook
        #: The group, for a state of the hook's.
        self._group_of = group_of

    def __call__(self, state: Any, bucket: Any) -> Any:
        group = self._group_of(state)
        try:
            future = self._hook(state, bucket)
            if not isinstance(future, torch._C.Future):
                kind = type(future).__name__
                raise TypeError(f"a hook returns a torch.futures.Future, not {kind}")
        except BaseException as error:
            group.abort_for_hook(error)
            raise
        return _failing.then(future, functools.partial(_outcome, group))

    def __reduce__(self) -> Any:
        # As a function: by its name, if that is this hook's.
        place: Any = sys.modules.get(self.__module__)
        for name in self.__qualname__.split("."):
            place = getattr(place, name, None)
        if place is self:
            return self.__qualname__
        return AbortingHook, (self._hook, self._group_of)


def _outcome(group: Any, ended: Any) -> Any:
    try:
        return ended.value()
    except BaseException as error:
        group.abort_for_hook(error)
        # That of another bucket, if it came first: it aborted this one.
        raise group.hook_error or error
