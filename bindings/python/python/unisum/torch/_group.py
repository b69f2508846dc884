"""A process group whose collectives are unisum's."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any, Callable, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup

from .. import _completion, _errors
from .._communicator import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, BARRIER, BROADCAST, GATHER
from .._communicator import REDUCE, REDUCE_SCATTER, SCATTER, Communicator
from .._connect import connect, join
from . import _options, _profiling
from ._barrier import monitored_barrier
from ._cuda import CudaCalls
from ._elastic import ElasticGroup
from ._joining import Newcomer
from ._options import counts, flat, nested, single
from ._sparse import all_reduce_sparse
from ._work import UnisumWork, overdue, seconds


#: What PyTorch calls the collectives in profiles, by their numbers.
_NAMES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "gather",
    "scatter",
    "barrier",
)


def create(options: Any, backend_options: Any = None, name: str = "unisum") -> Any:
    """Makes a group: what PyTorch calls for ``init_process_group`` and ``new_group``."""
    from . import _backend

    is_one_of_several = _backend.is_one_of_several()
    group = UnisumProcessGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        is_default=not options.global_ranks_in_group,
        name=name,
        is_elastic=getattr(options, "enable_reconfigure", False),
        is_newcomer=isinstance(backend_options, Newcomer),
    )
    return _backend.beside_others(group) if is_one_of_several else group


class UnisumProcessGroup(ElasticGroup, ProcessGroup):
    """A ``torch.distributed`` process group over unisum.

    Made by ``init_process_group("unisum")`` and ``new_group``; its ranks meet by PyTorch's store.
    """

    # Each collective travels by itself or in batches of unisum's own.
    supports_coalescing = False
    supports_splitting = True

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        timeout: timedelta,
        is_default: bool = False,
        name: str = "unisum",
        communicator: Optional[Communicator] = None,
        is_elastic: bool = False,
        is_newcomer: bool = False,
    ) -> None:
        limit = seconds(timeout) or 1800.0
        is_split = communicator is not None
        if communicator is None:
            settings = _options.settings(limit, is_default, is_elastic or is_newcomer)
            settings.update(store=store, key="unisum/rendezvous", rank=rank, world=world)
            communicator = join(**settings) if is_newcomer else connect(**settings)
        rank, world = communicator.rank, communicator.world
        super().__init__(rank, world)
        self._backend_name = name
        self._store = store
        self._rank, self._world = rank, world
        self._is_split = is_split
        self._timeout = self._default_timeout = limit
        self._name = self._desc = ""
        self._barriers = self._sequence = 0
        self._error: Optional[BaseException] = None
        #: What the first communication hook raised, after which the group was aborted.
        self.hook_error: Optional[BaseException] = None
        self._has_state = not is_newcomer
        self._communicator = communicator
        self._native = self._communicator._native
        # All ranks begin messages, and the others are making buckets with a newcomer.
        self._messenger = None if is_newcomer else self._native._messenger()
        self._done = UnisumWork([], [])
        #: The thread on which models' hooks run, once there are some.
        self._turns: Any = None
        self._cuda = CudaCalls(lambda ordinal: self._communicator.on_device(ordinal))

    # What PyTorch asks of every group.

    def getBackendName(self) -> str:
        # Under whatever name it is registered: PyTorch's C++ knows others by theirs.
        return "unisum"

    name = getBackendName

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    def getRank(self) -> int:
        return self._rank

    def getSize(self) -> int:
        return self._world

    rank = getRank
    size = getSize

    @property
    def _device_types(self) -> List[torch.device]:
        # While PyTorch makes the group it must not attach its flight recorder, which needs a group
        # that is not written in Python; it asks here whether it can.
        is_made = self in dist.distributed_c10d._world.pg_map
        if self._is_split and not is_made:
            # `split_group` asks besides, on which device the new group is.
            is_made = sys._getframe(1).f_code.co_name != "_maybe_attach_flight_recorder"
        return [torch.device("cpu")] if is_made else []

    def _get_backend(self, _device: Any) -> "UnisumProcessGroup":
        return self

    def split_group(
        self,
        ranks: List[int],
        timeout: Any = None,
        opts: Any = None,
        group_name: Optional[str] = None,
        group_desc: Optional[str] = None,
        device_types: Any = None,
    ) -> "Optional[UnisumProcessGroup]":
        """A group of these ranks of this one, by this one's connections: what
        ``torch.distributed.split_group`` calls. Collective over this group; ``None`` on ranks that
        are in no new group."""
        is_member = self._rank in ranks
        native = self._native._split(
            min(ranks) if is_member else None, ranks.index(self._rank) if is_member else 0
        )
        if native is None:
            return None
        name = group_name or f"split of {self._name}: {ranks}"
        group = UnisumProcessGroup(
            dist.PrefixStore(name, self._store),
            ranks.index(self._rank),
            len(ranks),
            # The connections' deadline is that of this group.
            timedelta(seconds=self._timeout),
            name=self._backend_name,
            communicator=Communicator(native),
        )
        group._set_default_timeout(timeout)
        group.setGroupName(name)
        group.setGroupDesc(group_desc or "")
        return group

    def get_group_store(self) -> Any:
        return self._store

    def _set_sequence_number_for_group(self) -> None:
        self._sequence = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _set_default_timeout(self, timeout: Any) -> None:
        self._default_timeout = seconds(timeout) or self._default_timeout

    set_timeout = _set_default_timeout

    def _start_coalescing(self, _device: Any) -> None:
        pass

    def _end_coalescing(self, _device: Any = None) -> Any:
        return self._done

    def _has_hooks(self) -> bool:
        return False

    def get_error(self) -> Any:
        """What went wrong in this group, as PyTorch's ``ErrorType``."""
        kinds = torch._C._distributed_c10d.ErrorType
        if self._error is None:
            return kinds.SUCCESS
        if isinstance(self._error, _errors.TimeoutError):
            return kinds.TIMEOUT
        return kinds.REMOTE_ERROR

    getError = get_error

    @property
    def communicator(self) -> Any:
        """The group as a ``unisum.Communicator``, for what PyTorch has no name for."""
        return self._communicator

    # Calling unisum.

    def _call(
        self,
        kind: int,
        data: Any,
        out: Any,
        opts: Any,
        result: List[torch.Tensor],
        op: int = 0,
        scale: Optional[float] = None,
        root: int = 0,
        by_rank: Optional[List[int]] = None,
        received: Optional[List[int]] = None,
        after: Optional[Callable[[], None]] = None,
    ) -> Any:
        request = (kind, op, root, scale, False, by_rank, received, data, out)
        limit = seconds(getattr(opts, "timeout", None)) or self._default_timeout
        self._sequence += 1
        is_async = getattr(opts, "asyncOp", True) or limit < self._timeout
        given = result or (data if isinstance(data, list) else [data])
        if kind == BARRIER:
            self._on_device(self._cuda.barrier)
        elif given and given[0].is_cuda:
            is_async = getattr(opts, "asyncOp", True)
            return self._on_device(lambda: self._cuda.run(request, result, is_async))
        if _profiling.is_on():
            is_async = True
            shown = data if isinstance(data, list) else [data] if data is not None else result
            after = self._profiled(_NAMES[kind], shown, after)
        try:
            if is_async:
                _completion.starts_collective()
                return self._watched([self._native._start(request)], result, after, limit)
            self._native._run(request)
        except _errors.ConfigurationError:
            # An argument was refused; the group goes on.
            raise
        except _errors.Error as error:
            self._error = overdue(error)
            raise self._error from None
        except RuntimeError:
            _options.refuse_unsendable(given)
            raise
        if after is not None:
            after()
        return self._done

    def _on_device(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except _errors.Error as error:
            self._error = error
            raise

    def _profiled(
        self, name: str, tensors: List[torch.Tensor], after: Optional[Callable[[], None]]
    ) -> Callable[[], None]:
        end = _profiling.record(f"{self._backend_name}:{name}", tensors)

        def both() -> None:
            end()
            if after is not None:
                after()

        return both

    def _watched(
        self,
        works: List[Any],
        result: List[torch.Tensor],
        after: Optional[Callable[[], None]],
        limit: float,
    ) -> UnisumWork:
        # The group's own deadline says more about who is missing.
        own = limit if limit < self._timeout else None
        return UnisumWork(works, result, after, own)

    def _batch(
        self,
        kind: int,
        pairs: Sequence[Any],
        opts: Any,
        result: List[torch.Tensor],
        op: int = 0,
        scale: Optional[float] = None,
    ) -> Any:
        """One collective on several tensors: a batch for each type among them."""
        if pairs and pairs[0][0].is_cuda:
            work = self._done
            for data, out in pairs:
                request = (kind, op, 0, scale, False, None, None, data, out)
                is_async = getattr(opts, "asyncOp", True)
                # The last one's end is that of all: they are in one stream.
                work = self._on_device(lambda: self._cuda.run(request, result, is_async))
            self._sequence += 1
            return work
        by_type: dict = {}
        for data, out in pairs:
            request = (kind, op, 0, scale, False, None, None, data, out)
            by_type.setdefault(data.dtype, []).append(request)
        limit = seconds(getattr(opts, "timeout", None)) or self._default_timeout
        self._sequence += 1
        _completion.starts_collective()
        after = None
        if _profiling.is_on():
            after = self._profiled(f"{_NAMES[kind]}_coalesced", [data for data, _ in pairs], None)
        works = [self._native._start_batch(requests) for requests in by_type.values()]
        work = self._watched(works, result, after, limit)
        if not getattr(opts, "asyncOp", True):
            work.wait()
        return work

    # Collectives.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Any:
        tensor = single(tensors)
        opts = _reduce_options(opts, timeout)
        if tensor.is_sparse:
            all_reduce_sparse(self, tensor, opts.reduceOp)
            return UnisumWork([], [tensor])
        op, scale = _options.reduction(opts.reduceOp, tensor.dtype)
        return self._call(ALL_REDUCE, tensor, None, opts, [tensor], op, scale)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        opts = _reduce_options(opts)
        op, scale = _options.reduction(opts.reduceOp, tensors[0].dtype)
        pairs = [(tensor, None) for tensor in tensors]
        return self._batch(ALL_REDUCE, pairs, opts, list(tensors), op, scale)

    def reduce(self, tensors: Any, opts: Any = None, op: Any = None, timeout: Any = None) -> Any:
        tensor = single(tensors)
        if isinstance(opts, int):
            opts = _with(dist.ReduceOptions(), rootRank=opts, reduceOp=op)
        number, scale = _options.reduction(opts.reduceOp, tensor.dtype)
        root = opts.rootRank
        return self._call(REDUCE, tensor, None, opts, [tensor], number, scale, root)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None, root: int = 0) -> Any:
        tensor = single(tensors)
        if opts is None or isinstance(opts, int):
            opts = _with(dist.BroadcastOptions(), rootRank=root if opts is None else opts)
        return self._call(BROADCAST, tensor, None, opts, [tensor], root=opts.rootRank)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        out, tensor = flat(nested(outputs)), single(inputs)
        if len(out) != self._world:
            raise ValueError(f"all_gather needs {self._world} outputs, not {len(out)}")
        flat([tensor])
        return self._call(ALL_GATHER, tensor, out, opts, out, by_rank=counts(out))

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        flat([output, input])
        if output.numel() != input.numel() * self._world:
            raise ValueError("output tensor size must be equal to world_size times input tensor size")
        return self._call(ALL_GATHER, input, output, opts, [output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        pairs = list(zip(flat(list(inputs)), flat(list(outputs))))
        return self._batch(ALL_GATHER, pairs, opts, list(outputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        # The lists are by rank, then by tensor.
        result = [flat([by_rank[index] for by_rank in outputs]) for index in range(len(inputs))]
        after = None
        if _profiling.is_on():
            after = self._profiled("all_gather", list(inputs), None)
        if inputs and inputs[0].is_cuda:
            pairs = list(zip(inputs, result))
            return self._batch(ALL_GATHER, pairs, opts, [it for out in result for it in out])
        self._sequence += 1
        _completion.starts_collective()
        works = [
            self._native._start((ALL_GATHER, 0, 0, None, False, counts(out), None, tensor, out))
            for tensor, out in zip(inputs, result)
        ]
        gathered = [tensor for out in result for tensor in out]
        return self._watched(works, gathered, after, self._default_timeout)

    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None
    ) -> Any:
        out, parts = single(outputs), flat(nested(inputs))
        opts = _reduce_options(opts, timeout, dist.ReduceScatterOptions)
        op, scale = _options.reduction(opts.reduceOp, out.dtype)
        flat([out])
        by_rank = counts(parts)
        return self._call(REDUCE_SCATTER, parts, out, opts, [out], op, scale, by_rank=by_rank)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        flat([output, input])
        if output.numel() * self._world != input.numel():
            raise ValueError("input tensor size must be equal to world_size times output tensor size")
        opts = _reduce_options(opts, None, dist.ReduceScatterOptions)
        op, scale = _options.reduction(opts.reduceOp, output.dtype)
        return self._call(REDUCE_SCATTER, input, output, opts, [output], op, scale)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        opts = _reduce_options(opts, None, dist.ReduceScatterOptions)
        op, scale = _options.reduction(opts.reduceOp, outputs[0].dtype)
        pairs = list(zip(flat(list(inputs)), flat(list(outputs))))
        return self._batch(REDUCE_SCATTER, pairs, opts, list(outputs), op, scale)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        out, tensor = flat(nested(outputs)), single(inputs)
        flat([tensor])
        if isinstance(opts, int):
            opts = _with(dist.GatherOptions(), rootRank=opts)
        root = opts.rootRank
        if self._rank == root and len(out) != self._world:
            raise ValueError(f"gather needs {self._world} outputs at its root, not {len(out)}")
        return self._call(GATHER, tensor, out, opts, out, root=root)

    def gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        out = [output] if self._rank == opts.rootRank else []
        return self._call(GATHER, input, flat(out), opts, out, root=opts.rootRank)

    gather_into_tensor = gather_single

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> Any:
        out, parts = single(outputs), flat(nested(inputs))
        flat([out])
        if isinstance(opts, int):
            opts = _with(dist.ScatterOptions(), rootRank=opts)
        root = opts.rootRank
        if self._rank == root and len(parts) != self._world:
            raise ValueError(f"scatter needs {self._world} inputs at its root, not {len(parts)}")
        return self._call(SCATTER, parts if self._rank == root else None, out, opts, [out], root=root)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        out, parts = flat(list(outputs)), flat(list(inputs))
        sent, received = [it.numel() for it in parts], [it.numel() for it in out]
        return self._call(
            ALL_TO_ALL, parts, out, opts, out, by_rank=sent, received=received
        )

    def all_to_all_single(
        self, output: Any, input: Any, output_splits: Any = (), input_splits: Any = (), opts: Any = None
    ) -> Any:
        flat([output, input])
        if not output_splits and not input_splits:
            for tensor in (output, input):
                _options.split_counts([], tensor, self._world)
            return self._call(ALL_TO_ALL, input, output, opts, [output])
        sent = _options.split_counts(input_splits, input, self._world)
        received = _options.split_counts(output_splits, output, self._world)
        return self._call(
            ALL_TO_ALL, input, output, opts, [output], by_rank=sent, received=received
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> Any:
        return self._call(BARRIER, None, None, opts, [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names the ranks that did not come."""
        self._barriers += 1
        limit = self._default_timeout
        if timeout is not None:
            limit = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        number = self._barriers
        monitored_barrier(self._store, self._rank, self._world, number, limit, wait_all_ranks)

    # Messages.

    def send(self, tensors: Any, to: int, tag: int = 0) -> UnisumWork:
        return self._message(False, single(tensors), to, tag)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> UnisumWork:
        return self._message(True, single(tensors), source, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> UnisumWork:
        tensor = single(tensors)
        self._refuse_device(tensor)
        _completion.starts_collective()
        flat([tensor])
        after = None
        if _profiling.is_on():
            after = self._profiled("recvAnySource", [tensor], None)
        work = self._messages()._start_any(tensor, tag)
        made = UnisumWork([work], [tensor], after)
        made._source = lambda: work.source
        return made

    def _refuse_device(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:
            raise ValueError("unisum sends messages of the CPU's memory only: copy to it first")

    def _message(self, receives: bool, tensor: torch.Tensor, peer: int, tag: int) -> UnisumWork:
        self._refuse_device(tensor)
        _completion.starts_collective()
        flat([tensor])
        after = None
        if _profiling.is_on():
            after = self._profiled("recv" if receives else "send", [tensor], None)
        _options.refuse_unsendable([tensor])
        work = self._messages()._start(receives, tensor, peer, tag)
        made = UnisumWork([work], [tensor], after)
        if receives:
            made._source = lambda: peer
        return made

    # The end.

    def shutdown(self) -> None:
        """Leaves the job after what is under way; ``destroy_process_group`` calls it."""
        self._cuda.close()
        if self._messenger is not None:
            self._messenger.close()
        self._communicator.close()

    def abort(self) -> None:
        """Ends the job of this group on all its ranks: calls under way fail."""
        self._abort("the process group was aborted")

    def abort_for_hook(self, error: BaseException) -> None:
        """The same because a communication hook has raised on this rank."""
        if self._communicator.closed or self.view is not None:
            # An elastic job goes on: the hook may have raised because a rank was lost.
            return
        if self.hook_error is None:
            self.hook_error = error
        told = (str(error).splitlines() or [""])[0]
        self._abort(f"its communication hook raised {type(error).__name__}: {told}")

    def _abort(self, why: str) -> None:
        if not self._communicator.closed:
            self._error = self._communicator.abort(why)


def _with(options: Any, **values: Any) -> Any:
    for name, value in values.items():
        if value is not None:
            setattr(options, name, value)
    return options


def _reduce_options(opts: Any, timeout: Any = None, kind: Any = None) -> Any:
    """Options; some callers give an operation in their place."""
    if hasattr(opts, "reduceOp"):
        return opts
    options = (kind or dist.AllreduceOptions)()
    return _with(options, reduceOp=opts, timeout=timeout)
