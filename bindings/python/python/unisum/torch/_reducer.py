"""What reduces the gradients of one model: it stands where PyTorch's DDP has its `Reducer`."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch.autograd import Variable

from .. import _errors
from .._buckets import Buckets, Parameter, StepReport
from ._backend import group_of

_TYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    # As two numbers each.
    torch.complex64: "float32",
    torch.complex128: "float64",
}


class _Gradient:
    """Where one parameter's gradient goes."""

    def __init__(self, name: str, parameter: torch.Tensor, place: int) -> None:
        self.name = name
        self.parameter = parameter
        self.place = place
        self.memory: Any = None
        self.address = 0
        #: How often its hook has run in this backward pass, and how often it does in each.
        self.fired = 0
        self.uses = 1
        self.is_ready = False
        #: Whether it was used since the last reduction.
        self.is_used = False

    def described(self) -> Parameter:
        it = self.parameter
        if it.dtype not in _TYPES:
            raise TypeError(f"parameter {self.name!r}: gradients can't be of {it.dtype}")
        shape = (*it.shape, 2) if it.is_complex() else tuple(it.shape)
        return Parameter(self.name, shape, _TYPES[it.dtype])

    def lies_in(self, memory: torch.Tensor) -> None:
        """Takes the place that it has in the buckets."""
        memory = memory.flatten()
        if self.parameter.is_complex():
            memory = torch.view_as_complex(memory.view(-1, 2))
        self.memory, self.address = memory, memory.data_ptr()

    def view(self) -> torch.Tensor:
        """The gradient, in the memory that is reduced, laid out as the parameter is."""
        it = self.parameter
        return self.memory.as_strided(it.shape, _strides(it))  # type: ignore[no-any-return]

    def fill(self) -> None:
        """Has the parameter's gradient lie in the buckets."""
        gradient = self.parameter.grad
        if gradient is not None and gradient.data_ptr() == self.address:
            return
        view = self.view()
        if gradient is not None:
            view.copy_(gradient)
        self.parameter.grad = view


