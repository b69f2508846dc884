"""Draws latency and bus bandwidth against size, from a folder of results; needs matplotlib."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, FixedLocator, NullLocator  # noqa: E402

from .bounds import shm_us, tcp_us  # noqa: E402
from .libraries import BY_NAME  # noqa: E402
from .medians import Table, best_floors  # noqa: E402
from .text import size_text  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
LOOKS = {
    "unisum-shm": ("#D55E00", "o"),
    "unisum-shm-private": ("#E69F00", "D"),
    "unisum-tcp": ("#D55E00", "o"),
    "openmpi-shm": ("#0072B2", "s"),
    "openmpi-shm-yield": ("#56B4E9", "s"),
    "openmpi-tcp": ("#0072B2", "s"),
    "mpich-shm": ("#009E73", "^"),
    "mpich-tcp": ("#009E73", "^"),
    "oneccl-shm": ("#CC79A7", "v"),
    "oneccl-tcp": ("#CC79A7", "v"),
    "gloo-tcp": ("#56B4E9", "P"),
    "one-pass": ("#777777", "."),
    "tcp-tree": ("#777777", "."),
}
FLOORS = {"shm": shm_us, "tcp": tcp_us}


def bus_bandwidth(size, time_us, ranks):
    """GB/s, as nccl-tests define it."""
    return size / time_us * 1e-3 * 2 * (ranks - 1) / ranks


def microseconds(value, _position=None):
    """Axis labels with the unit that reads best."""
    for scale, unit in ((1e6, "s"), (1e3, "ms")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} µs"


def draw_panel(axes, table, floors, transport, ranks, of_time):
    sizes = table.sizes(ranks)
    for name, (colour, marker) in LOOKS.items():
        line = BY_NAME[name]
        if line.transport != transport:
            continue
        points = [(size, table.value(name, ranks, size)) for size in sizes]
        points = [(size, of_time(size, time)) for size, time in points if time]
        if points:
            axes.plot(*zip(*points), color=colour, marker=marker, markersize=4,
                      linewidth=2.2 if line.is_ours else 1.2, label=line.title,
                      zorder=3 if line.is_ours else 2)
    bounds = [(size, FLOORS[transport](floors, ranks, size)) for size in sizes]
    bounds = [(size, of_time(size, time)) for size, time in bounds if time]
    if bounds:
        axes.plot(*zip(*bounds), color="black", linestyle="--", linewidth=1,
                  label="physical floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(f"{ranks} ranks")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_locator(FixedLocator([8 << power for power in range(0, 30, 3)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes[0] / 2, sizes[-1] * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(max(1, int(size)))))
    axes.tick_params(axis="x", labelrotation=40, labelsize=8)
    axes.tick_params(axis="y", labelsize=8)


def draw(table, floors, transport, kind, subtitle, paths):
    """One figure: a panel for each number of ranks."""
    worlds = table.ranks()
    columns = min(2, len(worlds))
    rows = -(-len(worlds) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.6 * columns, 4.0 * rows + 1.1),
                                   squeeze=False, layout="constrained")
    for axes in grid.flat[len(worlds):]:
        axes.set_visible(False)
    for axes, ranks in zip(grid.flat, worlds):
        latency = kind == "latency"
        of_time = ((lambda size, time: time) if latency
                   else (lambda size, time, ranks=ranks: bus_bandwidth(size, time, ranks)))
        draw_panel(axes, table, floors, transport, ranks, of_time)
        if latency:
            axes.yaxis.set_major_formatter(FuncFormatter(microseconds))
    for axes in grid[:, 0]:
        axes.set_ylabel("time of one all-reduce" if kind == "latency" else "bus bandwidth, GB/s")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"All-reduce over {transport}: {kind}\n{subtitle}", fontsize=11)
    for path in paths:
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(out, *further):
    results = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))
    table, floors = Table(results["rows"]), best_floors(results["floors"])
    machine = results["machine"]
    subtitle = (f"{machine['processor'].split(' (')[0]}, {machine['cores']} cores, "
                f"float32 sum, in place, {results['date'][:10]}")
    matplotlib.rcParams["svg.hashsalt"] = "compare"
    for transport in ("shm", "tcp"):
        if not any(BY_NAME[line].transport == transport for line in table.lines()):
            continue
        for kind in ("latency", "bandwidth"):
            folders = [Path(folder) for folder in (out, *further)]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"{transport}-{kind}.{form}"
                     for folder in folders for form in ("svg", "png")]
            draw(table, floors, transport, kind, subtitle, paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
