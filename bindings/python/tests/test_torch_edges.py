"""What newcomers run into: interrupts, worlds that disagree, processes that fork, tensors of every
kind and type."""

import datetime
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import unisum  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

LIMIT_S = 600


def begin(rank, world, folder, seconds=LIMIT_S):
    torch.set_num_threads(1)
    dist.init_process_group(
        "unisum",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )


# Interrupts.

PROGRAM = """
import datetime, sys, torch, torch.distributed as dist
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
try:
    print("begins", flush=True)
    dist.init_process_group("unisum", init_method=f"file://{folder}/init", rank=rank,
        world_size=world, timeout=datetime.timedelta(seconds=600))
    dist.barrier()
    print("is in", flush=True)
    if rank == 0 or sys.stdin.readline():
        dist.all_reduce(torch.ones(1))
except BaseException as error:
    print(type(error).__name__, getattr(error, "ranks", None), str(error)[:300], flush=True)
    raise SystemExit(3)
"""


class Ranks:
    """Processes of PROGRAM."""

    def __init__(self, ranks, world, folder):
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(rank), str(world), str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in ranks
        ]

    def __enter__(self):
        return self.all

    def __exit__(self, *_):
        for it in self.all:
            it.kill()
            it.communicate()


def told(process):
    return process.stdout.readline().strip()


def test_ctrl_c_in_a_collective_reaches_all(tmp_path):
    with Ranks(range(2), 2, tmp_path) as (first, second):
        for it in (first, second):
            assert (told(it), told(it)) == ("begins", "is in")
        first.send_signal(signal.SIGINT)
        assert told(first).startswith("KeyboardInterrupt") and first.wait(60) == 3
        second.stdin.write("go on\n")
        second.stdin.flush()
        text = told(second)
        assert text.startswith(("AbortedError (0,)", "RankLostError (0,)")), text


def is_listed(folder):
    """Whether rank 0 has told the others where it is."""
    path = folder / "init"
    return path.exists() and b"unisum/rendezvous" in path.read_bytes()


@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_while_a_rank_is_missing(tmp_path, interrupted):
    with Ranks(range(2), 3, tmp_path) as ranks:
        for it in ranks:
            assert told(it) == "begins"
        # Once both wait for the third, or on their way there.
        until = datetime.datetime.now() + datetime.timedelta(seconds=120)
        while not is_listed(tmp_path):
            assert datetime.datetime.now() < until
        ranks[interrupted].send_signal(signal.SIGINT)
        assert told(ranks[interrupted]).startswith("KeyboardInterrupt")
        assert ranks[interrupted].wait(60) == 3


ENDS_SLOWLY = """
import sys, time, torch.distributed as dist, unisum

class Store:
    '''PyTorch's, which says when a key is looked for.'''
    def __init__(self, path):
        self.inner = dist.FileStore(path, 2)
    def set(self, key, value):
        self.inner.set(key, value)
    def get(self, key):
        return self.inner.get(key)
    def check(self, keys):
        return self.look("check", keys)
    def wait(self, keys, limit):
        return self.look("wait", keys, limit)
    def look(self, name, *arguments):
        print("looks", flush=True)
        return getattr(self.inner, name)(*arguments)

class Slow:
    '''The interpreter takes its time, once no thread may come back to it.'''
    def __del__(self, sleep=time.sleep):
        sleep(2)

# A module that is taken down although the thread still refers to this one.
sys.slow = Slow()
try:
    unisum.connect(rank=1, world=2, store=Store(sys.argv[1]), connect_timeout=1)
except KeyboardInterrupt:
    raise SystemExit(3)
"""


def test_the_process_ends_while_a_thread_waits_in_the_store(tmp_path):
    arguments = [sys.executable, "-c", ENDS_SLOWLY, str(tmp_path / "store")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert told(process) == "looks"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 3


# Worlds that disagree.


def different_worlds(rank, world, folder):
    """Rank 1 takes the world for larger than rank 0 does."""
    with pytest.raises(unisum.RendezvousError) as raised:
        begin(rank, world + rank, folder, 10)
    text = str(raised.value)
    assert "world of 3, but this job's is 2" in text and raised.value.ranks == (1 - rank,), text


# Processes that fork.


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3,), float(index))


