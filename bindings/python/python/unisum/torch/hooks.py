"""Communication hooks for PyTorch's own DistributedDataParallel.

Each has the signature of PyTorch's (`hook(state, bucket)`, which gives a future) and takes the place of
the hook of that name in ``torch.distributed.algorithms.ddp_comm_hooks``::

    model = torch.nn.parallel.DistributedDataParallel(module)
    model.register_comm_hook(None, unisum.torch.hooks.bf16_compress_hook)

    state = unisum.torch.hooks.WireState("int8")
    model.register_comm_hook(state, unisum.torch.hooks.wire_hook)
    saved = state.state_dict()              # what rounding lost, this rank's own

The process groups are unisum's. ``unisum.torch.DistributedDataParallel`` needs no hooks, and copies
less.

A hook that raises on one rank aborts its process group: ``backward`` raises on the other ranks, too,
with an error that names the rank and the exception. ``aborting`` does the same for hooks of other
origin.
"""

# No postponed annotations: PyTorch looks at those of hooks.
import functools
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist

from .. import _completion
from .._buckets import Buckets, Parameter
from ._aborting import AbortingHook
from ._backend import group_of
from ._failing import fail, then
from ._reducer import _TYPES

__all__ = [
    "PowerSGDState",
    "WireState",
    "aborting",
    "allreduce_hook",
    "bf16_compress_hook",
    "fp16_compress_hook",
    "fp8_compress_hook",
    "int8_compress_hook",
    "powerSGD_hook",
    "wire_hook",
]


def _group(group: Any) -> Any:
    own = group_of(group if group is not None else dist.group.WORLD)
    if own is None:
        raise ValueError("hooks of unisum's need a process group of unisum's")
    return own


def aborting(hook: Callable[..., Any], process_group: Any = None) -> AbortingHook:
    """The hook, and if it raises on a rank, or the future that it returns fails there, the process
    group is aborted: calls of the other ranks raise ``unisum.AbortedError``, which names the rank and
    the exception. Without this they wait until the group's timeout.

    ``process_group`` is the model's, of unisum (the default group). Also a decorator.
    """
    return AbortingHook(hook, functools.partial(_given_group, process_group))


def _given_group(group: Any, _state: Any) -> Any:
    return _group(group)


def _by_group(hook: Callable[..., Any]) -> AbortingHook:
    """A hook whose state is its process group."""
    return AbortingHook(hook, _group)


def _by_state(wires: Tuple[str, ...], shown: str) -> Callable[[Callable[..., Any]], AbortingHook]:
    """A hook whose state is a ``WireState``, whose wire begins with one of
    these. Another state is refused on this rank, and aborts nothing."""

    def group_of(state: Any) -> Any:
        if not isinstance(state, WireState) or not state.wire.startswith(wires):
            raise ValueError(f"the state of this hook is {shown}")
        return _group(state.process_group)

    return lambda hook: AbortingHook(hook, group_of)


