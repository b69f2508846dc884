"""Token classification in several processes of this host: named entities in Japanese sentences, with
DistributedDataParallel. What is unisum's about it is the backend's name.

    pip install --no-deps hironsancorpus==0.1.2      # the corpus: 16,000 tokens, MIT licence
    python ner.py                                    # over unisum; or by torchrun
    python ner.py --backend gloo                     # the same over gloo
    python ner.py --own --wire int8                  # unisum's own DDP, gradients in 8 bits
"""

import argparse
import importlib.util
import time
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_digits import Stopwatch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NOTHING, UNKNOWN = 0, 1


def sentences():
    """Each a list of (token, kind of its characters, part of speech, tag)."""
    found = importlib.util.find_spec("hironsan")
    if found is None or found.origin is None:
        raise SystemExit("the corpus is missing: pip install --no-deps hironsancorpus==0.1.2")
    text = (Path(found.origin).parent / "corpus" / "iob_sents.txt").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    rows = [[line.split("\t") for line in block if line] for block in blocks]
    return [[(row[0], row[1], row[2] + row[3], row[-1]) for row in block] for block in rows if block]


class Corpus:
    """Numbers for sentences; those with a place divisible by five are held out."""

    def __init__(self):
        everything = sentences()
        self.held_out = everything[::5]
        self.training = [it for place, it in enumerate(everything) if place % 5]
        self.columns = [
            {word: number + 2 for number, word in enumerate(sorted(self._seen(column)))}
            for column in range(3)
        ]
        self.tags = sorted({row[3] for sentence in everything for row in sentence})
        self._number = {tag: number for number, tag in enumerate(self.tags)}

    def _seen(self, column):
        return {row[column] for sentence in self.training for row in sentence}

    def batch(self, some):
        """Tokens of three kinds and tags, filled up to the longest sentence."""
        length = max(len(it) for it in some)
        tokens = torch.full((len(some), length, 3), NOTHING)
        tags = torch.full((len(some), length), -100)
        for at, sentence in enumerate(some):
            for place, row in enumerate(sentence):
                numbers = [known.get(row[it], UNKNOWN) for it, known in enumerate(self.columns)]
                tokens[at, place] = torch.tensor(numbers)
                tags[at, place] = self._number[row[3]]
        return tokens, tags


class Tagger(nn.Module):
    def __init__(self, corpus, width=64):
        super().__init__()
        sizes = [len(known) + 2 for known in corpus.columns]
        self.embeddings = nn.ModuleList(nn.Embedding(size, width, NOTHING) for size in sizes)
        self.drop = nn.Dropout(0.3)
        self.both_ways = nn.LSTM(3 * width, 96, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * 96, len(corpus.tags))

    def forward(self, tokens):
        # A word that is rare in training is unknown half of the time.
        words = tokens[..., 0]
        if self.training:
            words = words.masked_fill((torch.rand(words.shape) < 0.1) & (words > 0), UNKNOWN)
        columns = [words, tokens[..., 1], tokens[..., 2]]
        embedded = [layer(it) for layer, it in zip(self.embeddings, columns)]
        hidden, _ = self.both_ways(self.drop(torch.cat(embedded, dim=-1)))
        return self.head(self.drop(hidden))


def entities(tags):
    """(begin, end, kind) of each entity in tags of the IOB2 scheme."""
    found, begin = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and not (tag.startswith("I-") and tag[2:] == tags[begin][2:]):
            found.add((begin, place, tags[begin][2:]))
            begin = None
        if tag.startswith("B-"):
            begin = place
    return found


def evaluate(model, corpus):
    """F1 of whole entities; each rank looks at its part of the sentences."""
    model.eval()
    counts = torch.zeros(3)  # right, guessed, there
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        for sentence in corpus.held_out[rank::world]:
            guesses = model(corpus.batch([sentence])[0])[0].argmax(dim=-1)
            guessed = entities([corpus.tags[it] for it in guesses])
            there = entities([row[3] for row in sentence])
            counts += torch.tensor([len(guessed & there), len(guessed), len(there)])
    dist.all_reduce(counts)
    right, guessed, there = counts.tolist()
    return 2 * right / max(guessed + there, 1)


def parallel(arguments, module):
    """The model, and what tells the seconds in communication."""
    if arguments.own:
        import unisum.torch

        model = unisum.torch.DistributedDataParallel(module, wire=arguments.wire)
        spent = []
        return model, lambda: spent.append(model.last_report.exposed) or sum(spent)
    model = DistributedDataParallel(module)
    stopwatch = Stopwatch()
    model.register_comm_hook(None, stopwatch.hook)
    return model, lambda: stopwatch.seconds


def worker(rank, arguments, init_file):
    torch.set_num_threads(1)
    rank = ranks.join(rank, arguments, init_file)
    corpus = Corpus()
    torch.manual_seed(0)
    model, communicated = parallel(arguments, Tagger(corpus))
    torch.manual_seed(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    order = torch.Generator().manual_seed(0)
    begun, seconds = time.perf_counter(), 0.0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        places = torch.randperm(len(corpus.training), generator=order).tolist()
        # As many batches on all ranks, of 16 sentences in all.
        each = max(16 // arguments.ranks, 1)
        step = each * arguments.ranks
        for begin in range(0, len(places) - step + 1, step):
            own = places[begin + rank * each : begin + (rank + 1) * each]
            tokens, tags = corpus.batch([corpus.training[it] for it in own])
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tags.flatten()).backward()
            seconds = communicated()
            optimizer.step()
        if epoch % 4 == 0 or epoch == arguments.epochs:
            f1 = evaluate(model.module, corpus)
            if rank == 0:
                print(f"Epoch {epoch}, F1: {100 * f1:.1f}%", flush=True)
    if rank == 0:
        total = time.perf_counter() - begun
        print(f"{total:.2f} s in all, {seconds:.2f} s in communication of gradients")
    dist.destroy_process_group()
    if f1 < arguments.at_least:
        raise SystemExit(f"an F1 of {f1} is below {arguments.at_least}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="unisum", choices=["unisum", "gloo"])
    parser.add_argument("--own", action="store_true", help="unisum's DistributedDataParallel")
    parser.add_argument("--wire", help="how gradients travel with --own: int8, bf16, ...")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--at-least", type=float, default=0.0, help="fail below this F1")
    arguments = parser.parse_args()
    ranks.launch(worker, arguments)


if __name__ == "__main__":
    main()
