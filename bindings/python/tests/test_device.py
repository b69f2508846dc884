"""Collectives on device memory, on the devices of the repository's emulated driver."""

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
