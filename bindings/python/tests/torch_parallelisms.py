"""Ways to divide a model or its data that PyTorch has, over the backend that is being tested, each
compared with the same model in a single process. Scenarios take rank and world; over gloo the same
ones pass."""

import copy
import os
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

WIDTH = 16
CPU = torch.device("cpu")


def close(own, other):
    return torch.allclose(own, other, 1e-4, 1e-5)


def data(count, *shape):
    """The same on all ranks."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


# Pipelines.


def layers(count):
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]


def pipeline(rank, world, schedule, stages_each=1):
    """Two steps of a pipeline whose stages lie on the ranks in turn: losses and gradients."""
    count, parts = world * stages_each, 2 * world
    inputs, targets = data(2, 4 * parts, WIDTH)
    whole = nn.Sequential(*layers(count))
    own = {at: copy.deepcopy(whole[at]) for at in range(rank, count, world)}
    stages = [PipelineStage(it, at, count, CPU) for at, it in own.items()]
    given = stages if stages_each > 1 else stages[0]
    runs = schedule(given, n_microbatches=parts, loss_fn=F.mse_loss)
    for _ in range(2):
        losses = []
        # The schedule scales what is in them by the number of microbatches.
        for it in [*own.values(), whole]:
            it.zero_grad()
        arguments = (inputs,) if rank == 0 else ()
        if rank == world - 1:
            output = runs.step(*arguments, target=targets, losses=losses)
            assert close(output, whole(inputs))
            expected = F.mse_loss(whole(inputs), targets)
            assert close(torch.stack(losses).mean(), expected)
        else:
            runs.step(*arguments)
        F.mse_loss(whole(inputs), targets).backward()
        for at, it in own.items():
            for gradient, other in zip(it.parameters(), whole[at].parameters()):
                assert close(gradient.grad, other.grad), at


def pipeline_gpipe(rank, world):
    pipeline(rank, world, ScheduleGPipe)


def pipeline_1f1b(rank, world):
    pipeline(rank, world, Schedule1F1B)


def pipeline_interleaved(rank, world):
    pipeline(rank, world, ScheduleInterleaved1F1B, stages_each=2)


# Sequences.


def ring_attention(rank, world):
    """Keys and values go round, and what each part of them adds is merged."""
    query, key, value = data(3, 2, 4, 8 * world, WIDTH)
    expected = F.scaled_dot_product_attention(query, key, value).chunk(world, 2)[rank]
    own = query.chunk(world, 2)[rank]
    key, value = key.chunk(world, 2)[rank], value.chunk(world, 2)[rank]
    following = [(it + 1) % world for it in range(world)]
    total, largest, result = 0.0, torch.full((2, 4, 8, 1), float("-inf")), 0.0
    for turn in range(world):
        scores = own @ key.transpose(-1, -2) / WIDTH**0.5
        top = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, kept = (scores - top).exp(), (largest - top).exp()
        total, largest = total * kept + weights.sum(-1, keepdim=True), top
        result = result * kept + weights @ value
        if turn + 1 < world:
            both = torch.stack([key, value])
            moved = funcol.permute_tensor(both.flatten(), following, dist.group.WORLD)
            key, value = moved.reshape(both.shape).unbind()
    assert close(result / total, expected)


def attention_by_all_to_all(rank, world):
    """Each rank has a part of the sequence outside of attention, and some heads in it (Ulysses)."""
    query, key, value = data(3, 2, 4, 8 * world, WIDTH)
    expected = F.scaled_dot_product_attention(query, key, value).chunk(world, 2)[rank]
    moved = []
    for whole in (query, key, value):
        own = whole.chunk(world, 2)[rank]
        by_heads = torch.stack(own.chunk(world, 1)).contiguous()
        received = torch.empty_like(by_heads)
        dist.all_to_all_single(received, by_heads)
        moved.append(torch.cat(received.unbind(), 2))
    attended = F.scaled_dot_product_attention(*moved)
    by_sequence = torch.stack(attended.chunk(world, 2)).contiguous()
    received = torch.empty_like(by_sequence)
    dist.all_to_all_single(received, by_sequence)
    assert close(torch.cat(received.unbind(), 1), expected)


def context_parallel_of_pytorch(rank, world):
    """The forward pass only. In PyTorch 2.15 the backward pass fails on the CPU, over gloo as well:
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default does not have a
    sharding strategy registered". Its ring is for the operations of CUDA devices."""
    from torch.distributed.tensor.experimental import context_parallel as context
    from torch.distributed.tensor.experimental._context_parallel import _attention

    # Which is for causal masks.
    _attention._cp_options.enable_load_balance = False
    own = data(3, 2, 4, 8 * world, WIDTH)
    expected = F.scaled_dot_product_attention(*own).chunk(world, 2)[rank]
    with context(init_device_mesh("cpu", (world,)), buffers=own, buffer_seq_dims=[2] * 3):
        assert own[0].shape == (2, 4, 8, WIDTH)
        assert close(F.scaled_dot_product_attention(*own), expected)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, inputs):
        return self.down(torch.relu(self.up(self.norm(inputs))))


