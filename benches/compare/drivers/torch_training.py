"""Training steps over unisum and over Gloo, in turns, in the same processes: one line of JSON for each
model. `torch_training.py RANKS ROUNDS [MODEL,...]`.

A step is a forward and a backward pass. Its exposed communication is its time less that of the same
step of the bare module, on as many ranks at once.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import unisum.torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "pytorch"))
from gpt import GPT  # noqa: E402

STEPS = 2


def mlp():
    """25 M parameters."""
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(2500, 2500), nn.ReLU())))


def gpt():
    """10.7 M parameters."""
    return GPT(80, 64, width=384, heads=6, layers=6)


def sharded(model, group):
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Rank:
    def __init__(self, rank, world, folder):
        self.rank, self.world = rank, world
        limit = timedelta(seconds=300)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=limit
        )
        self.gloo = dist.group.WORLD
        self.unisum = dist.new_group(backend="unisum", timeout=limit)

    def sides(self, name):
        """By name of the side: a model."""
        torch.manual_seed(0)
        if name == "FSDP2, GPT of 11 M":
            return {
                "alone": gpt(),
                "gloo": sharded(gpt(), self.gloo),
                "unisum": sharded(gpt(), self.unisum),
            }
        make = mlp if name.startswith("DDP, MLP") else gpt
        return {
            "alone": make(),
            "gloo": DistributedDataParallel(make(), process_group=self.gloo),
            "unisum": DistributedDataParallel(make(), process_group=self.unisum),
            "own": unisum.torch.DistributedDataParallel(make(), process_group=self.unisum),
        }

    def step(self, model, inputs):
        model.zero_grad()
        model(inputs).square().mean().backward()

    def timed(self, model, inputs):
        """A step's time, on the slowest rank."""
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(STEPS):
            self.step(model, inputs)
        took = torch.tensor([(time.perf_counter() - begin) / STEPS], dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item() * 1e3

    def measure(self, name, rounds):
        sides = self.sides(name)
        torch.manual_seed(self.rank)
        inputs = torch.randn(16, 2500) if "MLP" in name else torch.randint(0, 80, (2, 64))
        for model in sides.values():
            # Buckets are laid out anew in the second step.
            self.timed(model, inputs)
        times = {side: [] for side in sides}
        for number in range(rounds):
            names = list(sides)
            for side in names[number % len(names):] + names[: number % len(names)]:
                times[side].append(self.timed(sides[side], inputs))
        if self.rank == 0:
            medians = {side: statistics.median(it) for side, it in times.items()}
            exposed = {
                side: statistics.median(
                    step - alone for step, alone in zip(times[side], times["alone"])
                )
                for side in sides
                if side != "alone"
            }
            row = {"model": name, "ranks": self.world}
            row.update({f"{side}_ms": it for side, it in medians.items()})
            row["exposed"] = " / ".join(f"{it:.1f}" for it in exposed.values())
            row["exposed_ms"] = exposed
            print(json.dumps(row), flush=True)
        sides.clear()
        gc.collect()


MODELS = ("DDP, MLP of 25 M", "DDP, GPT of 11 M", "FSDP2, GPT of 11 M")


def main():
    world, rounds = int(sys.argv[1]), int(sys.argv[2])
    models = sys.argv[3].split(";") if len(sys.argv) > 3 else MODELS
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="compare-")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                own = Rank(rank, world, folder)
                for name in models:
                    own.measure(name, rounds)
                dist.barrier()
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
