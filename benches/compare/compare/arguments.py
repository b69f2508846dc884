"""What the command line asks for."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).resolve().parents[1]

# Powers of two, two apart, that hit the sizes which the targets name.
FULL_SIZES = "8,64,256,1K,4K,16K,64K,256K,1M,4M,16M,64M,256M"
QUICK_SIZES = "8,1K,16K,64K,1M,64M"
# Larger buffers are measured up to so many ranks only.
HUGE_BYTES = 64 << 20
HUGE_RANKS = 4

PARTS = ("speed", "floors", "choice", "late", "startup", "resident", "hosts")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def bytes_of(text):
    """Bytes in `64K` and the like."""
    number, unit = text.strip().rstrip("Bb"), ""
    if number and number[-1].upper() in UNITS:
        number, unit = number[:-1], number[-1].upper()
    count = int(number) * UNITS[unit]
    if count < 4:
        raise ValueError(f"{text}: a buffer holds at least one float of 4 bytes")
    return count


def size_list(text):
    """Ascending sizes of a list with commas."""
    return sorted({bytes_of(word) for word in text.split(",")})


def number_list(text):
    return sorted({int(word) for word in text.split(",")})


def word_list(text):
    return tuple(word for word in text.split(",") if word)


def part_list(text):
    parts = word_list(text)
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return parts


def target_folder():
    """Where cargo builds, and this keeps its virtual environments and programs."""
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


@dataclass
class Options:
    """The command line, with defaults filled in."""

    ranks: list = field(default_factory=lambda: [2, 4, 8, 16])
    sizes: list = field(default_factory=lambda: size_list(FULL_SIZES))
    rounds: int = 3
    seconds: float = 0.12
    limit: float = 15.0
    peers: tuple = ()
    parts: tuple = PARTS
    quick: bool = False
    publish: bool = False
    install: bool = True
    bench: Path = Path("allreduce-bench")
    out: Path = Path("out")
    cache: Path = Path("cache")

    def sizes_for(self, ranks):
        """Sizes to measure with so many ranks."""
        return [size for size in self.sizes if size <= HUGE_BYTES or ranks <= HUGE_RANKS]

    def choice_ranks(self):
        """Numbers of ranks to look at unisum's choices with."""
        return sorted({self.ranks[0], self.ranks[-1]}) if self.quick else self.ranks


def parser():
    parser = argparse.ArgumentParser(
        prog="benches/compare/run",
        description="Measures unisum's all-reduce side by side with other libraries, in turns.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer sizes, ranks and rounds: a few minutes")
    add("--ranks", type=number_list, metavar="N,...", help="[default: 2,4,8,16]")
    add("--sizes", type=size_list, metavar="BYTES,...", help=f"[default: {FULL_SIZES}]")
    add("--rounds", type=int, metavar="N", help="[default: 3; with --quick 1]")
    add("--seconds", type=float, help="to measure one size for [default: 0.12]")
    add("--limit", type=float, help="seconds per library and world, then no larger sizes")
    add("--peers", type=word_list, metavar="NAME,...",
        help="of openmpi, mpich, gloo, oneccl [default: all]")
    add("--only", type=part_list, metavar="PART,...", help=f"of {', '.join(PARTS)}")
    add("--without", type=part_list, metavar="PART,...", default=(), help="leave parts out")
    add("--bench", type=Path, help="allreduce-bench to measure [default: build it]")
    add("--out", type=Path, help="folder for the results [default: compare/DATE in target]")
    add("--publish", action="store_true", help="also write the plots to docs/figures")
    add("--no-install", action="store_true", help="use the peers that are installed already")
    add("--report", type=Path, metavar="DIR", help="only make the report of an earlier run again")
    return parser


def options_from(arguments, date):
    """Options of parsed arguments; `date` names the folder of results."""
    cache = target_folder() / "compare"
    quick = arguments.quick
    peers = arguments.peers if arguments.peers is not None else ()
    parts = arguments.only or tuple(part for part in PARTS if part not in arguments.without)
    return Options(
        ranks=arguments.ranks or ([2, 4, 16] if quick else [2, 4, 8, 16]),
        sizes=arguments.sizes or size_list(QUICK_SIZES if quick else FULL_SIZES),
        rounds=arguments.rounds or (1 if quick else 3),
        seconds=arguments.seconds or (0.05 if quick else 0.12),
        limit=arguments.limit or (3.0 if quick else 8.0),
        peers=peers or ("openmpi", "mpich", "gloo", "oneccl"),
        parts=parts,
        quick=quick,
        publish=arguments.publish,
        install=not arguments.no_install,
        bench=arguments.bench,
        out=arguments.out or cache / "results" / date,
        cache=cache,
    )


def geometric_runs(sizes):
    """Cuts ascending sizes into (first, last, factor), the form that allreduce-bench takes."""
    runs, at = [], 0
    while at < len(sizes):
        first = last = sizes[at]
        factor = 2
        if at + 1 < len(sizes) and sizes[at + 1] % first == 0:
            factor = sizes[at + 1] // first
        at += 1
        while at < len(sizes) and sizes[at] == last * factor:
            last = sizes[at]
            at += 1
        runs.append((first, last, factor))
    return runs
