"""Sharded buckets, and what ranks keep for their shards: each rank updates its share of a model."""

import contextlib
import ctypes
import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import unisum
from worlds import World

SHAPES = [("embedding", (100, 70)), ("scalar", ()), ("none", (0, 3)), ("weight", (40, 40)),
          ("bias", (257,))]
PARAMETERS = [unisum.Parameter(name, shape) for name, shape in SHAPES]
#: Weights and two moments.
VECTORS = 3


def meeting(folder):
    return {"UNISUM_RENDEZVOUS": f"file://{folder}/world", "UNISUM_REPRODUCIBLE": 1}


def gradient(number, parameter, shape):
    """The same on all ranks, in eighths: their sums and averages are exact."""
    elements = numpy.arange(numpy.prod(shape, dtype=int))
    eighths = (3 * number + 5 * parameter + 7 * elements) % 11 - 5
    return (eighths / 8).astype("float32").reshape(shape)


def adamw(weights, first, second, gradients, number):
    """One step, in place, of elements that know nothing of each other."""
    one = numpy.float32(1)
    rate, decay, beta, gamma, little = numpy.array([1e-2, 1e-2, 0.9, 0.99, 1e-8], "float32")
    first *= beta
    first += (one - beta) * gradients
    second *= gamma
    second += (one - gamma) * gradients * gradients
    corrected = first / numpy.float32(1 - 0.9 ** (number + 1))
    root = numpy.sqrt(second / numpy.float32(1 - 0.99 ** (number + 1)))
    weights -= rate * decay * weights
    weights -= rate * corrected / (root + little)


class Reference:
    """What one process has after so many steps, which does all by itself, without unisum."""

    def __init__(self):
        self.steps = -1

    def after(self, steps):
        if self.steps < 0 or steps < self.steps:
            self.steps = 0
            self.state = []
            for number, (_, shape) in enumerate(SHAPES):
                weights = numpy.arange(numpy.prod(shape, dtype=int), dtype="float32")
                weights = weights / numpy.float32(64) - numpy.float32(number)
                self.state.append([weights, numpy.zeros_like(weights), numpy.zeros_like(weights)])
        while self.steps < steps:
            for number, vectors in enumerate(self.state):
                adamw(*vectors, gradient(self.steps, number, SHAPES[number][1]).ravel(), self.steps)
            self.steps += 1
        return self.state


def same(left, right):
    return numpy.asarray(left).tobytes() == numpy.asarray(right).tobytes()


