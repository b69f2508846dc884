"""PyTorch's DistributedDataParallel, with gradients in unisum's buckets."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Optional

import torch
from torch.distributed.utils import _sync_module_states
from torch.nn.parallel import DistributedDataParallel as _TorchDDP

from .._buckets import StepReport
from ._group import UnisumProcessGroup
from ._reducer import Logger, Reducer

#: What the constructor takes besides options.
_PLACES = ("self", "module")


class DistributedDataParallel(_TorchDDP):
    """Data parallelism over a process group of unisum's, with the signature and semantics of
    ``torch.nn.parallel.DistributedDataParallel``, of which it is a subclass.

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

    ``register_comm_hook``, ``mixed_precision`` and optimizers that run in the backward pass need
    PyTorch's own reducer: ``unisum.torch.hooks`` has hooks for that.
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
        # By name, whatever the version of PyTorch has in which place.
        given = inspect.signature(_TorchDDP.__init__).bind_partial(
            self, module, *arguments, **options
        )
        options = {name: it for name, it in given.arguments.items() if name not in _PLACES}
        if options.get("mixed_precision") is not None:
            raise NotImplementedError(
                "mixed_precision needs PyTorch's reducer: use autocast, or a module in 16 bits"
            )
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

    def _ddp_init_helper(
        self, parameters: Any, expect_sparse_gradient: Any, _names: Any, static_graph: bool
    ) -> None:
        group = self.process_group
        if not isinstance(group, UnisumProcessGroup):
            raise ValueError(
                "unisum.torch.DistributedDataParallel needs a process group of unisum's: "
                'init_process_group("unisum")'
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
                process_group=group,
                broadcast_bucket_size=self.broadcast_bucket_size,
                src=0,
                params_and_buffers_to_ignore=self.parameters_to_ignore,
                broadcast_buffers=self._syncs_buffers,
            )

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

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        raise NotImplementedError(
            "unisum's DDP takes no hooks: say how gradients travel by `wire`, or use hooks of "
            "`unisum.torch.hooks` with PyTorch's DistributedDataParallel"
        )

    def _register_builtin_comm_hook(self, comm_hook_type: Any) -> None:
        self.register_comm_hook(None, comm_hook_type)

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


def _tensors(output: Any) -> Any:
    """The tensors in an output of any structure."""
    from torch.nn.parallel.distributed import _find_tensors

    return _find_tensors(output)
