"""Jobs that outlive their ranks: real processes, killed at random moments.

`UNISUM_TEST_KILLS=N` makes so many trials for each transport, by hand; `UNISUM_TEST_SEED` repeats a
run.
"""

import hashlib
import os
import pickle
import random
import time

import numpy
import pytest
import unisum
from worlds import World

TRIALS = int(os.environ.get("UNISUM_TEST_KILLS", 4))
# Elements of the first parameter, by which it can be seen who took part in a step.
PROCESSES = 16


def meeting(folder):
    return {"UNISUM_RENDEZVOUS": f"file://{folder}/world"}


def drawn(what):
    seed = int(os.environ.get("UNISUM_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"{what}: UNISUM_TEST_SEED={seed}")
    return random.Random(seed)


def victims_of(draw, trial, ranks):
    """Rank 0 no less often than others; two where a quorum is left without it."""
    victims = [0 if trial % 2 == 0 else draw.randrange(ranks)]
    if ranks > 4 and trial % 3 == 0:
        victims.append((victims[0] + 1 + draw.randrange(ranks - 1)) % ranks)
    return victims


class Training:
    """Steps of gradient buckets, which go on whoever is killed: no call fails."""

    def __init__(self, count, wire):
        self.comm = unisum.connect(elastic=1)
        parameters = [
            unisum.Parameter("who", (PROCESSES,), "float64"),
            unisum.Parameter("first", (count // 8 + 1, 8)),
            unisum.Parameter("last", (3,), "float64"),
        ]
        self.buckets = unisum.Buckets(
            self.comm, parameters, wire=wire, bucket_bytes=32 << 10, end_bucket_bytes=1024
        )
        assert self.buckets.view == self.comm.view and self.comm.view.epoch == 1
        self.process = self.comm.view.processes[self.comm.rank]
        self.weights = numpy.zeros((count // 8 + 1, 8), "float32")
        self.took_part = numpy.zeros(PROCESSES, int)
        self.steps = self.changes = 0

    def step(self):
        with self.buckets.begin() as step:
            step.put("last", numpy.ones(3))
            first = step.view("first").numpy()
            first[:] = (numpy.arange(first.size).reshape(first.shape) * 7 + self.steps * 3
                        + self.process) % 41 - 20
            step.ready("first")
            step.view("who").numpy()[self.process] = 1
            step.ready("who")
        self.steps += 1
        self.learn(step.report)
        self.follow(step.report.change)
        return step.report.participants

    def learn(self, report):
        """The averages are over whole ranks: as many as the report says."""
        who = self.buckets.gradient("who").numpy()
        there = numpy.flatnonzero(who)
        assert len(there) == report.participants, report
        assert numpy.allclose(who[there], 1 / report.participants, rtol=1e-12), report
        if report.change is None or report.change.redone:
            assert there.tolist() == self.buckets.view.processes, report
        self.took_part[there] += 1
        self.weights += self.buckets.gradient("first").numpy()

    def follow(self, change):
        taken = self.buckets.take_communicator()
        assert (taken is None) == (change is None)
        if change is None:
            return
        self.changes += 1
        assert change.lost and change.took > 0 and change.view.epoch > self.comm.view.epoch
        lost = {self.comm.view.processes[rank] for rank in change.lost}
        left = [it for it in self.comm.view.processes if it not in lost]
        assert change.view.processes == left and taken.view == change.view == self.buckets.view
        assert self.buckets.take_communicator() is None
        self.comm = taken
        assert (self.comm.world, left[self.comm.rank]) == (len(left), self.process)
        # Memory is that of the job's now.
        unisum.empty(3)

    def told(self):
        """What is the same on all ranks in the end."""
        for process in self.comm.view.processes:
            assert self.took_part[process] == self.steps
        # What was taken is a communicator as any other.
        self.comm.barrier()
        bits = hashlib.sha256(self.weights.tobytes()).hexdigest()
        return (self.comm.view, self.steps, self.took_part.tolist(), bits)


def train(talk, count, last, wire):
    training = Training(count, wire)
    until = None
    while until is None or training.steps < until:
        participants = training.step()
        if training.steps == 3:
            talk("training")
        # Some ranks may hear of the change in an earlier step than others.
        if participants == last and until is None:
            until = training.steps + 5
    assert training.changes
    talk(training.told())


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_survivors_of_kills_end_the_same_steps_with_the_same_bits(transport, tmp_path):
    draw = drawn(transport)
    for trial in range(TRIALS):
        ranks = 3 + draw.randrange(3)
        victims = victims_of(draw, trial, ranks)
        arguments = (draw.choice([0, 3000, 100_000]), ranks - len(victims),
                     [None, "int8", "bf16"][trial % 3])
        print(f"trial {trial}: of {ranks}, {victims} die, {arguments}")
        environment = {"UNISUM_TRANSPORT": transport, "UNISUM_REPRODUCIBLE": trial % 2}
        folder = tmp_path / str(trial)
        folder.mkdir()
        with World(train, ranks, arguments, **meeting(folder), **environment) as world:
            world.wait_for("training")
            # Any moment of some steps.
            time.sleep(draw.random() * 0.05)
            for victim in victims:
                world.signal(victim)
                time.sleep(draw.choice([0, 0.0003, 0.02]))
            told = list(world.end(victims).values())
        assert all(it == told[0] for it in told), told


def add(talk, last):
    """Calls that a loss ends are made again: what they read is as it was."""
    comm = unisum.connect(elastic=True)
    process = comm.view.processes[comm.rank]
    done, until = 0, None
    while until is None or done < until:
        in_place = numpy.full(1000, process + 1.0)
        try:
            if done % 2:
                comm.all_reduce(in_place)
            else:
                comm.all_reduce(in_place, async_op=True).wait()
        except unisum.ViewChanged as changed:
            assert changed.kind == "view_changed" and isinstance(changed, unisum.Error)
            assert changed.epoch > comm.view.epoch and changed.joined == ()
            assert all(rank < comm.world for rank in changed.lost)
            again = pickle.loads(pickle.dumps(changed))
            assert type(again) is unisum.ViewChanged and str(again) == str(changed)
            assert (again.epoch, again.lost, again.ranks) == (
                changed.epoch, changed.lost, changed.ranks)
            if done % 2:
                assert (in_place == process + 1).all()
            comm, done = align(comm, done)
        else:
            done += 1
        if done == 3:
            talk("training")
        if comm.world == last and until is None:
            until = done + 5
    expected = sum(it + 1.0 for it in comm.view.processes)
    assert (comm.all_reduce(numpy.full(3, process + 1.0)) == expected).all()
    talk((comm.view, done))


def align(comm, done):
    """All ranks after as many calls, in the view of those that are left."""
    while True:
        comm = comm.rebuild()
        try:
            steps = numpy.zeros(comm.world, int)
            comm.all_gather(numpy.array([done]), steps)
            return comm, int(steps.max())
        except unisum.ViewChanged:
            continue


def test_calls_that_a_loss_ends_can_be_made_again(tmp_path):
    draw = drawn("calls")
    for trial in range(TRIALS):
        ranks = 3 + draw.randrange(3)
        victims = victims_of(draw, trial, ranks)
        folder = tmp_path / str(trial)
        folder.mkdir()
        with World(add, ranks, (ranks - len(victims),), **meeting(folder)) as world:
            world.wait_for("training")
            time.sleep(draw.random() * 0.03)
            for victim in victims:
                world.signal(victim)
            told = list(world.end(victims).values())
        assert all(it == told[0] for it in told), told


def change_without_a_loss(talk):
    comm = unisum.connect(elastic=1)
    if comm.rank == 1:
        comm.revoke()
    with pytest.raises(unisum.ViewChanged) as raised:
        while True:
            comm.barrier()
    assert (raised.value.epoch, raised.value.lost) == (2, ())
    again = comm.rebuild()
    assert again.view == unisum.View(2, comm.view.processes)
    with pytest.raises(unisum.ConfigurationError, match="not rank"):
        again.shrink([again.rank])
    group = again.split(again.rank % 2)
    assert group.view is None
    with pytest.raises(unisum.ConfigurationError, match="can be rebuilt"):
        group.rebuild()
    talk("rebuilt")
    again.barrier()
    if again.rank == 2:
        # It is left behind while it is in a call, or before.
        with pytest.raises(unisum.RankLostError, match="without this one"):
            while True:
                again.barrier()
    else:
        smaller = again.shrink([2])
        assert smaller.view == unisum.View(3, [0, 1, 3])
        assert smaller.all_reduce(numpy.ones(1))[0] == 3
    talk("ended")


def test_ranks_revoke_rebuild_and_shrink(tmp_path):
    with World(change_without_a_loss, 4, **meeting(tmp_path)) as world:
        assert set(world.end().values()) == {"ended"}


def need_all(talk):
    comm = unisum.connect(elastic=3)
    talk("training")
    with pytest.raises(unisum.RankLostError, match="the job needs 3") as raised:
        while True:
            comm.barrier()
    assert raised.value.ranks == (1,)
    talk("ended")


def test_a_job_of_too_few_ends_with_a_loss(tmp_path):
    with World(need_all, 3, **meeting(tmp_path)) as world:
        world.wait_for("training")
        world.signal(1)
        assert world.end([1]) == {0: "ended", 2: "ended"}


def not_elastic(talk, elastic):
    """The argument wins over the variable."""
    comm = unisum.connect(elastic=elastic)
    assert comm.view is None
    with pytest.raises(unisum.ConfigurationError, match="Builder::elastic"):
        comm.rebuild()
    with pytest.raises(unisum.ConfigurationError):
        comm.revoke()
    buckets = unisum.Buckets(comm, [("w", (4,))])
    assert buckets.view is None and buckets.take_communicator() is None
    with buckets.begin() as step:
        step.put("w", numpy.ones(4, "float32"))
    assert step.report.change is None
    talk("ended")


@pytest.mark.parametrize("elastic, variable", [(None, 0), (False, 1), (0, 2)])
def test_a_job_is_elastic_only_if_it_is_said(tmp_path, elastic, variable):
    environment = {**meeting(tmp_path), "UNISUM_ELASTIC": variable}
    with World(not_elastic, 2, (elastic,), **environment) as world:
        assert set(world.end().values()) == {"ended"}


def by_the_variable(talk):
    assert unisum.connect().view == unisum.View(1, [0, 1])
    talk("ended")


def test_the_variable_makes_a_job_elastic(tmp_path):
    with World(by_the_variable, 2, **meeting(tmp_path), UNISUM_ELASTIC=2) as world:
        assert set(world.end().values()) == {"ended"}


def test_what_is_no_number_of_ranks_is_refused():
    for elastic in (-1, 1 << 20):
        with pytest.raises((unisum.ConfigurationError, OverflowError)):
            unisum.connect(rank=0, world=2, elastic=elastic)
