"""Gradient buckets: what a training loop calls during the backward pass."""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from . import _completion, _unisum
from ._communicator import Communicator, View, Work, succeed
from ._sharded import Resharded, ShardMove, ShardPiece, ShardState, Weights
from ._types import Data
from ._unisum import Array


class Parameter(NamedTuple):
    """A parameter of a model: its name, which no other has, its shape, and its gradient's type:
    float16, bfloat16, float32 or float64.

    ``uses`` is how often the model uses it: the gradient of a tied parameter is final when it was
    marked ready so often.
    """

    name: str
    shape: Tuple[int, ...]
    dtype: str = "float32"
    uses: int = 1


def described(parameters: Sequence[Parameter]) -> List[Tuple[str, List[int], str, int]]:
    """As the native part takes them."""
    return [(it.name, list(it.shape), it.dtype, it.uses) for it in parameters]


def place_of(places: Dict[str, int], parameter: Union[int, str]) -> int:
    """The place of a parameter that is told by name or by place."""
    if isinstance(parameter, int):
        return parameter
    try:
        return places[parameter]
    except KeyError:
        raise ValueError(f"there is no parameter {parameter!r}") from None


class BucketReport(NamedTuple):
    """What became of a bucket in a step, in seconds since the step's beginning."""

    bytes: int
    #: When its last gradient was ready.
    ready: float
    #: When its reduction began.
    started: float
    #: When it had ended.
    finished: float


class StepChange(NamedTuple):
    """How the view of an elastic job changed during a step, which all ranks that are left have
    ended in the same way."""

    #: The view in which the step ended: ``Buckets.take_communicator`` gives its communicator.
    view: View
    #: The ranks that were lost, as they were numbered when the step began.
    lost: List[int]
    #: Whether the gradients were averaged again, over the ranks that are left; otherwise they are
    #: averages over those that there were before.
    redone: bool
    #: Seconds from when this rank noticed the first loss until it was in the view.
    took: float


class StepReport(NamedTuple):
    """A step that all ranks committed to. Times are in seconds, since its beginning."""

    #: Whether some averaged gradient is infinite or NaN: the same on all ranks.
    nonfinite: bool
    #: How many ranks had gradients; the average is over these.
    participants: int
    #: Parameters that no rank put anything in: their gradients are zero.
    unused: List[int]
    #: When the program had put in all it would, and waited.
    computed: float
    #: When all ranks had agreed on how the step ended.
    ended: float
    #: How long the program waited for communication after it had computed.
    exposed: float
    #: How long buckets were being reduced in all.
    communicated: float
    #: By bucket, in launching order.
    buckets: List[BucketReport]
    #: How the job's view changed meanwhile, if it did.
    change: Optional[StepChange] = None
    #: Whether processes ask to be let into an elastic job (``unisum.join``), and all ranks know: the
    #: same on all ranks, so that all can call ``Buckets.admit`` after this step.
    newcomers: bool = False


def _report(told: Any) -> StepReport:
    *fields, buckets, change, newcomers = told
    if change is not None:
        epoch, processes, *rest = change
        change = StepChange(View(epoch, processes), *rest)
    fields += [[BucketReport(*it) for it in buckets], change, newcomers]
    return StepReport(*fields)


