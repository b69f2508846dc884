"""What encryption costs: the same in clear text and encrypted, in turns, by ratios of one round."""

import argparse
import json
import os
import secrets
import sys
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from . import machine, processes
from .arguments import geometric_runs, number_list, size_list, target_folder, word_list
from .build import bench
from .hosts import Hosts, port, world
from .libraries import note, unisum_words
from .processes import Launch
from .text import markdown, significant, size_text

PARTS = ("loopback", "hosts", "start")
CLEAR, ENCRYPTED = "off", "token"
HOSTS, HOSTS_BYTES = 2, 64 << 20
START_RANKS = 16
LIMIT_S = 120
# Most times the time in clear text: half of the bandwidth is left, or 0.98 of a slow wire's.
SMALL_BYTES = 4 << 10
MOST = {"small": 1.3, "loopback": 1 / 0.5, "hosts": 1 / 0.98, "start": 1.5}


def parser():
    parser = argparse.ArgumentParser(
        prog="benches/compare/encrypted",
        description="Measures all-reduce over loopback TCP, between two namespaces on 1 Gbit/s "
        "(root), and the start, with UNISUM_TLS=off and token in turns. A ratio is encrypted to "
        "clear of the same round; what is told is its median, with the least and the largest.",
    )
    add = parser.add_argument
    add("--ranks", type=number_list, default=[2, 4], metavar="N,...", help="[default: 2,4]")
    add("--sizes", type=size_list, default=size_list("8,1M,64M"), help="[default: 8,1M,64M]")
    add("--rounds", type=int, default=7, help="[default: 7]")
    add("--seconds", type=float, default=0.3, help="per size and turn [default: 0.3]")
    add("--only", type=word_list, default=PARTS, help=f"of {', '.join(PARTS)}")
    add("--bench", type=Path, help="allreduce-bench to measure [default: build it]")
    add("--out", type=Path, help="folder for the results [default: compare/DATE in target]")
    return parser


def records(launch, tls):
    """What came of a launch at this level of encryption."""
    launch.environment = {**launch.environment, "UNISUM_TLS": tls}
    outcome = processes.run(launch, LIMIT_S)
    if outcome.failure:
        note(f"  {tls}: {outcome.failure}")
    return outcome.records


def of_call(record):
    """Of a call: its time, and the processor time of all ranks per GB of buffer."""
    is_large = record["bytes"] > SMALL_BYTES
    return {"us": record["p50_us"],
            "cpu_s_per_GB": record["cpu_seconds_per_GB"] if is_large else None}


def loopback(arguments, program, tls, _):
    for ranks in arguments.ranks:
        for first, last, factor in geometric_runs(arguments.sizes):
            sizes = [first] if first == last else [first, first * factor]
            words = unisum_words({"sizes": sizes, "seconds": arguments.seconds})
            words[words.index("-e") + 1] = last
            environment = {"UNISUM_TOKEN": secrets.token_hex(16)}
            command = [program, "-n", ranks, "-t", "tcp", *words]
            for record in records(Launch([command], environment), tls):
                yield ("loopback", ranks, record["bytes"]), of_call(record)


def hosts(arguments, program, tls, turn):
    words = unisum_words({"sizes": [HOSTS_BYTES], "seconds": arguments.seconds, "warmup": 1})
    with Hosts(HOSTS) as made:
        launch = world(made, HOSTS, port(turn), [str(word) for word in (program, *words)])
        for record in records(launch, tls):
            yield ("hosts", HOSTS, record["bytes"]), of_call(record)


def start(_, program, tls, __):
    command = [program, "--startup", START_RANKS, "-t", "tcp", "--format", "json"]
    environment = {"UNISUM_TOKEN": secrets.token_hex(16)}
    for record in records(Launch([command], environment), tls):
        took_ms = record["connect_ms"] + record["first_all_reduce_ms"]
        yield ("start", START_RANKS, None), {"us": took_ms * 1e3, "cpu_s_per_GB": None}


def measure(arguments, program, rows):
    """All parts in turns; each round begins with the other level."""
    parts = {"loopback": loopback, "hosts": hosts, "start": start}
    for number in range(arguments.rounds):
        for part in arguments.only:
            levels = (CLEAR, ENCRYPTED) if number % 2 == 0 else (ENCRYPTED, CLEAR)
            for at, tls in enumerate(levels):
                for key, found in parts[part](arguments, program, tls, 2 * number + at):
                    rows.append({"case": key, "round": number, "tls": tls, **found})
        note(f"round {number + 1} of {arguments.rounds}")


def ratios(rows):
    """By case: its pairs, clear and encrypted, of rounds in which both were measured."""
    rounds = defaultdict(dict)
    for row in rows:
        rounds[tuple(row["case"]), row["round"]][row["tls"]] = row
    cases = defaultdict(list)
    for (case, _), levels in rounds.items():
        if len(levels) == 2:
            cases[case].append((levels[CLEAR], levels[ENCRYPTED]))
    return cases


def most(case):
    """Most times the time in clear text that a case may take."""
    part, _, size = case
    return MOST["small" if part == "loopback" and size <= SMALL_BYTES else part]


def summary(pairs):
    """Of a case's pairs: medians, and of the ratios also the least and the largest."""
    several = sorted(encrypted["us"] / clear["us"] for clear, encrypted in pairs)
    middle = lambda at, key: median(pair[at][key] for pair in pairs)
    costs = [middle(at, "cpu_s_per_GB") for at in (0, 1)] if pairs[0][0]["cpu_s_per_GB"] else None
    return {"us": [middle(at, "us") for at in (0, 1)], "costs": costs,
            "ratio": median(several), "range": (several[0], several[-1])}


def time_text(us):
    for unit, length in (("s", 1e6), ("ms", 1e3)):
        if us >= length:
            return f"{significant(us / length)} {unit}"
    return f"{significant(us)} µs"


def line(case, pairs):
    part, ranks, size = case
    told = summary(pairs)
    least, largest = told["range"]
    met = "yes" if told["ratio"] <= most(case) else "no"
    costs = " → ".join(map(significant, told["costs"])) if told["costs"] else "–"
    return [part, str(ranks), size_text(size) if size else "–", *map(time_text, told["us"]),
            f"**{told['ratio']:.2f}** ({least:.2f}–{largest:.2f})",
            f"{most(case):.2f}: {met}", costs]


def report(rows):
    head = ["where", "ranks", "size", "clear", "encrypted", "ratio of times", "at most",
            "processor time, s per GB"]
    return markdown(head, [line(case, pairs) for case, pairs in ratios(rows).items()])


def main(words):
    arguments = parser().parse_args(words)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    about, rows = machine.describe(), []
    program = bench(arguments.bench)
    if "hosts" in arguments.only and os.geteuid() != 0:
        note("hosts are left out: network namespaces need root")
        arguments.only = tuple(part for part in arguments.only if part != "hosts")
    try:
        measure(arguments, program, rows)
    except KeyboardInterrupt:
        note("interrupted: what was measured so far is reported")
    out = arguments.out or target_folder().resolve() / "compare/results" / f"encrypted-{date}"
    out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=0), encoding="utf-8")
    print(f"{about}\n\n{report(rows)}")
    note(f"results are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
