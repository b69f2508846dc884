"""Gradients in buckets that a communication hook of the program's reduces."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as dist

from .. import _ending, _errors
from ._reducer import _TYPES, Reducer, _Gradient

#: How much the bucket holds that is ready first, so that communication begins early.
_FIRST_BYTES = 1 << 20


class Bucket:
    """What a hook is given: it has the methods of ``torch.distributed.GradBucket``, which a program
    can't make."""

    def __init__(self, index: int, is_last: bool, gradients: List[_Gradient], memory: Any) -> None:
        self._index, self._is_last = index, is_last
        self._members = gradients
        self._memory = memory
        self._buffer = torch.view_as_complex(memory.view(-1, 2)) if self._is_complex() else memory
        self._missing = len(gradients)

    def _is_complex(self) -> bool:
        return self._members[0].parameter.is_complex()

    def _begin(self) -> None:
        self._missing = len(self._members)

    def _place(self) -> None:
        """Has the gradients take their places."""
        begin = 0
        for gradient in self._members:
            end = begin + gradient.parameter.numel() * (2 if self._is_complex() else 1)
            gradient.lies_in(self._memory[begin:end])
            begin = end

    def _take(self, given: Any) -> None:
        """Ends with what the hook has made of it."""
        if isinstance(given, (list, tuple)) and len(given) == 1:
            given = given[0]
        if not isinstance(given, torch.Tensor) or given.numel() != self._buffer.numel():
            count = self._buffer.numel()
            what = given.numel() if isinstance(given, torch.Tensor) else type(given).__name__
            raise ValueError(
                "the hook's future has to give a tensor"
                f" of the bucket's {count} elements, not {what}"
            )
        if given.data_ptr() != self._buffer.data_ptr() or given.dtype != self._buffer.dtype:
            self._buffer.copy_(given.view_as(self._buffer))

    # What hooks call.

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last

    def buffer(self) -> torch.Tensor:
        """All gradients in one piece."""
        return self._buffer  # type: ignore[no-any-return]

    def set_buffer(self, buffer: torch.Tensor) -> None:
        """Puts other gradients in place of these."""
        self._take(buffer)

    def gradients(self) -> List[torch.Tensor]:
        """The gradients, as views of the buffer."""
        return [gradient.view() for gradient in self._members]

    def parameters(self) -> List[torch.Tensor]:
        return [gradient.parameter for gradient in self._members]


class _Turns:
    """A thread that runs calls in turn."""

    def __init__(self) -> None:
        self._calls: "queue.SimpleQueue[Any]" = queue.SimpleQueue()
        threading.Thread(
            target=_serve, args=(self._calls,), name="unisum-hooks", daemon=True
        ).start()

    def run(self, call: Callable[[], Any]) -> "concurrent.futures.Future[Any]":
        future: "concurrent.futures.Future[Any]" = concurrent.futures.Future()
        self._calls.put((call, future))
        return future

    def __del__(self) -> None:
        self._calls.put(None)


def _turns_of(group: Any) -> _Turns:
    """The group's, which all its models share."""
    if group._turns is None:
        group._turns = _Turns()
    return group._turns  # type: ignore[no-any-return]


def _serve(calls: "queue.SimpleQueue[Any]") -> None:
    while True:
        turn = calls.get()
        if turn is None:
            return
        call, future = turn
        if not _ending.begin():
            future.cancel()
            return
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        finally:
            _ending.end()
        # What it refers to may go while the next turn is waited for.
        del turn, call, future


