"""What programs of PyTorch do, over the backend that is being tested. Each scenario takes rank and
world, and raises if something is wrong; what it returns has to be the same as over gloo."""

import datetime
import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(rank, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + rank)
    make = lambda width: torch.randn(8, width, generator=generator).to(dtype)  # noqa: E731
    return make(16), make(4)


def trained(model, rank, steps=3, parameters=None, dtype=torch.float32):
    """The sum of the parameters' absolute values after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs, targets = batch(rank, dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(inputs).float(), targets.float()).backward()
        optimizer.step()
    parameters = parameters or (lambda: model.parameters())
    return sum(it.detach().double().abs().sum().item() for it in parameters())


def reductions(rank, world):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8):
        tensor = torch.full((5,), rank + 1).to(dtype)
        dist.all_reduce(tensor)
        assert (tensor == world * (world + 1) // 2).all(), dtype
        tensor = torch.full((5,), 2 * rank + 1).to(dtype)
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        assert (tensor == world).all(), (dtype, tensor)
    block = torch.zeros(2)
    dist.reduce_scatter_tensor(block, torch.full((2 * world,), rank + 1.0), dist.ReduceOp.AVG)
    assert (block == (world + 1) / 2).all()
    parts = [torch.full((index + 1,), float(rank)) for index in range(world)]
    own = torch.zeros(rank + 1)
    dist.reduce_scatter(own, parts)
    assert (own == world * (world - 1) / 2).all()
    grid = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    dist.all_reduce(grid)
    assert (grid == world).all()
    flags = torch.tensor([rank == 0, False])
    dist.all_reduce(flags)
    assert flags.tolist() == [True, False]


def gatherings(rank, world):
    uneven = [torch.zeros(index + 1) for index in range(world)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    assert all((it == index).all() for index, it in enumerate(uneven))
    out = torch.zeros(world, 2)
    dist.all_gather_into_tensor(out, torch.full((1, 2), float(rank)))
    assert (out[:, 0] == torch.arange(world)).all()
    received = torch.zeros(world * (rank + 1))
    sent = torch.cat([torch.full((index + 1,), float(rank)) for index in range(world)])
    dist.all_to_all_single(
        received, sent, [rank + 1] * world, [index + 1 for index in range(world)]
    )
    assert (received == torch.arange(world).repeat_interleave(rank + 1)).all()
    outputs = [torch.zeros(3) for _ in range(world)]
    dist.all_to_all(outputs, [torch.full((3,), float(rank)) for _ in range(world)])
    assert all((it == index).all() for index, it in enumerate(outputs))
    parts = [torch.full((2,), float(index)) for index in range(world)] if rank == 1 else None
    own = torch.zeros(2)
    dist.scatter(own, parts, src=1)
    assert (own == rank).all()
    gathered = [torch.zeros(2) for _ in range(world)] if rank == 0 else None
    dist.gather(own, gathered, dst=0)
    assert rank or all((it == index).all() for index, it in enumerate(gathered))


def objects(rank, world):
    everyone = [None] * world
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * rank})
    assert [it["rank"] for it in everyone] == list(range(world))
    told = [f"from {rank}"]
    dist.broadcast_object_list(told, src=1)
    assert told == ["from 1"]
    own = [None]
    dist.scatter_object_list(own, list(range(world)) if rank == 0 else None, src=0)
    assert own == [rank]
    collected = [None] * world if rank == 0 else None
    dist.gather_object(rank, collected, dst=0)
    assert rank or collected == list(range(world))


def messages(rank, world):
    following, previous = (rank + 1) % world, (rank - 1) % world
    large = torch.zeros(1 << 18)
    operations = [
        dist.P2POp(dist.isend, torch.full((1 << 18,), float(rank)), following),
        dist.P2POp(dist.irecv, large, previous),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert (large == previous).all()
    first, second = torch.zeros(2), torch.zeros(2)
    works = [dist.irecv(second, previous, tag=2), dist.irecv(first, previous, tag=1)]
    dist.send(torch.full((2,), 1.0), following, tag=1)
    dist.send(torch.full((2,), 2.0), following, tag=2)
    for work in works:
        work.wait()
    assert first[0] == 1 and second[0] == 2


def coalesced(rank, world):
    from torch.distributed.distributed_c10d import _coalescing_manager

    first, second = torch.ones(2), torch.ones(3, dtype=torch.float64)
    with _coalescing_manager(device=torch.device("cpu")):
        dist.all_reduce(first)
        dist.all_reduce(second)
    assert first[0] == world and second[0] == world
    outs = [torch.zeros(2 * world), torch.zeros(world)]
    with _coalescing_manager(device=torch.device("cpu")):
        dist.all_gather_into_tensor(outs[0], torch.full((2,), float(rank)))
        dist.all_gather_into_tensor(outs[1], torch.full((1,), float(rank)))
    assert (outs[1] == torch.arange(world)).all()


def functional(rank, world):
    import torch.distributed._functional_collectives as funcol

    group, tensor = dist.group.WORLD, torch.ones(2 * world, 2)
    assert funcol.all_reduce(tensor, "sum", group)[0, 0] == world
    assert funcol.all_reduce(tensor, "avg", group)[0, 0] == 1
    assert funcol.all_gather_tensor(tensor, 0, group).shape == (2 * world * world, 2)
    assert funcol.reduce_scatter_tensor(tensor, "sum", 0, group)[0, 0] == world
    assert funcol.all_to_all_single(tensor, None, None, group).sum() == tensor.sum()
    assert funcol.broadcast(tensor * rank, 1, group)[0, 0] == 1
    assert [it[0, 0] for it in funcol.all_reduce_coalesced([tensor] * 2, "sum", group)]
    assert len(funcol.all_gather_into_tensor_coalesced([tensor] * 2, group)) == 2
    several = funcol.reduce_scatter_tensor_coalesced([tensor] * 2, "sum", [0, 0], group)
    assert several[1][0, 0] == world


def groups(rank, world):
    pair = dist.new_group([0, 1])
    if rank < 2:
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=pair)
        assert tensor[0] == 2
        dist.destroy_process_group(pair)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("rows", "columns"))
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=mesh.get_group("rows"))
    assert tensor[0] == 2
    dist.barrier()
    dist.monitored_barrier()


def split_groups(rank, world):
    order = list(reversed(range(2)))
    group = dist.split_group(split_ranks=[order], timeout=datetime.timedelta(seconds=30))
    if rank < 2:
        assert dist.get_rank(group) == order.index(rank) and dist.get_world_size(group) == 2
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, 1, group=group)
        assert tensor[0] == 1
        tensors = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(tensors, torch.tensor([float(rank)]), group=group)
        assert [it.item() for it in tensors] == [1, 0]
        dist.monitored_barrier(group)
        if world == 2:
            # PyTorch names groups by a count of each process: all ranks have to make as many.
            again = dist.split_group(group, [[0], [1]])
            assert dist.get_world_size(again) == 1
            dist.destroy_process_group(again)
        dist.destroy_process_group(group)
    else:
        assert group == dist.GroupMember.NON_GROUP_MEMBER
    dist.barrier()


def ddp(rank, world):
    return trained(DDP(network()), rank)


def ddp_without_reducer_views(rank, world):
    return trained(DDP(network(), gradient_as_bucket_view=True, bucket_cap_mb=0.001), rank)


def ddp_static_graph(rank, world):
    return trained(DDP(network(), static_graph=True), rank)


def ddp_unused_parameters(rank, world):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = network(), nn.Linear(3, 3)

        def forward(self, inputs):
            return self.used(inputs)

    return trained(DDP(Model(), find_unused_parameters=True), rank)


def ddp_join(rank, world):
    model = DDP(network())
    inputs, targets = batch(rank)
    with model.join():
        for _ in range(2 + rank):
            F.mse_loss(model(inputs), targets).backward()


def ddp_no_sync(rank, world):
    model = DDP(network())
    inputs, targets = batch(rank)
    with model.no_sync():
        F.mse_loss(model(inputs), targets).backward()
    F.mse_loss(model(inputs), targets).backward()
    return sum(it.grad.double().abs().sum().item() for it in model.parameters())


def ddp_hooks(rank, world):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    results = []
    for hook in (default_hooks.allreduce_hook, default_hooks.bf16_compress_hook):
        model = DDP(network())
        model.register_comm_hook(None, hook)
        results.append(trained(model, rank))
    return results


def ddp_power_sgd(rank, world):
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    model = DDP(network(), bucket_cap_mb=0.001)
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    trained(model, rank, steps=6)
    sums = [None] * world
    dist.all_gather_object(sums, sum(it.sum().item() for it in model.parameters()))
    assert all(it == sums[0] for it in sums), sums


def zero(rank, world):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DDP(network())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.Adam, lr=0.01
    )
    inputs, targets = batch(rank)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    optimizer.consolidate_state_dict(0)
    return sum(it.double().abs().sum().item() for it in model.parameters())


def fsdp1(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    trained(model, rank)
    with FullyShardedDataParallel.summon_full_params(model):
        return sum(it.double().abs().sum().item() for it in model.parameters())


def fsdp2(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = []
    for policy in (
        MixedPrecisionPolicy(),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ):
        model = network()
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        full = lambda: [it.full_tensor() for it in model.parameters()]  # noqa: E731, B023
        results.append(trained(model, rank, parameters=full))
    return results


def hsdp(rank, world):
    from torch.distributed.fsdp import fully_shard

    if world < 4:
        return None
    model = network()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return trained(model, rank, parameters=lambda: [it.full_tensor() for it in model.parameters()])


def dtensor(rank, world):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, whole = init_device_mesh("cpu", (world,)), torch.arange(8.0 * world).reshape(-1, 4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(sharded.full_tensor(), whole)
    assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
    partial = DTensor.from_local(torch.ones(2 * world, 4), mesh, [Partial()])
    assert partial.redistribute(mesh, [Shard(0)]).to_local()[0, 0] == world
    assert distribute_tensor(whole, mesh, [Replicate()]).to_local().shape == whole.shape


def tensor_parallel(rank, world):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model, mesh = network(), init_device_mesh("cpu", (world,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    output = model(torch.ones(2, 16)).sum()
    output.backward()
    return output.item()


def checkpoint(rank, world):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    mesh = init_device_mesh("cpu", (world,))
    saved = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    dcp.save({"it": saved}, checkpoint_id=os.path.join(folder[0], "saved"))
    loaded = {"it": distribute_tensor(torch.zeros(8), mesh, [Shard(0)])}
    dcp.load(loaded, checkpoint_id=os.path.join(folder[0], "saved"))
    assert torch.equal(loaded["it"].full_tensor(), torch.arange(8.0))


def compiled(rank, world):
    """`torch.compile` leaves collectives that it can't compile as they are."""
    def program(tensor):
        dist.broadcast(tensor, 0)
        gathered = [torch.zeros(1) for _ in range(world)]
        dist.all_gather(gathered, torch.full((1,), float(rank)))
        return tensor + 1, gathered

    told, gathered = torch.compile(program, backend="eager")(torch.full((2,), float(rank)))
    assert told[0] == 1 and [it.item() for it in gathered] == list(range(world))
    return trained(torch.compile(DDP(network()), backend="eager"), rank)


def futures(rank, world):
    """A future's callback may start a collective and wait for it."""
    seen = []

    def again(future):
        tensor = future.value()[0].clone()
        dist.all_reduce(tensor, async_op=True).get_future().wait()
        seen.append(tensor[0].item())
        return tensor

    works = [dist.all_reduce(torch.ones(2), async_op=True) for _ in range(3)]
    for future in [work.get_future().then(again) for work in works]:
        assert future.wait()[0] == world * world
    assert len(seen) == 3


SCENARIOS = [
    it for name, it in list(globals().items())
    if callable(it) and getattr(it, "__module__", "") == __name__
    and name not in ("network", "batch", "trained")
]