@_by_group
def allreduce_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket as it is: the division is part of the all-reduce."""
    return then(_averaged(process_group, bucket.buffer()), _first)  # type: ignore[no-any-return]


def _averaged(process_group: Any, tensor: torch.Tensor) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG
    return _group(process_group).allreduce([tensor], options).get_future()


def _first(ended: Any) -> Any:
    return ended.value()[0]


class WireState:
    """How the buckets of one model travel, and what rounding lost of them.

    ``wire`` is ``"bf16"``, ``"f16"``, ``"f8e4m3"``, ``"f8e5m2"``, ``"int8"`` or ``"powersgd:RANK"``;
    sums are made in float32. With ``feedback`` (the default) what rounding lost is added to the
    next step's gradients. Buckets of other types than float32 travel as they are.
    """

    def __init__(
        self,
        wire: str,
        process_group: Any = None,
        *,
        feedback: Optional[bool] = None,
        start_step: Optional[int] = None,
        at_least: Optional[float] = None,
    ) -> None:
        self.process_group = process_group
        self.wire = wire
        self._options = {"feedback": feedback, "start_step": start_step, "at_least": at_least}
        self._buckets: Dict[Tuple[Any, ...], Buckets] = {}
        self._saved: Dict[Tuple[Any, ...], bytes] = {}

    def _of(self, bucket: dist.GradBucket) -> Buckets:
        shapes = tuple((tuple(it.shape), _TYPES[it.dtype]) for it in bucket.gradients())
        key = (bucket.index(), shapes)
        if key not in self._buckets:
            # PyTorch lays its buckets out anew after the first step, on all ranks alike.
            for other in [it for it in self._buckets if it[0] == bucket.index()]:
                self._buckets.pop(other).close()
            described = [Parameter(str(at), *it) for at, it in enumerate(shapes)]
            self._buckets[key] = Buckets(
                _group(self.process_group).communicator,
                described,
                wire=self.wire,
                relayout=False,
                **self._options,
            )
            if key in self._saved:
                self._buckets[key].restore(self._saved.pop(key))
        return self._buckets[key]

    def __getstate__(self) -> Dict[str, Any]:
        """What copies have: what is kept from step to step, and the default group."""
        if self.process_group not in (None, dist.group.WORLD):
            raise RuntimeError("the state of a hook can be copied in the default group only")
        kept = {**self._saved, **{key: it.save() for key, it in self._buckets.items()}}
        return {**self.__dict__, "process_group": None, "_buckets": {}, "_saved": kept}

    def state_dict(self) -> Dict[str, Any]:
        """What is kept from step to step: this rank's own. Between steps."""
        kept = [(key, it.save()) for key, it in self._buckets.items()]
        return {"wire": self.wire, "kept": kept}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called, with a model whose buckets are alike: before
        the first step."""
        if state["wire"] != self.wire:
            raise ValueError(f"the state is of wire {state['wire']!r}, not {self.wire!r}")
        self._saved = {_key(key): saved for key, saved in state["kept"]}


def _key(key: Any) -> Tuple[Any, ...]:
    index, shapes = key
    return index, tuple((tuple(shape), dtype) for shape, dtype in shapes)


def _on_wire(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buckets = state._of(bucket)
    native = buckets._native
    gradients: List[torch.Tensor] = bucket.gradients()
    native._begin(False)
    try:
        for place, gradient in enumerate(gradients):
            native._put(place, gradient)
    except BaseException as error:
        native._drop_step(f"the hook raised {type(error).__name__}: {error}")
        raise
    work, _report = native._finish()
    future: torch.futures.Future = torch.futures.Future()

    def ended() -> None:
        try:
            work.wait(None)
            for place, gradient in enumerate(gradients):
                gradient.copy_(native._gradient(place).torch())
        except BaseException as error:
            fail(future, error)
        else:
            future.set_result(bucket.buffer())

    _completion.call_when_done(work, ended)
    return future


def _stateless(process_group: Any, bucket: dist.GradBucket, dtype: torch.dtype) -> Any:
    """Averages a bucket in a type of fewer bits; sums accumulate in float32 within each fold."""
    buffer = bucket.buffer()
    if buffer.dtype == dtype:
        return then(_averaged(process_group, buffer), _first)
    future = _averaged(process_group, buffer.to(dtype))
    return then(future, lambda ended: buffer.copy_(ended.value()[0]))


@_by_group
def bf16_compress_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in bfloat16, without error feedback, as PyTorch's hook of this name."""
    return _stateless(process_group, bucket, torch.bfloat16)  # type: ignore[no-any-return]


# PyTorch refuses hooks of the name "bf16_compress_hook" where it is built without CUDA.
bf16_compress_hook.__name__ = "bf16_compress"


@_by_group
def fp16_compress_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in float16, without error feedback, as PyTorch's hook of this name."""
    return _stateless(process_group, bucket, torch.float16)  # type: ignore[no-any-return]


@_by_state(("",), "a WireState")
def wire_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket as its state says that it travels."""
    return _on_wire(state, bucket)


@_by_state(("f8e4m3", "f8e5m2"), "WireState('f8e4m3')")
def fp8_compress_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in 8-bit floats: the state is ``WireState("f8e4m3")`` or ``"f8e5m2"``."""
    return _on_wire(state, bucket)


@_by_state(("int8",), "WireState('int8')")
def int8_compress_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in 8-bit integers: the state is ``WireState("int8")``."""
    return _on_wire(state, bucket)


class PowerSGDState(WireState):
    """The state of ``powerSGD_hook``, with arguments of PyTorch's names."""

    def __init__(
        self,
        process_group: Any = None,
        matrix_approximation_rank: int = 1,
        start_powerSGD_iter: int = 1000,
        min_compression_rate: float = 2.0,
    ) -> None:
        super().__init__(
            f"powersgd:{matrix_approximation_rank}",
            process_group,
            start_step=start_powerSGD_iter,
            at_least=min_compression_rate,
        )


@_by_state(("powersgd",), "PowerSGDState(...)")
def powerSGD_hook(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket by PowerSGD: of its matrices a few columns travel, of which what is left
    out is due in the next step."""
    return _on_wire(state, bucket)
