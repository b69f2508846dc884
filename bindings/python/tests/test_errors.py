"""What raises, and what it says."""

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import unisum


def alone():
    return unisum.connect(rank=0, world=1)


@pytest.mark.parametrize(
    "data, error",
    [
        (np.ones((4, 4))[:, ::2], ValueError),
        (np.array([object()]), TypeError),
        (3, TypeError),
        (None, TypeError),
        (np.ones(3, ">f4"), TypeError),
        (b"abc", ValueError),
        (np.array(["x"]), TypeError),
    ],
    ids=["gaps", "objects", "number", "None", "byte order", "read-only", "text"],
)
def test_what_is_no_array_is_refused(data, error):
    with alone() as comm, pytest.raises(error):
        comm.all_reduce(data)


def test_arguments_are_checked():
    with alone() as comm:
        with pytest.raises(ValueError, match="there are sum"):
            comm.all_reduce(np.ones(1), "add")
        with pytest.raises(unisum.ConfigurationError) as raised:
            comm.set_algorithm("none such")
        assert raised.value.kind == "configuration"
        with pytest.raises(TypeError, match="float33"):
            comm.empty(3, "float33")
        with pytest.raises(TypeError, match="same type"):
            comm.all_gather(np.ones(1), np.ones(1, "float32"))
    with pytest.raises(RuntimeError, match="closed"):
        comm.all_reduce(np.ones(1))
    with pytest.raises(TypeError, match="colour"):
        unisum.connect(colour="red")


def mark_of(name):
    """A file beside the one by which these ranks meet."""
    folder = os.path.dirname(os.environ["UNISUM_RENDEZVOUS"].removeprefix("file://"))
    return os.path.join(folder, name)


def mark(name):
    open(mark_of(name), "w").close()


def await_mark(name):
    until = time.monotonic() + 60
    while not os.path.exists(mark_of(name)):
        assert time.monotonic() < until, name
        time.sleep(0.01)


def different_calls():
    comm = unisum.connect()
    with pytest.raises(unisum.MismatchError) as raised:
        comm.all_reduce(np.ones(3 + comm.rank))
    error = raised.value
    assert error.kind == "mismatch" and error.ranks
    assert "3" in str(error) and "4" in str(error)
    assert type(pickle.loads(pickle.dumps(error))) is unisum.MismatchError
    with pytest.raises(unisum.AbortedError):
        comm.all_reduce(np.ones(3))


def a_rank_is_killed():
    comm = unisum.connect()
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(unisum.RankLostError) as raised:
        comm.all_reduce(np.ones(3))
    assert raised.value.ranks == (1,)


def a_rank_is_late():
    comm = unisum.connect(timeout=4)
    comm.barrier()
    if comm.rank == 1:
        return await_mark("told")
    work = comm.all_reduce(np.ones(3), async_op=True)
    with pytest.raises(unisum.TimeoutError, match="goes on"):
        work.wait(0.2)
    with pytest.raises(unisum.TimeoutError) as raised:
        work.wait()
    mark("told")
    error = raised.value
    assert error.ranks == (1,) and isinstance(error, TimeoutError)
    assert "reduce" in error.operation and error.step[0] <= error.step[1], (error.operation, error.step)


def interrupted(asynchronous):
    comm = unisum.connect()
    comm.barrier()
    begun = time.monotonic()
    if comm.rank == 0:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            if asynchronous:
                comm.all_reduce(np.ones(3), async_op=True).wait()
            else:
                comm.all_reduce(np.ones(3))
        if asynchronous:
            comm.abort("Ctrl-C")
        mark("interrupted")
    else:
        await_mark("interrupted")
        with pytest.raises(unisum.AbortedError):
            for _ in range(2):
                comm.all_reduce(np.ones(3))
    assert time.monotonic() - begun < 40


def handled():
    """A handler that does not raise lets the call go on."""
    comm = unisum.connect()
    seen = []

    def see(*_):
        seen.append(1)
        mark("seen")

    signal.signal(signal.SIGUSR1, see)
    comm.barrier()
    if comm.rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    else:
        await_mark("seen")
    assert comm.all_reduce(np.ones(1))[0] == 2
    assert bool(seen) == (comm.rank == 0)


def aborted():
    comm = unisum.connect()
    comm.barrier()
    if comm.rank == 1:
        comm.abort("enough")
    with pytest.raises(unisum.AbortedError, match="enough"):
        comm.all_reduce(np.ones(1))


@pytest.mark.parametrize("scenario", [different_calls, a_rank_is_late, handled, aborted])
def test_scenario(scenario):
    unisum.spawn(scenario, 2)


def test_a_killed_rank_is_named():
    with pytest.raises(unisum.RankFailed) as raised:
        unisum.spawn(a_rank_is_killed, 2)
    assert raised.value.rank == 1 and "exit status -9" in str(raised.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_ends_a_wait(asynchronous):
    unisum.spawn(interrupted, 2, (asynchronous,))


def fails(which):
    comm = unisum.connect()
    if comm.rank == which:
        raise ValueError("of its own")
    comm.barrier()


def test_spawn_tells_who_failed():
    with pytest.raises(unisum.RankFailed, match="of its own") as raised:
        unisum.spawn(fails, 3, (2,))
    assert raised.value.rank == 2


class Dictionary:
    """The least that a store has to be: shared by threads here."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values.get(key)


def test_a_store_of_two_methods_is_enough():
    store, sums = Dictionary(), []

    def rank(number):
        with unisum.connect(rank=number, world=2, store=store) as comm:
            sums.append(comm.all_reduce(np.full(2, number))[0])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert sums == [1, 1]