class Communicates(Numbers):
    def __getitem__(self, index):
        dist.all_reduce(torch.ones(1))


def loaders(rank, world, folder):
    """Processes that load data, however they are started, harm nothing; collectives in them are
    refused where they are copies of a rank."""
    begin(rank, world, folder)
    for method in ("fork", "spawn"):
        total = 0.0
        for part in DataLoader(Numbers(), 3, num_workers=2, multiprocessing_context=method):
            dist.all_reduce(part)
            total += part.sum().item()
        assert total == 3 * sum(range(12)) * world, method
    with pytest.raises(unisum.Error, match="forked after the communicator was made"):
        list(DataLoader(Communicates(), 3, num_workers=1, multiprocessing_context="fork"))
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor == world
    dist.destroy_process_group()


# Types.

INTEGERS = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
#: By rank: 1 and 1, 0 and 0, 3 and 1, 2 and 3.
GIVEN = ([1, 0, 3, 2], [1, 0, 1, 3])
EXPECTED = {
    "SUM": [2, 0, 4, 5],
    "AVG": [1, 0, 2, 2.5],
    "PRODUCT": [1, 0, 3, 6],
    "MIN": [1, 0, 1, 2],
    "MAX": [1, 0, 3, 3],
    "BAND": [1, 0, 1, 2],
    "BOR": [1, 0, 3, 3],
    "BXOR": [0, 0, 2, 1],
}
#: Of truth values, sums and averages are true if one is.
TRUTHS = {
    **{name: [1, 0, 1, 1] for name in EXPECTED},
    "BXOR": [0, 0, 0, 0],
}


def has(dtype, operation):
    if operation.startswith("B"):
        return dtype in INTEGERS
    return dtype not in COMPLEX or operation not in ("MIN", "MAX", "PRODUCT")


def reductions_of_all_types(rank, world, folder):
    """Right, or refused on all ranks alike, which harms nothing."""
    begin(rank, world, folder)
    for dtype in INTEGERS + FLOATS + COMPLEX:
        for operation, expected in (TRUTHS if dtype == "bool" else EXPECTED).items():
            tensor = torch.tensor(GIVEN[rank]).to(getattr(torch, dtype))
            kept = tensor.clone()
            if not has(dtype, operation):
                with pytest.raises((ValueError, TypeError)) as raised:
                    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
                assert len(str(raised.value)) > 20
                assert (tensor == kept).all()
                assert dist.group.WORLD.get_error() == torch._C._distributed_c10d.ErrorType.SUCCESS
                continue
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
            right = torch.tensor(expected).to(tensor.dtype)
            assert torch.equal(tensor.view(torch.uint8), right.view(torch.uint8)), (
                dtype, operation, tensor
            )
    dist.destroy_process_group()


# Tensors.


def tensors_of_all_kinds(rank, world, folder):
    begin(rank, world, folder)
    for empty in (torch.ones(0), torch.ones(3, 0)):
        dist.all_reduce(empty)
        outputs = [torch.ones_like(empty) for _ in range(world)]
        dist.all_gather(outputs, empty)
        dist.broadcast(empty, 1)
        dist.reduce_scatter_tensor(torch.ones(0), torch.ones(0))
    scalar = torch.tensor(float(rank + 1))
    dist.all_reduce(scalar)
    assert scalar.shape == () and scalar == 3
    outputs = [torch.tensor(0.0) for _ in range(world)]
    dist.all_gather(outputs, torch.tensor(float(rank)))
    assert [it.item() for it in outputs] == [0, 1]
    leaf = torch.ones(4, requires_grad=True)
    dist.all_reduce(leaf)
    assert leaf.requires_grad and (leaf == 2).all()
    computed = leaf * 2
    dist.all_reduce(computed)
    assert (computed == 8).all()
    swapped = torch.arange(8.0).reshape(2, 4).t()
    dist.all_reduce(swapped)
    assert torch.equal(swapped, 2 * torch.arange(8.0).reshape(2, 4).t())
    for gaps in (torch.ones(8)[::2], torch.ones(1).expand(4)):
        with pytest.raises(ValueError, match="contiguous"):
            dist.all_reduce(gaps)
    meta = torch.ones(4, device="meta")
    for call in (
        lambda: dist.all_reduce(meta),
        lambda: dist.broadcast(meta, 0),
        lambda: dist.reduce_scatter_tensor(meta[:2], meta),
        lambda: dist.send(meta, 1 - rank),
    ):
        with pytest.raises(ValueError, match="no memory"):
            call()
    dist.barrier()
    dist.destroy_process_group()


