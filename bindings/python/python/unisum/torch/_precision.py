"""Models that compute in fewer bits than their parameters have: ``mixed_precision``."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch.autograd import Variable
from torch.distributed.utils import _apply_to_tensors, _cast_forward_inputs
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import distributed

#: What gradients are reduced in, as wires.
_WIRES = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "f16"}

#: Where a parameter is: the dictionary of its module, and its name there.
_Place = Tuple[Dict[str, Any], str, torch.Tensor]


class Precision(NamedTuple):
    """What a model computes in, and what its gradients are reduced in; ``None``: as they are."""

    parameters: Optional[torch.dtype]
    reduction: Optional[torch.dtype]
    buffers: Optional[torch.dtype] = None
    output: Optional[torch.dtype] = None
    casts_inputs: bool = True

    @property
    def wire(self) -> Optional[str]:
        return None if self.reduction is None else _WIRES[self.reduction]


def precision(given: Any) -> Precision:
    """What a program says: a type, or what PyTorch has for DDP and for FSDP2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(given, torch.dtype):
        said = Precision(given, given)
    elif isinstance(given, MixedPrecisionPolicy):
        said = Precision(
            given.param_dtype,
            given.reduce_dtype or given.param_dtype,
            output=given.output_dtype,
            casts_inputs=given.cast_forward_inputs,
        )
    elif isinstance(given, distributed._MixedPrecision):
        reduction = given.reduce_dtype or given.param_dtype
        said = Precision(given.param_dtype, reduction, given.buffer_dtype)
    else:
        raise TypeError(
            "mixed_precision is a type such as torch.bfloat16, a"
            " torch.distributed.fsdp.MixedPrecisionPolicy, or DDP's own _MixedPrecision,"
            f" not {type(given).__name__}"
        )
    for dtype in (said.parameters, said.reduction):
        if dtype is not None and dtype not in _WIRES:
            raise ValueError(f"mixed_precision is for float32, bfloat16 and float16, not {dtype}")
    return said


def check(said: Precision, module: torch.nn.Module) -> None:
    """Refuses what gradients that lie in buckets can't be."""
    if said.reduction is None:
        return
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, it in module.named_parameters():
        if not it.requires_grad or name in ignored or getattr(it, "_ddp_ignored", False):
            continue
        if it.is_floating_point() and it.dtype not in (torch.float32, said.reduction):
            raise ValueError(
                f"the gradient of {name!r} can't be reduced in {said.reduction}: it lies in the"
                f" bucket that is reduced, and is of the parameter's type, {it.dtype}. Keep the"
                " module in float32, and have it compute in another type by param_dtype"
            )


def cast_buffers(said: Precision, module: torch.nn.Module) -> None:
    if said.buffers is not None:
        for buffer in module.buffers():
            if buffer.is_floating_point() and not getattr(buffer, "_ddp_ignored", False):
                buffer.data = buffer.to(said.buffers)


class LowPrecision:
    """Has a module use its parameters in another type, in the forward pass and in what the backward
    pass computes again. Autograd converts the gradients, which are added up in the parameters' own
    type. Outside of both, the module has the parameters themselves."""

    def __init__(self, said: Precision) -> None:
        self._said = said
        #: The casts of the last forward pass, until its backward pass ends.
        self._casts: Optional[List[torch.Tensor]] = None
        self._replaced: List[_Place] = []
        #: How many backward passes have begun.
        self._passes = 0

    def __getstate__(self) -> Any:
        return self._said

    def __setstate__(self, said: Any) -> None:
        self.__init__(said)  # type: ignore[misc]

    def forward(
        self, module: torch.nn.Module, run: Callable[..., Any], inputs: Any, options: Any
    ) -> Any:
        """The module's forward pass, as ``run`` does it."""
        self._restore()
        self._passes += 1
        said = self._said
        if said.parameters is not None and said.casts_inputs:
            inputs, options = _cast_forward_inputs(said.parameters, *inputs, **options)
        self._casts = None
        with self._replacing(module):
            output = run(*inputs, **options)
        if not torch.is_grad_enabled():
            self._casts = None
        else:
            # What checkpointed layers compute again finds the same parameters.
            begins = functools.partial(self._backward_begins, module)
            for it in distributed._find_tensors(output):
                if it.requires_grad:
                    it.register_hook(begins)
        if said.output is not None:
            output = _apply_to_tensors(
                lambda it: it.to(said.output) if it.is_floating_point() else it, output
            )
        return output

    def _places(self, root: torch.nn.Module) -> List[_Place]:
        return [
            (module._parameters, name, it)
            for module in root.modules()
            # These compute with weights of the type of their running statistics.
            if not isinstance(module, _BatchNorm) or self._said.buffers == self._said.parameters
            for name, it in module._parameters.items()
            if it is not None
            and it.is_floating_point()
            and it.dtype != self._said.parameters
            and not getattr(it, "_ddp_ignored", False)
        ]

    def _replace(self, module: torch.nn.Module) -> None:
        if self._said.parameters is None:
            return
        places = self._places(module)
        if self._casts is None:
            # One for each parameter, of which several modules may have the same.
            made: Dict[int, torch.Tensor] = {}
            for _, _, it in places:
                if id(it) not in made:
                    made[id(it)] = it.to(self._said.parameters)
            self._casts = [made[id(it)] for _, _, it in places]
        self._replaced = places
        for (owner, name, _), cast in zip(places, self._casts):
            owner[name] = cast

    def _restore(self) -> None:
        replaced, self._replaced = self._replaced, []
        for owner, name, parameter in replaced:
            owner[name] = parameter

    @contextmanager
    def _replacing(self, module: torch.nn.Module) -> Iterator[None]:
        self._replace(module)
        try:
            yield
        finally:
            self._restore()

    def _backward_begins(self, module: torch.nn.Module, _gradient: torch.Tensor) -> None:
        if not self._replaced:
            self._passes += 1
            with torch.enable_grad():
                self._replace(module)
            end = _End(self, self._passes)
            Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]

    def _backward_ended(self, number: int) -> None:
        # An exception that is kept keeps the end of its pass, which may come late.
        if number == self._passes:
            self._restore()
            self._casts = None


class _End:
    """Called when a backward pass has ended; dropped without a call if it raised."""

    def __init__(self, owner: LowPrecision, number: int) -> None:
        self._owner: Optional[LowPrecision] = owner
        self._number = number

    def __call__(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._backward_ended(self._number)

    __del__ = __call__
