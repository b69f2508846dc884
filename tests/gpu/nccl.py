"""Times of NCCL's all-reduce of f32 through PyTorch, by events: RANKS SMALLEST LARGEST FACTOR CSV."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def measure(rank, ranks, meeting, sizes, path):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{meeting}/init", rank=rank, world_size=ranks
    )
    rows = ["bytes,p50_us"]
    for size in sizes:
        data = torch.zeros(size // 4, device="cuda")
        repetitions = 200 if size < 16 << 20 else 20
        for _ in range(20):
            dist.all_reduce(data)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        torch.cuda.synchronize()
        dist.barrier()
        events[0].record()
        for event in events[1:]:
            dist.all_reduce(data)
            event.record()
        torch.cuda.synchronize()
        pairs = zip(events, events[1:])
        times = torch.tensor([a.elapsed_time(b) * 1e3 for a, b in pairs], device="cuda")
        # Each on the slowest rank.
        dist.all_reduce(times, dist.ReduceOp.MAX)
        rows.append(f"{size},{times.median().item()}")
    if rank == 0:
        with open(path, "w") as file:
            file.write("\n".join(rows) + "\n")
    dist.destroy_process_group()


def main():
    ranks, smallest, largest, factor = map(int, sys.argv[1:5])
    sizes = []
    while smallest <= largest:
        sizes.append(smallest)
        smallest *= factor
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(measure, (ranks, meeting, sizes, os.path.abspath(sys.argv[5])), nprocs=ranks)


if __name__ == "__main__":
    main()
