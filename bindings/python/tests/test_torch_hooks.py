"""Hooks that raise under PyTorch's own DDP: the other ranks' backward raises at once, with an error
that names the rank and its exception; the rank itself gets its own exception."""

import copy
import datetime
import functools
import os
import pickle
import time

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import unisum  # noqa: E402
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: E402
from torch_scenarios import batch, network  # noqa: E402
from unisum.torch import hooks  # noqa: E402

#: How long ranks would wait otherwise.
LIMIT_S = 600
RAISING = 1


class Own(Exception):
    """What a hook raises."""


#: Which bucket's hook raises, if one does.
raising_place = None


def check(bucket):
    if dist.get_rank() == RAISING and raising_place and PLACES[raising_place](bucket):
        raise Own("not today")


def at_once(state, bucket):
    check(bucket)
    return hooks.allreduce_hook(state, bucket)


def in_then(state, bucket):
    def ended(future):
        check(bucket)
        return future.value()

    return hooks.allreduce_hook(state, bucket).then(ended)


def by_its_future(state, bucket):
    try:
        check(bucket)
    except Own as error:
        future = torch.futures.Future()
        future.set_exception(error)
        return future
    return hooks.allreduce_hook(state, bucket)


class Raising(hooks.WireState):
    """The state of a hook of unisum's, which fails."""

    def _of(self, bucket):
        check(bucket)
        return super()._of(bucket)


def with_state(group):
    state = Raising("int8")
    state.process_group = group
    return state, hooks.int8_compress_hook


#: State and hook, given the group.
KINDS = {
    "at_once": lambda group: (group, hooks.aborting(at_once, group)),
    "in_then": lambda group: (group, hooks.aborting(in_then, group)),
    "by_its_future": lambda group: (group, hooks.aborting(by_its_future, group)),
    "of_unisum": with_state,
}
#: Which bucket it is.
PLACES = {
    "first": lambda bucket: bucket.index() == 0,
    "second": lambda bucket: bucket.index() == 1,
    "last": lambda bucket: bucket.is_last(),
}


def raising(rank, world, kind, place):
    """In a group of its own, which does not outlive it."""
    global raising_place
    group = dist.new_group()
    state, hook = KINDS[kind](group)
    # One gradient per bucket, once they are laid out anew after the first step.
    model = DDP(network(), process_group=group, bucket_cap_mb=1e-5)
    model.register_comm_hook(state, hook)
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    outputs = model(inputs)
    raising_place = place
    begun = time.monotonic()
    with pytest.raises(Exception) as raised:
        F.mse_loss(outputs, targets).backward()
        # What came before its future's callback has ended well: they learn of it in the next call.
        assert rank != RAISING and kind == "in_then"
        dist.all_reduce(torch.ones(1), group=group)
    assert time.monotonic() - begun < LIMIT_S / 2
    raising_place = None
    error, text = raised.value, str(raised.value)
    assert "Own: not today" in text or isinstance(error, Own), repr(error)
    if rank == RAISING:
        # PyTorch has what a callback raises as text.
        assert type(error) is (RuntimeError if kind == "in_then" else Own), repr(error)
    else:
        assert type(error) is unisum.AbortedError and error.ranks == (RAISING,), repr(error)
        assert f"rank {RAISING} aborted the job: its communication hook raised" in text
    with pytest.raises(unisum.AbortedError, match="Own: not today"):
        dist.all_reduce(torch.ones(1), group=group)


def without_a_hook(rank, world):
    """PyTorch's C++ waits for futures of unisum's that fail."""
    group = dist.new_group()
    model = DDP(network(), process_group=group)
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    outputs = model(inputs)
    if rank == RAISING:
        group.abort()
        return
    with pytest.raises(RuntimeError, match=f"rank {RAISING} aborted the job"):
        F.mse_loss(outputs, targets).backward()


