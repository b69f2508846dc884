"""Collectives on NumPy's arrays and on PyTorch's tensors, in place and apart."""

import asyncio
import time

import numpy as np
import pytest
import unisum

WORLD = 3


def total(world):
    return sum(range(1, world + 1))


def reductions():
    with unisum.connect() as comm:
        rank, world = comm.rank, comm.world
        for dtype in ("float16", "float32", "float64", "int8", "uint8", "int32", "int64"):
            data = np.full(1000, rank + 1, dtype)
            assert comm.all_reduce(data) is data
            assert (data == total(world)).all(), (dtype, data)
        data = np.full((4, 5), rank, "float64")
        out = np.zeros((4, 5))
        comm.all_reduce(data, "max", out=out)
        assert (out == world - 1).all() and (data == rank).all()
        assert (comm.all_reduce(np.array([float(rank)]), "average") == (world - 1) / 2).all()
        assert (comm.all_reduce(np.array([1.0]), scale=0.5) == world / 2).all()
        assert (comm.all_reduce(np.array([1 << rank]), "or") == (1 << world) - 1).all()
        complex_data = np.full(3, 1 + rank * 1j)
        comm.all_reduce(complex_data)
        assert (complex_data == world + 1j * total(world - 1)).all()
        result, found = comm.all_reduce(np.array([np.inf, 1.0]), detect_nonfinite=True)
        assert found and result[1] == world
        data = np.full(4, rank + 1.0)
        comm.reduce(data, root=1)
        assert (data == (total(world) if rank == 1 else rank + 1)).all()


def movements():
    with unisum.connect() as comm:
        rank, world = comm.rank, comm.world
        data = np.full(3, rank, "int16")
        comm.broadcast(data, root=2)
        assert (data == 2).all()
        out = np.zeros((world, 3), "int16")
        comm.all_gather(np.full(3, rank, "int16"), out)
        assert (out == np.arange(world)[:, None]).all()
        parts = [np.zeros(r + 1) for r in range(world)]
        comm.all_gather(np.full(rank + 1, float(rank)), parts, counts=[1, 2, 3])
        assert all((part == r).all() for r, part in enumerate(parts))
        out = np.zeros(2)
        comm.reduce_scatter(np.arange(2.0 * world), out)
        assert (out == world * np.array([2 * rank, 2 * rank + 1])).all()
        out = np.zeros(world)
        comm.all_to_all(np.full(world, float(rank)), out)
        assert (out == np.arange(world)).all()
        out = np.zeros(sum(range(world)) if rank == 0 else 0)
        out = np.zeros(world * rank, "int32")
        sent = np.full(total(world - 1), rank, "int32")
        comm.all_to_all(sent, out, counts=list(range(world)), receive_counts=[rank] * world)
        assert (out == np.repeat(np.arange(world), rank)).all()
        out = np.zeros((world, 1)) if rank == 0 else None
        comm.gather(np.array([float(rank)]), out)
        assert out is None or (out[:, 0] == np.arange(world)).all()
        out = np.zeros(1)
        comm.scatter(np.arange(3.0) if rank == 1 else None, out, root=1)
        assert out[0] == rank
        # Without a copy where input and output overlap, as frameworks have it.
        whole = np.zeros(world)
        whole[rank] = rank
        comm.all_gather(whole[rank : rank + 1], whole)
        assert (whole == np.arange(world)).all()
        comm.barrier()


def asynchronous():
    with unisum.connect() as comm:
        works = [comm.all_reduce(np.full(10, i), async_op=True) for i in range(20)]
        for i, work in reversed(list(enumerate(works))):
            assert (work.wait() == i * comm.world).all()
            assert work.done() and work.exception() is None

        async def several():
            first = comm.all_reduce(np.ones(4), async_op=True)
            second = comm.all_reduce(np.ones(4), "product", async_op=True)
            return (await first).sum(), (await second).sum()

        assert asyncio.run(several()) == (4 * comm.world, 4)
        future = comm.all_reduce(np.ones(2), async_op=True).future()
        assert (future.result(20) == comm.world).all()
        arrays = [np.ones(7), np.ones(100_000), np.ones((2, 2))]
        comm.all_reduce_batch(arrays)
        assert all((array == comm.world).all() for array in arrays)


def registered():
    with unisum.connect() as comm:
        array = comm.empty((2, 3), "bfloat16")
        assert array.shape == (2, 3) and array.nbytes == 12
        tensor = array.torch()
        tensor.fill_(comm.rank + 1)
        comm.all_reduce(array)
        assert (tensor == total(comm.world)).all()
        shown = unisum.empty(4, "float32").numpy()
        shown[:] = 1
        comm.all_reduce(shown)
        assert (shown == comm.world).all()


def tensors():
    import torch

    with unisum.connect() as comm:
        names = ("float16", "bfloat16", "float32", "float64", "int8", "int64", "bool")
        for dtype in [getattr(torch, name) for name in names]:
            tensor = torch.ones(33, dtype=dtype)
            comm.all_reduce(tensor, "max")
            assert (tensor == 1).all()
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
            tensor = torch.full((8,), float(comm.rank + 1)).to(dtype)
            comm.all_reduce(tensor)
            assert (tensor.to(torch.float32) == total(comm.world)).all()
        parameter = torch.nn.Parameter(torch.full((4,), float(comm.rank)))
        comm.broadcast(parameter, 1)
        assert (parameter == 1).all()


def messages_of_any_rank():
    with unisum.connect() as comm:
        post = comm.messenger()
        if comm.rank == 0:
            seen = []
            for tag, count in ((5, 10), (5, 10), (6, 100_000), (6, 100_000)):
                data = np.zeros(count)
                seen.append(post.receive_any(data, tag))
                assert (data == seen[-1]).all()
            assert sorted(seen) == [1, 1, 2, 2]
        else:
            # The other leaves while the first still sends.
            if comm.rank == 2:
                time.sleep(0.5)
            post.send(np.full(10, float(comm.rank)), 0, 5)
            post.send(np.full(100_000, float(comm.rank)), 0, 6)
        post.close()


def groups_and_messages():
    with unisum.connect() as comm:
        half = comm.split(comm.rank % 2, -comm.rank)
        assert half.world == (2 if comm.rank % 2 == 0 else 1)
        if comm.rank % 2 == 0:
            assert half.rank == (0 if comm.rank == 2 else 1)
        pair = comm.subset([1, 0])
        assert (pair is None) == (comm.rank == 2)
        if pair is not None:
            assert (pair.all_reduce(np.ones(1)) == 2).all()
        post = comm.messenger()
        following, previous = (comm.rank + 1) % WORLD, (comm.rank - 1) % WORLD
        received = np.zeros(100_000)
        receive = post.receive(received, previous, 7, async_op=True)
        post.send(np.full(100_000, comm.rank, "float64"), following, 7)
        assert (receive.wait() == previous).all()
        post.close()


SCENARIOS = [reductions, movements, asynchronous, registered, tensors]
SCENARIOS += [groups_and_messages, messages_of_any_rank]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda it: it.__name__)
def test_scenario(scenario):
    unisum.spawn(scenario, WORLD)


def test_a_world_of_one_needs_nobody():
    with unisum.connect(rank=0, world=1) as comm:
        assert (comm.all_reduce(np.ones(3), "average") == 1).all()
        assert comm.all_reduce(np.ones(3), async_op=True).wait().sum() == 3
