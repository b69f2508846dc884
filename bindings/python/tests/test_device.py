"""Collectives on device memory, on the devices of the repository's emulated driver."""

import ctypes
import os

import cuda_emulator
import numpy as np
import pytest
import unisum

pytestmark = pytest.mark.skipif(
    cuda_emulator.library() is None and os.environ.get("UNISUM_TEST_CUDA") != "required",
    reason="cargo build -p cuda-emulator makes the driver",
)


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    def use(devices=2, **settings):
        cuda_emulator.use(tmp_path, monkeypatch, devices, **settings)

    return use


def joined():
    comm = unisum.connect()
    device = comm.on_device()
    return comm, device, cuda_emulator.Driver(device.ordinal)


def every_collective():
    comm, device, driver = joined()
    rank, world = comm.rank, comm.world
    stream = driver.stream()
    values = [np.arange(12 * world, dtype="float32") + 100 * r for r in range(world)]
    each = 12

    def block(of, r):
        return of[r * each : (r + 1) * each]

    def result(array):
        device.synchronize(stream)
        return array.get()

    data = driver.array(values[rank])
    out = driver.array(np.zeros(each * world, "float32"))
    one = driver.array(np.zeros(each, "float32"))
    total = sum(values)

    assert device.all_reduce(data, out=out, stream=stream) is out
    np.testing.assert_array_equal(result(out), total)
    device.reduce_scatter(data, one, stream=stream)
    np.testing.assert_array_equal(result(one), block(total, rank))
    device.all_gather(one, out, stream=stream)
    np.testing.assert_array_equal(result(out), total)
    device.all_to_all(data, out, stream=stream)
    np.testing.assert_array_equal(result(out), np.concatenate([block(v, rank) for v in values]))
    device.gather(one, out if rank == 1 else None, 1, stream=stream)
    if rank == 1:
        np.testing.assert_array_equal(result(out), total)
    device.scatter(data if rank == 1 else None, one, 1, stream=stream)
    np.testing.assert_array_equal(result(one), block(values[1], rank))
    device.reduce(data, 1, "max", out=out if rank == 1 else [], stream=stream)
    if rank == 1:
        np.testing.assert_array_equal(result(out), values[-1])
    np.testing.assert_array_equal(result(data), values[rank])
    # In place: the own block of the output is the input, and of a reduce-scatter the other way.
    out.set(np.where(np.arange(each * world) // each == rank, rank + 1, 0))
    device.all_gather(out[rank * each : (rank + 1) * each], out, stream=stream)
    np.testing.assert_array_equal(result(out), np.repeat(np.arange(world) + 1, each))
    device.broadcast(data, 1, stream=stream)
    np.testing.assert_array_equal(result(data), values[1])
    device.all_reduce(data, "average", stream=stream)
    device.barrier(stream=stream)
    np.testing.assert_array_equal(result(data), values[1])
    for array in (data, out, one):
        array.free()
    device.close()
    comm.close()
    return True


def types_and_streams():
    comm, device, driver = joined()
    world = comm.world
    stream = driver.stream()

    class Stream:
        cuda_stream = stream

    class Protocol:
        def __cuda_stream__(self):
            return (0, stream)

    for number, dtype in enumerate(["int8", "uint16", "int64", "float16", "float64", "bool"]):
        array = driver.array(np.ones(33, dtype))
        handle = [stream, Stream(), Protocol()][number % 3]
        device.all_reduce(array, "max" if dtype == "bool" else "sum", stream=handle)
        device.synchronize(handle)
        expected = True if dtype == "bool" else world
        assert (array.get() == expected).all(), dtype
        array.free()
    # Without a stream, it is the legacy default stream, for which plain copies wait.
    array = driver.array(np.full(7, 2, "int32"))
    device.all_reduce(array)
    assert (array.get() == 2 * world).all()
    # The array says in which stream it is made: that one is waited for.
    made_in = driver.stream()
    array.set(np.full(7, 1))
    device.all_reduce(array, stream=made_in)
    array.changes["stream"] = made_in
    device.all_reduce(array, stream=stream)
    device.synchronize(stream)
    assert (array.get() == world * world).all()
    array.free()
    # Complex numbers are summed by their parts.
    array = driver.array(np.full(4, 1 + 2j, "complex64"))
    device.all_reduce(array, stream=stream)
    device.synchronize(stream)
    assert (array.get() == world * (1 + 2j)).all()
    with pytest.raises(TypeError, match="complex"):
        device.all_reduce(array, "max", stream=stream)
    array.free()
    array = driver.array(np.ones(5, "float32"))
    device.all_reduce(array, detect_nonfinite=True, stream=stream)
    assert device.take_nonfinite(stream) is False
    array.set(np.array([1, 2, np.inf if comm.rank == 1 else 0, 0, 0]))
    device.all_reduce(array, detect_nonfinite=True, stream=stream)
    assert device.take_nonfinite(stream) is True
    assert device.take_nonfinite(stream) is False
    array.free()
    device.close()
    comm.close()
    return True


def wrong_use():
    comm, device, driver = joined()
    array = driver.array(np.ones(10, "float32"))
    with pytest.raises(ValueError, match="not on a CUDA device"):
        device.all_reduce(np.ones(3))
    with pytest.raises(TypeError, match="no array on a CUDA device"):
        device.all_reduce(b"abc")
    with pytest.raises(TypeError, match="no CUDA stream"):
        device.all_reduce(array, stream="s")
    with pytest.raises(ValueError, match="there are sum"):
        device.all_reduce(array, "add")
    with pytest.raises(ValueError, match="overlap"):
        device.all_reduce(array[0:6], out=array[3:9])
    with pytest.raises(TypeError, match="same type"):
        other = driver.array(np.ones(10))
        device.all_reduce(array, out=other)
    array.changes = {"strides": (8,)}
    with pytest.raises(ValueError, match="gaps"):
        device.all_reduce(array)
    array.changes = {"mask": array}
    with pytest.raises(ValueError, match="mask"):
        device.all_reduce(array)
    array.changes = {"data": (array.__cuda_array_interface__["data"][0], True)}
    with pytest.raises(ValueError, match="read-only"):
        device.all_reduce(array)
    # Memory of the host on one rank is refused on all.
    host = np.ones(10, "float32")
    array.changes = {"data": (host.ctypes.data, False)} if comm.rank == 1 else {}
    with pytest.raises(unisum.ConfigurationError, match="no address of CUDA memory") as raised:
        device.all_reduce(array)
    assert raised.value.ranks == (1,)
    array.changes = {}
    with pytest.raises(unisum.MismatchError, match="f32 x 10"):
        device.all_reduce(array if comm.rank == 0 else array[0:9])
    device.all_reduce(array)
    device.synchronize()
    other.free()
    array.free()
    with pytest.raises(unisum.ConfigurationError, match="no device 9"):
        comm.on_device(9)
    device.close()
    assert device.closed
    with pytest.raises(RuntimeError, match="closed"):
        device.all_reduce(array)
    comm.close()
    return True


def shown(array):
    """An array of a gradient on a device as its values."""
    interface = array.__cuda_array_interface__
    assert interface["version"] == 3 and interface["stream"] is None
    values = np.empty(interface["shape"], interface["typestr"])
    start, is_read_only = interface["data"]
    assert not is_read_only and values.nbytes == array.nbytes
    driver = cuda_emulator.Driver(array.ordinal)
    to = values.ctypes.data_as(ctypes.c_void_p)
    driver.call("cuMemcpyDtoH_v2", to, ctypes.c_uint64(start), ctypes.c_size_t(values.nbytes))
    return values


MODEL = [
    unisum.Parameter("weight", (20, 15)),
    unisum.Parameter("bias", (9,), "float64"),
    unisum.Parameter("scale", (3,), "bfloat16"),
    unisum.Parameter("tied", (70,), uses=2),
]


def gradient_buckets():
    comm, device, driver = joined()
    rank, world = comm.rank, comm.world
    stream, other = driver.stream(), driver.stream()

    def values(r, step, shape, dtype="float32"):
        return (np.arange(np.prod(shape)).reshape(shape) % 7 + 8 * r + step).astype(dtype)

    buckets = unisum.DeviceBuckets(comm, MODEL, bucket_bytes=1000, end_bucket_bytes=100)
    assert buckets.ordinal == device.ordinal and "CUDA IPC" in buckets.describe()
    assert sorted(sum(buckets.buckets, [])) == [0, 1, 2, 3] and len(buckets.buckets) > 2
    weight, scale = buckets.gradient("weight"), buckets.gradient(2)
    assert (weight.shape, weight.dtype, len(weight)) == ((20, 15), "float32", 20)
    assert (shown(weight) == 0).all()
    # What others would take for integers is shown by DLPack only.
    assert not hasattr(scale, "__cuda_array_interface__")
    assert not hasattr(weight, "__array_interface__")
    assert scale.__dlpack_device__() == (2, buckets.ordinal)
    ones = np.full(3, 0x3F80, "uint16")  # 1 as bfloat16
    tied = np.ones(70, "float32")
    for step in range(3):
        with buckets.begin(stream=stream) as under_way:
            under_way.put("tied", tied * (rank + step))
            under_way.put("bias", values(rank, step, 9, "float64"), stream=other)
            under_way.ready("tied", stream=other)
            under_way.put("scale", Bfloat16(ones))
            under_way.put(0, values(rank, step, (20, 15)))
        out = np.empty((20, 15), "float32")
        assert buckets.read("weight", out, stream=stream) is out
        mean = sum(values(r, step, (20, 15)) for r in range(world)) / world
        np.testing.assert_allclose(out, mean, rtol=1e-6)
        np.testing.assert_array_equal(shown(weight), out)
        mean = sum(values(r, step, 9, "float64") for r in range(world)) / world
        np.testing.assert_allclose(shown(buckets.gradient("bias")), mean, rtol=1e-12)
        # A collective on what is shown, also on what only DLPack shows.
        device.all_reduce(scale, "max", stream=stream)
        device.synchronize(stream)
        back = np.empty(3, "uint16")
        buckets.read("scale", Bfloat16(back), stream=stream)
        assert (back == ones).all()
        tied_back = buckets.read("tied", np.empty(70, "float32"), stream=stream)
        np.testing.assert_allclose(tied_back, sum(range(world)) / world + step, rtol=1e-6)
    assert buckets.take_nonfinite(stream) is False
    with buckets.begin(stream=stream) as under_way:
        for place, (_, shape, dtype, uses) in enumerate(MODEL):
            for _ in range(uses - 1):
                under_way.ready(place)
            if dtype == "bfloat16":
                under_way.ready(place)
            else:
                worst = np.inf if rank == 1 and place == 0 else 0
                under_way.put(place, np.full(shape, worst, dtype))
    buckets.synchronize(stream, 30)
    assert buckets.take_nonfinite(stream) is True
    assert buckets.take_nonfinite(stream) is False
    buckets.close()
    # What is shown stays where it is.
    assert np.isinf(shown(weight)).all() and device.ordinal == weight.ordinal
    with pytest.raises(RuntimeError, match="the buckets were closed"):
        buckets.gradient("weight")
    with pytest.raises(RuntimeError, match="the buckets were closed"):
        buckets.begin()
    del weight, scale
    device.close()
    comm.close()
    return True


class Bfloat16:
    """Elements of NumPy's uint16 that say that they are bfloat16."""

    class dtype:
        name = "bfloat16"

    def __init__(self, values):
        self._values = values
        self.__array_interface__ = {**values.__array_interface__, "typestr": "<V2"}


def steps_that_fail():
    comm, device, driver = joined()
    stream = driver.stream()
    buckets = unisum.DeviceBuckets(comm, MODEL[:2])

    def complete(step):
        step.put("weight", np.ones((20, 15), "float32"))
        step.put("bias", np.ones(9))

    for how in ("left out", "twice", "raised", "complained of"):
        own = KeyError if how == "raised" and comm.rank == 1 else unisum.Error
        with pytest.raises(own) as raised:
            with buckets.begin(stream=stream) as step:
                if comm.rank != 1:
                    complete(step)
                elif how == "left out":
                    step.ready("bias")
                elif how == "twice":
                    complete(step)
                    step.ready("bias")
                elif how == "raised":
                    raise KeyError("no such batch")
                else:
                    complete(step)
                    step.put("bias", np.ones(8))
        if comm.rank != 1:
            assert raised.value.kind == "step_failed", how
            words = {"left out": "weight", "twice": "once more", "raised": "no such batch"}
            assert words.get(how, "8 elements") in str(raised.value)
        if how in ("twice", "complained of") and comm.rank == 1:
            # It was told at once.
            assert raised.value.kind == "configuration"
        with buckets.begin(stream=stream) as step:
            complete(step)
        assert (buckets.read("bias", np.empty(9), stream=stream) == 1).all()
    with pytest.raises(RuntimeError, match="no step is under way"):
        step.ready("bias")
    step = buckets.begin(stream=stream)
    with pytest.raises(RuntimeError, match="a step is under way"):
        buckets.begin()
    with pytest.raises(ValueError, match="no parameter 'bais'"):
        step.ready("bais")
    with pytest.raises(ValueError, match="no parameter 2 among 2"):
        step.put(2, np.ones(9))
    with pytest.raises(TypeError, match="elements of f32"):
        step.put("bias", np.ones(9, "float32"))
    with pytest.raises(TypeError, match="no CUDA stream"):
        step.ready("bias", stream="s")
    # Nothing of that has harmed the step.
    complete(step)
    step.wait()
    read_only = np.ones(9)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        buckets.read("bias", read_only, stream=stream)
    buckets.close()
    with pytest.raises(unisum.MismatchError, match="bucket_bytes"):
        unisum.DeviceBuckets(comm, MODEL, bucket_bytes=1000 + comm.rank)
    with pytest.raises(unisum.ConfigurationError, match="no device 9"):
        unisum.DeviceBuckets(comm, MODEL, device=9)
    with unisum.DeviceBuckets(comm, MODEL, detect_nonfinite=False) as blind:
        with pytest.raises(unisum.ConfigurationError, match="detect_nonfinite"):
            blind.take_nonfinite()
    device.close()
    comm.close()
    return True


def failing():
    if os.environ["UNISUM_RANK"] == "1":
        os.environ["CUDA_EMULATOR_FAIL"] = "cuLaunchKernel:5:719"
    _, device, driver = joined()
    array = driver.array(np.ones(10, "float32"))
    with pytest.raises(unisum.Error) as raised:
        for _ in range(1000):
            device.all_reduce(array)
            device.synchronize()
    return raised.value.kind, raised.value.ranks, str(raised.value)


def absent():
    with unisum.connect() as comm:
        with pytest.raises(unisum.ConfigurationError, match="there is no CUDA driver"):
            unisum.cuda_devices()
        with pytest.raises(unisum.ConfigurationError, match="rank 0 can't use its device"):
            comm.on_device()
    return True


def test_every_collective_is_right(emulated):
    for ranks in (2, 3):
        emulated(ranks, DELAY_US=200, LEAKS="report")
        assert all(unisum.spawn(every_collective, ranks))


def test_types_and_streams(emulated):
    emulated(2, DELAY_US=200)
    assert all(unisum.spawn(types_and_streams, 2))


def test_wrong_use_is_refused(emulated):
    emulated(2)
    assert all(unisum.spawn(wrong_use, 2))


def test_gradient_buckets(emulated):
    for ranks in (2, 3):
        emulated(ranks, DELAY_US=200, LEAKS="report")
        assert all(unisum.spawn(gradient_buckets, ranks))


def test_steps_that_fail_fail_on_all_ranks(emulated):
    emulated(2)
    assert all(unisum.spawn(steps_that_fail, 2))


def test_a_failing_driver_is_told_to_all_ranks(emulated):
    emulated(3)
    for kind, ranks, text in unisum.spawn(failing, 3):
        assert (kind, ranks) == ("device", (1,)) and "cuLaunchKernel" in text


def test_without_a_driver_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    try:
        unisum.cuda_devices()
    except unisum.ConfigurationError:
        assert all(unisum.spawn(absent, 2))