class Training:
    """Steps of sharded AdamW, which go on whoever is killed and whoever comes."""

    def __init__(self, talk, comm, folder, copies):
        self.talk, self.comm, self.folder, self.copies = talk, comm, folder, copies
        self.state, self.reference = unisum.ShardState(VECTORS), Reference()
        self.lost = self.again = 0

    def run(self):
        while True:
            try:
                if not self.run_in_view():
                    return
                self.comm = self.comm.admit()
            except unisum.ViewChanged:
                self.comm = self.comm.rebuild()

    def run_in_view(self):
        """Whether newcomers ask to be let in; otherwise it has ended."""
        buckets = unisum.Buckets(
            self.comm, PARAMETERS, bucket_bytes=4000, end_bucket_bytes=900, sharded=True
        )
        self.lay_out(buckets)
        weights = buckets.weights()
        # Newcomers' numbers are drawn.
        there = "-".join(str(it) if it < 3 else "new" for it in self.comm.view.processes)
        is_told = False
        while True:
            report = self.step(buckets)
            if self.state.version % 7 == 0:
                self.gather(buckets, weights)
            if self.copies and self.state.version % self.copies == 0:
                buckets.copy_shards(self.state)
            if not is_told:
                self.talk(f"stepped {there}")
            is_told = True
            end = numpy.array([os.path.exists(f"{self.folder}/end")])
            self.comm.all_reduce(end, "or")
            if end[0]:
                self.gather(buckets, weights)
                self.told = [weights.parameter(it.name).numpy().tobytes() for it in PARAMETERS]
                return False
            if report.newcomers:
                return True

    def lay_out(self, buckets):
        before = self.state.version
        resharded = buckets.reshard(self.state)
        version = resharded.version
        assert self.state.version == version
        known = self.reference.after(version)
        for it in resharded.lost(self.comm.rank):
            for vector in range(VECTORS):
                elements = self.state.elements(vector, it.parameter, it.start, it.stop).numpy()
                assert not elements.any()
                elements[:] = known[it.parameter][vector][it.start : it.stop]
        if before:
            self.lost += sum(it.stop - it.start for it in resharded.lost())
            self.again += before - version
        seen = [numpy.zeros(len(it[0]), int) for it in known]
        for it in resharded.moves:
            seen[it.parameter][it.start : it.stop] += 1
        assert all((it == 1).all() for it in seen), resharded
        self.state.set_version(version)
        self.check(buckets)

    def check(self, buckets):
        """What this rank has is what it should be, to the bit."""
        known = self.reference.after(self.state.version)
        for bucket in range(len(buckets.buckets)):
            for it in buckets.shard_pieces(bucket):
                for vector in range(VECTORS):
                    own = self.state.vector(bucket, vector).numpy()
                    own = own[it.at : it.at + it.stop - it.start]
                    assert same(own, known[it.parameter][vector][it.start : it.stop]), it

    def step(self, buckets):
        number = self.state.version
        with buckets.begin() as step:
            for place, (name, shape) in reversed(list(enumerate(SHAPES))):
                step.put(name, gradient(number, place, shape))
        for bucket in range(len(buckets.buckets)):
            vectors = [self.state.vector(bucket, it).numpy() for it in range(VECTORS)]
            adamw(*vectors, buckets.shard_gradient(bucket).numpy(), number)
        self.state.set_version(number + 1)
        return step.report

    def gather(self, buckets, weights):
        for bucket in range(len(buckets.buckets)):
            weights.shard(bucket).numpy()[:] = self.state.vector(bucket, 0).numpy()
        buckets.gather(weights)
        known = self.reference.after(self.state.version)
        for place, (name, shape) in enumerate(SHAPES):
            found = weights.parameter(name).numpy()
            assert found.shape == shape and same(found, known[place][0]), name
        self.check(buckets)


def train(talk, folder, joins, copies):
    comm = unisum.join(elastic=1) if joins else unisum.connect(elastic=1)
    training = Training(talk, comm, folder, copies)
    training.run()
    bits = hashlib.sha256(b"".join(training.told)).hexdigest()
    talk((training.comm.view.processes, training.state.version, bits, training.lost))


def finish(world, folder, dead):
    (folder / "end").touch()
    return list(world.end(dead).values())


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_sharded_state_outlives_a_kill_and_takes_a_newcomer(transport, tmp_path):
    environment = {**meeting(tmp_path), "UNISUM_TRANSPORT": transport}
    with World(train, 3, (tmp_path, False, 1), **environment) as world:
        world.wait_for("stepped 0-1-2")
        world.signal(1)
        world.wait_for("stepped 0-2", without=[1])
        world.add(train, (tmp_path, True, 1))
        world.wait_for("stepped 0-2-new", without=[1])
        # The one that has been there longest.
        world.signal(0)
        world.wait_for("stepped 2-new", without=[0, 1])
        told = finish(world, tmp_path, [0, 1])
    assert told[0][0][0] == 2 and len(told[0][0]) == len(told) == 2 and told[0][1] >= 4, told
    assert all(it == told[0] for it in told) and told[0][3] == 0, told


