"""How the examples start their ranks, and how these meet."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: What mpirun, mpiexec, srun and a shell's loop set: which rank a process is.
LAUNCHERS = ("UNISUM_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_STEP_NUM_TASKS")


def is_launched():
    """Whether a launcher other than torchrun has started this process as a rank."""
    return any(os.environ.get(name) for name in LAUNCHERS)


def launch(worker, arguments, init_file=None):
    """Has each rank call `worker(rank, arguments, init_file)`: this process is one of those that
    a launcher has started, or it starts `arguments.ranks`, which meet by a file."""
    if dist.is_torchelastic_launched() or is_launched():
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
    elif dist.is_torchelastic_launched():
        dist.init_process_group(arguments.backend)
    else:
        store, rank, world = meet()
        dist.init_process_group(arguments.backend, store=store, rank=rank, world_size=world)
    rank, arguments.ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0 and arguments.backend == "unisum":
        import unisum.torch

        print(unisum.torch.describe().summary, file=sys.stderr, flush=True)
    return rank


def meet():
    """A store of PyTorch's for ranks that no torchrun has started, the rank, and how many there
    are: unisum knows the launchers, and tells all ranks where rank 0 has opened the store."""
    import unisum

    with unisum.connect() as comm:
        if comm.rank == 0:
            told = comm.describe().ranks
            host = told[0].addresses[0].rsplit(":", 1)[0].strip("[]") if told else "127.0.0.1"
            store = dist.TCPStore(host, 0, comm.world, is_master=True, wait_for_workers=False)
        place = torch.zeros(256, dtype=torch.uint8)
        if comm.rank == 0:
            text = f"{host} {store.port}".encode()
            place[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        comm.broadcast(place)
        if comm.rank > 0:
            host, port = bytes(place.tolist()).rstrip(b"\0").decode().split()
            store = dist.TCPStore(host, int(port), comm.world, wait_for_workers=False)
        return store, comm.rank, comm.world