class HookedReducer(Reducer):
    """A reducer whose buckets, in unisum's memory, are reduced by a hook: in the same order on all
    ranks, each when its last gradient is final and the one before it is reduced. A hook may so make
    several calls, one after the other's end, as PowerSGD's does: all ranks make them in one order.
    It runs on a thread of the group's, while the backward pass goes on. All models of a group share
    that thread, on which the ends of their steps are, too: the order of their calls is that in
    which the program's backward pass comes to them.

    At the end of a step ranks tell each other whether they took it, which one it was, and which
    parameters they used. A rank that gives a step up has its hooks run all the same, on zeros,
    because the others' wait.
    """

    def __init__(self, hook: Callable[..., Any], state: Any, *arguments: Any) -> None:
        self._hook, self._state = hook, state
        self._results: List[Any] = []
        #: Why there is no further step, if there is none: if a hook raised, or runs on, which calls
        #: the others wait for is not known.
        self._broken: Optional[str] = None
        self._own: List[Bucket] = []
        self._of: Dict[int, Bucket] = {}
        self._launched = 0
        self._is_laid_out = False
        super().__init__(*arguments)

    @classmethod
    def after(cls, reducer: Reducer, hook: Callable[..., Any], state: Any) -> "HookedReducer":
        """In place of another, between two steps. All ranks call it alike."""
        hooked = cls(hook, state, *reducer.end())
        hooked.optimized, hooked.report = reducer.optimized, reducer.report
        return hooked

    # Where gradients lie.

    def _make_buckets(self, _described: Any) -> None:
        self._own, self._of = [], {}
        self._broken = None
        self._turns = _turns_of(self._group)
        assigned = _assigned(self._gradients, self._options["bucket_bytes"])
        for index, members in enumerate(assigned):
            it = members[0].parameter
            count = sum(it.parameter.numel() for it in members) * (2 if it.is_complex() else 1)
            memory = self._group.communicator.empty((count,), _TYPES[it.dtype]).torch()
            bucket = Bucket(index, index == len(assigned) - 1, members, memory)
            bucket._place()
            self._own.append(bucket)
            self._of.update((gradient.place, bucket) for gradient in members)

    # A step.

    def prepare_for_forward(self) -> None:
        self._check()
        super().prepare_for_forward()

    def _check(self) -> None:
        """Refuses to go on out of step with the other ranks."""
        if self._broken is not None:
            raise _errors.Error(
                f"this model takes no further step: {self._broken}, so that this rank may have"
                " made other calls than the others. Make a new process group, and the model anew"
                " or by _update_process_group, on all ranks",
                "step_failed",
                [self._group.rank()],
            )

    def _rebuild_buckets(self) -> bool:
        # Buckets stay, but hooks such as `hook_with_zero_step` begin only once PyTorch's are laid
        # out for good, which it says in the second forward pass.
        was_told, self._is_laid_out = self._is_laid_out, self._steps > 0
        return self._is_laid_out and not was_told

    def _begin_buckets(self) -> None:
        self._check()
        self._launched = 0
        self._results = []
        for bucket in self._own:
            bucket._begin()

    def _hand_over(self, gradient: _Gradient) -> None:
        if gradient.is_ready:
            raise _errors.Error(
                f"{gradient.name} was marked ready before: it has more than one gradient in this"
                " backward pass. If each pass is alike, say static_graph=True.",
                "step_failed",
                [self._group.rank()],
            )
        self._of[gradient.place]._missing -= 1
        while self._launched < len(self._own) and self._own[self._launched]._missing == 0:
            self._launch()

    def _launch(self) -> None:
        bucket = self._own[self._launched]
        self._launched += 1
        self._results.append(self._turns.run(lambda: self._reduce(bucket)))

    def _reduce(self, bucket: Bucket) -> Optional[Exception]:
        """Has the hook reduce a bucket: what it gave in vain, if it did."""
        if self._broken is not None:
            return None
        with torch.no_grad():
            try:
                reduced = self._hook(self._state, bucket).wait()
            except BaseException as error:
                self._broken = f"its hook raised {type(error).__name__} in an earlier step"
                # The others wait in calls that this hook would have made.
                self._group.abort_for_hook(error)
                raise
            try:
                bucket._take(reduced)
            except ValueError as error:
                return error
        return None

    def _end_buckets(self) -> None:
        stale = self._clear_unready()
        used = self._told(failed=False)
        for gradient in self._gradients:
            is_used = used[gradient.place] > 0
            if gradient.is_ready:
                continue
            if is_used:
                gradient.parameter.grad = gradient.view()
            elif gradient.place in stale:
                # Nobody has used it: it stays what it was.
                gradient.memory.copy_(stale[gradient.place])
        self._factor()

    def _clear_unready(self) -> Dict[int, torch.Tensor]:
        """Zeros for the gradients that this step has none of: those of earlier ones by place."""
        stale = {}
        for gradient in self._gradients:
            if not gradient.is_ready:
                kept = gradient.parameter.grad
                if kept is not None and kept.data_ptr() == gradient.address:
                    stale[gradient.place] = gradient.memory.clone()
                gradient.memory.zero_()
        return stale

    def _told(self, failed: bool) -> List[int]:
        """Ends the step's buckets: how many ranks have used each parameter. Raises if a rank has
        given the step up, on all ranks."""
        try:
            wrong = self._take()
            counts = self._tell(failed or wrong is not None)
        except BaseException as error:
            if self._broken is None:
                # Such as an interrupt: a hook may be running, and has the bucket.
                kind = type(error).__name__
                self._broken = f"the end of an earlier step was waited for until {kind} was raised"
            raise
        if wrong is not None:
            raise wrong
        world = self._group.size()
        gave_up = [it for it in range(world) if counts[it]]
        if gave_up and not failed:
            names = ", ".join(str(it) for it in gave_up)
            raise _errors.Error(
                f"rank {names} gave the step up: its backward pass or its hook raised an exception,"
                " or gradients were left out",
                "step_failed",
                gave_up,
            )
        return counts[2 * world :]

    def _tell(self, failed: bool) -> List[int]:
        """What the ranks tell each other: by rank, who gave the step up and which step it was, and
        how many have used each parameter."""
        world, rank = self._group.size(), self._group.rank()
        told = torch.zeros(2 * world + len(self._gradients), dtype=torch.int32)
        told[rank] = failed
        told[world + rank] = self._steps % (1 << 31)
        for gradient in self._gradients:
            told[2 * world + gradient.place] = gradient.is_ready
        reduce = self._group.allreduce
        self._turns.run(lambda: reduce([told], dist.ReduceOp.SUM).wait()).result()
        counts: List[int] = told.tolist()
        steps = counts[world : 2 * world]
        if any(it != steps[0] for it in steps):
            # What hooks reduced is of different steps.
            text = f"ranks are in different steps of this model: by rank, {steps}"
            raise _errors.MismatchError(text, "mismatch")
        return counts

    def _reduce_sparse(self, parameter: torch.Tensor) -> None:
        reduce = super()._reduce_sparse
        self._turns.run(lambda: reduce(parameter)).result()

    def _take(self) -> Optional[Exception]:
        """Has all buckets reduced."""
        while self._launched < len(self._own):
            self._launch()
        outcomes = [result.result() for result in self._results]
        return next((it for it in outcomes if it is not None), None)

    def _drop(self, why: str) -> None:
        was_open, self._is_expected, self._is_open = self._is_open, False, False
        if self._broken is not None or not was_open:
            # The others' calls end with the group's time-out.
            return
        with torch.no_grad():
            for bucket in self._own[self._launched :]:
                bucket.buffer().zero_()
            self._told(failed=True)

    def shadow(self) -> None:
        with torch.no_grad():
            self._begin_buckets()
            self._steps += 1
            for gradient in self._gradients:
                gradient.is_ready = False
            for bucket in self._own:
                bucket.buffer().zero_()
            self._told(failed=False)
        self._turns.run(self._shadow_sparse).result()

    def admit(self) -> Any:
        raise NotImplementedError("hooks are not for elastic training")

    follow = admit


def _assigned(gradients: List[_Gradient], limit: int) -> List[List[_Gradient]]:
    """The gradients of each bucket: of one type, in the order in which backward passes usually
    come to them."""
    buckets: List[List[_Gradient]] = []
    open_buckets: Dict[torch.dtype, Any] = {}
    for gradient in reversed(gradients):
        it = gradient.parameter
        size = it.numel() * it.element_size()
        members, held = open_buckets.get(it.dtype, (None, 0))
        most = limit if len(buckets) > 1 else min(limit, _FIRST_BYTES)
        if members is None or held + size > most:
            members, held = [], 0
            buckets.append(members)
        members.append(gradient)
        open_buckets[it.dtype] = members, held + size
    return buckets
