"""PyTorch's DistributedDataParallel, with gradients in unisum's buckets."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Optional

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.optim import as_functional_optim
from torch.distributed.utils import _sync_module_states
from torch.nn.parallel import DistributedDataParallel as _TorchDDP

from .._buckets import StepReport
from . import _precision
from ._backend import group_of
from ._hooked import HookedReducer
from ._reducer import Logger, Reducer

#: What the constructor takes besides options.
_PLACES = ("self", "module")


def _refuse_devices(module: torch.nn.Module) -> None:
    """Before PyTorch's constructor does anything with the devices, or with other ranks."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"parameter {name!r} is on {parameter.device}: unisum.torch."
                "DistributedDataParallel has gradients in the CPU's memory. For modules on CUDA "
                "devices use torch.nn.parallel.DistributedDataParallel over a process group of "
                "unisum's, or, in a loop of your own, unisum.DeviceBuckets"
            )


class _OwnGroup:
    """Stands for the model's process group where that is the state of its hook, in copies."""


class DistributedDataParallel(_TorchDDP):
    """Data parallelism over a process group of unisum's, with the signature and semantics of
    ``torch.nn.parallel.DistributedDataParallel``, of which it is a subclass. The module is in the
    CPU's memory: for one on CUDA devices there is PyTorch's own, over unisum's process group.

    The gradients of parameters (``parameter.grad``) lie in the buckets that are reduced, in memory
    that ranks of the same host reach without a copy; nothing is copied back after the reduction. If
    a rank's backward pass raises, all ranks' ``backward`` raises ``unisum.Error`` that names it,
    and training can go on with the next step.

    Besides PyTorch's arguments:

    ``wire``
        How float32 gradients travel: as they are (``None``), as ``"bf16"``, ``"f16"``,
        ``"f8e4m3"``, ``"f8e5m2"``, ``"int8"``, or by PowerSGD, as ``"powersgd:4"``. They are summed
        in float32; what rounding lost is added to the next step's gradients.
    ``feedback``
        Whether it is (by default it is).
    ``powersgd_start``, ``powersgd_at_least``
        From which step on PowerSGD compresses (1,000), and that it leaves alone what would not get
        so many times smaller (2).

    ``elastic``
        Whether training outlives ranks, in a job that does (``UNISUM_ELASTIC=MINIMUM``, see
        docs/elastic.md). The ranks that are left end the step that a loss interrupts, with the same
        gradients on all of them: ``backward`` returns, ``last_report.change`` tells of it, and the
        group's rank and size are those of the new view. If a loss hits a rank in another call,
        ``backward`` raises ``unisum.ViewChanged``: see ``unisum.torch.rebuild``. Forward passes
        broadcast no buffers, unless ``broadcast_buffers`` is given. Not with ``join``. Processes
        that are started later enter by ``unisum.torch.join`` and ``unisum.torch.admit``.

    What the wire keeps from step to step is saved by ``wire_state_dict``, for each rank its own.

    ``mixed_precision`` is a type, such as ``torch.bfloat16``, a
    ``torch.distributed.fsdp.MixedPrecisionPolicy``, or DDP's own ``_MixedPrecision``. The module
    computes in ``param_dtype``; its parameters, their gradients and the optimizer's state stay as
    they are, in float32. Gradients travel in ``reduce_dtype``, as by ``wire``, but without feedback
    unless it is asked for.

    With a hook (``register_comm_hook``) gradients lie in other buckets of unisum's memory, which
    the hook reduces.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *arguments: Any,
        wire: Optional[str] = None,
        feedback: Optional[bool] = None,
        powersgd_start: Optional[int] = None,
        powersgd_at_least: Optional[float] = None,
        elastic: bool = False,
        **options: Any,
    ) -> None:
        _refuse_devices(module)
        # By name, whatever the version of PyTorch has in which place.
        given = inspect.signature(_TorchDDP.__init__).bind_partial(
            self, module, *arguments, **options
        )
        options = {name: it for name, it in given.arguments.items() if name not in _PLACES}
        low = options.pop("mixed_precision", None)
        if low is not None:
            low = _precision.precision(low)
            wire, feedback = _travels(low, wire, feedback)
            _precision.check(low, module)
        # Before PyTorch's constructor, which makes the reducer: a module takes no attributes yet.
        self.__dict__["_wire"] = {
            "wire": wire,
            "feedback": feedback,
            "start_step": powersgd_start,
            "at_least": powersgd_at_least,
        }
        self.__dict__["_is_elastic"] = elastic
        self.__dict__["_syncs"] = options.get("init_sync", True)
        syncs_buffers = options.get("broadcast_buffers")
        if options.get("forward_sync_buffers") is not None:
            syncs_buffers = True
        self.__dict__["_syncs_buffers"] = syncs_buffers is not False
        if elastic and syncs_buffers is None:
            # A call in each forward pass, which a loss could hit.
            known = inspect.signature(_TorchDDP.__init__).parameters
            name = "forward_sync_buffers"
            options[name if name in known else "broadcast_buffers"] = False
        # Parameters that differ are told by the buckets, on all ranks alike, before anything is
        # sent.
        super().__init__(module, **{**options, "init_sync": False})
        self._syncs = False
        self._low = None
        if low is not None:
            _precision.cast_buffers(low, module)
            self._low = _precision.LowPrecision(low)

    def _ddp_init_helper(
        self, parameters: Any, expect_sparse_gradient: Any, _names: Any, static_graph: bool
    ) -> None:
        group = group_of(self.process_group)
        if group is None:
            raise ValueError(
                "unisum.torch.DistributedDataParallel needs a process group of unisum's: "
                'init_process_group("unisum")'
            )
        if self._is_elastic and group is not self.process_group:
            raise ValueError(
                "elastic=True needs a process group that is unisum's alone: init_process_group("
                '"unisum"). This one has another backend, which would not follow'
            )
        if self._is_elastic and group.view is None:
            raise ValueError(
                "elastic=True needs a job that outlives its ranks: UNISUM_ELASTIC=MINIMUM in the"
                " environment of init_process_group, of which this is the default group, with more"
                " than one rank"
            )
        known = {id(it): name for name, it in self.module.named_parameters()}
        named: Dict[str, torch.Tensor] = {known[id(it)]: it for it in parameters}
        options = {
            **self._wire,
            "bucket_bytes": int(self.bucket_bytes_cap),
            "end_bucket_bytes": min(int(self.bucket_bytes_cap), 1 << 20),
        }
        self.reducer: Any = Reducer(
            group,
            named,
            list(expect_sparse_gradient),
            options,
            self.find_unused_parameters,
            static_graph,
        )
        if self.__dict__.get("_comm_hooks"):
            # A copy of a model that has a hook.
            (hook, state), *_ = self._comm_hooks
            state = self.process_group if state is _OwnGroup else state
            self._comm_hooks = [(hook, state)]
            self.reducer = HookedReducer.after(self.reducer, hook, state)
        self.logger: Any = Logger(
            {
                "module_name": type(self.module).__name__,
                "backend_name": group.name(),
                "world_size": group.size(),
                "rank": group.rank(),
                "bucket_cap_bytes": int(self.bucket_bytes_cap),
                "find_unused_parameters": self.find_unused_parameters,
                "wire": str(self._wire["wire"]),
            }
        )
        self._passing_sync_batchnorm_handle(self.module)
        # A newcomer gets them by `unisum.torch.admit`.
        if self._syncs and group._has_state:
            _sync_module_states(
                module=self.module,
                process_group=self.process_group,
                broadcast_bucket_size=self.broadcast_bucket_size,
                src=0,
                params_and_buffers_to_ignore=self.parameters_to_ignore,
                broadcast_buffers=self._syncs_buffers,
            )

    def __getstate__(self) -> Any:
        if self.reducer.fused is not None:
            raise RuntimeError("a model with a fused optimizer can't be copied: copy its module")
        attributes = super().__getstate__()
        # A process group can't be copied, and a copy's hook has that of the copy.
        attributes["_comm_hooks"] = [
            (hook, _OwnGroup if state is self.process_group else state)
            for hook, state in self._comm_hooks
        ]
        return attributes

    def _post_forward(self, output: Any) -> Any:
        output = super()._post_forward(output)
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            self.reducer.watch(list(_tensors(output)))
        return output

    # Uneven inputs: what a rank that has no more data does for the others.

    def _match_all_reduce_for_bwd_pass(self) -> None:
        self.reducer.shadow()

    def _match_unused_params_allreduce(self) -> None:
        pass

    def join(self, *arguments: Any, **options: Any) -> Any:
        if self._is_elastic:
            raise NotImplementedError(
                "elastic training has no `join`: after a loss ranks share the data out anew"
            )
        return super().join(*arguments, **options)

    def _follow(self, group: Any) -> None:
        """Goes on in another view of the group: what `unisum.torch.rebuild` calls."""
        if self.process_group is not group:
            raise ValueError("the model has another process group")
        self.reducer.follow(group)

    def _check_comm_hook(self, hook: Any) -> None:
        # PyTorch's asks besides for NCCL, by the names of hooks.
        if not callable(hook):
            raise TypeError("Communication hook must be callable.")
        signature = inspect.signature(hook)
        known = {inspect.Signature.empty, dist.GradBucket, "dist.GradBucket"}
        bucket = signature.parameters.get("bucket")
        if bucket is not None and bucket.annotation not in known:
            raise ValueError("Communication hook: bucket annotation should be dist.GradBucket.")
        known = {inspect.Signature.empty, torch.futures.Future[torch.Tensor]}
        if signature.return_annotation not in known:
            raise ValueError(
                "Communication hook: return annotation should be"
                " torch.futures.Future[torch.Tensor]."
            )

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """Has ``hook(state, bucket)`` reduce the gradients from the next step on, as in PyTorch:
        one hook, on all ranks alike, between two steps. ``bucket.buffer()`` lies in unisum's
        memory; the hook divides by the number of ranks itself. ``last_report`` stays what it is,
        and sparse gradients are averaged without the hook.
        """
        if self._is_elastic:
            raise NotImplementedError(
                "elastic training takes no hooks: their calls would end with the first loss"
            )
        if self._wire["wire"] is not None:
            raise ValueError(
                f"gradients travel as {self._wire['wire']!r} already: a hook takes the place of"
                " `wire`, and of a reduce_dtype other than float32"
            )
        self._check_comm_hook(hook)
        if self._comm_hooks:
            raise RuntimeError("a hook can be registered once only, and this model has one")
        self.reducer = HookedReducer.after(self.reducer, hook, state)
        self._comm_hooks.append((hook, state))

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        kinds = dist.BuiltinCommHookType
        hooks_by_kind = {
            kinds.ALLREDUCE: default_hooks.allreduce_hook,
            kinds.FP16_COMPRESS: default_hooks.fp16_compress_hook,
        }
        self.register_comm_hook(self.process_group, hooks_by_kind[comm_hook_type])

    def _register_fused_optim(
        self, optim: Any, *arguments: Any, optim_params: Any = None, **options: Any
    ) -> None:
        # PyTorch's steps in a hook, before ranks have agreed that the step is one.
        functional = as_functional_optim(optim, *arguments, **options)
        self.register_comm_hook(None, default_hooks.allreduce_hook)
        chosen = None if optim_params is None else {id(it) for it in optim_params}
        self.reducer.fused = functional, chosen

    def _setup_in_backward_optimizers(self) -> None:
        own = [it for it in self._module_parameters if hasattr(it, "_in_backward_optimizers")]
        if own:
            # They would run before the gradients are reduced.
            handles = dist.optim.apply_optimizer_in_backward.param_to_optim_hook_handle_map
            for parameter in own:
                for handle in handles.get(parameter, ()):
                    handle.remove()
            self.reducer.optimized = own

    def _run_ddp_forward(self, *inputs: Any, **options: Any) -> Any:
        run = super()._run_ddp_forward
        if self._low is None:
            return run(*inputs, **options)
        return self._low.forward(self.module, run, inputs, options)

    # What is more than PyTorch's.

    @property
    def last_report(self) -> Optional[StepReport]:
        """How the last reduction went: what of it was hidden, whether a gradient is infinite or
        NaN on any rank."""
        return self.reducer.report  # type: ignore[no-any-return]

    def rescale(self, factor: float) -> None:
        """From the next step on the loss is scaled ``factor`` times as much as in the last: what
        the wire keeps of gradients is multiplied. All ranks call it alike."""
        if self.reducer.buckets is not None:
            self.reducer.buckets.rescale(factor)

    def wire_state_dict(self) -> Dict[str, Any]:
        """What the wire keeps from step to step, for this rank's checkpoint beside the optimizer's
        state. Not between forward and backward pass."""
        buckets = self.reducer.buckets
        saved = b"" if buckets is None else buckets.save()
        kept = torch.frombuffer(bytearray(saved), dtype=torch.uint8) if saved else torch.empty(0)
        return {
            "wire": self._wire["wire"],
            "rank": self.process_group.rank(),
            "kept": kept.to(torch.uint8),
        }

    def load_wire_state_dict(self, state: Dict[str, Any]) -> None:
        """Goes on where ``wire_state_dict`` was called on this rank, with the same ``wire``."""
        own = {"wire": self._wire["wire"], "rank": self.process_group.rank()}
        for name, value in own.items():
            if state[name] != value:
                raise ValueError(f"the state is of {name} {state[name]!r}, not {value!r}")
        if self.reducer.buckets is not None:
            self.reducer.buckets.restore(bytes(state["kept"].numpy()))


def _travels(low: Any, wire: Optional[str], feedback: Optional[bool]) -> Any:
    """The wire and its feedback, as both ``mixed_precision`` and ``wire`` say."""
    if wire is None:
        return low.wire, False if feedback is None else feedback
    if low.wire not in (None, wire) and low.reduction != low.parameters:
        raise ValueError(f"gradients can't travel both as {wire!r} and as reduce_dtype says")
    return wire, feedback


def _tensors(output: Any) -> Any:
    """The tensors in an output of any structure."""
    from torch.nn.parallel.distributed import _find_tensors

    return _find_tensors(output)
