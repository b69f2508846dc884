"""PyTorch programs that processes join while they train, some of which are killed meanwhile.

`UNISUM_TEST_WHOLE=1` runs all.
"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import unisum  # noqa: E402
import unisum.torch  # noqa: E402
from torch import nn  # noqa: E402
from unisum.torch import DistributedDataParallel as DDP  # noqa: E402
from unisum.torch import _state  # noqa: E402
from worlds import World  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "pytorch" / "gpt.py"
LIMIT = 120

#: Worlds of PyTorch programs take seconds: most of them once a day.
whole = pytest.mark.skipif(
    not os.environ.get("UNISUM_TEST_WHOLE"), reason="UNISUM_TEST_WHOLE is not set"
)


def enter(meeting, joins):
    """In the job, as one of its first ranks or as a newcomer."""
    torch.set_num_threads(1)
    os.environ["UNISUM_ELASTIC"] = "1"
    names = ("RANK", "WORLD", "LOCAL_RANK", "LOCAL_SIZE", "TOKEN")
    rank, world, *_ = (os.environ.pop(f"UNISUM_{name}", None) for name in names)
    if isinstance(meeting, int):
        how = {"store": dist.TCPStore("127.0.0.1", meeting, is_master=False)}
    else:
        how = {"init_method": f"file://{meeting}/init"}
    if joins:
        unisum.torch.join(**how)
    else:
        dist.init_process_group("unisum", rank=int(rank), world_size=int(world), **how)


class Noted(nn.Module):
    """A module with all that modules have: what differs between ranks, and what isn't saved."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(16, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 40)
        )
        self.tied = self.layers[3].weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("unsaved", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.layers(x)


class Training:
    """A model, its optimizer and its schedule; ranks begin with other weights than newcomers."""

    def __init__(self, seed, wire=None):
        self.model = DDP(Noted(seed), bucket_cap_mb=0.01, wire=wire, elastic=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.9)
        self.step = 0

    @property
    def all(self):
        return self.model, self.optimizer, self.schedule

    def take_step(self, process):
        generator = torch.Generator().manual_seed(1000 * self.step + process)
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def admit(self):
        self.step = unisum.torch.admit(*self.all, step=self.step)

    def align(self):
        self.step = unisum.torch.align(*self.all, step=self.step)

    def bits(self):
        """Of everything that all ranks have the same of."""
        module = self.model.module
        states = [self.optimizer.state_dict(), self.schedule.state_dict()]
        state = [dict(module.named_parameters()), states]
        return hashlib.sha256(_state.to_bytes(state)).hexdigest()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train(talk, meeting, expected, wire=None, joins=False, dies=None):
    """Until there is a file `end`, which all ranks see at the same step. `expected` is how many of
    the first ranks are left once all have come, how many there were, and how many have joined."""
    left, founders, newcomers = expected
    enter(meeting, joins)
    if dies == "in the view":
        die()
    training = Training(1 if joins else 0, wire)
    if dies == "with buckets":
        die()
    if joins:
        with pytest.raises(unisum.ConfigurationError, match="unisum.torch.admit"):
            dist.send(torch.ones(1), 0)
        training.admit()
        assert training.step > 0
    own = unisum.torch.view().processes[dist.get_rank()]
    assert (own >= founders) == joins
    ends = torch.zeros(1)
    is_complete = False
    while not ends.item():
        try:
            training.take_step(own)
            if training.step == 3 and not joins:
                talk("training")
            newcomers_wait = training.model.last_report.newcomers
            ends.fill_(os.path.exists(os.environ["TEST_END"]))
            dist.all_reduce(ends, dist.ReduceOp.MIN)
            if newcomers_wait and not ends.item():
                training.admit()
        except unisum.ViewChanged:
            ends.zero_()
            training.align()
        processes = unisum.torch.view().processes
        there = sum(it < founders for it in processes), sum(it >= founders for it in processes)
        assert processes[dist.get_rank()] == own
        if there == (left, newcomers) and not is_complete:
            is_complete = True
            talk("complete")
    check_group()
    talk((unisum.torch.view(), training.step, training.bits()))
    dist.destroy_process_group()


def check_group():
    """What PyTorch says of ranks is what the view says; messages, groups and barriers work."""
    view, rank = unisum.torch.view(), dist.get_rank()
    world = len(view.processes)
    assert (rank, dist.get_world_size()) == (unisum.torch.rank(), world)
    assert dist.get_process_group_ranks(dist.group.WORLD) == list(range(world))
    told = [None] * world
    dist.all_gather_object(told, view.processes[rank])
    assert told == view.processes
    # A step may have changed the view since.
    unisum.torch.rebuild()
    work = dist.isend(torch.tensor([rank]), (rank + 1) % world)
    dist.recv(got := torch.zeros(1, dtype=torch.int64), (rank - 1) % world)
    work.wait()
    assert got.item() == (rank - 1) % world
    pair = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        dist.all_reduce(one := torch.ones(1), group=pair)
        assert one.item() == 2
    dist.group.WORLD.monitored_barrier()


def run(tmp_path, meeting, ranks, newcomers, wire=None, kill=None, **environment):
    """Some train, others join; `newcomers` say how each dies, if it does. What the others tell."""
    living = sum(it is None for it in newcomers)
    expected = (ranks - (kill is not None), ranks, living)
    environment["TEST_END"] = end = tmp_path / "end"
    with World(train, ranks, (meeting, expected, wire), **environment) as world:
        # They may come before there is a job.
        added = [world.add(train, (meeting, expected, wire, True, it)) for it in newcomers]
        victims = [number for number, dies in zip(added, newcomers) if dies]
        if kill is not None:
            world.wait_for("training", LIMIT, added)
            world.signal(kill)
            victims.append(kill)
        world.wait_for("complete", LIMIT, victims)
        end.touch()
        told = list(world.end(victims, LIMIT).values())
    assert len(told) == expected[0] + living
    assert all(it == told[0] for it in told), told
    assert len(told[0][0].processes) == len(told)


def store():
    """In another process than rank 0, which may be lost."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_two_join_while_a_third_is_killed(tmp_path):
    run(tmp_path, str(tmp_path), 2, ["with buckets", None, None], "int8")


@whole
@pytest.mark.parametrize("wire", [None, "powersgd:2"])
def test_two_join_ranks_that_met_by_a_store(wire, tmp_path):
    server = store()
    run(tmp_path, server.port, 2, [None, None], wire)


@whole
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_one_joins_one_rank_that_met_by_the_file_of_a_variable(transport, tmp_path):
    variables = {"UNISUM_RENDEZVOUS": f"file://{tmp_path}/meeting", "UNISUM_TRANSPORT": transport}
    run(tmp_path, str(tmp_path), 1, [None], **variables)


@whole
def test_newcomers_are_killed_as_soon_as_they_are_in_the_view(tmp_path):
    run(tmp_path, str(tmp_path), 2, ["in the view", None, "in the view"])


@whole
def test_rank_0_is_killed_while_others_join(tmp_path):
    run(tmp_path, str(tmp_path), 3, [None, None], kill=0)


def differ(talk, meeting, joins=False):
    """Rank 1 has other weights, which all ranks hear; buffers differ, and are given to the newcomer
    only, from rank 0."""
    enter(meeting, joins)
    training = Training(1 if joins else 0)
    module = training.model.module
    if not joins:
        # Of which newcomers know nothing.
        pair = dist.new_group([0, 1])
        while not training.step or not training.model.last_report.newcomers:
            training.take_step(dist.get_rank())
        module.layers[1].running_mean.fill_(10 + dist.get_rank())
        module.unsaved.fill_(20 + dist.get_rank())
        if dist.get_rank() == 1:
            with torch.no_grad():
                module.layers[0].bias[7] += 1
    before = training.bits()
    with pytest.raises(unisum.MismatchError, match=r"ranks \[1\]") as raised:
        training.admit()
    assert raised.value.ranks == (1,) and training.bits() == before
    if dist.get_rank() == 1:
        # As if this rank were behind: it gets what the others have.
        training.step -= 1
    training.align()
    told = (training.step, training.bits())
    own = {0: 0, 1: 1, 2: 0}[dist.get_rank()]
    assert (module.layers[1].running_mean == 10 + own).all()
    assert (module.unsaved == 20 + own).all() and module.layers[1].num_batches_tracked > 0
    check_group()
    if not joins:
        dist.all_reduce(one := torch.ones(1), group=pair)
        assert one.item() == 2
    talk(told)
    dist.destroy_process_group()


def test_ranks_that_differ_are_told_and_get_the_state_of_those_that_are_furthest():
    server = store()
    with World(differ, 2, (server.port,)) as world:
        world.add(differ, (server.port, True))
        told = list(world.end((), LIMIT).values())
    assert len(told) == 3 and all(it == told[0] for it in told) and told[0][0] > 0, told


def test_nobody_joins_where_there_is_no_such_job(tmp_path, monkeypatch):
    for name, value in {"INTERFACE": "=lo", "ELASTIC": "1", "CONNECT_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"UNISUM_{name}", value)
    with pytest.raises(unisum.RendezvousError):
        unisum.torch.join(f"file://{tmp_path}/nobody")
    assert not dist.is_initialized()
    alone = {"rank": 0, "world_size": 1}
    dist.init_process_group("unisum", init_method=f"file://{tmp_path}/alone", **alone)
    try:
        training = Training(0)
        with pytest.raises(ValueError, match="-1 steps"):
            unisum.torch.admit(*training.all, step=-1)
        # Nobody asks to be let in: the same ranks go on.
        training.take_step(0)
        training.admit()
        assert (training.step, unisum.torch.view().epoch) == (1, 2)
        training.take_step(0)
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("UNISUM_ELASTIC", "0")
    dist.init_process_group("unisum", init_method=f"file://{tmp_path}/other", **alone)
    try:
        with pytest.raises(unisum.ConfigurationError):
            unisum.torch.admit(DDP(Noted(0)))
        with pytest.raises(unisum.ConfigurationError):
            unisum.torch.align(DDP(Noted(0)))
    finally:
        dist.destroy_process_group()


def test_the_same_state_is_the_same_bytes():
    kinds = [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
    tensors = [torch.arange(6).reshape(2, 3).to(kind) for kind in kinds]
    tensors += [torch.tensor(3.5), torch.empty(0, 3), torch.arange(6).reshape(2, 3).t()]
    name = "betas"
    state = {"all": tensors, name: (0.9, name), 3: None}
    again = _state.from_bytes(_state.to_bytes(state))
    assert again["betas"] == (0.9, "betas") and again[3] is None
    for one, other in zip(tensors, again["all"]):
        assert one.dtype == other.dtype and torch.equal(one, other)
    # Equal texts, of which some are one object, and memory in another order.
    betas = (0.9, "".join(["be", "tas"]))
    apart = {"all": [it.clone() for it in again["all"]], "betas": betas, 3: None}
    assert _state.to_bytes(state) == _state.to_bytes(again) == _state.to_bytes(apart)
    tensors[1][0, 0] = -0.0
    assert _state.to_bytes(state) != _state.to_bytes(again)
    with pytest.raises(TypeError, match="sparse"):
        _state.to_bytes(torch.eye(3).to_sparse())


@whole
def test_others_join_the_example():
    environment = {**os.environ, "UNISUM_INTERFACE": "=lo"}
    command = [sys.executable, str(EXAMPLE), "--elastic", "--report", "1", "--width", "32"]
    command += ["--layers", "1", "--steps"]
    # As many steps as newcomers need: they end it.
    started = subprocess.Popen(
        [*command, "100000", "--ranks", "2"], stdout=subprocess.PIPE, text=True, env=environment
    )
    processes, lines, newcomers = [], [], []
    try:
        for line in started.stdout:
            lines.append(line)
            if line.startswith("others join"):
                options = line.split(" with ")[1].split()
            if line.startswith("rank "):
                processes.append(int(line.split()[-1]))
            if line.startswith("step 2:"):
                joining = [*command, "100000", *options]
                newcomers = [subprocess.Popen(joining, env=environment) for _ in range(2)]
            if "there are 4 ranks" in line:
                break
        assert newcomers and "there are 4 ranks" in lines[-1], "".join(lines)
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
        for process in [*newcomers, started]:
            process.kill()
            process.wait()
