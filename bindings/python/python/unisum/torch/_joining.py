"""Processes that join an elastic job that runs, and the state that they are given."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Tuple

import torch
import torch.distributed as dist

from .. import _errors
from . import _state


class Newcomer:
    """What `init_process_group` takes for options of a process that joins."""


def join(
    init_method: Any = None, *, store: Any = None, timeout: Any = None, **options: Any
) -> None:
    """Has this process join a job that runs, as a new rank behind the others, in place of
    ``init_process_group("unisum", ...)``. It is given what the job's ranks are, but for rank and
    world: ``init_method`` or ``store``, ``timeout``, and ``UNISUM_ELASTIC`` in the environment.

    Blocks until the ranks let it in (``admit``), ``timeout`` at most. It then makes its
    ``unisum.torch.DistributedDataParallel`` and its optimizer, and calls ``admit`` itself, before
    anything else: meanwhile the others wait. What takes long is better done before ``join``.

    Raises ``unisum.RendezvousError`` if there is no such job, it ends, refuses this process, or
    lets nobody in.
    """
    # Which rank of how many is found out: these only satisfy PyTorch.
    dist.init_process_group(
        "unisum",
        init_method=init_method,
        store=store,
        rank=1,
        world_size=2,
        timeout=timeout,
        pg_options=Newcomer(),
        **options,
    )


def admit(model: Any, *stateful: Any, step: int = 0) -> int:
    """Lets those into the job that have called ``join``, and gives them the training's state. Every
    rank calls it: those that are there after a step that they all took, once
    ``model.last_report.newcomers`` says that somebody waits, which is the same on all ranks; and
    newcomers when they have their model and optimizer. All go on behind it with the same calls, so
    that it is the last thing in a training's loop.

    ``model`` is a ``unisum.torch.DistributedDataParallel`` with ``elastic=True``. Its parameters
    and buffers are given to newcomers, and so is the state of each of ``stateful``: optimizers,
    learning rate schedulers, and whatever else has ``state_dict`` and ``load_state_dict`` and is
    the same on all ranks. ``step`` is how many steps this rank has taken; newcomers need not say
    it. Returns how many steps the training has taken: all ranks have that state.

    The lowest of the ranks that are furthest sends its state. Those that are as far compare
    fingerprints: if parameters or ``stateful`` differ, all raise ``unisum.MismatchError``. Buffers
    may differ, as those of ``BatchNorm`` do: ranks that have some keep their own.

    If ranks are lost meanwhile, it goes on with those that are left, as ``align`` does.
    """
    group = model.process_group

    def enter() -> None:
        if group._has_state:
            group._adopt(model.reducer.admit())
        group._messenger = group._native._messenger()

    return _aligned(model, stateful, step, enter)


def align(model: Any, *stateful: Any, step: int = 0) -> int:
    """Goes on with the ranks that are left, after ``unisum.ViewChanged``: ``rebuild``, and then all
    ranks get the state of those that are furthest. Takes and returns what ``admit`` does, and may
    meet ranks that are in ``admit``.

    Collective: every rank that is left calls it; if ranks are lost meanwhile, it goes on with those
    that are left then.
    """
    return _aligned(model, stateful, step, _again(model))


def _again(model: Any) -> Callable[[], None]:
    """Goes on in the next view."""
    group = model.process_group
    return functools.partial(group._renew, group._next_view, [model])


def _aligned(
    model: Any, stateful: Tuple[Any, ...], step: int, enter: Callable[[], None]
) -> int:
    """Enters a view, and shares the state there; again if ranks are lost."""
    if step < 0:
        raise ValueError(f"{step} steps can't have been taken")
    while True:
        try:
            enter()
            return _share(model, stateful, step)
        except _errors.ViewChanged:
            enter = _again(model)


def _share(model: Any, stateful: Tuple[Any, ...], step: int) -> int:
    """Gives the state of the ranks that are furthest to the others. If the view changes, nothing
    has changed on this rank."""
    group = model.process_group
    communicator = group.communicator
    own = step if group._has_state else -1
    told = torch.empty(communicator.world, dtype=torch.int64)
    communicator.all_gather(torch.tensor([own]), told)
    steps = told.tolist()
    furthest = max(steps)
    first = steps.index(furthest)
    kept = None
    if min(steps) < 0:
        sends = own >= 0 and communicator.rank == first
        kept = communicator.share_state(_state.to_bytes(_own(model)) if sends else None)
    has = own == furthest and own >= 0
    state = communicator.share_state(_state.to_bytes(_common(model, stateful)) if has else None)
    if state is not None:
        _load(model, stateful, _state.from_bytes(state))
    if own < 0:
        assert kept is not None
        _load_own(model, _state.from_bytes(kept))
        group._has_state = True
    return furthest


def _named(model: Any) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What of the module's state all ranks have the same of, and the rest."""
    module, ignored = model.module, set(model.parameters_to_ignore)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    common, rest = {}, {}
    for name, value in module.state_dict().items():
        if name not in ignored:
            (common if name in parameters else rest)[name] = value
    return common, rest


def _unsaved(model: Any) -> Dict[str, torch.Tensor]:
    """The buffers that are not in the module's state."""
    known = set(model.module.state_dict()) | set(model.parameters_to_ignore)
    return {name: it for name, it in model.module.named_buffers() if name not in known}


def _common(model: Any, stateful: Tuple[Any, ...]) -> Any:
    return _named(model)[0], [it.state_dict() for it in stateful]


def _load(model: Any, stateful: Tuple[Any, ...], state: Any) -> None:
    parameters, others = state
    if len(others) != len(stateful):
        count = len(stateful)
        raise ValueError(f"the others give the state of {len(others)} objects, not {count}")
    _load_module(model, parameters)
    for it, saved in zip(stateful, others):
        it.load_state_dict(saved)


def _own(model: Any) -> Any:
    group, world = model.process_group, dist.distributed_c10d._world
    # By these PyTorch and the group name what they keep in the store.
    counts = world.group_count, group._barriers, group._sequence
    return _named(model)[1], _unsaved(model), counts


def _load_own(model: Any, state: Any) -> None:
    group, world = model.process_group, dist.distributed_c10d._world
    buffers, unsaved, (world.group_count, group._barriers, group._sequence) = state
    _load_module(model, buffers)
    with torch.no_grad():
        for name, buffer in _unsaved(model).items():
            buffer.copy_(unsaved[name])


def _load_module(model: Any, state: Dict[str, Any]) -> None:
    unexpected = model.module.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"the module of the other ranks has {unexpected}, and this one has not")
