"""Processes that join an elastic job that runs."""

import hashlib

import numpy
import pytest
import unisum
from worlds import World

WEIGHTS = 1000
PARAMETERS = [unisum.Parameter("weights", (WEIGHTS,)), unisum.Parameter("ranks", (1,), "float64")]


def meeting(folder):
    return {"UNISUM_RENDEZVOUS": f"file://{folder}/world"}


def state_of(weights, steps):
    return numpy.array([steps], "int64").tobytes() + weights.tobytes()


def train(talk, until, joins, ends):
    """Steps of gradient buckets, until the job has `until` ranks, and `ends` more."""
    if joins:
        comm = unisum.join(elastic=1)
        buckets = unisum.Buckets(comm, PARAMETERS)
        state = comm.share_state()
        steps = int(numpy.frombuffer(state[:8], "int64")[0])
        weights = numpy.frombuffer(state[8:], "float32").copy()
        # Behind those that were there; the other newcomer may have entered the same view.
        assert steps > 0 and comm.rank >= 2
    else:
        comm = unisum.connect(elastic=1)
        assert comm.newcomers == 0
        buckets = unisum.Buckets(comm, PARAMETERS)
        steps, weights = 0, numpy.zeros(WEIGHTS, "float32")
    last = None
    while last is None or steps < last:
        with buckets.begin() as step:
            step.put("ranks", numpy.ones(1))
            step.put("weights", numpy.full(WEIGHTS, comm.rank + steps % 7, "float32"))
        report = step.report
        comm = buckets.take_communicator() or comm
        assert report.participants == comm.world and buckets.gradient("ranks").numpy()[0] == 1
        weights += buckets.gradient("weights").numpy()
        steps += 1
        if report.newcomers and last is None:
            before = comm.view
            comm = buckets.admit()
            assert comm.view.processes[: len(before.processes)] == before.processes
            assert comm.share_state(state_of(weights, steps)) is None
        if steps == 3:
            talk("training")
        # The same step on all ranks.
        if report.participants == until and last is None:
            last = steps + ends
    # Memory is that of the job's now.
    ones = unisum.empty(3)
    ones.numpy()[:] = 1
    comm.all_reduce(ones)
    assert (ones.numpy() == comm.world).all()
    talk((comm.view, steps, hashlib.sha256(weights.tobytes()).hexdigest()))


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_processes_join_a_training_and_have_the_same_weights(transport, tmp_path):
    environment = {**meeting(tmp_path), "UNISUM_TRANSPORT": transport}
    with World(train, 2, (4, False, 5), **environment) as world:
        world.wait_for("training")
        for _ in range(2):
            world.add(train, (4, True, 5))
        told = list(world.end().values())
    assert len(told) == 4 and all(it == told[0] for it in told), told
    assert len(told[0][0].processes) == 4


def test_processes_join_after_others_were_killed(tmp_path):
    with World(train, 3, (4, False, 5), **meeting(tmp_path)) as world:
        world.wait_for("training")
        world.signal(0)
        for _ in range(2):
            world.add(train, (4, True, 5))
        told = list(world.end([0]).values())
    assert len(told) == 4 and all(it == told[0] for it in told), told
    assert len(told[0][0].processes) == 4 and told[0][0].epoch > 2


def test_whoever_finds_the_record_of_a_job_that_was_killed_is_told(tmp_path):
    with World(train, 2, (3, False, 5), **meeting(tmp_path)) as world:
        world.wait_for("training")
        world.signal(0)
        world.signal(1)
        world.end([0, 1])
    with World(late, 1, **meeting(tmp_path)) as world:
        assert list(world.end().values()) == ["refused"]


def late(talk):
    with pytest.raises(unisum.RendezvousError, match="it has ended"):
        unisum.join(elastic=1)
    talk("refused")


def admit_between_calls(talk, joins):
    """Without buckets: all ranks find out by a call of their own whether all know of a newcomer."""
    if joins:
        comm = unisum.join(elastic=True)
        assert comm.share_state() == b"state"
    else:
        comm = unisum.connect(elastic=True)
        talk("running")
        known = numpy.zeros(1, int)
        while known[0] == 0:
            known[0] = comm.newcomers
            comm.all_reduce(known, "min")
        comm = comm.admit()
        mine = b"state" if comm.rank == 0 else b"other"
        assert comm.world == 3 and comm.share_state(b"state") is None
        with pytest.raises(unisum.MismatchError) as raised:
            comm.share_state(mine)
        assert raised.value.ranks == (1,)
    if joins:
        with pytest.raises(unisum.MismatchError, match=r"ranks \[1\]"):
            comm.share_state()
    comm.barrier()
    talk(comm.view)


def test_a_process_is_let_in_between_two_calls(tmp_path):
    with World(admit_between_calls, 2, (False,), **meeting(tmp_path)) as world:
        world.wait_for("running")
        world.add(admit_between_calls, (True,))
        views = list(world.end().values())
    assert len(views) == 3 and views[0].epoch == 2 and all(it == views[0] for it in views)


def refused(talk):
    with pytest.raises(unisum.ConfigurationError, match="is for elastic jobs"):
        unisum.join()
    with pytest.raises(unisum.ConfigurationError, match="by a file or by a store"):
        unisum.join(elastic=1, rendezvous="tcp://127.0.0.1:1")
    with pytest.raises(unisum.RendezvousError):
        unisum.join(elastic=1, connect_timeout=1)
    with pytest.raises(TypeError, match="no option `elastics`"):
        unisum.join(elastics=1)
    talk("refused")


def test_who_can_not_join_is_told_why(tmp_path):
    with World(refused, 1, **meeting(tmp_path)) as world:
        assert list(world.end().values()) == ["refused"]
