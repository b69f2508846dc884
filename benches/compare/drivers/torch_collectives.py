"""Collectives of torch.distributed over unisum and over Gloo, in turns, in the same processes on the
same tensors: one line of JSON for each collective and size.

`torch_collectives.py RANKS SIZES ROUNDS SECONDS`: sizes in bytes with commas, seconds per size,
backend and round. A size is that of the whole: the output of an all-gather, the input of a
reduce-scatter. One process imports torch and forks the ranks.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import unisum.torch  # noqa: F401
from torch_gloo import fitting, quantile_us

BACKENDS = ("unisum", "gloo")
MOST_OPERATIONS = 3000
LEAST_OPERATIONS = 3


def collectives(rank, world, count, group):
    """By name: the call, what it needs filled before, and a check of one result."""
    whole, chunk = torch.empty(count), torch.empty(count // world)
    other = torch.empty(count)
    lists = list(whole.chunk(world)), list(other.chunk(world))

    def fill():
        whole.fill_(rank + 1.0)
        other.fill_(rank + 1.0)
        chunk.fill_(rank + 1.0)

    total = world * (world + 1) / 2
    by_rank = torch.arange(1.0, world + 1).repeat_interleave(count // world)
    calls = {
        "all_reduce": (
            lambda: dist.all_reduce(whole, group=group),
            lambda: bool((whole == total).all()),
        ),
        "all_gather": (
            lambda: dist.all_gather_into_tensor(whole, chunk, group=group),
            lambda: torch.equal(whole, by_rank),
        ),
        "all_gather (list)": (
            lambda: dist.all_gather(lists[0], chunk, group=group),
            lambda: torch.equal(whole, by_rank),
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter_tensor(chunk, whole, group=group),
            lambda: bool((chunk == total).all()),
        ),
        "all_to_all": (
            lambda: dist.all_to_all_single(other, whole, group=group),
            lambda: torch.equal(other, by_rank),
        ),
        "all_to_all (list)": (
            lambda: dist.all_to_all(lists[1], lists[0], group=group),
            lambda: torch.equal(other, by_rank),
        ),
        "broadcast": (
            lambda: dist.broadcast(whole, 0, group=group),
            lambda: bool((whole == 1).all()),
        ),
    }
    return fill, calls


class Rank:
    def __init__(self, rank, world, folder):
        self.rank, self.world = rank, world
        limit = timedelta(seconds=300)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=limit
        )
        self.groups = {"gloo": dist.group.WORLD}
        self.groups["unisum"] = dist.new_group(backend="unisum", timeout=limit)

    def slowest(self, values):
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def timed(self, call, operations):
        """Operations back to back, each as long as on its slowest rank."""
        times = [0.0] * operations
        dist.barrier()
        for at in range(operations):
            start = time.perf_counter()
            call()
            times[at] = time.perf_counter() - start
        return sorted(self.slowest(times))

    def measure(self, name, size, rounds, seconds):
        count = max(size // 4 // self.world, 1) * self.world
        sides = {}
        for backend in BACKENDS:
            fill, calls = collectives(self.rank, self.world, count, self.groups[backend])
            call, check = calls[name]
            fill()
            call()
            right = check()
            fill()
            cold = self.timed(call, 2)[0]
            warm = self.timed(call, fitting(seconds / 4, cold, 1, 200))
            operations = fitting(seconds, statistics.median(warm), LEAST_OPERATIONS, MOST_OPERATIONS)
            sides[backend] = (call, fill, operations, right)
        medians = {backend: [] for backend in BACKENDS}
        for number in range(rounds):
            for backend in BACKENDS[:: 1 if number % 2 == 0 else -1]:
                call, fill, operations, _ = sides[backend]
                # Sums of sums must not grow beyond all numbers.
                fill()
                self.timed(call, 1)
                fill()
                medians[backend].append(quantile_us(self.timed(call, operations), 0.5))
        wrong = self.slowest([0.0 if sides[it][3] else 1.0 for it in BACKENDS])
        if self.rank == 0:
            row = {"collective": name, "ranks": self.world, "bytes": size}
            for backend, is_wrong in zip(BACKENDS, wrong):
                row[f"{backend}_us"] = statistics.median(medians[backend])
                row[f"{backend}_wrong"] = bool(is_wrong)
            print(json.dumps(row), flush=True)


def main():
    world, rounds, seconds = int(sys.argv[1]), int(sys.argv[3]), float(sys.argv[4])
    sizes = [int(size) for size in sys.argv[2].split(",")]
    only = sys.argv[5].split(",") if len(sys.argv) > 5 else None
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="compare-")
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                own = Rank(rank, world, folder)
                names = collectives(rank, world, world, None)[1]
                for name in names if only is None else only:
                    for size in sizes:
                        own.measure(name, size, rounds, seconds)
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
