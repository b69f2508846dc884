"""Holds what was measured against the targets in targets.json."""

import json
from dataclasses import dataclass
from statistics import median

from .arguments import FOLDER
from .bounds import exchange_us, hosts_bound_us
from .libraries import BY_NAME, LINES
from .medians import Table, choices, floors_of, steepest, switches_per_operation, tail
from .text import size_text


@dataclass
class Verdict:
    """One target at one number of ranks."""

    name: str
    ranks: object
    limit: float
    measured: object = None  # None: not measured
    where: str = ""

    @property
    def met(self):
        return self.measured is not None and self.measured <= self.limit

    @property
    def word(self):
        return "not measured" if self.measured is None else "met" if self.met else "NOT met"


def load():
    return json.loads((FOLDER / "targets.json").read_text(encoding="utf-8"))


def rivals(ours):
    """Names of the peers' lines on the same transport."""
    transport = BY_NAME[ours].transport
    return [line.name for line in LINES if line.is_peer and line.transport == transport]


class Judge:
    """Knows the results; one method per kind of target."""

    def __init__(self, results):
        self.results = results
        self.table = Table(results["rows"])
        self.doublings = Table(results["doublings"])
        self.algorithms = choices(results["algorithms"])
        self.floors = floors_of(results["floors"])
        self.hosts = Table([{**row, "line": f"{row['line']}-{row['local']}"}
                            for row in results["hosts"] if "p50_us" in row])
        streams = [entry["value"] for entry in results["hosts"] if "floor" in entry]
        self.goodput = median(streams) if streams else None

    def verdicts(self, targets):
        return [verdict for target in targets for verdict in self.judge(target)]

    def judge(self, target):
        kind = getattr(self, target["kind"])
        if "limits" not in target:
            return [Verdict(target["name"], "", target["limit"], *worst(kind(target)))]
        return [
            Verdict(target["name"], int(ranks), limit, *worst(kind(target, int(ranks))))
            for ranks, limit in target["limits"].items()
        ]

    def sizes(self, target, ranks):
        sizes = self.table.sizes(ranks)
        return [size for size in sizes if target.get("from", 0) <= size <= target.get("to", size)]

    def ratio(self, target, ranks):
        against = target["against"]
        others = rivals(target["ours"]) if against == "peers" else [against]
        for size in self.sizes(target, ranks):
            key = target.get("key", "p50_us")
            found = self.table.ratio(target["ours"], others, ranks, size, key)
            if found:
                yield found[0], f"{size_text(size)}, {BY_NAME[found[1]].title}"

    def exchange(self, target, ranks):
        mine = self.table.value(target["ours"], ranks, target["size"])
        raw = exchange_us(self.floors, target["size"])
        if mine and raw:
            yield mine / raw, f"{size_text(target['size'])}, exchange {raw / 1e3:.1f} ms"

    def switches(self, target, ranks):
        return self.computed(target, ranks, switches_per_operation)

    def tail(self, target, ranks):
        return self.computed(target, ranks, tail)

    def computed(self, target, ranks, function):
        for size in self.sizes(target, ranks):
            value = self.table.of_rows(target["ours"], ranks, size, function)
            if value is not None:
                yield value, size_text(size)

    def bound(self, target):
        for size in self.hosts.sizes():
            mine = self.hosts.value(f"unisum-auto-{target['local']}", 4 * target["local"], size)
            if mine and self.goodput and size >= target["from"]:
                yield mine / hosts_bound_us(self.goodput, 4, size), size_text(size)

    def hosts_ratio(self, target):
        local = target["local"]
        for size in self.hosts.sizes():
            if target["from"] <= size <= target["to"]:
                found = self.hosts.ratio(f"unisum-auto-{local}", [f"gloo-tcp-{local}"],
                                         4 * local, size)
                if found:
                    yield found[0], size_text(size)

    def late(self, _target):
        for entry in self.results["late"]:
            if BY_NAME[entry["line"]].is_ours:
                yield entry["waiting_cpu_ms_max"], BY_NAME[entry["line"]].title

    def startup(self, _target):
        times = startup_ms(self.results["startup"])
        peers = [(time, name) for name, time in times.items() if BY_NAME[name].is_peer]
        if peers:
            best, peer = min(peers)
            for name, time in times.items():
                if BY_NAME[name].is_ours:
                    yield time / best, f"{BY_NAME[name].title} / {BY_NAME[peer].title}"

    def resident(self, _target):
        for entry in self.results["resident"]:
            if BY_NAME[entry["line"]].is_ours:
                yield entry["beside_buffers_MiB"], BY_NAME[entry["line"]].title

    def cliff(self, target, ranks):
        found = steepest(self.doublings, target["ours"], ranks)
        if found:
            yield found[0], f"{size_text(found[1])} to {size_text(found[2])}"

    def choice(self, target, ranks):
        for (line, n, size), (ratio, taken, best) in self.algorithms.items():
            if (line, n) == (target["ours"], ranks):
                yield ratio, f"{size_text(size)}, {taken} for {best}"


def startup_ms(entries):
    """Median over rounds of the time to connect and to do the first all-reduce, by line."""
    times = {}
    for entry in entries:
        total = entry["connect_ms"] + entry["first_all_reduce_ms"]
        times.setdefault(entry["line"], []).append(total)
    return {line: median(several) for line, several in times.items()}


def worst(measured):
    """The largest of (value, where) pairs, or nothing."""
    return max(measured, key=lambda pair: pair[0], default=(None, ""))
