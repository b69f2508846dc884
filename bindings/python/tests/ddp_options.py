"""What `unisum.torch.DistributedDataParallel` does with communication hooks, with `mixed_precision`
and with optimizers that run in the backward pass. Scenarios as in ddp_scenarios."""

import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import unisum
import unisum.torch
from ddp_scenarios import Network, batch, both, gradients, network, same, trained_alike
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint
from unisum.torch import DistributedDataParallel as DDP


def hooked(make, gloo, ours=default_hooks.allreduce_hook, state=None, **options):
    """Both kinds of DDP: ours with a hook, PyTorch's with the same over gloo."""
    pair = both(make, gloo, **options)
    pair[0].register_comm_hook(state, ours)
    pair[1].register_comm_hook(gloo, default_hooks.allreduce_hook)
    return pair


def hooks_of_pytorch(rank, world, gloo):
    for options in ({}, {"bucket_cap_mb": 0.001}, {"gradient_as_bucket_view": True}):
        trained_alike(hooked(network, gloo, **options), rank, world)
    trained_alike(hooked(network, gloo), rank, world, zero=False)
    builtin = both(network, gloo)
    builtin[0]._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    trained_alike(builtin, rank, world)
    # After steps without a hook.
    late = both(network, gloo)
    trained_alike(late, rank, world, steps=2)
    late[0].register_comm_hook(None, default_hooks.allreduce_hook)
    trained_alike(late, rank, world)


def hooks_that_compress(rank, world, gloo):
    exact = TorchDDP(network(), process_group=gloo)
    inputs, targets = batch(rank)
    F.mse_loss(exact(inputs), targets).backward()
    largest = max(it.abs().max() for it in gradients(exact))
    power = powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2, min_compression_rate=1)
    cases = [
        (default_hooks.fp16_compress_hook, None, 0.002),
        (default_hooks.bf16_compress_hook, None, 0.02),
        (powerSGD_hook.powerSGD_hook, power, 0.5),
        (unisum.torch.hooks.allreduce_hook, None, 1e-6),
        (unisum.torch.hooks.int8_compress_hook, unisum.torch.hooks.WireState("int8"), 0.02),
    ]
    for hook, state, bound in cases:
        model = DDP(network(), bucket_cap_mb=0.001)
        model.register_comm_hook(state, hook)
        for _ in range(4):
            model.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
        for own, other in zip(gradients(model), gradients(exact)):
            assert (own - other).abs().max() <= bound * largest, hook.__name__
        if state is power:
            # It has compressed.
            off = (model.module[0].weight.grad - exact.module[0].weight.grad).abs().max()
            assert off > 0.01 * largest
        everyone = [torch.empty(16, 32).t().contiguous() for _ in range(world)]
        dist.all_gather(everyone, model.module[0].weight.grad)
        assert all(torch.equal(it, everyone[0]) for it in everyone), hook.__name__


def hooks_that_step_an_optimizer(rank, world, gloo):
    ours, theirs = both(network, gloo, bucket_cap_mb=0.001)
    zero = ZeroRedundancyOptimizer(
        ours.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.05
    )
    hook = hook_with_zero_step(default_hooks.allreduce_hook, ours, zero)
    ours.register_comm_hook(None, hook)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.05)
    for number in range(5):
        inputs, targets = batch(rank, number)
        for model in (ours, theirs):
            model.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
        # The hook only looks at the buckets in the second step, and lets the first one pass.
        if number > 1:
            adam.step()
        for own, other in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(own, other, 1e-3, 1e-4), number


def what_a_hook_is_given(rank, world, gloo):
    seen = []

    def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        views = bucket.gradients()
        assert torch.equal(torch.cat([it.flatten() for it in views]), bucket.buffer())
        assert [it.shape for it in views] == [it.shape for it in bucket.parameters()]
        state.append((bucket.index(), bucket.is_last(), bucket.buffer().data_ptr()))
        future = torch.futures.Future()
        # Another tensor than the bucket's.
        future.set_result(bucket.buffer() * 0 + 7)
        return future

    model = DDP(network(), bucket_cap_mb=0.001)
    model.register_comm_hook(seen, hook)
    inputs, targets = batch(rank)
    F.mse_loss(model(inputs), targets).backward()
    assert [it[0] for it in seen] == list(range(len(seen))) and len(seen) > 1
    assert [it[1] for it in seen] == [False] * (len(seen) - 1) + [True]
    assert all((it == 7).all() for it in gradients(model))
    # They are views of what the hook was given.
    inside = {it.grad.data_ptr() for it in model.parameters()}
    assert {it[2] for it in seen} <= inside


