"""Elastic jobs: the process group and the models follow the ranks that are left."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

import torch.distributed as dist

from .. import _errors
from .._communicator import Communicator, View


class ElasticGroup:
    """What a process group has besides if its job is elastic.

    Its rank and size, and with them those of ``torch.distributed``, are those of the view that it
    is in: of the first one until ``unisum.torch.DistributedDataParallel`` has ended a step in
    another one, or ``rebuild`` has made it.
    """

    _communicator: Communicator
    _native: Any
    _messenger: Any
    _cuda: Any
    _done: Any
    #: Whether this process has the state of the training: not when it has joined, until ``admit``.
    _has_state: bool

    @property
    def view(self) -> Optional[View]:
        """The epoch, and by rank which process it is; ``None`` if the job is not elastic."""
        return self._communicator.view

    def rebuild(self) -> None:
        """Goes on with the ranks that are left, after ``unisum.ViewChanged``, as
        ``unisum.Communicator.rebuild`` does. Collective: every rank that is left calls it. Models
        have to follow: ``unisum.torch.rebuild`` does both."""
        self._renew(self._next_view)

    def shrink(self, exclude: Sequence[int]) -> None:
        """Goes on without these ranks, which need not take part. Collective: every other rank calls
        it, with the same list."""
        self._renew(lambda: self._communicator.shrink(exclude))

    def revoke(self) -> None:
        """Ends all calls of the group, on all ranks, with ``unisum.ViewChanged``. Any thread of any
        rank may call it."""
        self._communicator.revoke()

    # What `torch.distributed._reconfigure` (from PyTorch 2.14 on, experimental) asks for.

    @property
    def supports_reconfigure(self) -> bool:
        """Whether the job is elastic."""
        communicator = getattr(self, "_communicator", None)
        return communicator is not None and communicator.view is not None

    def get_reconfigure_handle(self) -> str:
        """What this process is called in the handles of ``reconfigure``."""
        view = self.view
        if view is None:
            raise RuntimeError("the job is not elastic: UNISUM_ELASTIC=MINIMUM")
        return f"unisum:{view.processes[self._communicator.rank]}"

    def reconfigure(self, options: Any) -> Any:
        """Goes on with the ranks that these handles name, or those of them that are left: their
        order stays. It has ended when this returns. Collective among them."""
        handles = list(options.handles)
        is_ordered = not isinstance(options.handles, (set, frozenset))
        while True:
            others = excluded(self._communicator.view, handles, is_ordered)
            if others:
                self.shrink(others)
            else:
                self.rebuild()
            if not excluded(self._communicator.view, handles, False):
                return self._done

    def _next_view(self) -> Communicator:
        """The communicator of the ranks that are left."""
        return self._communicator.rebuild()

    def _renew(self, make: Any, models: Sequence[Any] = ()) -> None:
        """Goes on with a communicator that is made, and so do these models."""
        while True:
            self._adopt(make())
            try:
                # In this order, as newcomers do: they make their models before all else.
                for model in models:
                    model._follow(self)
                self._messenger = self._native._messenger()
                return
            except _errors.ViewChanged:
                # Ranks were lost again: all that are left come here.
                make = self._next_view

    def _adopt(self, communicator: Communicator) -> None:
        """Takes the communicator of another view. Not collective: there are no messages in it."""
        self._cuda.close()
        self._messenger = None
        self._communicator, self._native = communicator, communicator._native
        self._error: Optional[BaseException] = None
        self._rank, self._world = communicator.rank, communicator.world
        ranks = dist.distributed_c10d._world.pg_group_ranks
        if self in ranks:
            # Ranks of the whole job are those of its view.
            ranks[self] = {rank: rank for rank in range(self._world)}

    def _messages(self) -> Any:
        if self._messenger is None:
            why, call = "a step has changed the view", "rebuild"
            if not self._has_state:
                why, call = "this process has joined the job", "admit"
            raise _errors.ConfigurationError(
                f"{why}: `unisum.torch.{call}`, on all ranks, makes messages possible",
                "configuration",
            )
        return self._messenger


def _group(group: Any) -> Any:
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ElasticGroup):
        raise ValueError('the process group is not one of unisum\'s: init_process_group("unisum")')
    return group


def rank(group: Any = None) -> int:
    """This process's number in the view that the group is in, as ``torch.distributed.get_rank``."""
    return _group(group).rank()  # type: ignore[no-any-return]


def world(group: Any = None) -> int:
    """How many ranks are in the group now, as ``torch.distributed.get_world_size``."""
    return _group(group).size()  # type: ignore[no-any-return]


def view(group: Any = None) -> Optional[View]:
    """Who is in the group's job now: the epoch, and by rank which process it is. ``None`` if the
    job is not elastic."""
    return _group(group).view  # type: ignore[no-any-return]


def rebuild(*models: Any, group: Any = None) -> None:
    """Has the group and these ``unisum.torch.DistributedDataParallel`` go on with the ranks that
    are left, after ``unisum.ViewChanged``. Gradients are gone: the step is taken again.

    Collective: every rank that is left calls it, with the same models; if ranks are lost meanwhile,
    it goes on with those that are left then. Some ranks may have taken a step more than others:
    programs compare their numbers of steps, and those behind get the state of one that is ahead.
    """
    group = _group(group)
    group._renew(group._next_view, models)


def excluded(view: Optional[View], handles: Sequence[str], is_ordered: bool) -> List[int]:
    """The ranks of a view that are not among these handles. Processes that were lost may be."""
    if view is None:
        raise RuntimeError("the job is not elastic: UNISUM_ELASTIC=MINIMUM")
    known = {f"unisum:{process}": rank for rank, process in enumerate(view.processes)}
    ranks = [known[handle] for handle in handles if handle in known]
    if is_ordered and sorted(set(ranks)) != ranks:
        raise ValueError(f"an elastic job keeps the order of its ranks, {list(known)}: {handles}")
    return [rank for rank in range(len(known)) if rank not in ranks]
