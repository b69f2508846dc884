"""Trains a small network with AdamW of which each process keeps its share only, and loses nothing
when one of them is killed.

    python sharded_adamw.py --ranks 3               # kill ranks: the others finish
    python sharded_adamw.py --join --meet /tmp/...  # one more rank: the others say where

Each rank has the averages of its shard of the gradients, and its shard of the weights and of
AdamW's two moments: 12 bytes for each of its elements. The next rank has a copy of these.
"""

import argparse
import hashlib
import multiprocessing
import os
import tempfile

import torch
import unisum
from torch import nn


class Sharded:
    """A module's training in one view of the job: buckets, and AdamW on this rank's shards."""

    def __init__(self, comm, module, state):
        self.comm, self.module, self.state = comm, module, state
        self.named = dict(module.named_parameters())
        parameters = [unisum.Parameter(name, tuple(it.shape)) for name, it in self.named.items()]
        self.buckets = unisum.Buckets(comm, parameters, sharded=True)
        resharded = self.buckets.reshard(state)
        self.restore(resharded)
        state.set_version(resharded.version)
        self.weights = self.buckets.weights()
        self.optimizer = self.adamw()
        self.gather()

    def restore(self, resharded):
        """What nobody has: the weights of the beginning, which all ranks draw alike. Later it would
        come from a checkpoint of `resharded.version`."""
        lost = resharded.lost(self.comm.rank)
        if lost and resharded.version:
            raise SystemExit(f"there is no checkpoint of step {resharded.version}")
        whole = [it.detach().ravel() for it in self.named.values()]
        for it in lost:
            elements = self.state.elements(0, it.parameter, it.start, it.stop)
            elements.torch()[:] = whole[it.parameter][it.start : it.stop]

    def adamw(self):
        """PyTorch's own, whose tensors lie in the state."""
        moments = {}
        for bucket in range(len(self.buckets.buckets)):
            shard, first, second = (self.state.vector(bucket, it).torch() for it in range(3))
            shard.grad = self.buckets.shard_gradient(bucket).torch()
            steps = torch.tensor(float(self.state.version))
            moments[shard] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}
        optimizer = torch.optim.AdamW(list(moments), lr=3e-3)
        optimizer.state.update(moments)
        return optimizer

    def gather(self):
        """The module has all weights."""
        for bucket in range(len(self.buckets.buckets)):
            self.weights.shard(bucket).torch().copy_(self.state.vector(bucket, 0).torch())
        self.buckets.gather(self.weights)
        with torch.no_grad():
            for name, it in self.named.items():
                it.copy_(self.weights.parameter(name).torch())

    def step(self, inputs, targets):
        """The report of a step, and this rank's loss."""
        self.module.zero_grad()
        loss = nn.functional.mse_loss(self.module(inputs), targets)
        with self.buckets.begin() as step:
            loss.backward()
            for name, it in reversed(list(self.named.items())):
                step.put(name, it.grad)
        self.optimizer.step()
        self.state.set_version(self.state.version + 1)
        self.gather()
        return step.report, loss.item()


def batch(number, rank, world):
    """A rank's part of a step's data."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.rand(96, 8, generator=generator)
    targets = torch.sin(3 * inputs)
    return inputs.tensor_split(world)[rank], targets.tensor_split(world)[rank]


def train(comm, arguments):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 8))
    state = unisum.ShardState(3)
    while True:
        try:
            training = Sharded(comm, module, state)
            if state.version:
                # Copies are of the view before: the next loss, however soon, takes new ones.
                training.buckets.copy_shards(state)
            if comm.rank == 0:
                print(f"from step {state.version}: {comm.world} ranks", flush=True)
            while state.version < arguments.steps:
                data = batch(state.version, comm.rank, comm.world)
                report, loss = training.step(*data)
                if state.version % arguments.copy_every == 0:
                    training.buckets.copy_shards(state)
                if comm.rank == 0 and state.version % 100 == 0:
                    print(f"step {state.version}: loss {loss:.4f}", flush=True)
                if report.newcomers:
                    break
            else:
                # All have made the last step.
                comm.barrier()
                return comm, loss, module
            comm = comm.admit()
        except unisum.ViewChanged:
            comm = comm.rebuild()


def work(arguments, meet, rank=None):
    torch.set_num_threads(1)
    options = {"rendezvous": f"file://{meet}", "elastic": 1}
    if rank is None:
        comm = unisum.join(**options)
    else:
        comm = unisum.connect(rank=rank, world=arguments.ranks, **options)
    comm, loss, module = train(comm, arguments)
    bits = b"".join(it.detach().numpy().tobytes() for it in module.parameters())
    told = f"loss {loss:.4f}, weights {hashlib.sha256(bits).hexdigest()[:16]}"
    print(f"process {os.getpid()}, rank {comm.rank} of {comm.world}: {told}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--copy-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--join", action="store_true", help="be one more rank of a job that runs")
    parser.add_argument("--meet", help="the file by which the ranks find each other")
    arguments = parser.parse_args()
    if arguments.join:
        if not arguments.meet:
            parser.error("--join takes --meet")
        return work(arguments, os.path.abspath(arguments.meet))
    with tempfile.TemporaryDirectory() as folder:
        meet = os.path.abspath(arguments.meet or f"{folder}/meet")
        print(f"others join with --join --meet {meet}", flush=True)
        context = multiprocessing.get_context("spawn")
        started = [
            context.Process(target=work, args=(arguments, meet, rank))
            for rank in range(arguments.ranks)
        ]
        for process in started:
            process.start()
            print(f"process {process.pid}", flush=True)
        for process in started:
            process.join()
    statuses = [process.exitcode for process in started]
    raise SystemExit(any(it > 0 for it in statuses) or all(it < 0 for it in statuses))


if __name__ == "__main__":
    main()