def failed_futures_are_typed(rank, world):
    group = dist.new_group()
    dist.barrier(group)
    if rank == RAISING:
        group.abort()
        return
    future = dist.all_reduce(torch.ones(1), group=group, async_op=True).get_future()
    seen = []

    def ended(it):
        with pytest.raises(unisum.AbortedError) as raised:
            it.value()
        seen.append(raised.value.ranks)

    with pytest.raises(unisum.AbortedError) as raised:
        future.wait()
    future.then(ended).wait()
    assert raised.value.ranks == (RAISING,) and seen == [(RAISING,)]


def without_cuda(rank, world):
    """PyTorch, where it is built without CUDA, refuses its own hook of this name."""
    version, torch.version.cuda = torch.version.cuda, None
    model = DDP(network())
    model.register_comm_hook(None, hooks.bf16_compress_hook)
    torch.version.cuda = version
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    gradients = [it.grad.double().sum().item() for it in model.parameters()]
    everyone = [None] * world
    dist.all_gather_object(everyone, gradients)
    assert all(it == gradients for it in everyone)


def no_group_of_unisum(rank, world):
    gloo = dist.new_group(backend="gloo")
    for hook in (hooks.allreduce_hook, hooks.aborting(at_once, gloo)):
        model = DDP(network(), process_group=gloo)
        model.register_comm_hook(gloo, hook)
        inputs, targets = batch(rank)
        with pytest.raises(ValueError, match="process group of unisum"):
            F.mse_loss(model(inputs), targets).backward()


def no_future(rank, world):
    group = dist.new_group()
    model = DDP(network(), process_group=group)
    model.register_comm_hook(None, hooks.aborting(lambda _state, bucket: bucket.buffer(), group))
    inputs, targets = batch(rank)
    with pytest.raises((TypeError, unisum.AbortedError), match="returns a torch.futures.Future"):
        F.mse_loss(model(inputs), targets).backward()


def losing(rank, world):
    """The last of them: a rank's process ends."""
    model = DDP(network())
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    outputs = model(inputs)
    if rank == world - 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match=f"rank {world - 1}"):
        F.mse_loss(outputs, targets).backward()


SCENARIOS = [
    functools.partial(raising, kind=kind, place=place) for kind in KINDS for place in PLACES
]
SCENARIOS += [without_a_hook, failed_futures_are_typed, without_cuda, no_group_of_unisum, no_future,
              losing]


def rank_of(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "unisum",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=LIMIT_S),
    )
    for scenario in SCENARIOS:
        scenario(rank, world)
        if scenario is not losing:
            dist.barrier()


def test_all_ranks_learn_of_it(tmp_path):
    mp.spawn(rank_of, (3, str(tmp_path)), nprocs=3)


def in_an_elastic_job(rank, world, folder):
    """Which goes on."""
    os.environ["UNISUM_ELASTIC"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "unisum", init_method=f"file://{folder}/init", rank=rank, world_size=world
    )
    model = DDP(network())
    model.register_comm_hook(None, hooks.aborting(lambda _state, bucket: 1 / 0))
    inputs, targets = batch(rank)
    with pytest.raises(ZeroDivisionError):
        F.mse_loss(model(inputs), targets).backward()
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor == world
    dist.destroy_process_group()


def test_an_elastic_job_goes_on(tmp_path):
    mp.spawn(in_an_elastic_job, (2, str(tmp_path)), nprocs=2)


@hooks.aborting
def decorated(state, bucket):
    """As a program has it."""


def test_hooks_are_copied():
    for hook in (hooks.int8_compress_hook, hooks.bf16_compress_hook, decorated):
        assert pickle.loads(pickle.dumps(hook)) is hook
        assert copy.deepcopy(hook) is hook
    made = pickle.loads(pickle.dumps(hooks.aborting(at_once)))
    assert made.__wrapped__ is at_once and made.__name__ == "at_once"
    assert decorated.__doc__ == "As a program has it."