def test_what_the_dead_had_is_told_and_restored(tmp_path):
    with World(train, 3, (tmp_path, False, 0), **meeting(tmp_path)) as world:
        world.wait_for("stepped 0-1-2")
        world.signal(0)
        world.wait_for("stepped 1-2", without=[0])
        world.add(train, (tmp_path, True, 0))
        world.wait_for("stepped 1-2-new", without=[0])
        told = finish(world, tmp_path, [0])
    # A third of each bucket, some of which is padding; the newcomer saw nothing lost.
    elements = 7000 + 1 + 1600 + 257
    assert [it[:3] for it in told] == [told[0][:3]] * 3, told
    assert abs(told[0][3] - elements // 3) < 500 and told[1][3] == told[0][3], told
    assert told[2][3] == 0, told


LARGE = [unisum.Parameter("a", (500_000,)), unisum.Parameter("b", (500_000,))]


def hold_views(transport="tcp"):
    """Memory so large that the system takes it back at once: a view that dangles ends the rank."""
    import torch

    with unisum.connect(transport=transport) as comm:
        state = unisum.ShardState(2)
        whole = unisum.Buckets(comm, LARGE, bucket_bytes=1 << 30, end_bucket_bytes=1 << 30,
                               sharded=True)
        whole.reshard(state)
        state.set_version(1)
        count = len(whole.shard(0))
        assert len(whole.buckets) == 1 and count >= 500_000
        first = whole.shard_pieces(0)[0]
        views = [state.vector(0, 0).numpy(), torch.from_dlpack(state.vector(0, 0)),
                 state.vector(0, 0).torch(), state.elements(0, *first[:3]).numpy()]
        views[0][:] = numpy.arange(count)
        array = state.vector(0, 0)
        parts = unisum.Buckets(comm, LARGE, bucket_bytes=1 << 20, end_bucket_bytes=1 << 20,
                               sharded=True)
        resharded = parts.reshard(state)
        assert not resharded.lost() and any(it.source != it.destination for it in resharded.moves)
        # Memory that was given back is given to others.
        others = [numpy.full(count, -1, "float32") for _ in range(8)]
        for view in views:
            assert (view[:100] == view[0] + numpy.arange(100)).all() and view[-1] >= 0
        assert (array.numpy() == numpy.arange(count)).all()
        # It is the program's alone: the state has other memory.
        kept = [state.vector(it, 0).numpy().copy() for it in range(len(parts.buckets))]
        views[0][:] = -7
        views[1][:] = -8
        assert all(same(state.vector(it, 0), kept[it]) for it in range(len(kept)))
        last = state.vector(0, 1).numpy()
        gradients, weights = parts.shard_gradient(0).numpy(), parts.weights()
        parameter, shard = weights.parameter("a").torch(), weights.shard(0).numpy()
        parts.copy_shards(state)
        parts.close()
        del state, parts, whole, weights, array, others
        gc.collect()
        for it in (last, gradients, parameter, shard, views[0]):
            it[:] = 3
            assert (it == 3).all()
    return True


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_views_outlive_layouts_states_and_buckets(transport):
    assert unisum.spawn(hold_views, 2, args=(transport,)) == [True, True]


def with_torch():
    """Tensors that are PyTorch's optimizer's, in the state's memory."""
    import torch

    with unisum.connect() as comm:
        state = unisum.ShardState(3)
        buckets = unisum.Buckets(comm, PARAMETERS, bucket_bytes=4000, sharded=True)
        buckets.reshard(state)
        known = Reference().after(0)
        weights = buckets.weights()
        shards, options = [], {"lr": 1e-2, "weight_decay": 1e-2, "betas": (0.9, 0.99)}
        for bucket in range(len(buckets.buckets)):
            shard, first, second = (state.vector(bucket, it).torch() for it in range(3))
            for it in buckets.shard_pieces(bucket):
                values = known[it.parameter][0][it.start : it.stop]
                shard[it.at : it.at + len(values)] = torch.from_numpy(values)
            shard.grad = buckets.shard_gradient(bucket).torch()
            shards.append((shard, first, second))
        state.set_version(0)
        optimizer = torch.optim.AdamW([it[0] for it in shards], **options)
        for shard, first, second in shards:
            optimizer.state[shard] = {
                "step": torch.tensor(0.0), "exp_avg": first, "exp_avg_sq": second
            }
        expected = [torch.from_numpy(it[0].copy()) for it in known]
        alone = torch.optim.AdamW(expected, **options)
        for number in range(5):
            with buckets.begin() as step:
                for place, (name, shape) in enumerate(SHAPES):
                    step.put(name, torch.from_numpy(gradient(number, place, shape)))
            optimizer.step()
            for place, it in enumerate(expected):
                it.grad = torch.from_numpy(gradient(number, place, SHAPES[place][1]).ravel())
            alone.step()
        for bucket, (shard, first, _) in enumerate(shards):
            weights.shard(bucket).torch().copy_(shard)
            # What the optimizer wrote is what the state has.
            assert same(state.vector(bucket, 1), first.numpy()) and first.abs().sum() > 0
        buckets.gather(weights)
        for place, (name, _) in enumerate(SHAPES):
            found = weights.parameter(name).torch().ravel()
            torch.testing.assert_close(found, expected[place], rtol=1e-6, atol=1e-7)
        return True


def test_an_optimizer_of_torch_works_on_the_state():
    assert unisum.spawn(with_torch, 3) == [True] * 3


def misuse():
    with unisum.connect() as comm:
        plain = unisum.Buckets(comm, PARAMETERS)
        state = unisum.ShardState(2)
        for call in (lambda: plain.shard(0), lambda: plain.shard_pieces(0),
                     lambda: plain.shard_gradient(0), plain.weights,
                     lambda: plain.reshard(state), lambda: plain.copy_shards(state)):
            with pytest.raises(ValueError, match="these buckets are not sharded"):
                call()
        for options in ({"wire": "int8"}, {"uneven_inputs": True}):
            with pytest.raises(ValueError, match="sharded buckets take no `"):
                unisum.Buckets(comm, PARAMETERS, sharded=True, **options)
        for dtype in ("int32", "float8_e5m2", "bool"):
            with pytest.raises(TypeError, match="gradients have no elements"):
                unisum.ShardState(1, dtype)
        with pytest.raises(TypeError, match="no element type"):
            unisum.ShardState(1, "float31")
        with pytest.raises(ValueError, match="of at most 1024"):
            unisum.ShardState(1025)
        with pytest.raises(OverflowError):
            unisum.ShardState(-1)
        buckets = unisum.Buckets(comm, PARAMETERS, bucket_bytes=4000, sharded=True)
        count = len(buckets.buckets)
        with pytest.raises(IndexError, match="no bucket 0 among 0"):
            state.vector(0, 0)
        with pytest.raises(unisum.ConfigurationError, match="not that of its shards"):
            buckets.copy_shards(state)
        refuse_other_states(comm, buckets)
        resharded = buckets.reshard(state)
        assert resharded.version == 0 and resharded.lost() == resharded.moves
        assert {it.destination for it in resharded.lost(1)} == {1}
        with pytest.raises(unisum.ConfigurationError):
            buckets.copy_shards(state)
        refuse_indices(state, buckets, count)
        state.set_version(comm.rank)
        with pytest.raises(unisum.MismatchError, match="version 0 of its shards, and rank 1 1"):
            buckets.copy_shards(state)
        with pytest.raises(OverflowError):
            state.set_version(-1)
        state.set_version(9)
        buckets.copy_shards(state)
        refuse_in_steps(comm, buckets, state)
        again = buckets.reshard(state)
        assert again.version == 9 and all(it.source == it.destination for it in again.moves)
        other = unisum.Buckets(comm, [("others", (9000,))], sharded=True)
        with pytest.raises(unisum.MismatchError, match="is that of other parameters") as raised:
            other.reshard(state if comm.rank == 1 else unisum.ShardState(2))
        assert raised.value.ranks == (1,)
        with pytest.raises(unisum.ConfigurationError, match="of other buckets"):
            other.gather(buckets.weights())
        buckets.close()
        for call in (lambda: buckets.shard(0), buckets.weights, lambda: buckets.reshard(state)):
            with pytest.raises(RuntimeError, match="the buckets were closed"):
                call()
        assert state.version == 9 and repr(state) == "unisum.ShardState(version=9)"
        return True


def refuse_other_states(comm, buckets):
    with pytest.raises(unisum.MismatchError, match="vectors of f32") as raised:
        buckets.reshard(unisum.ShardState(1 + comm.rank))
    assert raised.value.ranks == (0, 1)
    with pytest.raises(unisum.MismatchError, match="2 vectors of f32, and rank 1 2 vectors of f64"):
        buckets.reshard(unisum.ShardState(2, ["float32", "float64"][comm.rank]))


def refuse_indices(state, buckets, count):
    for bucket, vector in [(count, 0), (0, 2), (1 << 60, 0)]:
        with pytest.raises(IndexError):
            state.vector(bucket, vector)
    for call in (buckets.shard, buckets.shard_pieces, buckets.shard_gradient,
                 buckets.weights().shard):
        with pytest.raises(IndexError, match=f"no bucket {count} among {count}"):
            call(count)
        with pytest.raises(OverflowError):
            call(-1)
    piece = buckets.shard_pieces(0)[0]
    last = (1 << 64) - 1
    for start, stop in [(piece.start, piece.stop + 1), (piece.stop, piece.start), (last, last),
                        (piece.start, last), (piece.stop + 1, piece.stop + 1)]:
        with pytest.raises(ValueError, match="in no shard of this rank"):
            state.elements(0, piece.parameter, start, stop)
    with pytest.raises(ValueError, match="in no shard of this rank"):
        state.elements(0, 77, 0, 1)
    assert len(state.elements(1, piece.parameter, piece.stop, piece.stop)) == 0
    with pytest.raises(ValueError, match="no parameter"):
        buckets.weights().parameter("missing")
    # Lengths that do not fit.
    with pytest.raises(ValueError):
        state.vector(0, 0).numpy()[:] = numpy.ones(len(buckets.shard(0)) + 1, "float32")


def refuse_in_steps(comm, buckets, state):
    """Calls out of order, and a program that raises: the state stays, and the next step is made."""
    step = buckets.begin()
    for call in (lambda: buckets.reshard(state), lambda: buckets.copy_shards(state),
                 buckets.weights, lambda: buckets.shard_gradient(0)):
        with pytest.raises(RuntimeError, match="a step is under way"):
            call()
    for place, (_, shape) in enumerate(SHAPES):
        step.put(place, gradient(0, place, shape))
    step.wait()
    before = state.vector(0, 0).numpy().copy()
    try:
        with buckets.begin() as step:
            if comm.rank == 1:
                raise KeyError("no such layer")
            for place, (_, shape) in enumerate(SHAPES):
                step.put(place, gradient(0, place, shape))
    except KeyError:
        assert comm.rank == 1
    except unisum.Error as error:
        assert (comm.rank, error.kind, error.ranks) == (0, "step_failed", (1,))
    assert same(state.vector(0, 0), before) and state.version == 9
    with buckets.begin() as step:
        for place, (_, shape) in enumerate(SHAPES):
            step.put(place, gradient(1, place, shape))
    for it in buckets.shard_pieces(0):
        found = buckets.shard_gradient(0).numpy()[it.at : it.at + it.stop - it.start]
        whole = gradient(1, it.parameter, SHAPES[it.parameter][1]).ravel()
        assert same(found, whole[it.start : it.stop])


def test_what_is_wrong_is_refused_and_the_next_call_works():
    assert unisum.spawn(misuse, 2) == [True, True]


def from_two_threads():
    """A call that waits for the other rank has the state and the buckets alone."""
    with unisum.connect() as comm:
        buckets, state = unisum.Buckets(comm, PARAMETERS, sharded=True), unisum.ShardState(1)
        if comm.rank == 1:
            comm.barrier()
            buckets.reshard(state)
            return True
        thread = threading.Thread(target=buckets.reshard, args=(state,))
        thread.start()
        deadline = time.monotonic() + 30
        refused = None
        while refused is None and time.monotonic() < deadline:
            try:
                state.version
            except RuntimeError as error:
                refused = str(error)
        with pytest.raises(RuntimeError, match="another call of these buckets"):
            buckets.copy_shards(unisum.ShardState(1))
        comm.barrier()
        thread.join()
        assert state.version == 0
        return refused


def test_a_second_thread_is_refused():
    refused = "another call of this state of shards is under way"
    assert unisum.spawn(from_two_threads, 2) == [refused, True]


def memory_in_use():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def without_memory():
    """One rank has no memory for its shards, and then none for what travels."""
    # Large blocks come from the system, and go back there (M_MMAP_THRESHOLD).
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    with unisum.connect(transport="tcp") as comm:
        big = [unisum.Parameter("a", (1 << 22,)), unisum.Parameter("b", (1 << 22,))]
        state = unisum.ShardState(4)
        whole = unisum.Buckets(comm, big, bucket_bytes=1 << 30, end_bucket_bytes=1 << 30,
                               sharded=True)
        parts = unisum.Buckets(comm, big, bucket_bytes=1 << 24, end_bucket_bytes=1 << 24,
                               sharded=True)
        assert (len(whole.buckets), len(parts.buckets)) == (1, 2)
        size = 4 * len(whole.shard(0)) * 4
        limits = resource.getrlimit(resource.RLIMIT_AS)
        for buckets, call, room in [(whole, whole.reshard, size // 2),
                                    (parts, parts.reshard, size + size // 8),
                                    (whole, whole.copy_shards, size + size // 2)]:
            if comm.rank == 1:
                resource.setrlimit(resource.RLIMIT_AS, (memory_in_use() + room, limits[1]))
            with pytest.raises(unisum.Error, match="have no memory for the state") as raised:
                call(state)
            assert (raised.value.kind, raised.value.ranks) == ("memory", (1,))
            resource.setrlimit(resource.RLIMIT_AS, limits)
            if call == whole.reshard:
                whole.reshard(state)
                state.set_version(3)
                state.vector(0, 0).numpy()[:] = comm.rank
        assert state.version == 3 and (state.vector(0, 0).numpy() == comm.rank).all()
        parts.reshard(state)
        # The first half of all was rank 0's.
        for bucket, value in enumerate([0, 1]):
            assert (state.vector(bucket, 0).numpy() == value).all()
        return True


def test_a_lack_of_memory_is_an_error_on_all_ranks():
    assert unisum.spawn(without_memory, 2) == [True, True]


EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "pytorch" / "sharded_adamw.py"


def test_the_example_outlives_a_kill_and_takes_another_rank():
    environment = {**os.environ, "UNISUM_INTERFACE": "=lo", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(EXAMPLE), "--steps", "1500"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines, processes, newcomer, outputs = [], [], None, ""
    try:
        for line in started.stdout:
            lines.append(line)
            if line.startswith("others join"):
                options = line.split(" with ")[1].split()
            if line.startswith("process ") and "rank" not in line:
                processes.append(int(line.split()[1]))
            if line.startswith("step 100:"):
                # Rank 0 tells how far they are.
                os.kill(processes[0], signal.SIGKILL)
            if line.endswith(" 2 ranks\n") and newcomer is None:
                newcomer = subprocess.Popen(
                    [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
                )
        outputs = newcomer.communicate(timeout=60)[0]
        assert (started.wait(60), newcomer.returncode) == (0, 0), lines
    finally:
        for process in filter(None, [newcomer, started]):
            process.kill()
            process.wait()
        for process in processes[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    ended = [it for it in [*lines, *outputs.splitlines()] if "weights" in it]
    assert len(ended) == 3 and any(it.endswith(" 3 ranks\n") for it in lines[5:]), (lines, outputs)
    assert len({it.split("weights ")[1].strip() for it in ended}) == 1, ended
    losses = [float(it.split("loss ")[1].split(",")[0]) for it in ended]
    assert max(losses) < 0.1, ended
