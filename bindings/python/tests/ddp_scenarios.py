"""What `unisum.torch.DistributedDataParallel` does, held against PyTorch's over gloo in the same
processes. Each scenario takes rank, world and a group of gloo's, and raises if something is
wrong."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import unisum
import unisum.torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.utils.checkpoint import checkpoint
from unisum.torch import DistributedDataParallel as DDP


class Network(nn.Module):
    """Layers of which some may be left out, or used twice."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.never = nn.Linear(3, 3)

    def forward(self, inputs, middle=True, times=1):
        hidden = self.first(inputs).relu()
        for _ in range(times if middle else 0):
            hidden = self.middle(hidden).relu()
        return self.last(hidden)


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(rank, number=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + 17 * number + rank)
    make = lambda width: torch.randn(8, width, generator=generator).to(dtype)  # noqa: E731
    return make(16), make(4)


def gradients(model):
    return [None if it.grad is None else it.grad.detach().clone() for it in model.parameters()]


def same(ours, theirs, world, places=""):
    """Bit for bit with two ranks, where there is one order of sums."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs):
        assert (own is None) == (other is None), places
        if own is None:
            continue
        assert own.dtype == other.dtype and own.shape == other.shape
        if world == 2:
            assert torch.equal(own, other), (places, (own - other).abs().max())
        else:
            tight = own.dtype in (torch.float32, torch.float64, torch.complex64)
            assert torch.allclose(own, other, *((1e-4, 1e-6) if tight else (0.02, 0.01))), places


def both(make, gloo, ours=None, **options):
    theirs = TorchDDP(make(), process_group=gloo, **options)
    return DDP(make(), **options, **(ours or {})), theirs


def trained_alike(pair, rank, world, steps=4, step=None, zero=True, dtype=torch.float32, rate=0.05):
    """Trains both; gradients and weights have to be the same after each step."""
    step = step or (lambda model, inputs, number: model(inputs))
    optimizers = [torch.optim.SGD(it.parameters(), lr=rate) for it in pair]
    for number in range(steps):
        inputs, targets = batch(rank, number, dtype)
        for model, optimizer in zip(pair, optimizers):
            if zero:
                optimizer.zero_grad()
            F.mse_loss(step(model, inputs, number).float(), targets.float()).backward()
        same(gradients(pair[0]), gradients(pair[1]), world, f"step {number}")
        for optimizer in optimizers:
            optimizer.step()


def gradients_are_those_of_pytorch(rank, world, gloo):
    trained_alike(both(network, gloo), rank, world)
    trained_alike(both(network, gloo, bucket_cap_mb=0.001), rank, world)
    trained_alike(both(network, gloo), rank, world, zero=False)


def models_in_16_bits(rank, world, gloo):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pair = both(lambda: network().to(dtype), gloo)  # noqa: B023
        if world == 2 or dtype == torch.float64:
            trained_alike(pair, rank, world, steps=2, dtype=dtype)
        else:
            # gloo rounds after each of its sums.
            F.mse_loss(pair[0](batch(rank, 0, dtype)[0]).float(), torch.zeros(8, 4)).backward()
            assert all(it.grad.dtype == dtype for it in pair[0].parameters())


def gradients_are_views_of_buckets(rank, world, gloo):
    model = DDP(network())
    addresses = []
    for number in range(4):
        inputs, targets = batch(rank, number)
        model.zero_grad(set_to_none=number % 2 == 0)
        F.mse_loss(model(inputs), targets).backward()
        native = model.reducer.buckets._native
        places = [native._gradient(place).torch().data_ptr() for place in range(4)]
        addresses.append([it.grad.data_ptr() for it in model.parameters()])
        assert addresses[-1] == places, number
    # Laid out anew once.
    assert addresses[1] == addresses[2] == addresses[3]
    assert model.last_report.participants == world and not model.last_report.nonfinite


def layouts_of_weights_are_kept(rank, world, gloo):
    def convolution():
        torch.manual_seed(5)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 2))
        return layers.to(memory_format=torch.channels_last)

    pair = both(convolution, gloo)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(rank))
    for model in pair:
        model(images).square().sum().backward()
        assert model.module[0].weight.grad.stride() == model.module[0].weight.stride()
    same(gradients(pair[0]), gradients(pair[1]), world)


def complex_weights(rank, world, gloo):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 3, dtype=torch.complex64))

        def forward(self, inputs):
            return (inputs @ self.weight).abs()

    pair = both(Complex, gloo)
    for model in pair:
        model(torch.full((2, 5), rank + 1j)).sum().backward()
    same(gradients(pair[0]), gradients(pair[1]), world)


def sparse_gradients(rank, world, gloo):
    def words():
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))

    pair = both(words, gloo)
    for model in pair:
        model(torch.tensor([rank, 3, 3])).sum().backward()
    ours, theirs = (gradients(model) for model in pair)
    assert ours[0].is_sparse
    same([ours[0].to_dense(), *ours[1:]], [theirs[0].to_dense(), *theirs[1:]], world)


def accumulation(rank, world, gloo):
    for zero in (True, False):
        pair = both(network, gloo)
        for number in range(3):
            for model in pair:
                if zero:
                    model.zero_grad()
                with model.no_sync():
                    for part in range(2):
                        inputs, targets = batch(rank, 3 * number + part)
                        F.mse_loss(model(inputs), targets).backward()
                inputs, targets = batch(rank, 3 * number + 2)
                F.mse_loss(model(inputs), targets).backward()
            same(gradients(pair[0]), gradients(pair[1]), world, f"{zero} {number}")


def unused_parameters(rank, world, gloo):
    pair = both(Network, gloo, find_unused_parameters=True)
    # The middle is used by nobody, by some, by all.
    uses = [False, rank == 0, True, rank == 1, False, True]
    trained_alike(
        pair, rank, world, 6, lambda model, inputs, number: model(inputs, middle=uses[number])
    )
    assert pair[0].module.never.weight.grad is None
    # Used in a step that is accumulated, and not in the next.
    for model in pair:
        model.zero_grad()
        inputs, targets = batch(rank)
        with model.no_sync():
            F.mse_loss(model(inputs), targets).backward()
        F.mse_loss(model(inputs, middle=False), targets).backward()
    same(gradients(pair[0]), gradients(pair[1]), world)


def missing_gradients_are_named(rank, world, gloo):
    class Whole(Network):
        def __init__(self):
            super().__init__()
            del self.never

    model = DDP(Whole())
    inputs, targets = batch(rank)
    for number in range(2):
        try:
            F.mse_loss(model(inputs, middle=rank != 1), targets).backward()
            # Rank 1 goes on, and finds out with its next pass.
            model(inputs)
            raise AssertionError("the step went well")
        except unisum.Error as error:
            assert error.kind == "step_failed" and error.ranks == (1,), error.ranks
            assert "Expected to have finished reduction" in str(error)
            assert "middle.weight, middle.bias" in str(error)
    F.mse_loss(model(inputs), targets).backward()
    theirs = TorchDDP(Whole(), process_group=gloo)
    F.mse_loss(theirs(inputs), targets).backward()
    # What failed stays where it was, as after any backward pass that raises.
    model.zero_grad()
    F.mse_loss(model(inputs), targets).backward()
    same(gradients(model), gradients(theirs), world)


def static_graph(rank, world, gloo):
    pair = both(Network, gloo, static_graph=True)
    trained_alike(pair, rank, world, 4, lambda model, inputs, _: model(inputs, times=2))
    assert pair[0].module.never.weight.grad is None


def checkpointed_layers(rank, world, gloo):
    class Checkpointed(nn.Module):
        def __init__(self, is_reentrant):
            super().__init__()
            torch.manual_seed(3)
            self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
            self.is_reentrant = is_reentrant

        def forward(self, inputs, times=1):
            inputs = inputs.clone().requires_grad_()
            for _ in range(times):
                inputs = checkpoint(self.layer, inputs, use_reentrant=self.is_reentrant)
            return self.last(inputs)

    for is_reentrant in (True, False):
        make = lambda: Checkpointed(is_reentrant)  # noqa: B023, E731
        trained_alike(both(make, gloo), rank, world)
        # Several passes through one layer, each of which runs its hook.
        pair = both(make, gloo, static_graph=True)
        trained_alike(pair, rank, world, 4, lambda model, inputs, _: model(inputs, times=2))


def tied_weights(rank, world, gloo):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.into, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.out.weight = self.into.weight
            self.last = nn.Linear(16, 4)

        def forward(self, inputs):
            return self.last(self.out(self.into(inputs).relu()))

    trained_alike(both(Tied, gloo), rank, world)


def buffers(rank, world, gloo):
    def normalised():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    pair = both(normalised, gloo)
    trained_alike(pair, rank, world)
    for model in pair:
        model(batch(rank)[0])
    own, other = (list(model.buffers()) for model in pair)
    same([it.float() for it in own], [it.float() for it in other], world)
    apart = DDP(normalised(), broadcast_buffers=False)
    for _ in range(2):
        apart(batch(rank)[0])
    means = [torch.zeros(8) for _ in range(world)]
    dist.all_gather(means, apart.module[1].running_mean)
    assert not torch.equal(means[0], means[1])


def models_begin_alike(rank, world, gloo):
    model = DDP(network(seed=rank))
    for own, first in zip(model.parameters(), network(seed=0).parameters()):
        assert torch.equal(own, first)
    # Told on all ranks before anything is sent.
    with pytest.raises(unisum.MismatchError, match=r"`weight` \(f32 \[5, 3\]\) on rank 1"):
        DDP(nn.Linear(3, 4 + (rank == 1)))


def uneven_inputs(rank, world, gloo):
    for divides_by_all in (True, False):
        pair = both(network, gloo)
        optimizers = [torch.optim.SGD(it.parameters(), lr=0.05) for it in pair]
        for model, optimizer in zip(pair, optimizers):
            with model.join(divide_by_initial_world_size=divides_by_all):
                for number in range(2 + 2 * rank):
                    inputs, targets = batch(rank, number)
                    optimizer.zero_grad()
                    F.mse_loss(model(inputs), targets).backward()
                    optimizer.step()
        own, other = ([it.detach() for it in model.parameters()] for model in pair)
        for ours, theirs in zip(own, other):
            assert torch.allclose(ours, theirs, 1e-5, 1e-6)
    # After it, all goes on as before.
    trained_alike(both(network, gloo), rank, world)


def a_rank_that_raises(rank, world, gloo):
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("this layer can't")

    inner = network()
    handle = inner[0].register_forward_hook(lambda _m, _i, out: Raises.apply(out))
    model = DDP(inner)
    inputs, targets = batch(rank)
    for culprit in (1, 0):
        raises = rank == culprit
        if not raises:
            handle.remove()
        try:
            F.mse_loss(model(inputs), targets).backward()
            raise AssertionError("the step went well")
        except ArithmeticError:
            assert raises
        except unisum.Error as error:
            assert not raises and error.kind == "step_failed" and error.ranks == (culprit,)
            assert "backward pass raised" in str(error)
        handle.remove()
        handle = inner[0].register_forward_hook(lambda _m, _i, out: Raises.apply(out))
    handle.remove()
    pair = model, TorchDDP(network(), process_group=gloo)
    model.zero_grad()
    trained_alike(pair, rank, world)


def several_models(rank, world, gloo):
    first, second = both(network, gloo), both(lambda: network(4), gloo)
    inputs, targets = batch(rank)
    for _ in range(3):
        for one, other in zip(first, second):
            F.mse_loss(one(inputs) + other(inputs), targets).backward()
        same(gradients(first[0]), gradients(first[1]), world)
        same(gradients(second[0]), gradients(second[1]), world)
    del first, one
    trained_alike(both(network, gloo), rank, world)


def passes_of_all_kinds(rank, world, gloo):
    pair = both(network, gloo)
    inputs, targets = batch(rank)
    for model in pair:
        # No backward pass follows; two outputs in one; none is to be recorded.
        model(inputs)
        F.mse_loss(model(inputs) + model(2 * inputs), targets).backward()
        with torch.no_grad():
            model(inputs)
        model.eval()
        model(inputs)
        model.train()
        # One pass forward, two backward: the second adds on this rank only.
        loss = F.mse_loss(model(inputs), targets)
        loss.backward(retain_graph=True)
        loss.backward()
    same(gradients(pair[0]), gradients(pair[1]), world)

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = network(1), network(2)

        def forward(self, inputs):
            return {"one": self.one(inputs), "others": [self.other(inputs)]}

    pair = both(Twins, gloo)
    for model in pair:
        for _ in range(2):
            outputs = model(inputs)
            outputs["one"].sum().backward()
            outputs["others"][0].sum().backward()
    same(gradients(pair[0]), gradients(pair[1]), world)


def wires(rank, world, gloo):
    exact = TorchDDP(network(), process_group=gloo)
    inputs, targets = batch(rank)
    F.mse_loss(exact(inputs), targets).backward()
    # How far off, relative to the largest gradient of the bucket.
    largest = max(it.abs().max() for it in gradients(exact))
    bounds = {"bf16": 0.01, "f16": 0.002, "f8e4m3": 0.1, "f8e5m2": 0.2, "int8": 0.02}
    for wire, bound in bounds.items():
        model = DDP(network(), wire=wire)
        F.mse_loss(model(inputs), targets).backward()
        for own, other in zip(gradients(model), gradients(exact)):
            assert (own - other).abs().max() <= bound * largest, wire
        assert any((own != other).any() for own, other in zip(gradients(model), gradients(exact)))
    with pytest.raises(ValueError, match="can't travel as"):
        DDP(network(), wire="int3")


def what_a_wire_keeps_is_saved(rank, world, gloo):
    for options in (
        {"wire": "int8"},
        {"wire": "powersgd:2", "powersgd_start": 1, "powersgd_at_least": 1.0},
    ):
        model = DDP(network(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(model, optimizer, number):
            inputs, targets = batch(rank, number)
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()

        for number in range(4):
            step(model, optimizer, number)
        saved = pickle.loads(pickle.dumps((model.state_dict(), model.wire_state_dict())))
        assert saved[1]["kept"].numel() > 100
        again = DDP(network(), **options)
        again.load_state_dict(saved[0])
        again.load_wire_state_dict(saved[1])
        forgetful = DDP(network(), **options)
        forgetful.load_state_dict(saved[0])
        others = [(it, torch.optim.SGD(it.parameters(), lr=0.05)) for it in (again, forgetful)]
        for pair in [(model, optimizer), *others]:
            step(*pair, 4)
        if options["wire"] == "int8":
            same(gradients(again), gradients(model), 2)
        assert any((a != b).any() for a, b in zip(gradients(forgetful), gradients(model)))
        model.rescale(2.0)
        with pytest.raises(ValueError, match="of wire"):
            DDP(network(), wire="bf16").load_wire_state_dict(saved[1])


def hooks_for_pytorch(rank, world, gloo):
    hooks = unisum.torch.hooks
    exact = TorchDDP(network(), process_group=gloo)
    inputs, targets = batch(rank)
    F.mse_loss(exact(inputs), targets).backward()
    largest = max(it.abs().max() for it in gradients(exact))
    exactly = hooks.PowerSGDState(None, 2, start_powerSGD_iter=9)
    cases = [
        (hooks.allreduce_hook, None, 0 if world == 2 else 1e-6),
        (hooks.bf16_compress_hook, None, 0.02),
        (hooks.fp16_compress_hook, None, 0.002),
        (hooks.fp8_compress_hook, hooks.WireState("f8e4m3"), 0.1),
        (hooks.int8_compress_hook, hooks.WireState("int8"), 0.02),
        (hooks.powerSGD_hook, exactly, 0 if world == 2 else 1e-6),
    ]
    for hook, state, bound in cases:
        model = TorchDDP(network(), bucket_cap_mb=0.001)
        model.register_comm_hook(state, hook)
        for _ in range(3):
            model.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            for own, other in zip(gradients(model), gradients(exact)):
                assert (own - other).abs().max() <= bound * largest, hook.__name__
    # What is kept.
    state = hooks.PowerSGDState(None, 2, start_powerSGD_iter=0, min_compression_rate=1)
    model = TorchDDP(network())
    model.register_comm_hook(state, hooks.powerSGD_hook)
    for number in range(3):
        model.zero_grad()
        inputs, targets = batch(rank, number)
        F.mse_loss(model(inputs), targets).backward()
    saved = pickle.loads(pickle.dumps(state.state_dict()))
    again = hooks.PowerSGDState(None, 2, start_powerSGD_iter=0, min_compression_rate=1)
    again.load_state_dict(saved)
    assert again._saved and all(len(it) > 100 for it in again._saved.values())
    with pytest.raises(ValueError, match="state of this hook"):
        hooks.int8_compress_hook(None, None)
    with pytest.raises(ValueError, match="process group of unisum"):
        hooks.allreduce_hook(gloo, None)


def states_are_those_of_pytorch(rank, world, gloo):
    ours, theirs = both(network, gloo)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(name.startswith("module.") for name in ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, TorchDDP)
    again = pickle.loads(pickle.dumps(ours))
    trained_alike((again, theirs), rank, world)
    assert copy.deepcopy(ours.module).state_dict().keys() == ours.module.state_dict().keys()
    assert ours._get_ddp_logging_data()["world_size"] == world


def groups(rank, world, gloo):
    with pytest.raises(ValueError, match="process group of unisum"):
        DDP(network(), process_group=gloo)
    pair = dist.new_group([0, 1])
    other = dist.new_group([0, 1], backend="gloo")
    if rank < 2:
        ours = DDP(network(), process_group=pair)
        trained_alike((ours, TorchDDP(network(), process_group=other)), rank, 2)
    dist.barrier()


def loss_scaling(rank, world, gloo):
    model = DDP(network())
    scaler = unisum.LossScaler(4.0)
    inputs, targets = batch(rank)
    loss = F.mse_loss(model(inputs), targets)
    (loss * (float("inf") if rank == 1 else scaler.scale)).backward()
    assert model.last_report.nonfinite and not scaler.update(model.last_report.nonfinite)
    assert scaler.scale == 2.0
    model.zero_grad()
    (F.mse_loss(model(inputs), targets) * scaler.scale).backward()
    assert scaler.update(model.last_report.nonfinite)


SCENARIOS = [
    it for name, it in list(globals().items())
    if callable(it) and getattr(it, "__module__", "") == __name__
    and name not in ("Network", "network", "batch", "gradients", "same", "both", "trained_alike")
]
