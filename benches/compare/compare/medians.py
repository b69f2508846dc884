"""Medians over rounds, and what is computed from them."""

from collections import defaultdict
from statistics import median


class Table:
    """Medians over rounds, by line, ranks and bytes."""

    def __init__(self, rows):
        self.rounds = defaultdict(list)
        for row in rows:
            self.rounds[row["line"], row["ranks"], row["bytes"]].append(row)

    def value(self, line, ranks, size, key="p50_us"):
        """Median over rounds of a row's value; None if it was not measured."""
        rows = self.rounds.get((line, ranks, size))
        return median(row[key] for row in rows) if rows else None

    def of_rows(self, line, ranks, size, function):
        """Median over rounds of something computed from a row."""
        rows = self.rounds.get((line, ranks, size))
        return median(map(function, rows)) if rows else None

    def round_count(self):
        return max((len(rows) for rows in self.rounds.values()), default=0)

    def lines(self):
        return sorted({line for line, _, _ in self.rounds})

    def ranks(self):
        return sorted({ranks for _, ranks, _ in self.rounds})

    def sizes(self, ranks=None):
        return sorted({size for _, n, size in self.rounds if ranks in (None, n)})

    def best(self, lines, ranks, size, key="p50_us"):
        """(line, value) of the smallest value among lines, or None."""
        found = [(self.value(line, ranks, size, key), line) for line in lines]
        found = [pair for pair in found if pair[0] is not None]
        if not found:
            return None
        value, line = min(found)
        return line, value

    def ratio(self, ours, others, ranks, size, key="p50_us"):
        """(ratio, line it is against) of ours to the best of others, or None."""
        mine, best = self.value(ours, ranks, size, key), self.best(others, ranks, size, key)
        if mine is None or best is None or best[1] <= 0:
            return None
        return mine / best[1], best[0]


def switches_per_operation(row):
    """Voluntary context switches per rank and operation."""
    return row["voluntary_switches"] / row["ranks"] / row["iterations"]


def tail(row):
    """99th percentile over median."""
    return row["p99_us"] / row["p50_us"]


def floors_of(entries):
    """Median over rounds of each floor, by name."""
    values = defaultdict(list)
    for entry in entries:
        values[entry["floor"]].append(entry["value"])
    return {name: median(several) for name, several in values.items()}


def best_floors(entries):
    """The best of each floor over the rounds: a limit is what was reached at all."""
    values = defaultdict(list)
    better = {}
    for entry in entries:
        values[entry["floor"]].append(entry["value"])
        better[entry["floor"]] = min if entry["unit"] == "us" else max
    return {name: better[name](several) for name, several in values.items()}


def steepest(table, line, ranks):
    """(growth, from, to) of the steepest step between sizes that are one doubling apart."""
    worst = None
    for size in table.sizes(ranks):
        first, second = table.value(line, ranks, size), table.value(line, ranks, 2 * size)
        if first and second and (worst is None or second / first > worst[0]):
            worst = second / first, size, 2 * size
    return worst


def choices(rows):
    """Of the rows of `-a all`: automatic choice against the best algorithm.

    Gives (ratio, chosen, best) by line, ranks and bytes, of medians over rounds.
    """
    groups = defaultdict(lambda: defaultdict(list))
    chosen = defaultdict(list)
    for row in rows:
        key = row["line"], row["ranks"], row["bytes"]
        groups[key][row["algorithm"]].append(row["p50_us"])
        if row["automatic"]:
            chosen[key].append(row["algorithm"])
    result = {}
    for key, algorithms in groups.items():
        times = {name: median(values) for name, values in algorithms.items()}
        best = min(times, key=times.get)
        # If rounds chose differently, the slowest choice counts.
        taken = max(chosen[key], key=lambda name: times[name], default=None)
        if taken:
            result[key] = times[taken] / times[best], taken, best
    return result
