"""The exceptions of unisum. Each has ``kind``, ``ranks``, ``operation`` and ``step``."""

from __future__ import annotations

import builtins
from typing import Optional, Sequence, Tuple


class Error(RuntimeError):
    """Why a call failed, who caused it, and how far it got.

    After a failed collective the communicator is aborted on every rank: make a new one, or end.
    """

    #: Which kind it is: ``"timeout"``, ``"rank_lost"``, ``"mismatch"``, ...
    kind: str
    #: The ranks that caused it, where that is known: the same on every rank that reports it.
    ranks: Tuple[int, ...]
    #: The collective that failed, in words, if one did.
    operation: Optional[str]
    #: How many steps of how many it had done on this rank.
    step: Optional[Tuple[int, int]]

    def __init__(
        self,
        message: str = "",
        kind: str = "other",
        ranks: Sequence[int] = (),
        operation: Optional[str] = None,
        step: Optional[Tuple[int, int]] = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.ranks = tuple(ranks)
        self.operation = operation
        self.step = step

    def __reduce__(self):
        arguments = (str(self), self.kind, self.ranks, self.operation, self.step)
        return type(self), arguments


class ConfigurationError(Error, ValueError):
    """An argument, an environment variable or a launcher's setting is wrong."""


class RendezvousError(Error, ConnectionError):
    """The job could not be joined: an address, the token, a rank that never came."""


class RankLostError(Error, ConnectionError):
    """A rank's process ended, or its host or network went away."""


class ViewChanged(Error):
    """An elastic job has lost ranks, or has taken some in: ``Communicator.rebuild`` gives the
    communicator of those that are there now. What the call was to read is as it was before."""

    #: The epoch that the job is in now.
    epoch: Optional[int]
    #: The ranks that are not in it any more, as they were numbered before.
    lost: Tuple[int, ...]
    #: The ranks that are new in it, as they are numbered there.
    joined: Tuple[int, ...]

    def __init__(
        self,
        message: str = "",
        kind: str = "view_changed",
        ranks: Sequence[int] = (),
        operation: Optional[str] = None,
        step: Optional[Tuple[int, int]] = None,
        epoch: Optional[int] = None,
        lost: Sequence[int] = (),
        joined: Sequence[int] = (),
    ) -> None:
        super().__init__(message, kind, ranks, operation, step)
        self.epoch = epoch
        self.lost = tuple(lost)
        self.joined = tuple(joined)

    def __reduce__(self):
        kind, arguments = super().__reduce__()
        return kind, (*arguments, self.epoch, self.lost, self.joined)


class TimeoutError(Error, builtins.TimeoutError):
    """The deadline passed: a rank is stopped, too late, too slow, or never called."""


class MismatchError(Error):
    """Ranks called different collectives, or the same with different arguments."""


class AbortedError(Error):
    """An earlier error aborted the communicator; the text repeats it."""


_CLASSES = {
    "configuration": ConfigurationError,
    "rendezvous": RendezvousError,
    "rank_lost": RankLostError,
    "view_changed": ViewChanged,
    "timeout": TimeoutError,
    "mismatch": MismatchError,
    "aborted": AbortedError,
}


def make(kind, message, ranks, operation, step, change=None):
    """The exception for an error of the native part, which calls this."""
    if kind == "view_changed":
        return ViewChanged(message, kind, ranks, operation, step, *(change or ()))
    return _CLASSES.get(kind, Error)(message, kind, ranks, operation, step)
