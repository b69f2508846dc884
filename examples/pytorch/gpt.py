"""A small GPT that learns a novel character by character, in several processes: replicated by
DistributedDataParallel, sharded by FSDP2 with `--fsdp`, or with its layers divided among the ranks by
tensor parallelism with `--tensor-parallel`. What is unisum's about it is the backend's name.

    python gpt.py --ranks 2 --steps 200     # or in the processes that torchrun starts
    python gpt.py --fsdp
    python gpt.py --tensor-parallel
    python gpt.py --own --wire int8         # unisum's own DDP, gradients in 8 bits
    python gpt.py --elastic --ranks 4       # kill ranks: the others finish
    python gpt.py --elastic --join --meet /tmp/...      # one more rank: the others say where
    python gpt.py --width 384 --layers 6    # 11 M parameters
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

NOVEL = Path(__file__).resolve().parent.parent / "data" / "persuasion.txt"


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        # What a head has stays the same where ranks have some of the heads.
        self.head_width = width // heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        normal = self.first(x)
        query, key, value = (
            layer(normal).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
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


def communication_s(step, steps=4):
    """What collectives take in a step, whether something else goes on meanwhile or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    events = [it for it in profile.key_averages() if it.key.startswith(("gloo:", "unisum:"))]
    return sum(it.cpu_time_total for it in events) / steps / 1e6


def parallel(model, arguments):
    """The model, replicated, sharded, or with divided layers."""
    if arguments.own:
        import unisum.torch

        return unisum.torch.DistributedDataParallel(
            model, wire=arguments.wire, elastic=arguments.elastic
        )
    if not (arguments.fsdp or arguments.tensor_parallel):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (arguments.ranks,))
    if arguments.tensor_parallel:
        # Each rank has some of the heads, and of the hidden units behind them.
        by_columns = ("query", "key", "value", "feed.0")
        plan = {name: ColwiseParallel() for name in by_columns}
        plan.update({name: RowwiseParallel() for name in ("out", "feed.2")})
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
        return model
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def are_equal(model):
    """Whether all ranks have the same weights, bit by bit."""
    bits = torch.cat([it.detach().flatten() for it in model.parameters()]).view(torch.int32)
    most, least = bits.clone(), bits.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return torch.equal(most, least)


def worker(rank, arguments, init_file):
    torch.set_num_threads(1)
    if arguments.elastic:
        import unisum.torch
    if arguments.join:
        unisum.torch.join(f"file://{init_file}")
    else:
        rank = ranks.join(rank, arguments, init_file)
    text = NOVEL.read_text()
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([known[character] for character in text])
    torch.manual_seed(0)
    gpt = GPT(len(known), arguments.context, arguments.width, arguments.heads, arguments.layers)
    model = parallel(gpt, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if arguments.elastic:
        # Ranks change, processes keep their number.
        rank = unisum.torch.view().processes[dist.get_rank()]
    # Ranks that have parts of the layers see the same text.
    generator = torch.Generator().manual_seed(1 + (0 if arguments.tensor_parallel else rank))

    def train():
        starts = torch.randint(
            len(tokens) - arguments.context - 1, (arguments.batch,), generator=generator
        )
        rows = torch.stack([tokens[at : at + arguments.context + 1] for at in starts])
        optimizer.zero_grad()
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    begun = time.perf_counter()
    step, is_checked = 0, not arguments.elastic
    if arguments.join:
        step = unisum.torch.admit(model, optimizer)
    changes, world = unisum.ViewChanged if arguments.elastic else (), dist.get_world_size()
    while step < arguments.steps or not is_checked:
        try:
            if step == arguments.steps:
                assert are_equal(model), "ranks have different weights"
                is_checked = True
                continue
            loss = train()
            step += 1
            if step % arguments.report == 0 or step == arguments.steps:
                dist.all_reduce(loss)
                took = time.perf_counter() - begun
                nats = loss.item() / dist.get_world_size()
                if dist.get_rank() == 0:
                    print(f"step {step}: {nats:.3f} nats a character, {took:.1f} s", flush=True)
            # Last, since newcomers go on with the next step.
            if arguments.elastic and model.last_report.newcomers:
                step = unisum.torch.admit(model, optimizer, step=step)
        except changes:
            step = unisum.torch.align(model, optimizer, step=step)
        if arguments.elastic and dist.get_rank() == 0 and dist.get_world_size() != world:
            world = dist.get_world_size()
            print(f"after step {step}: there are {world} ranks", flush=True)
    if arguments.elastic:
        if dist.get_rank() == 0:
            print(f"weights are the same on all {world} ranks")
        return dist.destroy_process_group()
    spent = communication_s(train)
    if arguments.own:
        spent = model.last_report.communicated
    if rank == 0:
        each = took / arguments.steps
        print(f"{1e3 * each:.1f} ms a step, {1e3 * spent:.1f} ms of communication in one")
    dist.destroy_process_group()


def outlive(arguments, init_file):
    """Starts ranks that may be killed: 1 if one that was not has failed, or all were."""
    os.environ["UNISUM_ELASTIC"] = "1"
    print(f"others join with --elastic --join --meet {init_file}", flush=True)
    context = mp.get_context("spawn")
    started = [
        context.Process(target=worker, args=(rank, arguments, init_file))
        for rank in range(arguments.ranks)
    ]
    for rank, process in enumerate(started):
        process.start()
        print(f"rank {rank} is process {process.pid}", flush=True)
    for process in started:
        process.join()
    statuses = [process.exitcode for process in started]
    return int(any(it > 0 for it in statuses) or all(it < 0 for it in statuses))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="unisum", choices=["unisum", "gloo"])
    parser.add_argument("--fsdp", action="store_true", help="shard parameters by FSDP2")
    parser.add_argument(
        "--tensor-parallel", action="store_true", help="divide the layers among the ranks"
    )
    parser.add_argument("--own", action="store_true", help="unisum's DistributedDataParallel")
    parser.add_argument(
        "--elastic", action="store_true", help="go on without ranks that are killed, with --own"
    )
    parser.add_argument(
        "--join", action="store_true", help="be one more rank of a job that runs with --elastic"
    )
    parser.add_argument("--meet", help="the file by which the ranks find each other")
    parser.add_argument("--wire", help="how gradients travel with --own: int8, bf16, ...")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--report", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.elastic and (
        arguments.backend != "unisum" or arguments.fsdp or arguments.tensor_parallel
    ):
        parser.error("--elastic is of unisum's DistributedDataParallel")
    if arguments.join and not (arguments.elastic and arguments.meet):
        parser.error("--join takes --elastic and --meet")
    arguments.own |= arguments.elastic
    if arguments.join:
        os.environ["UNISUM_ELASTIC"] = "1"
        return worker(None, arguments, os.path.abspath(arguments.meet))
    init_file = arguments.meet and os.path.abspath(arguments.meet)
    if not arguments.elastic:
        return ranks.launch(worker, arguments, init_file)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(outlive(arguments, init_file or os.path.join(folder, "init")))


if __name__ == "__main__":
    main()
