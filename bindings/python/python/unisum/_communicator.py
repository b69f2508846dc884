"""Communicators, and the handles of what they do asynchronously."""

from __future__ import annotations

import concurrent.futures
import weakref
from typing import (
    TYPE_CHECKING,
    Any,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
    overload,
)

from . import _completion, _errors, _observing, _unisum
from ._observing import Description, Stats
from ._types import Data, DataOrList
from ._unisum import Array

if TYPE_CHECKING:
    from ._device import DeviceCommunicator

ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER = range(5)
ALL_TO_ALL, GATHER, SCATTER, BARRIER = range(5, 9)

OPS = {
    "sum": 1,
    "product": 2,
    "min": 3,
    "max": 4,
    "average": 5,
    "and": 6,
    "or": 7,
    "xor": 8,
}

T = TypeVar("T")


def _op(name: str) -> int:
    try:
        return OPS[name]
    except KeyError:
        known = ", ".join(OPS)
        raise ValueError(f"no operation {name!r}: there are {known}") from None


class Work:
    """A collective or a message under way.

    ``wait`` blocks; ``await work`` waits in a coroutine; ``future()`` gives a
    ``concurrent.futures.Future``. The tensors are unisum's until it has ended: leave them alone.
    Dropping it cancels nothing, since the other ranks take part.
    """

    __slots__ = ("_works", "_result", "__weakref__")

    def __init__(self, works: List[_unisum.Work], result: Any) -> None:
        self._works = works
        self._result = result

    def wait(self, timeout: Optional[float] = None) -> Any:
        """Blocks until it has ended and gives what the blocking call would give.

        Raises what the call failed with, or ``unisum.TimeoutError`` if it has not ended in
        ``timeout`` seconds: it then goes on. Ctrl-C ends the wait, not the call.
        """
        for work in self._works:
            if not work.wait(timeout):
                text = f"the call has not ended within {timeout} s: it goes on"
                raise _errors.TimeoutError(text, "timeout")
        return self._result

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return all(work.done() for work in self._works)

    def exception(self) -> Optional[BaseException]:
        """What it failed with, if it has."""
        return next((e for e in (work.exception() for work in self._works) if e), None)

    @property
    def nonfinite(self) -> bool:
        """Whether the result has an infinity or a NaN, if ``detect_nonfinite`` asked for it."""
        return any(work.nonfinite for work in self._works)

    def add_done_callback(self, callback: Any) -> None:
        """Has ``callback(work)`` called once it has ended, on a thread of unisum's for that. It
        may start collectives and wait for them."""
        if not self._works:
            callback(self)
            return
        last = self._works[-1]
        _completion.call_when_done(last, lambda: callback(self))

    def future(self) -> "concurrent.futures.Future[Any]":
        """It as a future of ``concurrent.futures``, which can't be cancelled."""
        future: "concurrent.futures.Future[Any]" = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def end(work: "Work") -> None:
            try:
                future.set_result(work.wait())
            except BaseException as error:
                future.set_exception(error)

        self.add_done_callback(end)
        return future

    def __await__(self) -> Iterator[Any]:
        import asyncio

        return asyncio.wrap_future(self.future()).__await__()


class View(NamedTuple):
    """Who is in an elastic job during an epoch."""

    #: 1 at the start of the job; each change adds 1.
    epoch: int
    #: By rank, which process it is: the same process has the same number in all epochs.
    processes: List[int]


_last: "Optional[weakref.ref[Communicator]]" = None


def remember(communicator: "Communicator") -> None:
    """From here on ``unisum.empty`` allocates for it."""
    global _last
    _last = weakref.ref(communicator)


def succeed(former: "Optional[Communicator]", communicator: "Communicator") -> "Communicator":
    """``unisum.empty`` allocates for the later one, if it did for the former."""
    if former is not None and _last is not None and _last() is former:
        remember(communicator)
    return communicator


def empty(shape: Union[int, Sequence[int]], dtype: str = "float32") -> Array:
    """A zeroed array in registered memory of the communicator that was connected last: see
    ``Communicator.empty``."""
    communicator = _last() if _last is not None else None
    if communicator is None or communicator.closed:
        raise _errors.ConfigurationError("there is no communicator: connect first", "configuration")
    return communicator.empty(shape, dtype)