def hooks_and_unused_parameters(rank, world, gloo):
    uses = [False, rank == 0, True, rank == 1, False, True]
    run = lambda model, inputs, number: model(inputs, middle=uses[number])  # noqa: E731
    pair = hooked(Network, gloo, find_unused_parameters=True)
    trained_alike(pair, rank, world, 6, run)
    assert pair[0].module.never.weight.grad is None
    pair = hooked(Network, gloo, static_graph=True)
    trained_alike(pair, rank, world, 4, lambda model, inputs, _: model(inputs, times=2))
    # Accumulation, and what was used in an accumulated pass only.
    pair = hooked(Network, gloo, find_unused_parameters=True)
    for model in pair:
        inputs, targets = batch(rank)
        with model.no_sync():
            F.mse_loss(model(inputs), targets).backward()
        F.mse_loss(model(inputs, middle=False), targets).backward()
    same(gradients(pair[0]), gradients(pair[1]), world)
    # What nobody uses stays what it was.
    model = pair[0]
    kept = model.module.middle.weight.grad.clone()
    F.mse_loss(model(inputs, middle=False), targets).backward()
    assert torch.equal(model.module.middle.weight.grad, kept)


def hooks_and_uneven_inputs(rank, world, gloo):
    pair = hooked(network, gloo)
    optimizers = [torch.optim.SGD(it.parameters(), lr=0.05) for it in pair]
    for model, optimizer in zip(pair, optimizers):
        with model.join():
            for number in range(2 + rank):
                inputs, targets = batch(rank, number)
                optimizer.zero_grad()
                F.mse_loss(model(inputs), targets).backward()
                optimizer.step()
    own, other = ([it.detach() for it in model.parameters()] for model in pair)
    for ours, theirs in zip(own, other):
        assert torch.allclose(ours, theirs, 1e-5, 1e-6)


def hooks_and_ranks_that_raise(rank, world, gloo):
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("this layer can't")

    pair = hooked(network, gloo, bucket_cap_mb=0.001)
    model = pair[0]
    inputs, targets = batch(rank)
    handle = model.module[0].register_forward_hook(lambda _m, _i, out: Raises.apply(out))
    if rank != 1:
        handle.remove()
    with pytest.raises(ArithmeticError if rank == 1 else unisum.Error) as raised:
        F.mse_loss(model(inputs), targets).backward()
    if rank != 1:
        assert raised.value.kind == "step_failed" and raised.value.ranks == (1,)
    handle.remove()
    model.zero_grad()
    trained_alike(pair, rank, world)


def hooks_of_several_models(rank, world, gloo):
    """In one backward pass: their calls are made in one order, one after the other."""
    group, threads, order = dist.group.WORLD, [], []

    def hook(state, bucket):
        threads.append(threading.get_ident())
        order.append(10 * state + bucket.index())
        return default_hooks.allreduce_hook(group, bucket)

    def observed(*arguments):
        threads.append(threading.get_ident())
        return type(group).allreduce(group, *arguments)

    make = [functools.partial(network, seed) for seed in range(3)]
    pairs = [both(it, gloo, bucket_cap_mb=0.001) for it in make]
    for state, (ours, _theirs) in enumerate(pairs):
        ours.register_comm_hook(state, hook)
    inputs, targets = batch(rank)
    for number in range(3):
        for models in zip(*pairs):
            group.allreduce = observed
            sum(F.mse_loss(it(inputs), targets) for it in models).backward()
            del group.allreduce
        for ours, theirs in pairs:
            same(gradients(ours), gradients(theirs), world, number)
    assert len(order) > 9 and len(threads) > len(order)
    assert len(set(threads)) == 1 and threads[0] != threading.get_ident()
    everyone = [None] * world
    dist.all_gather_object(everyone, order)
    assert all(it == order for it in everyone)


def hooks_that_are_refused(rank, world, gloo):
    hook = default_hooks.allreduce_hook
    model = DDP(network())
    model.register_comm_hook(None, hook)
    with pytest.raises(RuntimeError, match="once only"):
        model.register_comm_hook(None, hook)
    with pytest.raises(ValueError, match="travel as 'int8' already"):
        DDP(network(), wire="int8").register_comm_hook(None, hook)
    with pytest.raises(TypeError, match="callable"):
        DDP(network()).register_comm_hook(None, 3)

    def annotated(state, bucket: int):
        pass

    with pytest.raises(ValueError, match="bucket annotation"):
        DDP(network()).register_comm_hook(None, annotated)

    def too_short(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer()[1:])
        return future

    wrong = DDP(network())
    wrong.register_comm_hook(None, too_short)
    inputs, targets = batch(rank)
    with pytest.raises(ValueError, match="of the bucket's 676 elements, not 675"):
        F.mse_loss(wrong(inputs), targets).backward()


