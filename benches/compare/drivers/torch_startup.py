"""From `init_process_group` to the end of the first all-reduce: `torch_startup.py RANKS BACKEND`."""

import json
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import unisum.torch  # noqa: F401


def rank_main(rank, world, backend, folder):
    torch.set_num_threads(1)
    begin = time.monotonic()
    dist.init_process_group(
        backend, init_method=f"file://{folder}/init", rank=rank, world_size=world
    )
    dist.all_reduce(torch.ones(2))
    end = time.monotonic()
    times = torch.tensor([-begin, end], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if rank == 0:
        # From the first rank's begin to the last one's end.
        row = {"backend": backend, "ranks": world, "ms": (times[0] + times[1]).item() * 1e3}
        print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def main():
    world, backend = int(sys.argv[1]), sys.argv[2]
    folder = tempfile.mkdtemp(prefix="compare-")
    children = []
    gate, opener = os.pipe()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)
            rank_main(rank, world, backend, folder)
            os._exit(0)
        children.append(child)
    os.close(opener)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