class Communicator:
    """A membership in a job: one rank of a world of ranks that work together.

    All ranks call the same collectives in the same order. Arrays may be NumPy's, PyTorch's on the
    CPU, or any others that have ``__dlpack__`` or a buffer; they are used where they lie, without
    a copy, and have no gaps. Calls block, with the interpreter free for other threads, and Ctrl-C
    ends them: on all ranks with an error, since the others need this one. With ``async_op=True``
    they return a ``Work`` at once.

    After an error the communicator is aborted on every rank; in an elastic job
    (``unisum.connect(elastic=1)``) ``rebuild`` gives another one. ``close`` leaves the job; a
    ``with`` block does.
    """

    def __init__(self, native: _unisum.Communicator) -> None:
        self._native = native
        #: This process's number, from 0.
        self.rank: int = native.rank
        #: How many ranks there are.
        self.world: int = native.world

    @property
    def local_rank(self) -> int:
        """This rank's number among those on its host, from 0."""
        return self._native.local_rank

    @property
    def local_size(self) -> int:
        """How many ranks are on this host."""
        return self._native.local_size

    @property
    def transport(self) -> str:
        """What carries the data, as ``"shm"`` or ``"shm+tcp"``."""
        return self._native.transport

    @property
    def closed(self) -> bool:
        """Whether the job was left."""
        return self._native.closed

    def describe(self) -> Description:
        """Where the ranks are, what links cost, which algorithm is chosen for which size: as data,
        which ``print`` and ``str`` give for people. Not collective; never waits."""
        return _observing.description(self._native._describe())

    def stats(self) -> Stats:
        """What this rank has done so far in this communicator's collectives, and what it is doing.

        Not collective. Any thread may call it at any time, also while a call is stuck: it waits for
        none. In a world of one everything is zero.
        """
        return _observing.stats(self._native._stats())

    def set_algorithm(self, name: Optional[str]) -> None:
        """Fixes the algorithm of later calls, or has it chosen (``None``). All ranks call it."""
        self._native.set_algorithm(name)

    @property
    def view(self) -> Optional[View]:
        """Who is in the job, in the epoch that this communicator is of. ``None`` if the job is not
        elastic, and for groups."""
        view = self._native._view()
        return None if view is None else View(*view)

    def rebuild(self) -> "Communicator":
        """The communicator of the ranks that are left, after ``unisum.ViewChanged``: numbered anew,
        in the same order. Messengers, buckets and groups of all ranks are made again from it; arrays
        of ``empty`` stay, and groups of some ranks go on if none of these is lost.

        Collective: every rank that is left calls it. Blocks until all have; if ranks are lost
        meanwhile, it goes on with those that are left then. If the view has not changed, this makes
        it change, with the same ranks. Raises ``unisum.RankLostError`` if too few are left, or if
        the others went on without this rank.
        """
        return succeed(self, Communicator(self._native._rebuild()))

    @property
    def newcomers(self) -> int:
        """How many processes ask to be let into the job (``unisum.join``), as far as this rank knows:
        others may know of more, or of fewer. Never blocks."""
        return self._native._newcomers()

    def admit(self) -> "Communicator":
        """As ``rebuild``, and the processes enter that ask to be let in: their ranks follow those that
        there are. Collective: every rank calls it, for example once a minimum of ``newcomers`` over
        all ranks has shown that all know of one. ``share_state`` gives newcomers the program's
        state."""
        return succeed(self, Communicator(self._native._admit()))

    def share_state(self, state: Optional[bytes] = None) -> Optional[bytes]:
        """Gives the program's state, as bytes, to the ranks that pass ``None``, which get it returned.
        The lowest rank that has it sends it; on the others that have it, it has to be the same, or
        all raise ``unisum.MismatchError`` with the ranks that differ.

        Collective: every rank calls it, with its state or with ``None``.
        """
        return self._native._share_state(None if state is None else bytes(state))

    def shrink(self, exclude: Sequence[int]) -> "Communicator":
        """The communicator of all ranks but these, which need not take part, and get
        ``unisum.RankLostError``. Every other rank calls it, with the same list; else as
        ``rebuild``."""
        return succeed(self, Communicator(self._native._shrink(list(exclude))))

    def revoke(self) -> None:
        """Ends all calls on this communicator, on all ranks, with ``unisum.ViewChanged``: all then
        ``rebuild``. Any thread of any rank may call it; it returns at once."""
        self._native.revoke()

    def abort(self, why: str = "the program aborted it") -> BaseException:
        """Ends the job on all ranks: their calls under way raise ``unisum.AbortedError``. In an elastic
        job, it ends only this communicator and groups of all its ranks.

        Any thread may call it. Gives the exception that they get.
        """
        return self._native._abort(why)

    def close(self) -> None:
        """Leaves the job, after asynchronous calls under way. The second time it does nothing."""
        self._native.close()

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"unisum.Communicator(rank={self.rank}, world={self.world})"

    def empty(self, shape: Union[int, Sequence[int]], dtype: str = "float32") -> Array:
        """A zeroed array in registered memory, which ranks of this host reach without a copy.

        ``array.numpy()`` and ``array.torch()`` show it; calls take all three. Types are NumPy's
        names and ``bfloat16``, ``float8_e4m3fn``, ``float8_e5m2``. Not collective.
        """
        axes = (shape,) if isinstance(shape, int) else tuple(shape)
        return self._native._empty(axes, str(dtype))

    def _call(
        self,
        kind: int,
        data: Any,
        out: Any,
        op: int = 0,
        root: int = 0,
        scale: Optional[float] = None,
        detect: bool = False,
        counts: Optional[Sequence[int]] = None,
        receive_counts: Optional[Sequence[int]] = None,
        async_op: bool = False,
    ) -> Any:
        if data is None and kind != SCATTER:
            raise TypeError("None is no array")
        # Several arrays are a list.
        data = list(data) if isinstance(data, tuple) else data
        out = list(out) if isinstance(out, tuple) else out
        request = (
            kind,
            op,
            root,
            scale,
            detect,
            None if counts is None else list(counts),
            None if receive_counts is None else list(receive_counts),
            data,
            out,
        )
        result = data if out is None else out
        if async_op:
            _completion.starts_collective()
            return Work([self._native._start(request)], result)
        nonfinite = self._native._run(request)
        return (result, nonfinite) if detect else result

    def all_reduce(
        self,
        data: Data,
        op: str = "sum",
        *,
        out: Optional[Data] = None,
        scale: Optional[float] = None,
        detect_nonfinite: bool = False,
        async_op: bool = False,
    ) -> Any:
        """Reduces ``data`` of all ranks, element by element, for all: in ``out``, or in place.

        ``op`` is sum, product, min, max, average, and, or, xor. ``scale`` multiplies inputs of a
        sum. With ``detect_nonfinite`` it returns ``(result, found)``: whether the result has an
        infinity or a NaN, the same on all ranks, at no further pass. Else the result.
        """
        return self._call(
            ALL_REDUCE,
            data,
            out,
            _op(op),
            scale=scale,
            detect=detect_nonfinite,
            async_op=async_op,
        )

    def reduce(
        self,
        data: Data,
        root: int = 0,
        op: str = "sum",
        *,
        out: Optional[Data] = None,
        async_op: bool = False,
    ) -> Any:
        """Reduces ``data`` of all ranks for ``root``; elsewhere it stays as it is."""
        return self._call(REDUCE, data, out, _op(op), root, async_op=async_op)

    def broadcast(self, data: Data, root: int = 0, *, async_op: bool = False) -> Any:
        """Gives all ranks the ``data`` of ``root``."""
        return self._call(BROADCAST, data, None, 0, root, async_op=async_op)

    def all_gather(
        self,
        data: Data,
        out: DataOrList,
        *,
        counts: Optional[Sequence[int]] = None,
        async_op: bool = False,
    ) -> Any:
        """Gives all ranks the ``data`` of all, in rank order, in ``out``.

        ``counts`` says how many elements each rank has, if not all have as many. ``out`` may be a
        list of arrays, which are filled one after the other.
        """
        return self._call(ALL_GATHER, data, out, counts=counts, async_op=async_op)

    def reduce_scatter(
        self,
        data: DataOrList,
        out: Data,
        op: str = "sum",
        *,
        counts: Optional[Sequence[int]] = None,
        scale: Optional[float] = None,
        detect_nonfinite: bool = False,
        async_op: bool = False,
    ) -> Any:
        """Reduces ``data`` of all ranks and gives each its block of the result, in ``out``."""
        return self._call(
            REDUCE_SCATTER,
            data,
            out,
            _op(op),
            scale=scale,
            detect=detect_nonfinite,
            counts=counts,
            async_op=async_op,
        )

    def all_to_all(
        self,
        data: DataOrList,
        out: DataOrList,
        *,
        counts: Optional[Sequence[int]] = None,
        receive_counts: Optional[Sequence[int]] = None,
        async_op: bool = False,
    ) -> Any:
        """Sends block r of ``data`` to rank r, and gets in ``out`` a block from each rank.

        ``counts`` and ``receive_counts`` say how long the blocks are, if they differ.
        """
        if (counts is None) != (receive_counts is None):
            raise ValueError("give counts and receive_counts, or neither")
        return self._call(
            ALL_TO_ALL,
            data,
            out,
            counts=counts,
            receive_counts=receive_counts,
            async_op=async_op,
        )

    def gather(
        self,
        data: Data,
        out: Optional[DataOrList] = None,
        root: int = 0,
        *,
        counts: Optional[Sequence[int]] = None,
        async_op: bool = False,
    ) -> Any:
        """Gives ``root`` the ``data`` of all ranks, in rank order, in its ``out``."""
        out = [] if out is None else out
        return self._call(GATHER, data, out, 0, root, counts=counts, async_op=async_op)

    def scatter(
        self,
        data: Optional[DataOrList],
        out: Data,
        root: int = 0,
        *,
        counts: Optional[Sequence[int]] = None,
        async_op: bool = False,
    ) -> Any:
        """Gives each rank its block of the ``data`` of ``root``, which others leave ``None``."""
        return self._call(SCATTER, data, out, 0, root, counts=counts, async_op=async_op)

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._native._barrier()

    def all_reduce_batch(
        self,
        tensors: Sequence[Data],
        op: str = "sum",
        *,
        async_op: bool = False,
    ) -> Any:
        """Reduces several arrays of one type in place, in few launches: small ones travel
        together."""
        return self._batch(ALL_REDUCE, [(it, None) for it in tensors], _op(op), async_op)

    def all_gather_batch(
        self, pairs: Sequence[Tuple[Data, Data]], *, async_op: bool = False
    ) -> Any:
        """``all_gather`` of several pairs of input and output, in few launches."""
        return self._batch(ALL_GATHER, pairs, 0, async_op)

    def reduce_scatter_batch(
        self, pairs: Sequence[Tuple[Data, Data]], op: str = "sum", *, async_op: bool = False
    ) -> Any:
        """``reduce_scatter`` of several pairs of input and output, in few launches."""
        return self._batch(REDUCE_SCATTER, pairs, _op(op), async_op)

    def _batch(
        self, kind: int, pairs: Sequence[Tuple[Any, Any]], op: int, async_op: bool
    ) -> Any:
        requests = [(kind, op, 0, None, False, None, None, data, out) for data, out in pairs]
        _completion.starts_collective()
        result = [data if out is None else out for data, out in pairs]
        work = Work([self._native._start_batch(requests)] if requests else [], result)
        return work if async_op else work.wait()

    def split(self, color: Optional[int], key: int = 0) -> "Optional[Communicator]":
        """Divides the ranks into groups: those of one ``color``, in the order of ``key``.

        Collective. ``None`` for a rank that gives no color. In an elastic job, a group of some of
        the ranks goes on while none of its own is lost; its errors name ranks by their numbers there.
        """
        return _wrapped(self._native._split(color, key))

    def subset(self, ranks: Sequence[int]) -> "Optional[Communicator]":
        """A group of these ranks, in this order; ``None`` elsewhere. All ranks call it."""
        return _wrapped(self._native._subset(list(ranks)))

    def duplicate(self) -> "Communicator":
        """The same ranks, with an order of calls of their own. Collective."""
        return Communicator(self._native._duplicate())

    def on_device(self, ordinal: Optional[int] = None) -> "DeviceCommunicator":
        """The same ranks with a CUDA device each, for collectives on its memory: this rank's is
        the device ``ordinal`` of this process; by default, by its number on the host, as if there
        were enough. Collective."""
        from ._device import DeviceCommunicator

        return DeviceCommunicator(self._native._on_device(self._ordinal(ordinal)))

    def _ordinal(self, given: Optional[int]) -> int:
        """The number of this rank's device, given or by default."""
        if given is not None:
            return given
        try:
            return self.local_rank % _unisum.cuda_devices()
        except _errors.ConfigurationError:
            # The call that takes it says on all ranks what is missing.
            return 0

    def messenger(self) -> "Messenger":
        """Messages between two ranks, with tags. Collective."""
        return Messenger(self._native._messenger())