def copies_of_hooked_models(rank, world, gloo):
    pair = hooked(network, gloo)
    again = pickle.loads(pickle.dumps(pair[0]))
    assert again._comm_hooks == pair[0]._comm_hooks
    trained_alike((again, pair[1]), rank, world)
    # States that are not plain data: the group, and what wires keep.
    builtin = DDP(network())
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    wired = DDP(network())
    state = unisum.torch.hooks.WireState("int8", dist.group.WORLD)
    wired.register_comm_hook(state, unisum.torch.hooks.int8_compress_hook)
    inputs, targets = batch(rank)
    for model in (builtin, wired):
        for _ in range(2):
            F.mse_loss(model(inputs), targets).backward()
        copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        for it in (model, *copies):
            it.zero_grad()
            F.mse_loss(it(inputs), targets).backward()
        for it in copies:
            assert it.reducer is not model.reducer
            same(gradients(it), gradients(model), 2)
    kept = [it._comm_hooks[0][1]._buckets for it in (wired, *copies)]
    assert all(list(it) == list(kept[0]) for it in kept)
    with pytest.raises(RuntimeError, match="default group only"):
        pickle.dumps(unisum.torch.hooks.WireState("int8", gloo))


def optimizers_in_the_backward_pass(rank, world, gloo):
    for hook in (None, default_hooks.allreduce_hook):
        ours = network()
        _apply_optimizer_in_backward(torch.optim.SGD, ours.parameters(), {"lr": 0.05})
        ours = DDP(ours)
        if hook is not None:
            ours.register_comm_hook(None, hook)
        theirs = TorchDDP(network(), process_group=gloo)
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
        for number in range(3):
            inputs, targets = batch(rank, number)
            optimizer.zero_grad()
            for model in (ours, theirs):
                F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            assert all(it.grad is None for it in ours.parameters())
        own, other = ([it.detach() for it in model.parameters()] for model in (ours, theirs))
        same(own, other, world)
    fused = DDP(network())
    fused._register_fused_optim(torch.optim.SGD, 0.05)
    inputs, targets = batch(rank)
    F.mse_loss(fused(inputs), targets).backward()
    assert not torch.equal(fused.module[0].weight, network()[0].weight)
    with pytest.raises(RuntimeError, match="fused optimizer can't be copied"):
        pickle.dumps(fused)


class Checkpointed(nn.Module):
    """Has layers computed again in the backward pass, and a weight that two layers share."""

    def __init__(self, is_reentrant=None):
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.out.weight = self.into.weight
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.is_reentrant = is_reentrant
        self.seen = []

    def forward(self, inputs):
        self.seen.append((inputs.dtype, self.last.weight.dtype))
        hidden = self.out(self.into(inputs).relu())
        if self.is_reentrant is None:
            hidden = self.last(self.norm(hidden))
        else:
            hidden = self.norm(hidden)
            # Not a module's own call.
            run = lambda it: F.linear(it, self.last.weight, self.last.bias)  # noqa: E731
            hidden = checkpoint(run, hidden, use_reentrant=self.is_reentrant)
        return hidden


def averages_computed_in(dtype, inputs, targets):
    """The gradients, averaged in float32, of a module whose weights are cast by hand."""
    module = Checkpointed()
    casts = {name: it.to(dtype) for name, it in module.named_parameters() if "norm" not in name}
    output = torch.func.functional_call(module, casts, (inputs.to(dtype),))
    F.mse_loss(output.float(), targets).backward()
    averages = gradients(module)
    for it in averages:
        dist.all_reduce(it, dist.ReduceOp.AVG)
    return averages


