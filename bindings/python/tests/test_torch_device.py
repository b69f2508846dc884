"""CUDA tensors in PyTorch's process groups, as far as it goes without a device: what is registered
and how names are read by PyTorch itself; collectives with objects that stand for PyTorch's tensors
and streams, on the repository's emulated driver.

Not shown here: tensors, streams, futures and the allocator of a PyTorch that has a device.
"""

import contextlib
import ctypes
import datetime
import os
import time

import cuda_emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import unisum.torch  # noqa: E402
from torch._C import _distributed_c10d as c10d  # noqa: E402
from torch.distributed.distributed_c10d import BackendConfig  # noqa: E402

needs_emulator = pytest.mark.skipif(
    cuda_emulator.library() is None and os.environ.get("UNISUM_TEST_CUDA") != "required",
    reason="cargo build -p cuda-emulator makes the driver",
)


def test_the_backend_is_registered_for_both_kinds_of_devices():
    assert dist.Backend.backend_capability["unisum"] == ["cpu", "cuda"]
    # It takes no device's default away.
    assert dist.Backend.default_device_backend_map["cuda"] == "nccl"


@pytest.mark.parametrize(
    "name, devices",
    [
        ("unisum", {"cpu": "unisum", "cuda": "unisum"}),
        ("cuda:unisum", {"cuda": "unisum"}),
        ("cpu:unisum,cuda:nccl", {"cpu": "unisum", "cuda": "nccl"}),
        ("cpu:gloo,cuda:unisum", {"cpu": "gloo", "cuda": "unisum"}),
    ],
)
def test_names_by_device_are_read(name, devices):
    found = BackendConfig(dist.Backend(name)).get_device_backend_map()
    assert {device: str(backend) for device, backend in found.items()} == devices


