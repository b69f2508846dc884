"""Data-parallel training on handwritten digits, in 8 processes of this host, with
DistributedDataParallel: the classic form. What is unisum's about it is the backend's name.

    python ddp_digits.py                         # over unisum
    python ddp_digits.py --backend gloo          # the same over gloo
    torchrun --nproc-per-node 4 ddp_digits.py    # in the processes that torchrun starts
    mpirun -n 4 python ddp_digits.py             # or mpirun, mpiexec or srun
"""

import argparse
import time

import ranks
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def digits():
    """1,797 images of 8 × 8 pixels: those to train with, and those to evaluate on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:360], order[360:]
    return TensorDataset(images[rest], labels[rest]), (images[held_out], labels[held_out])


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Stopwatch:
    """A communication hook that averages as DDP does and measures how long that takes."""

    def __init__(self):
        self.seconds = 0.0

    def hook(self, _state, bucket):
        begun = time.perf_counter()
        tensor = bucket.buffer().div_(dist.get_world_size())
        future = dist.all_reduce(tensor, async_op=True).get_future()

        def ended(future):
            self.seconds += time.perf_counter() - begun
            return future.value()[0]

        return future.then(ended)


def train(model, loader, optimizer):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def evaluate(model, images, labels):
    """The share of images that are classified right, each rank looking at its part of them."""
    model.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        guesses = model(images[rank::world]).argmax(dim=1)
    counts = torch.tensor([(guesses == labels[rank::world]).sum(), len(guesses)])
    dist.all_reduce(counts)
    return counts[0].item() / counts[1].item()


def worker(rank, arguments, init_file):
    torch.set_num_threads(1)
    rank = ranks.join(rank, arguments, init_file)
    torch.manual_seed(rank)
    training, (images, labels) = digits()
    sampler = DistributedSampler(training, shuffle=True, seed=0)
    loader = DataLoader(training, batch_size=arguments.batch, sampler=sampler)
    model = DistributedDataParallel(network())
    stopwatch = Stopwatch()
    model.register_comm_hook(None, stopwatch.hook)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    begun = time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        sampler.set_epoch(epoch)
        train(model, loader, optimizer)
        accuracy = evaluate(model, images, labels)
        if rank == 0:
            print(f"Epoch {epoch}, accuracy: {100 * accuracy:.1f}%", flush=True)
    if rank == 0:
        total = time.perf_counter() - begun
        print(f"{total:.2f} s in all, {stopwatch.seconds:.2f} s in communication of gradients")
    dist.destroy_process_group()
    if accuracy < arguments.at_least:
        raise SystemExit(f"accuracy {accuracy} is below {arguments.at_least}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="unisum", choices=["unisum", "gloo"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--at-least", type=float, default=0.0, help="fail below this accuracy")
    arguments = parser.parse_args()
    ranks.launch(worker, arguments)


if __name__ == "__main__":
    main()