def wrong_ranks_and_layouts(rank, world, folder):
    begin(rank, world, folder)
    data = torch.ones(4)
    for call in (
        lambda: dist.reduce(data, -5),
        lambda: dist.broadcast(data, -5),
        lambda: dist.gather(data, None, dst=-5),
        lambda: dist.scatter(data, None, src=-5),
        lambda: dist.send(data, -5),
        lambda: dist.isend(data, -5),
        lambda: dist.irecv(data, -5),
    ):
        with pytest.raises(ValueError, match="no rank -5"):
            call()
    with pytest.raises(ValueError, match="elements of this one are in the same place"):
        dist.all_reduce(torch.ones(1).expand(4))
    for sparse in (torch.eye(4).to_sparse_csr(), torch.eye(4).to_sparse_csc()):
        with pytest.raises(ValueError, match="layout torch.sparse_cs. are not taken"):
            dist.all_reduce(sparse)
    dist.all_reduce(data)
    assert (data == 2).all()
    dist.destroy_process_group()


def a_wait_is_over_before_the_collective(rank, world, folder):
    begin(rank, world, folder)
    store = dist.distributed_c10d._get_default_store()
    data = torch.ones(4)
    if rank == 0:
        work = dist.all_reduce(data, async_op=True)
        with pytest.raises(unisum.TimeoutError, match="it goes on") as raised:
            work.wait(datetime.timedelta(seconds=0.3))
        assert raised.value.ranks == ()
        store.set("waited", "yes")
        work.wait()
    else:
        store.wait(["waited"])
        dist.all_reduce(data)
    assert (data == 2).all()
    dist.destroy_process_group()


def all_name_who_misses_the_barrier(rank, world, folder):
    """Also those that came before rank 0, whose verdict they hear after their own time."""
    begin(rank, world, folder)
    store = dist.distributed_c10d._get_default_store()
    limit = datetime.timedelta(seconds=2)
    if rank == 0:
        store.wait(["about to come"])
        time.sleep(0.5)  # the others are in the barrier, and rank 0 is late for their clocks
    if rank == 2:
        store.set("about to come", "yes")
    if rank == 1:
        store.wait(["over"])  # it hears that it came too late
    with pytest.raises(unisum.TimeoutError, match="Ranks 1 failed to pass") as raised:
        dist.monitored_barrier(timeout=limit, wait_all_ranks=True)
    assert raised.value.ranks == (1,)
    if rank == 0:
        store.set("over", "yes")
    dist.barrier()
    # Who waits for a rank 0 that does not come names it.
    if rank != 0:
        with pytest.raises(unisum.TimeoutError, match="it did not come in 300 ms") as raised:
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=0.3))
        assert raised.value.ranks == (0,)
    dist.barrier()
    dist.destroy_process_group()


CASES = [
    (different_worlds, 2),
    (loaders, 2),
    (reductions_of_all_types, 2),
    (tensors_of_all_kinds, 2),
    (wrong_ranks_and_layouts, 2),
    (a_wait_is_over_before_the_collective, 2),
    (all_name_who_misses_the_barrier, 3),
]


@pytest.mark.parametrize("case, world", CASES, ids=lambda it: getattr(it, "__name__", it))
def test_case(case, world, tmp_path):
    mp.spawn(case, (world, str(tmp_path)), nprocs=world)