def _strides(tensor: torch.Tensor) -> Tuple[int, ...]:
    """Those of the tensor if it has no gaps, in whatever order of the axes, else those of rows."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape)):
        if length == 1:
            continue
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= length
    return tensor.stride()


class _End:
    """Called when a backward pass has ended; dropped without a call if it raised."""

    def __init__(self, reducer: "Reducer") -> None:
        self._reducer = weakref.ref(reducer)
        self._is_called = False

    def __call__(self) -> None:
        self._is_called = True
        reducer = self._reducer()
        if reducer is not None:
            reducer._backward_ended(self)

    def __del__(self) -> None:
        reducer = self._reducer()
        if not self._is_called and reducer is not None:
            reducer._backward_raised(self)


class Reducer:
    """The gradients of a model's parameters, in buckets that are averaged during the backward pass.

    Hooks of the parameters tell it when a gradient is final. The reduction ends where the backward
    pass does, before ``backward`` returns.
    """

    def __init__(
        self,
        group: Any,
        named: Dict[str, torch.Tensor],
        sparse: List[bool],
        options: Dict[str, Any],
        find_unused_parameters: bool,
        static_graph: bool,
    ) -> None:
        self._finds_unused = find_unused_parameters
        self._is_static = static_graph
        self._options = options
        self._arguments = named, sparse, options
        self._sparse = [it for it, is_sparse in zip(named.values(), sparse) if is_sparse]
        dense = [it for it, is_sparse in zip(named.items(), sparse) if not is_sparse]
        self._gradients = [_Gradient(*it, place) for place, it in enumerate(dense)]
        #: How the last reduction ended.
        self.report: Optional[StepReport] = None
        self._end: Any = None
        self._is_expected = self._is_open = False
        self._ready = self._steps = 0
        self._joined: Any = None
        #: Parameters that have optimizers of their own, which run once gradients are reduced.
        self.optimized: List[Any] = []
        #: An optimizer that steps a parameter at a time then, and of which, by `id`; or of all.
        self.fused: Optional[Tuple[Any, Any]] = None
        self._update_process_group(group)
        self._hooks = [
            it.parameter.register_post_accumulate_grad_hook(  # type: ignore[attr-defined]
                functools.partial(_fired, weakref.ref(self), it)
            )
            for it in self._gradients
        ]

    def _update_process_group(self, group: Any) -> None:
        """Makes the buckets. Collective."""
        own = group_of(group)
        if own is None:
            raise ValueError("unisum's gradients need a process group of unisum's")
        self._group = own
        self.buckets: Optional[Buckets] = None
        if self._gradients:
            self._make_buckets([it.described() for it in self._gradients])
        self._version = -1
        self._steps = 0

    def _make_buckets(self, described: List[Parameter]) -> None:
        group = self._group
        while self.buckets is None:
            try:
                self.buckets = self._made(group.communicator, described)
            except _errors.ViewChanged:
                if group._has_state:
                    raise
                # The others let newcomers in, and begin again without those that they lost.
                group._adopt(group._next_view())

    def _made(self, communicator: Any, described: List[Parameter]) -> Buckets:
        return Buckets(
            communicator,
            described,
            unused_parameters=True,
            static_graph=self._is_static,
            **self._options,
        )

    def end(self) -> Tuple[Any, ...]:
        """Ends, between two steps: the arguments for another that reduces the same parameters."""
        self.prepare_for_forward()
        self._remove_autograd_hooks()
        if self.buckets is not None:
            self.buckets.close()
        return (self._group, *self._arguments, self._finds_unused, self._is_static)

    def admit(self) -> Any:
        """Lets newcomers in: the communicator of the view. Collective."""
        self.prepare_for_forward()
        if self.buckets is None:
            return self._group.communicator.admit()
        return self.buckets.admit()

    def follow(self, group: Any) -> None:
        """Goes on in another view of the group, with the next step. Collective."""
        self._is_expected = self._is_open = False
        self._joined = None
        if self.buckets is not None:
            self.buckets.close()
        for gradient in self._gradients:
            gradient.is_ready = gradient.is_used = False
            # What lies there may be reduced in part.
            gradient.parameter.grad = None
        self._update_process_group(group)

    # A backward pass.

    def prepare_for_forward(self) -> None:
        """Refuses to go on if the last backward pass left gradients out."""
        if not self._is_open:
            return
        missing = [it.name for it in self._gradients if not it.is_ready]
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        text = (
            "Expected to have finished reduction in the prior iteration before starting a new one."
            f" On rank {self._group.rank()} {len(missing)} parameters had no gradient after the"
            f" backward pass: {shown}. If the model does not use all parameters in each pass, say"
            " find_unused_parameters=True."
        )
        self._drop(text)
        raise _errors.Error(text, "step_failed", [self._group.rank()])

    def prepare_for_backward(self, _outputs: Any = ()) -> None:
        """The gradients of the next backward pass are to be reduced."""
        self._is_expected = True

    def watch(self, outputs: List[torch.Tensor]) -> None:
        """Has the backward pass through these tell when it has ended."""
        me = weakref.ref(self)

        def begins(_gradient: Any) -> None:
            reducer = me()
            if reducer is not None and reducer._is_expected:
                reducer._queue_end()

        for output in outputs:
            if output.requires_grad:
                output.register_hook(begins)

    def _queue_end(self) -> None:
        if self._end is None or self._end() is None:
            end = _End(self)
            self._end = weakref.ref(end)
            Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]

    def _begin(self) -> None:
        self._is_open = True
        self._ready = 0
        for gradient in self._gradients:
            gradient.is_ready, gradient.fired = False, 0
        self._begin_buckets()
        self._steps += 1

    def _begin_buckets(self) -> None:
        if self.buckets is None:
            return
        native = self.buckets._native
        native._begin(False)
        # The layout changes once, in the second step.
        if self._steps < 2:
            version = self.buckets.layout_version
            if version != self._version:
                self._version = version
                for gradient in self._gradients:
                    gradient.lies_in(native._gradient(gradient.place).torch())

    def _fired(self, gradient: _Gradient) -> None:
        """A parameter's gradient was accumulated."""
        gradient.is_used = True
        if not self._is_expected:
            return
        self._queue_end()
        if not self._is_open:
            self._begin()
        gradient.fired += 1
        if self._is_static and self._steps == 1:
            return
        if not self._is_static or gradient.fired == gradient.uses:
            self._mark(gradient)

    def _mark(self, gradient: _Gradient) -> None:
        with torch.no_grad():
            gradient.fill()
            self._hand_over(gradient)
        if not gradient.is_ready:
            gradient.is_ready = True
            self._ready += 1

    def _hand_over(self, gradient: _Gradient) -> None:
        """Says that the gradient is final."""
        assert self.buckets is not None
        self.buckets._native._ready(gradient.place, True)

    def _backward_ended(self, _end: Any) -> None:
        # An exception that is kept keeps it: the next pass has another end.
        self._end = None
        if not self._is_expected:
            return
        if self._is_static and self._steps == 1 and self._is_open:
            for gradient in self._gradients:
                gradient.uses = gradient.fired
                if gradient.fired:
                    self._mark(gradient)
        is_whole = self._ready == len(self._gradients)
        if not self._is_open:
            # Nothing but parameters with sparse gradients, or none that was used.
            if self._gradients and not (self._finds_unused or self._is_static):
                return
            self._begin()
        if is_whole or self._finds_unused or self._is_static:
            self._finish()

    def _backward_raised(self, _end: Any) -> None:
        self._end = None
        if not self._is_expected:
            return
        try:
            if not self._is_open:
                # Before its first gradient: the others' step is to fail all the same.
                self._begin()
            self._drop("its backward pass raised an exception")
        except _errors.Error:
            # The group has ended; the program gets the exception of its backward pass.
            self._is_expected = self._is_open = False

    def _finish(self) -> None:
        """Ends the reduction: blocks until all ranks have."""
        with torch.no_grad():
            for gradient in self._gradients:
                if not gradient.is_ready and gradient.is_used and gradient.parameter.grad is not None:
                    # Used in steps that were accumulated, and not in this one.
                    self._mark(gradient)
            self._is_expected = self._is_open = False
            self._end_buckets()
            for parameter in self._sparse:
                self._reduce_sparse(parameter)
        for gradient in self._gradients:
            gradient.is_used = False
        self._optimize()

    def _optimize(self) -> None:
        """What steps with the backward pass: once all ranks have agreed that it is a step."""
        if self.fused is not None:
            functional, chosen = self.fused
            for gradient in self._gradients:
                it = gradient.parameter
                if it.grad is not None and (chosen is None or id(it) in chosen):
                    functional.step_param(it, it.grad)
        for it in self.optimized:
            if it.grad is not None:
                for optimizer in it._in_backward_optimizers:
                    optimizer.step()
                it.grad = None

    def _end_buckets(self) -> None:
        if self.buckets is None:
            return
        from .._buckets import _report

        work, told = self.buckets._native._finish()
        work.wait(None)
        self.report = report = _report(told._told())
        self._take_view()
        unused = set(report.unused)
        for gradient in self._gradients:
            if not gradient.is_ready and gradient.place not in unused:
                # Others have used it.
                gradient.parameter.grad = gradient.view()
        factor = self._factor()
        if factor != 1:
            for gradient in self._gradients:
                if gradient.parameter.grad is not None and gradient.place not in unused:
                    gradient.parameter.grad.mul_(factor)

    def _take_view(self) -> None:
        """The group is in the view in which the step has ended."""
        assert self.buckets is not None
        communicator = self.buckets.take_communicator()
        if communicator is not None:
            self._group._adopt(communicator)

    def _factor(self) -> float:
        """What averages over all ranks are multiplied by, to be over those that have data."""
        if self._joined is None:
            return 1
        work, divides_by_all = self._joined
        self._joined = None
        # Not `result`, which works of groups with several backends lack.
        participants = work.get_future().wait()[0].item()
        return 1 if divides_by_all else self._group.size() / participants

    def _reduce_sparse(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.sparse_coo_tensor(size=parameter.shape, dtype=parameter.dtype)
        dist.all_reduce(gradient, group=self._group)
        parameter.grad = gradient / self._group.size()

    def _drop(self, why: str) -> None:
        self._is_expected = self._is_open = False
        if self.buckets is not None:
            self.buckets._native._drop_step(why)

    def shadow(self) -> None:
        """Takes part in a reduction of the others, with nothing of its own."""
        if self.buckets is not None:
            native = self.buckets._native
            native._begin(False)
            self._steps += 1
            native._finish()[0].wait(None)
            self._take_view()
            self._version = -1 if self._steps <= 2 else self._version
        self._shadow_sparse()

    def _shadow_sparse(self) -> None:
        for parameter in self._sparse:
            nothing = torch.sparse_coo_tensor(size=parameter.shape, dtype=parameter.dtype)
            dist.all_reduce(nothing, group=self._group)

    # What PyTorch's DDP asks of its reducer besides.

    def _rebuild_buckets(self) -> bool:
        return False

    def _push_all_rebuilt_params(self) -> None:
        pass

    def _set_forward_pass_work_handle(self, work: Any, divides_by_all: bool) -> None:
        self._joined = work, divides_by_all

    def _set_static_graph(self) -> None:
        self._is_static = True

    def _delay_all_reduce(self) -> None:
        pass

    def _check_reducer_finalized(self) -> None:
        self.prepare_for_forward()

    def _reset_state(self) -> None:
        if self._is_open:
            self._drop("the process group was exchanged")
        self._is_expected = False

    def _remove_autograd_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _set_ddp_runtime_logging_sample_rate(self, _rate: int) -> None:
        pass

    def _set_manual_finalization_required(self, required: bool) -> None:
        if required:
            raise NotImplementedError("unisum's DDP ends each reduction with the backward pass")


def _fired(reducer: Any, gradient: _Gradient, _parameter: torch.Tensor) -> None:
    it = reducer()
    if it is not None:
        it._fired(gradient)


class Logger:
    """Stands where PyTorch's DDP has its `Logger`, and logs nothing."""

    def __init__(self, data: Dict[str, Any]) -> None:
        self._data = data

    def _get_ddp_logging_data(self) -> Any:
        return self

    @property
    def strs_map(self) -> Dict[str, str]:
        return {name: it for name, it in self._data.items() if isinstance(it, str)}

    @property
    def ints_map(self) -> Dict[str, int]:
        return {name: int(it) for name, it in self._data.items() if not isinstance(it, str)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_arguments: None