@overload
def _wrapped(native: None) -> None: ...
@overload
def _wrapped(native: _unisum.Communicator) -> Communicator: ...
def _wrapped(native: Optional[_unisum.Communicator]) -> Optional[Communicator]:
    return None if native is None else Communicator(native)


class Messenger:
    """Sends and receives messages between two ranks, under tags, in any order of posting.

    Messages of the same two ranks and tag arrive in the order in which they were sent, and have
    the same length and type at both ends. A send returns when its data may be overwritten.
    """

    def __init__(self, native: _unisum.Messenger) -> None:
        self._native = native

    def send(self, data: Data, to: int, tag: int = 0, *, async_op: bool = False) -> Optional[Work]:
        """Sends an array to rank ``to``."""
        if async_op:
            return Work([self._native._start(False, data, to, tag)], None)
        self._native._transfer(False, data, to, tag)
        return None

    def receive_any(self, data: Data, tag: int = 0) -> int:
        """Receives the next message with this tag of any rank in ``data``, and gives the rank."""
        work = self._native._start_any(data, tag)
        work.wait()
        return int(work.source or 0)

    def receive(self, data: Data, source: int, tag: int = 0, *, async_op: bool = False) -> Any:
        """Receives the next message of rank ``source`` with this tag in ``data``."""
        if async_op:
            return Work([self._native._start(True, data, source, tag)], data)
        self._native._transfer(True, data, source, tag)
        return data

    def close(self) -> None:
        """Ends it on this rank, after what was sent to it has been received."""
        self._native.close()
