"""What `unisum.torch.DistributedDataParallel` does when steps fail on some ranks. Scenarios as in
ddp_scenarios."""

import pytest
import torch
import torch.nn.functional as F
import unisum
from ddp_scenarios import batch, both, network, trained_alike
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


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


SCENARIOS = [
    it for it in list(globals().values())
    if callable(it) and getattr(it, "__module__", "") == __name__ and it is not Raises
]