class Buckets:
    """The gradients of a model in buckets of registered memory, which are averaged over all ranks
    while the backward pass goes on::

        buckets = unisum.Buckets(comm, [unisum.Parameter("weight", (128, 64)),
                                        unisum.Parameter("bias", (64,))])
        with buckets.begin() as step:
            step.view("bias").numpy()[:] = ...      # written where it is reduced
            step.ready("bias")                      # final: travels once its bucket is full
            step.put("weight", gradient)            # or copied there
        buckets.gradient("bias").numpy()            # the average, when the block has ended

    In an elastic job a step outlives ranks: ``report.change`` tells of it, and the program takes
    the new communicator with ``take_communicator``.

    Collective: every rank makes them, with the same parameters, in the order in which they were
    registered, and the same settings; it begins its steps in the same order. Parameters are told
    by name or by place. Which gradient lies where changes once, after the first step, unless
    ``relayout`` is false or a ``layout`` is given: arrays of before then show old memory.

    ``wire`` is how gradients travel: as they are (``None``), as ``"bf16"``, ``"f16"``,
    ``"f8e4m3"``, ``"f8e5m2"`` or ``"int8"``, or in few columns, ``"powersgd:4"``. Sums are made in
    float32, and what rounding lost is added in the next step, unless ``feedback`` is false.
    PowerSGD compresses from step ``start_step`` (1,000) on what gets ``at_least`` so many times (2)
    smaller.

    ``unused_parameters``: a step may end without a gradient for some, which are then zero.
    ``static_graph``: what a rank does not use in its first step it never uses.
    ``uneven_inputs``: ranks may run out of data at different times, and call ``join``.
    ``sharded``: each rank gets the averages of its shard of each bucket only (``shard_gradient``),
    as in ZeRO-2 and FSDP; the rest of the gradients is unspecified after a step. Keeps the layout;
    not with ``wire`` or ``uneven_inputs``. In an elastic job such buckets end with their view: all
    ranks make others, and ``reshard`` what they keep for their shards.
    """

    def __init__(
        self,
        communicator: Communicator,
        parameters: Sequence[Union[Parameter, Tuple[Any, ...]]],
        *,
        wire: Optional[str] = None,
        feedback: Optional[bool] = None,
        start_step: Optional[int] = None,
        at_least: Optional[float] = None,
        bucket_bytes: Optional[int] = None,
        end_bucket_bytes: Optional[int] = None,
        unused_parameters: bool = False,
        static_graph: bool = False,
        uneven_inputs: bool = False,
        relayout: Optional[bool] = None,
        layout: Optional[bytes] = None,
        sharded: bool = False,
    ) -> None:
        #: The parameters, as they were given.
        self.parameters: List[Parameter] = [Parameter(*it) for it in parameters]
        self._places = {it.name: place for place, it in enumerate(self.parameters)}
        options = {
            "wire": wire,
            "feedback": feedback,
            "start_step": start_step,
            "at_least": at_least,
            "bucket_bytes": bucket_bytes,
            "end_bucket_bytes": end_bucket_bytes,
            "unused_parameters": unused_parameters,
            "static_graph": static_graph,
            "uneven_inputs": uneven_inputs,
            "relayout": relayout,
            "layout": layout,
            "sharded": sharded,
        }
        # They may outlive it.
        self._communicator = weakref.ref(communicator)
        self._native = _unisum.make_buckets(
            communicator._native, described(self.parameters), options
        )

    def _place(self, parameter: Union[int, str]) -> int:
        return place_of(self._places, parameter)

    def begin(self) -> "Step":
        """Begins a step whose gradients, with those that were accumulated before, are averaged
        over all ranks. Collective. Blocks only to lay buckets out anew, in the second step."""
        self._native._begin(False)
        return Step(self)

    def begin_accumulating(self) -> "Step":
        """Begins a step whose gradients stay on this rank and add to those of the next steps,
        until ``begin`` is called. Every rank accumulates equally many steps."""
        self._native._begin(True)
        return Step(self)

    def gradient(self, parameter: Union[int, str]) -> Array:
        """A parameter's gradient: after a step the average over the ranks that took part, after an
        accumulating step what this rank has. It may be changed, until the next step begins."""
        return self._native._gradient(self._place(parameter))

    def join(self, update: Callable[[StepReport, List[Array]], Any]) -> None:
        """Takes part in the steps of the ranks that have data still, with nothing of its own,
        until all have called this. Takes ``uneven_inputs``.

        After each step ``update(report, gradients)`` is called, with the averages by parameter:
        the optimizer's step. It calls nothing of these buckets. Collective. Blocks.
        """
        self._native._join(lambda told, gradients: update(_report(told), gradients))

    @property
    def layout(self) -> bytes:
        """Where gradients lie, to be saved with a checkpoint and given to ``layout=``."""
        return bytes(self._native._layout()[0])

    @property
    def layout_version(self) -> int:
        """0 for the layout that follows from the parameters, 1 for that which was observed."""
        return self._native._layout()[1]

    @property
    def buckets(self) -> List[List[int]]:
        """The parameters of each bucket, by their places."""
        return self._native._layout()[2]

    @property
    def view(self) -> Optional[View]:
        """Who is in the job since the last step, if the job is elastic."""
        view = self._native._view_of_job()
        return None if view is None else View(*view)

    def take_communicator(self) -> Optional[Communicator]:
        """The communicator of the ranks that are left, if steps have changed the job's view
        (``StepReport.change``) since the last call of this: in place of the earlier one, which has
        ended. Not collective. These buckets go on with it."""
        native = self._native._take_communicator()
        if native is None:
            return None
        communicator = succeed(self._communicator(), Communicator(native))
        self._communicator = weakref.ref(communicator)
        return communicator

    def admit(self) -> Communicator:
        """Lets the processes into the job that ask for it (``StepReport.newcomers``), and goes on with
        them: the communicator of the view. As ``Communicator.admit``, but these buckets, their
        gradients and what the wire keeps stay.

        Collective: every rank calls it between two steps, and newcomers make their own buckets
        meanwhile, with the same parameters and settings, before they call anything else. Blocks
        until they have; Ctrl-C is heard after that.
        """
        communicator = succeed(self._communicator(), Communicator(self._native._admit()))
        self._communicator = weakref.ref(communicator)
        return communicator

    def shard(self, bucket: int) -> range:
        """The elements of a bucket that this rank averages if buckets are ``sharded``: the same
        number on each rank, those of rank 0 first."""
        start, stop, _ = _unisum.shard_of(self._native, bucket)
        return range(start, stop)

    def shard_pieces(self, bucket: int) -> List[ShardPiece]:
        """The elements of parameters that this rank's shard of a bucket consists of, besides
        padding."""
        return [ShardPiece(*it) for it in _unisum.shard_of(self._native, bucket)[2]]

    def shard_gradient(self, bucket: int) -> Array:
        """This rank's shard of a bucket's gradients: after a step, the averages. One dimension, as
        long as ``shard``. May be changed, until the next step begins."""
        return _unisum.shard_gradient(self._native, bucket)

    def weights(self) -> Weights:
        """Allocates memory for the parameters themselves, in the layout and types of the gradients,
        zeroed. Takes ``sharded``. Not collective."""
        return Weights(self)

    def gather(self, weights: Weights) -> None:
        """Gathers all shards of the weights on all ranks. Takes ``sharded``, and weights of these
        buckets: make new ones after each change of the view. ``ConfigurationError`` if they are of
        buckets with another layout, or of a rank with another number.

        Collective: every rank calls it between the same steps. Blocks; Ctrl-C is heard after that.
        If it fails, shards of other ranks are unspecified.
        """
        weights._native._gather(self._native)

    def reshard(self, state: ShardState) -> Resharded:
        """Gives each rank what belongs to its shards now, from whoever has it: at the start, and
        after each change of an elastic job's view, when the buckets have been made again. A
        newcomer, and every rank at the start, gives a new state. Takes ``sharded``.

        What nobody has is told (``Resharded.lost``), and zero: the program initializes it or takes
        it from its checkpoint, and then calls ``ShardState.set_version``. If copies of an earlier
        version are more complete (``copy_shards``), all ranks go back to that. What travels is
        checked by fingerprints (SHA-256).

        Collective: every rank calls it, between two steps. Blocks. If it fails, the state is what
        it was, and the next call goes on from what all ranks have. ``MismatchError``, on all ranks,
        if numbers of vectors or types differ, or state of other parameters was given.
        """
        version, moves = state._native._reshard(self._native)
        return Resharded(version, [ShardMove(*it) for it in moves])

    def copy_shards(self, state: ShardState) -> None:
        """Copies each rank's state to the next rank, and keeps it as it is now: if the job then
        loses a rank, or several of which no two are neighbours, ``reshard`` loses nothing, and goes
        back to this version. Takes ``sharded``.

        Collective: every rank calls it, between two steps, as often as is worth it: a loss costs
        the steps since. Blocks. Memory for two more states, and for four during the call.
        ``MismatchError``, on all ranks, if versions differ; ``ConfigurationError`` if state of
        other buckets, or with missing elements, was given on any rank.
        """
        state._native._copy(self._native)

    def rescale(self, factor: float) -> None:
        """From the next step on gradients come with a loss scale that is ``factor`` times that of
        the last: what is kept of them for the next step is multiplied."""
        self._native._rescale(factor)

    def save(self) -> bytes:
        """What is kept from step to step, such as what rounding lost, for a checkpoint: this
        rank's own. Empty if nothing is."""
        return bytes(self._native._save())

    def restore(self, saved: bytes) -> None:
        """Goes on where ``save`` was called."""
        self._native._restore(saved)

    def close(self) -> None:
        """Ends them. A step under way fails on all ranks."""
        self._native.close()

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"unisum.Buckets({len(self.parameters)} parameters)"


