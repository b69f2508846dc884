"""PyTorch programs that outlive their ranks: real processes, killed at random moments.

`UNISUM_TEST_KILLS=N` makes so many trials, by hand; `UNISUM_TEST_SEED` repeats a run.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import unisum  # noqa: E402
import unisum.torch  # noqa: E402
from test_elastic import TRIALS, drawn, victims_of  # noqa: E402
from torch import nn  # noqa: E402
from unisum.torch import DistributedDataParallel as DDP  # noqa: E402
from worlds import World  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "pytorch" / "gpt.py"


def join(folder, elastic=1, **options):
    torch.set_num_threads(1)
    if elastic is not None:
        os.environ["UNISUM_ELASTIC"] = str(elastic)
    rank, world = int(os.environ.pop("UNISUM_RANK")), int(os.environ.pop("UNISUM_WORLD"))
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "TOKEN"):
        os.environ.pop(f"UNISUM_{name}")
    dist.init_process_group(
        "unisum", init_method=f"file://{folder}/init", rank=rank, world_size=world, **options
    )
    return rank


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 40))


def bits(model):
    told = hashlib.sha256()
    for it in model.parameters():
        told.update(it.detach().numpy().tobytes())
    return told.hexdigest()


def take_step(model, optimizer, number, process):
    generator = torch.Generator().manual_seed(1000 * number + process)
    optimizer.zero_grad()
    model(torch.randn(8, 16, generator=generator)).square().mean().backward()
    optimizer.step()


def check_view(processes):
    """What PyTorch says of ranks is what the view says, and its collectives are among those."""
    view, rank = unisum.torch.view(), dist.get_rank()
    assert view.processes == processes
    assert (rank, dist.get_world_size()) == (unisum.torch.rank(), unisum.torch.world())
    assert dist.get_process_group_ranks(dist.group.WORLD) == list(range(len(processes)))
    told = [None] * len(processes)
    dist.all_gather_object(told, processes[rank])
    assert told == processes
    last = torch.tensor([rank])
    dist.broadcast(last, src=len(processes) - 1)
    assert last.item() == len(processes) - 1


def train(talk, folder, last, wire):
    """Nothing fails, whoever is killed."""
    process = join(folder)
    model = DDP(network(), bucket_cap_mb=0.01, wire=wire, elastic=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    number, until, changes = 0, None, 0
    while until is None or number < until:
        before = unisum.torch.view()
        take_step(model, optimizer, number, process)
        number += 1
        report = model.last_report
        assert report.participants in (len(before.processes), dist.get_world_size())
        if report.change is not None:
            changes += 1
            assert report.change.view == unisum.torch.view() and report.change.view != before
            lost = [before.processes[rank] for rank in report.change.lost]
            assert [it for it in before.processes if it not in lost] == (
                report.change.view.processes)
            assert before.processes[0] in lost or unisum.torch.rank() <= process
        if number == 3:
            talk("training")
        # Some ranks may hear of the change in an earlier step than others.
        if report.participants == last and until is None:
            until = number + 5
    assert changes
    view = unisum.torch.view()
    assert view.processes[dist.get_rank()] == process
    check_view(view.processes)
    told = (view, number, bits(model))
    dist.destroy_process_group()
    talk(told)


def test_survivors_of_kills_end_the_same_steps_with_the_same_weights(tmp_path):
    draw = drawn("kills")
    for trial in range(TRIALS):
        ranks = 3 + draw.randrange(3)
        victims = victims_of(draw, trial, ranks)
        folder = tmp_path / str(trial)
        folder.mkdir()
        wire = [None, "int8", "powersgd:2"][trial % 3]
        print(f"trial {trial}: of {ranks}, {victims} die, by {wire}")
        transport = {"UNISUM_TRANSPORT": ["tcp", "shm"][trial % 2]}
        arguments = (str(folder), ranks - len(victims), wire)
        with World(train, ranks, arguments, **transport) as world:
            world.wait_for("training", 120)
            time.sleep(draw.random() * 0.05)
            for victim in victims:
                world.signal(victim)
                time.sleep(draw.choice([0, 0.0003, 0.02]))
            told = list(world.end(victims, 120).values())
        assert all(it == told[0] for it in told), told


def leave_the_step(talk, folder):
    """Rank 0 is in a call of the program when rank 2 dies, the others are in a step: all meet in
    the program, and take the step again."""
    process = join(folder)
    model = DDP(network(), elastic=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    take_step(model, optimizer, 0, process)
    dist.barrier()
    talk("training")
    with pytest.raises(unisum.ViewChanged) as raised:
        if process == 2:
            time.sleep(60)
        elif process == 0:
            dist.barrier()
        else:
            take_step(model, optimizer, 1, process)
    assert raised.value.lost == (2,)
    unisum.torch.rebuild(model)
    check_view([0, 1, 3])
    take_step(model, optimizer, 1, process)
    assert model.last_report.participants == 3 and model.last_report.change is None
    # Messages are possible again, and groups.
    tensor = torch.tensor([process])
    if dist.get_rank() == 0:
        dist.send(tensor, 2)
    elif dist.get_rank() == 2:
        dist.recv(tensor, 0)
        assert tensor.item() == 0
    pair = dist.new_group([0, 2])
    if dist.get_rank() != 1:
        dist.all_reduce(tensor, group=pair)
        assert tensor.item() == 0 and dist.get_world_size(pair) == 2
        assert unisum.torch.view(pair) is None
    talk((bits(model), unisum.torch.view()))
    dist.destroy_process_group()


def test_a_loss_outside_of_steps_is_an_error_after_which_models_are_rebuilt(tmp_path):
    with World(leave_the_step, 4, (str(tmp_path),)) as world:
        world.wait_for("training", 120)
        world.signal(2)
        told = list(world.end([2], 120).values())
    assert all(it == told[0] for it in told), told


def messages(talk, folder):
    """A step that changes the view leaves no messages, and says how to get them."""
    process = join(folder)
    model = DDP(network(), elastic=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    number = 0
    while dist.get_world_size() == 3:
        take_step(model, optimizer, number, process)
        number += 1
        if number == 2:
            talk("training")
    with pytest.raises(unisum.ConfigurationError, match="unisum.torch.rebuild"):
        dist.send(torch.ones(1), 1 - dist.get_rank())
    unisum.torch.rebuild(model)
    tensor = torch.tensor([process])
    work = dist.isend(tensor, 1 - dist.get_rank())
    dist.recv(got := torch.zeros(1, dtype=torch.int64), 1 - dist.get_rank())
    work.wait()
    assert got.item() == 1 - process
    talk("ended")
    dist.destroy_process_group()


def test_messages_after_a_change(tmp_path):
    with World(messages, 3, (str(tmp_path),)) as world:
        world.wait_for("training", 120)
        world.signal(2)
        assert set(world.end([2], 120).values()) == {"ended"}


def shrink(talk, folder):
    process = join(folder)
    group = dist.group.WORLD
    if process == 1:
        with pytest.raises(unisum.RankLostError):
            while True:
                dist.barrier()
    else:
        group.shrink([1])
        check_view([0, 2])
        group.revoke()
        with pytest.raises(unisum.ViewChanged):
            while True:
                dist.barrier()
        group.rebuild()
        check_view([0, 2])
        assert unisum.torch.view().epoch == 3
    talk("ended")


def test_groups_shrink_and_are_revoked(tmp_path):
    with World(shrink, 3, (str(tmp_path),)) as world:
        assert set(world.end((), 120).values()) == {"ended"}


def reconfigure(talk, folder):
    """PyTorch's own names for it, from 2.14 on."""
    os.environ.pop("UNISUM_ELASTIC", None)
    process = join(folder, None, enable_reconfigure=True)
    assert dist._supports_reconfigure()
    handles = [None] * 4
    dist.all_gather_object(handles, dist._get_reconfigure_handle())
    assert len(set(handles)) == 4
    dist._reconfigure(1, handles).wait()
    check_view([0, 1, 2, 3])
    with pytest.raises(ValueError, match="order"):
        dist._reconfigure(2, handles[::-1])
    if process == 1:
        with pytest.raises(unisum.RankLostError):
            while True:
                dist.barrier()
        return talk("ended")
    dist._reconfigure(2, handles[:1] + handles[2:]).wait()
    check_view([0, 2, 3])
    if process == 0:
        talk("training")
        time.sleep(60)
    talk("training")
    with pytest.raises(unisum.ViewChanged):
        while True:
            dist.barrier()
    dist._reconfigure(3, {handles[2], handles[3]}).wait()
    check_view([2, 3])
    with pytest.raises(TypeError, match="does not support shrinking"):
        dist.shrink_group([0])
    talk("ended")
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(dist, "_reconfigure"), reason="PyTorch before 2.14")
def test_pytorch_reconfigures_the_group(tmp_path):
    with World(reconfigure, 4, (str(tmp_path),)) as world:
        world.wait_for("training", 120, without=[1])
        world.signal(0)
        assert set(world.end([0], 120).values()) == {"ended"}


