"""A small GPT that learns a novel character by character, in several processes: replicated by
DistributedDataParallel, or sharded by FSDP2 with `--fsdp`. What is unisum's about it is the
backend's name.

    python gpt.py --ranks 2 --steps 200
    python gpt.py --fsdp
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

NOVEL = Path(__file__).resolve().parent.parent / "data" / "persuasion.txt"


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.attention(self.first(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.second(x))


class GPT(nn.Module):
    def __init__(self, characters, context, width=64, heads=4, layers=2):
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens):
        x = self.characters(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def parallel(model, arguments):
    """The model, replicated or sharded."""
    if not arguments.fsdp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (arguments.ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank, arguments, init_file):
    torch.set_num_threads(1)
    dist.init_process_group(
        arguments.backend,
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=arguments.ranks,
    )
    text = NOVEL.read_text()
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([known[character] for character in text])
    torch.manual_seed(0)
    model = parallel(GPT(len(known), arguments.context), arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1 + rank)
    begun, loss = time.perf_counter(), torch.zeros(())
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(
            len(tokens) - arguments.context - 1, (arguments.batch,), generator=generator
        )
        rows = torch.stack([tokens[at : at + arguments.context + 1] for at in starts])
        optimizer.zero_grad()
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if step % arguments.report == 0 or step == arguments.steps:
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            if rank == 0:
                took = time.perf_counter() - begun
                nats = loss.item() / arguments.ranks
                print(f"step {step}: {nats:.3f} nats a character, {took:.1f} s", flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="unisum", choices=["unisum", "gloo"])
    parser.add_argument("--fsdp", action="store_true", help="shard parameters by FSDP2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--report", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (arguments, os.path.join(folder, "init")), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
