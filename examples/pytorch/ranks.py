"""How the examples start their ranks, and how these meet."""

import os
import sys
import tempfile

import torch.distributed as dist
import torch.multiprocessing as mp


def launch(worker, arguments, init_file=None):
    """Has each rank call `worker(rank, arguments, init_file)`: this process is one of those that
    torchrun has started, or it starts `arguments.ranks`, which meet by a file."""
    if dist.is_torchelastic_launched():
        return worker(None, arguments, None)
    with tempfile.TemporaryDirectory() as folder:
        init_file = init_file or os.path.join(folder, "init")
        mp.spawn(worker, args=(arguments, init_file), nprocs=arguments.ranks)


def join(rank, arguments, init_file):
    """Makes the process group, and gives the rank. Rank 0 says how the ranks found each other."""
    if init_file:
        dist.init_process_group(
            arguments.backend,
            init_method=f"file://{init_file}",
            rank=rank,
            world_size=arguments.ranks,
        )
    else:
        dist.init_process_group(arguments.backend)
    rank, arguments.ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0 and arguments.backend == "unisum":
        import unisum.torch

        print(unisum.torch.describe().summary, file=sys.stderr, flush=True)
    return rank
