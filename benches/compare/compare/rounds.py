"""Measures all lines in turns: A B C, A B C, with the floors first in each round."""

import time

from . import processes
from .libraries import note
from .processes import Launch

START_S = 45.0
FLOORS = ("memory", "latency", "tcp")


class Skips:
    """What was left out and why, each once."""

    def __init__(self, results):
        self.entries = results["skipped"]
        self.given_up = set()

    def add(self, line, ranks, reason):
        entry = {"line": line, "ranks": ranks, "reason": reason}
        if entry not in self.entries:
            self.entries.append(entry)
            note(f"  {line}, {ranks} ranks: {reason}")

    def give_up(self, line, ranks):
        self.given_up.add((line, ranks))

    def has(self, line, ranks):
        return (line, ranks) in self.given_up


def do(launcher, line, ranks, job, skips, timeout_s, observe=None):
    """The records of a job; what went wrong goes to the skips."""
    if skips.has(line.name, ranks):
        return []
    records = []
    for launch in launcher.launches(line, ranks, job):
        watch = (lambda pids, launch=launch: observe(launch, pids)) if observe else None
        outcome = processes.run(launch, timeout_s, watch)
        records += outcome.records
        if outcome.failure:
            skips.add(line.name, ranks, outcome.failure)
        if outcome.timed_out:
            skips.give_up(line.name, ranks)
            break
    return records


def speed(options, launcher, lines, results, skips, number):
    """One round: every line at every number of ranks, one after the other."""
    for ranks in options.ranks:
        # Each round begins with another line, so that none is always first after the pause.
        for line in lines[number % len(lines):] + lines[:number % len(lines)]:
            start = time.monotonic()
            sizes = options.sizes_for(ranks)
            job = {"sizes": sizes, "seconds": options.seconds, "limit": options.limit}
            # The limit is looked at between sizes; the largest one may still take its time.
            timeout_s = START_S + 3 * options.limit
            rows = do(launcher, line, ranks, job, skips, timeout_s)
            keep(results["rows"], rows, line, ranks, number, skips)
            note(f"  round {number + 1}, {ranks:2} ranks, {line.title}: "
                 f"{time.monotonic() - start:.1f} s")


def keep(kept, rows, line, ranks, number, skips):
    for row in rows:
        if "skipped_from" in row:
            skips.add(line.name, ranks, f"from {row['skipped_from']} B: {row['reason']}")
        elif row.get("wrong"):
            skips.add(line.name, ranks, f"{row['wrong']} wrong elements at {row['bytes']} B")
        elif "p50_us" in row:
            kept.append({"line": line.name, "round": number, **row})


def floors(places, results, number):
    """The machine's limits, in this round."""
    for name in FLOORS:
        outcome = processes.run(Launch([[places.programs / name]]), START_S)
        results["floors"] += [{"round": number, **record} for record in outcome.records]
        if outcome.failure:
            results["skipped"].append({"line": f"floor {name}", "ranks": 0,
                                       "reason": outcome.failure})
            note(f"  floor {name}: {outcome.failure}")


def choice(options, launcher, lines, results, skips, number):
    """unisum alone: all powers of two, and all algorithms against the automatic choice."""
    for line in lines:
        if not line.is_ours or line.name.endswith("private"):
            continue
        for ranks in options.choice_ranks():
            doublings = [8 << power for power in range(24)]
            brief = {"sizes": doublings, "seconds": options.seconds / 4, "warmup": 10}
            keep(results["doublings"], do(launcher, line, ranks, brief, skips, 120),
                 line, ranks, number, skips)
            some = [64 << 4 * power for power in range(5)]
            compared = {"sizes": some, "seconds": options.seconds * 4, "warmup": 5,
                        "algorithm": "all"}
            keep(results["algorithms"], do(launcher, line, ranks, compared, skips, 120),
                 line, ranks, number, skips)
            note(f"  round {number + 1}, {ranks:2} ranks, {line.title}: sizes and algorithms")