class Step:
    """A step under way. Gradients are put in and marked ready, by any threads in any order.

    As a ``with`` block it waits at the end; if the block raises, the step fails on all ranks, and
    their error names this one.
    """

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._native = buckets._native
        #: How the step ended, once it has.
        self.report: Optional[StepReport] = None
        self._is_open = True

    def view(self, parameter: Union[int, str]) -> Array:
        """The gradient of a parameter, in the memory that is reduced: zero if it is the first view
        since the last reduction, else what was left there. It is the program's until ``ready``."""
        return self._native._view(self._buckets._place(parameter))

    def ready(self, parameter: Union[int, str]) -> None:
        """The gradient is final, as what was written to its view. Not blocking."""
        self._native._ready(self._buckets._place(parameter), False)

    def put(self, parameter: Union[int, str], gradient: Data) -> None:
        """Copies a gradient that lies elsewhere, adds it if the parameter has one already, and
        marks it ready. It has the parameter's type."""
        self._native._put(self._buckets._place(parameter), gradient)

    def wait(self) -> StepReport:
        """Ends the step and waits until all buckets are reduced and all ranks agree.

        Raises ``unisum.Error`` of kind ``"step_failed"``, on all ranks alike, if a rank has no
        gradient for a parameter, marked one twice, or gave its step up: the next can be begun.
        """
        report = self.finish().wait()
        return report  # type: ignore[no-any-return]

    def finish(self) -> Work:
        """Ends the program's part: what was not marked ready is from here on. The work's ``wait``
        gives the ``StepReport``."""
        work, report = self._native._finish()
        self._is_open = False
        _completion.starts_collective()
        return _StepWork(self, work, report)

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self._is_open:
            return
        if error is None:
            self.wait()
            return
        self._is_open = False
        self._native._drop_step(f"the step was given up: {kind.__name__}: {error}")

    def __repr__(self) -> str:
        return f"unisum.Step(open={self._is_open})"


class _StepWork(Work):
    """The end of a step."""

    __slots__ = ("_step", "_report")

    def __init__(self, step: Step, work: _unisum.Work, report: _unisum.Report) -> None:
        super().__init__([work], None)
        self._step = step
        self._report = report

    def wait(self, timeout: Optional[float] = None) -> StepReport:
        super().wait(timeout)
        self._step.report = report = _report(self._report._told())
        return report
