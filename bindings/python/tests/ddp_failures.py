"""What `unisum.torch.DistributedDataParallel` does when steps fail on some ranks. Scenarios as in
ddp_scenarios."""

import signal
import sys
import threading
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import unisum
from ddp_scenarios import batch, both, gradients, network, trained_alike
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from unisum.torch import DistributedDataParallel as DDP


class Raises(torch.autograd.Function):
    """A layer whose backward pass raises."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("this layer can't")


def raising_before_the_first_gradient(rank, world, gloo):
    for is_hooked in (False, True):
        pair = both(network, gloo)
        model = pair[0]
        if is_hooked:
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        inputs, targets = batch(rank)
        F.mse_loss(model(inputs), targets).backward()
        # In what the module does last.
        handle = model.module[2].register_forward_hook(lambda _m, _i, out: Raises.apply(out))
        if rank != 1:
            handle.remove()
        with pytest.raises(ArithmeticError if rank == 1 else unisum.Error) as raised:
            F.mse_loss(model(inputs), targets).backward()
        if rank != 1:
            assert raised.value.kind == "step_failed" and raised.value.ranks == (1,)
        handle.remove()
        model.zero_grad()
        trained_alike(pair, rank, world)


def failed_steps_leave_the_weights(rank, world, gloo):
    ours, theirs = both(network, gloo, bucket_cap_mb=0.0001)
    ours._register_fused_optim(torch.optim.SGD, 0.05, optim_params=list(ours.parameters())[:3])
    optimizer = torch.optim.SGD(list(theirs.parameters())[:3], lr=0.05)
    inputs, targets = batch(rank)
    # After the gradients of the last layer.
    handle = ours.module[0].register_forward_hook(lambda _m, _i, out: Raises.apply(out))
    if rank != 1:
        handle.remove()
    with pytest.raises(ArithmeticError if rank == 1 else unisum.Error):
        F.mse_loss(ours(inputs), targets).backward()
    handle.remove()
    for own, first in zip(ours.parameters(), network().parameters()):
        assert torch.equal(own, first)
    ours.zero_grad()
    for model in (ours, theirs):
        F.mse_loss(model(inputs), targets).backward()
    optimizer.step()
    for own, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(own, other, 1e-5, 1e-6)


def hooks_that_raise(rank, world, gloo):
    """A rank whose hook raised has made other calls than the others: it doesn't go on."""
    group = dist.new_group()

    def hook(state, bucket):
        state.append(bucket.index())
        if rank == 1 and len(state) == 2:
            raise ArithmeticError("once")
        return default_hooks.allreduce_hook(group, bucket)

    model = DDP(network(), process_group=group)
    model.register_comm_hook([], hook)
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    kept = gradients(model)
    if rank == 1:
        outputs = model(inputs)
        with pytest.raises(ArithmeticError):
            F.mse_loss(outputs, targets).backward()
        # Neither forward, nor backward from there.
        with pytest.raises(unisum.Error, match="no further step: its hook raised Arithmetic"):
            model(inputs)
        model.reducer.prepare_for_backward()
        with pytest.raises(unisum.Error, match="no further step"):
            F.mse_loss(model.module(inputs), targets).backward()
    else:
        with pytest.raises(RuntimeError, match="rank 1 aborted the job: its communication hook rai"):
            F.mse_loss(model(inputs), targets).backward()
        with pytest.raises(unisum.Error, match="no further step"):
            model(inputs)
    model._update_process_group(dist.new_group())
    model.zero_grad()
    group = model.process_group
    F.mse_loss(model(inputs), targets).backward()
    for own, other in zip(gradients(model), kept):
        assert torch.allclose(own, other, 1e-5, 1e-7)


def ranks_in_different_steps(rank, world, gloo):
    model = both(network, gloo)[0]
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    # As if it had taken one alone.
    model.reducer._steps += rank == 1
    steps = [3 if it == 1 else 2 for it in range(world)]
    with pytest.raises(unisum.MismatchError, match="different steps") as raised:
        F.mse_loss(model(inputs), targets).backward()
    assert str(raised.value).endswith(f"by rank, {steps}")
    with pytest.raises(unisum.Error, match="no further step"):
        model(inputs)


def interrupted_waits_for_hooks(rank, world, gloo):
    """Ctrl-C while a hook runs, which has the bucket."""
    frames = sys._current_frames
    main, may_end = threading.main_thread().ident, threading.Event()

    def hook(_state, bucket):
        # Once the main thread has nothing to do but to wait for this.
        while "result" not in {it.f_code.co_name for it, _ in traceback.walk_stack(frames()[main])}:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)
        may_end.wait()
        return default_hooks.allreduce_hook(None, bucket)

    model = DDP(network())
    model.register_comm_hook(None, hook)
    inputs, targets = batch(rank)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        F.mse_loss(model(inputs), targets).backward()
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(unisum.Error, match="no further step.*until KeyboardInterrupt"):
        model(inputs)
    may_end.set()
    # The calls that hooks make still meet.
    model.reducer._results[0].result()


SCENARIOS = [
    it for it in list(globals().values())
    if callable(it) and getattr(it, "__module__", "") == __name__ and it is not Raises
]
