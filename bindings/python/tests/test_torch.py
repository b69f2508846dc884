"""unisum as PyTorch's backend: all scenarios of torch_scenarios at two worlds, and what is more
than a scenario: how groups begin and end."""

import datetime
import json
import os
import threading
import time
import traceback

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import torch_scenarios  # noqa: E402
import unisum.torch  # noqa: E402
from worlds import SIZES  # noqa: E402

LIMIT = datetime.timedelta(seconds=60)


def run_scenarios(rank, world, backend, folder, only):
    """All scenarios in one process group; what each gave goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=LIMIT
    )
    results = {}
    for scenario in torch_scenarios.SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        try:
            results[scenario.__name__] = ["passed", scenario(rank, world)]
        except Exception:
            results[scenario.__name__] = ["failed", traceback.format_exc()]
            break  # what the others do meanwhile is not known
    with open(f"{folder}/{rank}", "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()
    if backend == "gloo":
        # Its threads may give tensors back when the interpreter is gone, which aborts the process.
        os._exit(0)


def results_of(backend, world, folder, only=()):
    folder.mkdir()
    mp.spawn(run_scenarios, (world, backend, str(folder), only), nprocs=world)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world)]


@pytest.fixture(scope="module", params=SIZES)
def both(request, tmp_path_factory):
    """The results over unisum and over gloo."""
    folder = tmp_path_factory.mktemp("scenarios")
    world = request.param
    ours = results_of("unisum", world, folder / "unisum")
    return ours, results_of("gloo", world, folder / "gloo", COMPARED)


#: Those that give numbers.
COMPARED = (
    "ddp",
    "ddp_without_reducer_views",
    "ddp_static_graph",
    "ddp_unused_parameters",
    "ddp_no_sync",
    "ddp_hooks",
    "compiled",
    "zero",
    "fsdp1",
    "hsdp",
    "tensor_parallel",
)


def tolerance(scenario):
    """Sums of bf16 round otherwise."""
    return 2e-3 if scenario == "ddp_hooks" else 1e-5


@pytest.mark.parametrize("scenario", [it.__name__ for it in torch_scenarios.SCENARIOS])
def test_scenario(both, scenario):
    ours, gloo = both
    for rank, results in enumerate(ours):
        outcome, value = results.get(scenario, ["was not reached", ""])
        assert outcome == "passed", f"rank {rank}: {value}"
        assert value == ours[0][scenario][1] or scenario == "ddp_no_sync"
        if scenario in COMPARED:
            theirs = gloo[rank][scenario]
            assert theirs[0] == "passed", theirs[1]
            assert value == (theirs[1] and pytest.approx(theirs[1], rel=tolerance(scenario)))


def begin(rank, world, how, timeout=LIMIT):
    dist.init_process_group(
        "unisum", init_method=how, rank=rank, world_size=world, timeout=timeout
    )


def await_file(path):
    until = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < until, path
        time.sleep(0.02)


def twice(rank, world, folder):
    for number in range(3):
        begin(rank, world, f"file://{folder}/init{number}")
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        assert tensor[0] == world
        dist.destroy_process_group()


def by_environment(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    port = f"{folder}/port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        with open(port + "~", "w") as file:
            file.write(str(store.port))
        os.rename(port + "~", port)
    else:
        await_file(port)
        store = dist.TCPStore("127.0.0.1", int(open(port).read()), world, False)
    dist.init_process_group("unisum", store=store, rank=rank, world_size=world)
    dist.barrier()
    # The same store again.
    dist.destroy_process_group()
    dist.init_process_group("unisum", store=store, rank=rank, world_size=world)
    dist.barrier()
    dist.destroy_process_group()


def late(rank, world, folder):
    # In which both have to be there, too.
    begin(rank, world, f"file://{folder}/init", datetime.timedelta(seconds=10))
    dist.barrier()
    if rank == 1:
        await_file(f"{folder}/told")
        os._exit(0)
    with pytest.raises(RuntimeError) as raised:
        dist.all_reduce(torch.ones(1))
    open(f"{folder}/told", "w").close()
    assert raised.value.ranks == (1,)
    assert dist.group.WORLD.get_error() == torch._C._distributed_c10d.ErrorType.TIMEOUT
    dist.destroy_process_group()


def absent_from_barrier(rank, world, folder):
    begin(rank, world, f"file://{folder}/init")
    if rank == 0:
        with pytest.raises(RuntimeError, match="Ranks 1 failed to pass monitoredBarrier"):
            limit = datetime.timedelta(seconds=1)
            dist.monitored_barrier(timeout=limit, wait_all_ranks=True)
    dist.barrier()
    dist.destroy_process_group()


def aborted(rank, world, folder):
    begin(rank, world, f"file://{folder}/init")
    dist.barrier()
    if rank == 1:
        await_file(f"{folder}/started")
        dist.group.WORLD.abort()
    else:
        work = dist.all_reduce(torch.ones(1), async_op=True)
        open(f"{folder}/started", "w").close()
        with pytest.raises(RuntimeError, match="aborted"):
            work.wait()
    dist.destroy_process_group()


def non_contiguous(rank, world, folder):
    begin(rank, world, f"file://{folder}/init")
    with pytest.raises(ValueError, match="contiguous"):
        dist.all_gather([torch.ones(3) for _ in range(world)], torch.ones(6)[::2])
    with pytest.raises(ValueError, match="contiguous"):
        dist.all_reduce(torch.ones(6)[::2])
    dist.barrier()
    dist.destroy_process_group()


def observed(rank, world, folder):
    import unisum.torch

    begin(rank, world, f"file://{folder}/init")
    before = unisum.torch.stats()
    for _ in range(3):
        dist.all_reduce(torch.ones(100))
    after = unisum.torch.stats()
    assert after.calls >= before.calls + 3 and after.running is None
    described = unisum.torch.describe()
    assert len(described.ranks) == world and described.ranks[rank].pid == os.getpid()
    assert str(described).startswith(described.summary)
    # A group has counters of its own.
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    assert unisum.torch.stats(group).calls > 0
    other = dist.new_group(backend="gloo")
    with pytest.raises(ValueError, match="unisum"):
        unisum.torch.stats(other)
    with pytest.raises(ValueError, match="unisum"):
        unisum.torch.describe(other)
    dist.barrier()
    dist.destroy_process_group()


def beside_another_backend(rank, world, folder):
    """Tensors of the CPU are unisum's, those of other devices another backend's."""
    for number, name in enumerate(("cpu:unisum,cuda:gloo", "cuda:gloo,cpu:unisum")):
        dist.init_process_group(
            name, init_method=f"file://{folder}/init{number}", rank=rank, world_size=world,
            timeout=LIMIT,
        )
        group = dist.group.WORLD
        assert [group._get_backend(torch.device(it)).name() for it in ("cpu", "cuda")] == [
            "unisum", "gloo"
        ]
        tensor = torch.full((3,), 2.0 * rank).bfloat16()
        before = unisum.torch.stats().calls
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        assert unisum.torch.stats(group).calls > before
        assert (tensor == world - 1).all()
        gathered = torch.zeros(world)
        work = dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]), async_op=True)
        work.get_future().wait()
        assert gathered.tolist() == list(range(world))
        for name in ("gatherings", "reductions", "objects", "messages", "functional", "dtensor",
                     "ddp", "fsdp2", "checkpoint"):
            getattr(torch_scenarios, name)(rank, world)
        model = unisum.torch.DistributedDataParallel(torch.nn.Linear(2, 2), wire="bf16")
        model(torch.full((1, 2), float(rank))).sum().backward()
        assert (model.module.weight.grad == (world - 1) / 2).all()
        part = dist.new_group([1])
        if rank == 1:
            dist.all_reduce(tensor, group=part)
        dist.monitored_barrier()
        dist.barrier()
        dist.destroy_process_group()


def leaves_in_a_callback(rank, world, folder):
    """On rank 0, a callback of a future runs while the process ends: it is waited for."""
    begin(rank, world, f"file://{folder}/init")
    begun = threading.Event()

    def slow(future):
        begun.set()
        # Which is when the interpreter begins to end.
        threading.main_thread().join(60)
        time.sleep(0.5)
        with open(f"{folder}/ended", "w") as file:
            file.write("in order")

    if rank == 1:
        # What has ended already calls back at once, on the thread that asks.
        while not os.path.exists(f"{folder}/asked"):
            time.sleep(0.01)
        dist.all_reduce(torch.ones(3))
        return
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    future.add_done_callback(slow)
    open(f"{folder}/asked", "w").close()
    assert begun.wait(60)


def test_a_process_ends_in_order_while_a_callback_runs(tmp_path):
    mp.spawn(leaves_in_a_callback, (2, str(tmp_path)), nprocs=2)
    assert (tmp_path / "ended").read_text() == "in order"


def ddp_beside_another_backend(rank, world, folder):
    """What unisum's DDP does in a group that is unisum's in part."""
    DDP = unisum.torch.DistributedDataParallel
    dist.init_process_group(
        "cpu:unisum,cuda:gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world,
        timeout=LIMIT,
    )
    ones = torch.ones(1, 2)
    for divides_by_all in (True, False):
        model = DDP(torch.nn.Linear(2, 1))
        with model.join(divide_by_initial_world_size=divides_by_all):
            for _ in range(1 + rank):
                model.zero_grad()
                model(ones).sum().backward()
        # The last step was of the last rank alone.
        if rank == world - 1:
            expected = 1 / world if divides_by_all else 1.0
            assert model.module.weight.grad.tolist() == [[expected, expected]]
    model = DDP(torch.nn.Linear(2, 1))
    model._update_process_group(dist.new_group())
    model((rank + 1) * ones).sum().backward()
    assert (model.module.weight.grad == (world + 1) / 2).all()
    part = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="process group of unisum"):
            DDP(torch.nn.Linear(2, 1), process_group=part)
        with pytest.raises(ValueError, match="unisum"):
            unisum.torch.describe(part)
        model._update_process_group(part)
    with pytest.raises(ValueError, match="unisum's alone"):
        DDP(torch.nn.Linear(2, 1), elastic=True)
    dist.destroy_process_group()


IN_PYTHON = pytest.mark.skipif(
    not hasattr(torch._C._distributed_c10d.Backend, "all_gather_single"),
    reason="before PyTorch 2.14, backends can't be written in Python",
)
CASES = [
    twice, by_environment, late, absent_from_barrier, aborted, non_contiguous, observed,
    pytest.param(beside_another_backend, marks=IN_PYTHON),
    pytest.param(ddp_beside_another_backend, marks=IN_PYTHON),
]


@pytest.mark.parametrize("case", CASES, ids=lambda it: it.__name__)
def test_case(case, tmp_path):
    mp.spawn(case, (2, str(tmp_path)), nprocs=2)