def same_gradients(model, whole):
    named = dict(whole.named_parameters())
    for name, it in model.named_parameters():
        gradient = it.grad.full_tensor() if isinstance(it.grad, DTensor) else it.grad
        assert close(gradient, named[name].grad), name


def sequence_parallel(rank, world):
    """The norm has a part of the sequence, the linear layers a part of their columns or rows."""
    mesh, whole = init_device_mesh("cpu", (world,)), Block()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    model = parallelize_module(copy.deepcopy(whole), mesh, plan)
    (inputs,) = data(1, 2, 4 * world, WIDTH)
    output = model(inputs.chunk(world, 1)[rank])
    assert output.shape == (2, 4, WIDTH) and close(output, whole(inputs).chunk(world, 1)[rank])
    # Each rank's part of the sum.
    (output**2).sum().backward()
    (whole(inputs) ** 2).sum().backward()
    same_gradients(model, whole)


# Meshes of two dimensions.


def fsdp_and_tensor_parallel(rank, world):
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    whole = Block()
    model = parallelize_module(
        copy.deepcopy(whole), mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    fully_shard(model, mesh=mesh["data"])
    (inputs,) = data(1, 4 * world, WIDTH)
    replicas = mesh["data"].size()
    own = inputs.chunk(replicas)[mesh["data"].get_local_rank()]
    optimizers = [torch.optim.Adam(it.parameters(), 0.01) for it in (model, whole)]
    for _ in range(3):
        loss, expected = (model(own) ** 2).mean(), (whole(inputs) ** 2).mean()
        told = loss.detach().clone()
        dist.all_reduce(told, dist.ReduceOp.AVG, group=mesh["data"].get_group())
        assert close(told, expected)
        loss.backward()
        expected.backward()
        same_gradients(model, whole)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def loss_over_sharded_classes(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    logits, _ = data(2, 6, 4 * world)
    targets = torch.arange(6) % (4 * world)
    alone = logits.clone().requires_grad_()
    F.cross_entropy(alone, targets).backward()
    sharded = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = F.cross_entropy(sharded, distribute_tensor(targets, mesh, [Replicate()]))
        loss.backward()
    assert close(loss.full_tensor(), F.cross_entropy(logits, targets))
    assert sharded.grad.placements == (Shard(1),) and close(sharded.grad.full_tensor(), alone.grad)


# Checkpoints.


def checkpoint_in_other_shards(rank, world):
    """What was saved by rows is loaded in other parts, on a mesh of two dimensions, and by one rank
    alone."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    path = os.path.join(folder[0], "checkpoint")
    whole = Block()
    model = copy.deepcopy(whole)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=path)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    other = nn.Module.to(Block(), torch.float32)
    for it in other.parameters():
        nn.init.zeros_(it)
    parallelize_module(other, mesh["tensor"], {"up": RowwiseParallel(), "down": ColwiseParallel()})
    fully_shard(other, mesh=mesh["data"])
    loaded = {"model": other.state_dict(), "step": 0}
    dcp.load(loaded, checkpoint_id=path)
    assert loaded["step"] == 3
    for name, it in whole.state_dict().items():
        found = loaded["model"][name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, it), name
    alone = {"model": {name: torch.zeros_like(it) for name, it in whole.state_dict().items()}}
    dcp.load(alone, checkpoint_id=path, no_dist=True)
    for name, it in whole.state_dict().items():
        assert torch.equal(alone["model"][name], it), name
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


# Compiled programs.


def compiled_collectives(rank, world):
    group = dist.group.WORLD

    def program(tensor):
        total = funcol.all_reduce(tensor * 2, "sum", group)
        gathered = funcol.all_gather_tensor(tensor, 0, group)
        part = funcol.reduce_scatter_tensor(gathered + 1, "avg", 0, group)
        moved = funcol.all_to_all_single(gathered, None, None, group)
        passed_on = funcol.permute_tensor(tensor.flatten(), ring, group)
        return total.sin(), part, moved.sum(), passed_on

    ring = [(it + 1) % world for it in range(world)]
    tensor = torch.arange(6.0).reshape(3, 2) + rank
    expected = program(tensor)
    assert close(expected[0], sum((torch.arange(6.0) + it) * 2 for it in range(world)).sin()
                 .reshape(3, 2))
    backends = ("aot_eager", "inductor") if world == 2 and shutil.which("g++") else ("aot_eager",)
    for backend in backends:
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        for _ in range(2):
            for own, other in zip(compiled(tensor), expected):
                assert close(own, other), backend
        torch._dynamo.reset()


SCENARIOS = [
    it for name, it in list(globals().items())
    if callable(it) and getattr(it, "__module__", "") == __name__
    and name not in ("close", "data", "layers", "pipeline", "same_gradients", "Block")
]