def not_elastic(talk, folder):
    join(folder, 0)
    with pytest.raises(ValueError, match="UNISUM_ELASTIC"):
        DDP(network(), elastic=True)
    assert unisum.torch.view() is None and unisum.torch.world() == 2
    with pytest.raises(unisum.ConfigurationError):
        unisum.torch.rebuild()
    os.environ["UNISUM_ELASTIC"] = "1"
    assert unisum.torch.view(dist.new_group([0, 1])) is None
    talk("ended")
    dist.destroy_process_group()


def test_a_model_is_elastic_only_in_an_elastic_job(tmp_path):
    with World(not_elastic, 2, (str(tmp_path),)) as world:
        assert set(world.end((), 120).values()) == {"ended"}


def buffers(talk, folder):
    process = join(folder)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not DDP(module, elastic=True).will_sync_module_buffers()
    model = DDP(module, elastic=True, broadcast_buffers=True)
    assert model.will_sync_module_buffers()
    model(torch.full((3, 4), float(process)))
    with pytest.raises(NotImplementedError, match="join"):
        model.join()
    talk("ended")
    dist.destroy_process_group()


def test_buffers_stay_where_they_are_unless_it_is_said(tmp_path):
    with World(buffers, 2, (str(tmp_path),)) as world:
        assert set(world.end((), 120).values()) == {"ended"}


def test_the_example_survives_kills():
    draw = drawn("example")
    environment = {**os.environ, "UNISUM_INTERFACE": "=lo"}
    command = [sys.executable, str(EXAMPLE), "--elastic", "--ranks", "4", "--steps", "60"]
    command += ["--report", "1", "--width", "32", "--layers", "1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        processes, lines, victims = [], [], []
        for line in running.stdout:
            lines.append(line)
            if line.startswith("rank "):
                processes.append(int(line.split()[-1]))
            # Rank 0 first, which is another process each time.
            if line.startswith(("step 5:", "step 30:")) and len(victims) < 2:
                left = [it for it in processes if it not in victims]
                time.sleep(draw.random() * 0.03)
                victims.append(left[0] if not victims else draw.choice(left))
                os.kill(victims[-1], signal.SIGKILL)
        status = running.wait(120)
    finally:
        if running.poll() is None:
            # Its children, which it has not waited for.
            for process in processes:
                os.kill(process, signal.SIGKILL)
            running.kill()
            running.wait()
    said = "".join(lines)
    assert status == 0 and len(victims) == 2, said
    assert "weights are the same on all 2 ranks" in said, said
