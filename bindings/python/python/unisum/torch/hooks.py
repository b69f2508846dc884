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
"""

# No postponed annotations: PyTorch looks at those of hooks.
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist

from .. import _completion
from .._buckets import Buckets, Parameter
from ._backend import group_of
from ._reducer import _TYPES

__all__ = [
    "PowerSGDState",
    "WireState",
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


def allreduce_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket as it is: the division is part of the all-reduce."""
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG
    future = _group(process_group).allreduce([bucket.buffer()], options).get_future()
    return future.then(lambda ended: ended.value()[0])  # type: ignore[no-any-return]


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


def wire_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket as its state says that it travels."""
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
            future.set_exception(error)
        else:
            future.set_result(bucket.buffer())

    _completion.call_when_done(work, ended)
    return future




def _stateless(process_group: Any, bucket: dist.GradBucket, dtype: torch.dtype) -> Any:
    """Averages a bucket in a type of fewer bits; sums accumulate in float32 within each fold."""
    buffer = bucket.buffer()
    if buffer.dtype == dtype:
        return allreduce_hook(process_group, bucket)
    narrow = buffer.to(dtype)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG
    future = _group(process_group).allreduce([narrow], options).get_future()
    return future.then(lambda ended: buffer.copy_(ended.value()[0]))


def bf16_compress_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in bfloat16, without error feedback, as PyTorch's hook of this name."""
    return _stateless(process_group, bucket, torch.bfloat16)  # type: ignore[no-any-return]


def fp16_compress_hook(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in float16, without error feedback, as PyTorch's hook of this name."""
    return _stateless(process_group, bucket, torch.float16)  # type: ignore[no-any-return]


def fp8_compress_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in 8-bit floats: the state is ``WireState("f8e4m3")`` or ``"f8e5m2"``."""
    return _checked(state, ("f8e4m3", "f8e5m2"), bucket)


def int8_compress_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket in 8-bit integers: the state is ``WireState("int8")``."""
    return _checked(state, ("int8",), bucket)


def _checked(
    state: WireState, wires: Tuple[str, ...], bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    if not isinstance(state, WireState) or state.wire not in wires:
        raise ValueError(f"the state of this hook is WireState({wires[0]!r})")
    return wire_hook(state, bucket)


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


def powerSGD_hook(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket by PowerSGD: of its matrices a few columns travel, of which what is left
    out is due in the next step."""
    if not isinstance(state, WireState) or not state.wire.startswith("powersgd"):
        raise ValueError("the state of this hook is PowerSGDState(...)")
    return wire_hook(state, bucket)