def test_unisums_ddp_refuses_modules_on_devices_and_says_what_takes_them(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        # As if there were one.
        device = torch.nn.Linear(3, 2, device="cuda")
    modules = [device, torch.nn.Sequential(torch.nn.Linear(3, 3), device)]
    dist.init_process_group("unisum", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        for module, name in zip(modules, ("weight", "1.weight")):
            with pytest.raises(ValueError, match=f"{name}' is on cuda:0") as raised:
                unisum.torch.DistributedDataParallel(module)
            assert "torch.nn.parallel.DistributedDataParallel over" in str(raised.value)
        # What needs no gradients has none anywhere.
        device.requires_grad_(False)
        model = unisum.torch.DistributedDataParallel(torch.nn.Linear(3, 3))
        model(torch.ones(3)).sum().backward()
        assert model.module.weight.grad.eq(1).all()
    finally:
        dist.destroy_process_group()


class Device:
    """``torch.device("cuda", index)``."""

    def __init__(self, index):
        self.index = index

    def __eq__(self, other):
        return self.index == other.index

    def __repr__(self):
        return f"cuda:{self.index}"


class Tensor(cuda_emulator.FakeArray):
    """A contiguous tensor of one dimension, as far as the process group uses it."""

    is_cuda, is_sparse = True, False

    def __init__(self, driver, values):
        super().__init__(driver, np.ascontiguousarray(values))
        self.device, self.recorded = Device(driver._ordinal), []

    def numel(self):
        return self.shape[0]

    def is_contiguous(self):
        return True

    def record_stream(self, stream):
        self.recorded.append(stream)

    def reshape(self, *_):
        return self

    view = reshape

    def __getitem__(self, part):
        view = object.__new__(Tensor)
        view.__dict__.update(super().__getitem__(part).__dict__)
        return view

    def copy_(self, source):
        size = ctypes.c_size_t(self.numel() * self.dtype.itemsize)
        to, start = (it.__cuda_array_interface__["data"][0] for it in (self, source))
        stream = ctypes.c_void_p(Streams.used[-1].cuda_stream)
        self._driver.call(
            "cuMemcpyAsync", ctypes.c_uint64(to), ctypes.c_uint64(start), size, stream
        )


class Event:
    def __init__(self, driver, stream):
        self._driver, self.handle = driver, ctypes.c_void_p()
        driver.call("cuEventCreate", ctypes.byref(self.handle), 2)
        driver.call("cuEventRecord", self.handle, ctypes.c_void_p(stream))

    def query(self):
        return self._driver._library.cuEventQuery(self.handle) == 0


class Stream:
    def __init__(self, driver):
        self._driver, self.cuda_stream = driver, driver.stream()

    def record_event(self):
        return Event(self._driver, self.cuda_stream)

    def wait_event(self, event):
        stream = ctypes.c_void_p(self.cuda_stream)
        self._driver.call("cuStreamWaitEvent", stream, event.handle, 0)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Streams:
    """Stands for PyTorch's streams."""

    used = []

    def __init__(self, driver):
        self._driver, self.now = driver, Stream(driver)
        Streams.used = [self.now]

    def current(self, _device):
        return Streams.used[-1]

    def new(self, _device):
        return Stream(self._driver)

    @contextlib.contextmanager
    def use(self, stream):
        Streams.used.append(stream)
        yield
        Streams.used.pop()

    def future(self, _device):
        return torch.futures.Future()

    def empty(self, count, like):
        return Tensor(self._driver, np.zeros(count, like.dtype))


def in_group(rank, world, folder, scenario):
    dist.init_process_group(
        "cpu:unisum,cuda:unisum",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    group = dist.group.WORLD
    driver = cuda_emulator.Driver(rank)
    streams = group._cuda._streams = Streams(driver)
    # By its number on the host, as PyTorch's tensors would say.
    SCENARIOS[scenario](group, driver, streams, rank, world)
    # The CPU's tensors go on as ever.
    data = torch.ones(3)
    dist.all_reduce(data)
    assert data.tolist() == [world] * 3
    dist.destroy_process_group()


def options(kind, is_async, **values):
    made = kind()
    made.asyncOp = is_async
    for name, value in values.items():
        setattr(made, name, value)
    return made


def collectives(group, driver, streams, rank, world):
    def tensor(values):
        return Tensor(driver, np.asarray(values, "float32"))

    def got(it):
        driver.synchronize(streams.now.cuda_stream)
        return it.get().tolist()

    for is_async in (False, True):
        data = tensor([rank, 1, 2])
        work = group.allreduce([data], options(c10d.AllreduceOptions, is_async))
        work.wait()
        assert got(data) == [sum(range(world)), world, 2 * world]
        assert (len(data.recorded) > 0) == is_async, "its memory is kept for the other stream"
        assert work.get_future().value() == [data]
        out = [tensor([0, 0]) for _ in range(world)]
        opts = options(c10d.AllgatherOptions, is_async)
        group.allgather([out], [tensor([rank, -rank])], opts).wait()
        assert [got(it) for it in out] == [[r, -r] for r in range(world)]
        parts = [tensor([rank * 10 + r]) for r in range(world)]
        one = tensor([0])
        opts = options(c10d.ReduceScatterOptions, is_async, reduceOp=dist.ReduceOp.SUM)
        group.reduce_scatter([one], [parts], opts).wait()
        assert got(one) == [sum(10 * r + rank for r in range(world))]
        opts = options(c10d.BroadcastOptions, is_async, rootRank=1)
        group.broadcast([data], opts).wait()
        whole = tensor(np.zeros(world))
        group.all_gather_single(whole, tensor([rank + 1]), options(c10d.AllgatherOptions, is_async))
        group.barrier(options(c10d.BarrierOptions, is_async))
        assert got(whole) == [r + 1 for r in range(world)]
    several = [tensor([1, rank]), tensor([rank])]
    opts = options(c10d.AllreduceCoalescedOptions, True, reduceOp=dist.ReduceOp.MAX)
    group.allreduce_coalesced(several, opts).wait()
    assert [got(it) for it in several] == [[1, world - 1], [world - 1]]
    with pytest.raises(ValueError, match="on one device"):
        group.all_gather_single(tensor([1] * world), torch.ones(1))
    with pytest.raises(ValueError, match="CPU's memory only"):
        group.send([tensor([1])], 1 - rank)


def overlapped(group, driver, streams, rank, world):
    """Waiting blocks a stream, and not the host: others may have the processors in one turn."""
    assert any(overlap(group, driver, streams, rank, world) for _ in range(20))


def overlap(group, driver, streams, rank, world):
    data, copy = (Tensor(driver, np.full(5, rank, "float32")) for _ in range(2))
    group.allreduce([data], options(c10d.AllreduceOptions, False)).wait()
    driver.synchronize(streams.now.cuda_stream)
    begin = time.monotonic()
    work = group.allreduce([data], options(c10d.AllreduceOptions, True))
    work.wait()
    copy.copy_(data)
    took = time.monotonic() - begin
    was_complete = work.is_completed()
    expected = [sum(range(world)) * world] * 5
    driver.synchronize(streams.now.cuda_stream)
    assert copy.get().tolist() == expected, "the copy comes after the collective"
    assert work.is_completed()
    # Operations are up to 0.3 s late; both ranks tell how it was.
    told = torch.tensor([float(took < 0.25 and not was_complete)])
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item() == 1.0


SCENARIOS = {it.__name__: it for it in (collectives, overlapped)}


@needs_emulator
@pytest.mark.parametrize("scenario, world, delay_us", [
    ("collectives", 2, 200),
    ("collectives", 3, 0),
    ("overlapped", 2, 300_000),
])
def test_collectives_on_tensors_of_devices(scenario, world, delay_us, tmp_path, monkeypatch):
    cuda_emulator.use(tmp_path, monkeypatch, world, DELAY_US=delay_us)
    mp.spawn(in_group, (world, str(tmp_path), scenario), nprocs=world)