def mixed_precision(rank, world, gloo):
    inputs, targets = batch(rank)
    half = torch.bfloat16
    expected = {it: averages_computed_in(it, inputs, targets) for it in (half, torch.float16)}
    for is_reentrant in (None, True, False):
        for given, travels in (
            (half, "bf16"),
            (torch.float16, "f16"),
            (_MixedPrecision(half, torch.float32), None),
            (_MixedPrecision(half), "bf16"),
            (MixedPrecisionPolicy(half, torch.float32, torch.float32), None),
        ):
            module = Checkpointed(is_reentrant)
            model = DDP(module, mixed_precision=given)
            assert model._wire["wire"] == travels
            dtype = given if isinstance(given, torch.dtype) else given.param_dtype
            averages = expected[dtype]
            # What rounding on the wire may take of the largest gradient.
            bound = (0 if travels is None else 0.01) * max(it.abs().max() for it in averages)
            for _ in range(2):
                model.zero_grad()
                output = model(inputs)
                F.mse_loss(output.float(), targets).backward()
                own = gradients(model)
                assert all(it.dtype == torch.float32 for it in own)
                for ours, theirs in zip(own, averages):
                    assert (ours - theirs).abs().max() <= bound + 1e-6, given
            assert output.dtype == (getattr(given, "output_dtype", None) or dtype)
            assert module.seen[0] == (dtype, dtype)
            # Outside of the passes the module has its parameters, in full.
            assert all(isinstance(it, nn.Parameter) for it in module.parameters())
            assert module.out.weight is module.into.weight
            assert all(it.dtype == torch.float32 for it in model.state_dict().values()
                       if it.is_floating_point())


def mixed_precision_trains(rank, world, gloo):
    model = DDP(network(), mixed_precision=torch.bfloat16)
    exact = TorchDDP(network(), process_group=gloo)
    losses = []
    for it in (model, exact):
        optimizer = torch.optim.Adam(it.parameters(), lr=0.01)
        for _ in range(20):
            inputs, targets = batch(rank)
            optimizer.zero_grad()
            with it.no_sync():
                F.mse_loss(it(inputs).float(), targets).backward()
            loss = F.mse_loss(it(inputs).float(), targets)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 0.05 * losses[1]
    everyone = [torch.empty(32, 16) for _ in range(world)]
    dist.all_gather(everyone, model.module[0].weight.detach())
    assert all(torch.equal(it, everyone[0]) for it in everyone)
    again = pickle.loads(pickle.dumps(model))
    assert again(inputs).dtype == torch.bfloat16
    assert copy.deepcopy(model.module)(inputs).dtype == torch.float32
    with torch.no_grad():
        assert model(inputs).dtype == torch.bfloat16


def mixed_precision_and_the_rest(rank, world, gloo):
    inputs, targets = batch(rank)
    # With a hook, which has the gradients in full.
    model = DDP(network(), mixed_precision=_MixedPrecision(torch.bfloat16, torch.float32))
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    F.mse_loss(model(inputs).float(), targets).backward()
    assert model.module[0].weight.grad.dtype == torch.float32
    # With a wire of its own.
    assert DDP(network(), mixed_precision=torch.bfloat16, wire="int8")._wire["wire"] == "int8"
    # Layers that keep lists of their parameters.
    lstm = DDP(nn.LSTM(4, 4), mixed_precision=torch.bfloat16)
    lstm(torch.randn(2, 3, 4))[0].float().sum().backward()
    assert lstm.module.weight_ih_l0.grad.dtype == torch.float32
    # A pass that raises leaves the module as it was.
    broken = DDP(nn.Bilinear(2, 3, 4), mixed_precision=torch.bfloat16)
    with pytest.raises(TypeError):
        broken(torch.ones(2, 2))
    assert isinstance(broken.module.weight, nn.Parameter)
    # Buffers are cast for good, as PyTorch's DDP does.
    said = _MixedPrecision(torch.bfloat16, buffer_dtype=torch.bfloat16)
    normed = DDP(nn.BatchNorm1d(16), mixed_precision=said)
    assert normed.module.running_mean.dtype == torch.bfloat16
    assert normed.module.num_batches_tracked.dtype == torch.int64
    # What is not reduced may be of any type.
    frozen, marked = network(), network()
    frozen[0].bfloat16().requires_grad_(False)
    DDP._set_params_and_buffers_to_ignore_for_model(marked.bfloat16(), ["0.weight", "0.bias"])
    marked[2].float()
    for module in (frozen, marked):
        DDP(module, mixed_precision=_MixedPrecision(torch.bfloat16, torch.float32))
    with pytest.raises(TypeError, match="not MixedPrecision"):
        DDP(network(), mixed_precision=MixedPrecision())
    with pytest.raises(ValueError, match="not torch.int8"):
        DDP(network(), mixed_precision=torch.int8)
    with pytest.raises(ValueError, match="can't be reduced in torch.float32"):
        said = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        DDP(network().bfloat16(), mixed_precision=said)
    with pytest.raises(ValueError, match="both as 'int8'"):
        said = MixedPrecisionPolicy(torch.float32, torch.bfloat16)
        DDP(network(), mixed_precision=said, wire="int8")


SCENARIOS = [
    it for name, it in list(globals().items())
    if callable(it) and getattr(it, "__module__", "") == __name__
    and name not in ("Checkpointed", "averages_computed_in", "hooked")
]
