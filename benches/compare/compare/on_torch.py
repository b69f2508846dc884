"""unisum as PyTorch's backend against Gloo: collectives on plain tensors, training steps, start."""

import argparse
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from . import machine, processes
from .arguments import FOLDER, ROOT, number_list, size_list, target_folder, word_list
from .libraries import note
from .processes import Launch

PARTS = ("collectives", "training", "startup")
SIZES = "8,1K,64K,1M,25M,64M"
LIMIT_S = 1800


def parser():
    parser = argparse.ArgumentParser(
        prog="benches/compare/torch",
        description="Measures unisum as PyTorch's backend against Gloo, in turns, in the same "
        "processes. Ratios below 1: unisum is faster.",
    )
    add = parser.add_argument
    add("--ranks", type=number_list, default=[2, 4, 8], metavar="N,...", help="[default: 2,4,8]")
    add("--sizes", type=size_list, default=size_list(SIZES), help=f"[default: {SIZES}]")
    add("--rounds", type=int, default=5, help="[default: 5]")
    add("--seconds", type=float, default=0.15, help="per size, backend and round [default: 0.15]")
    add("--only", type=word_list, default=PARTS, help=f"of {', '.join(PARTS)}")
    add("--python", help="one that has torch and unisum [default: makes an environment]")
    add("--out", type=Path, help="folder for the results [default: compare/DATE in target]")
    return parser


def environment(given):
    """A Python with torch and unisum, built from this tree."""
    if given:
        return given
    folder = target_folder().resolve() / "compare" / "python"
    python = folder / "bin" / "python"
    if not python.exists():
        note("installing torch")
        subprocess.run([str(ROOT / "bindings/python/tests/setup"), str(folder)], check=True)
    note("building the wheel")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, str(ROOT / "bindings" / "python")], check=True)
    return str(python)


def run(python, driver, *words):
    """The objects that a driver printed."""
    command = [python, FOLDER / "drivers" / driver, *words]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "UNISUM_INTERFACE": "=lo"}
    outcome = processes.run(Launch([command], settings), LIMIT_S)
    if outcome.failure:
        note(f"{driver} {' '.join(map(str, words))}: {outcome.failure}")
    return outcome.records


def measure(arguments, python, results):
    for ranks in arguments.ranks:
        if "collectives" in arguments.only:
            note(f"collectives, {ranks} ranks")
            sizes = ",".join(map(str, arguments.sizes))
            words = (ranks, sizes, arguments.rounds, arguments.seconds)
            results["collectives"] += run(python, "torch_collectives.py", *words)
        if "training" in arguments.only:
            note(f"training, {ranks} ranks")
            results["training"] += run(python, "torch_training.py", ranks, arguments.rounds)
        if "startup" in arguments.only:
            note(f"startup, {ranks} ranks")
            for number in range(arguments.rounds):
                order = ("unisum", "gloo") if number % 2 == 0 else ("gloo", "unisum")
                for backend in order:
                    results["startup"] += run(python, "torch_startup.py", ranks, backend)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def size_text(size):
    for unit, bytes_ in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_ and size % bytes_ == 0:
            return f"{size // bytes_} {unit}"
    return f"{size} B"


def collectives_report(rows):
    """One line for a collective and size: unisum µs / Gloo µs = ratio, by ranks."""
    if not rows:
        return ""
    ranks = sorted({row["ranks"] for row in rows})
    cells = {(row["collective"], row["bytes"], row["ranks"]): row for row in rows}
    lines = []
    for name, size in dict.fromkeys((row["collective"], row["bytes"]) for row in rows):
        line = [name, size_text(size)]
        for count in ranks:
            row = cells.get((name, size, count))
            line.append("–" if row is None else f"{row['unisum_us']:,.0f} / {row['gloo_us']:,.0f} "
                        f"= **{row['unisum_us'] / row['gloo_us']:.2f}**")
        lines.append(line)
    ratios = [row["unisum_us"] / row["gloo_us"] for row in rows]
    wrong = [row for row in rows if row["unisum_wrong"] or row["gloo_wrong"]]
    text = table(["collective", "size", *(f"{count} ranks, µs" for count in ranks)], lines)
    text += f"\nMedian ratio {median(ratios):.2f}; {sum(it <= 0.3 for it in ratios)} of "
    text += f"{len(ratios)} are at most 0.3, {sum(it <= 1 for it in ratios)} at most 1.\n"
    return text + (f"\nWRONG RESULTS: {wrong}\n" if wrong else "")


def training_report(rows):
    lines = [
        [row["model"], row["ranks"], f"{row['alone_ms']:.1f}"]
        + [f"{row[side + '_ms']:.1f}" if side + "_ms" in row else "–"
           for side in ("gloo", "unisum", "own")]
        + [row["exposed"]]
        for row in rows
    ]
    head = ["model", "ranks", "no communication, ms", "Gloo", "unisum", "unisum's DDP",
            "exposed: Gloo / unisum / unisum's DDP"]
    return table(head, lines) if rows else ""


def startup_report(rows):
    lines = []
    for ranks in sorted({row["ranks"] for row in rows}):
        times = {
            backend: [row["ms"] for row in rows
                      if (row["backend"], row["ranks"]) == (backend, ranks)]
            for backend in ("unisum", "gloo")
        }
        if all(times.values()):
            ours, gloo = (median(times[backend]) for backend in ("unisum", "gloo"))
            lines.append([ranks, f"{ours:.0f}", f"{gloo:.0f}", f"{ours / gloo:.2f}"])
    return table(["ranks", "unisum, ms", "Gloo, ms", "ratio"], lines) if lines else ""


def report(results):
    text = f"# PyTorch over unisum and over Gloo\n\n{results['machine']}\n\n"
    for name, make in (("collectives", collectives_report), ("training", training_report),
                       ("startup", startup_report)):
        if results[name]:
            text += f"## {name.capitalize()}\n\n{make(results[name])}\n"
    return text


def main(words):
    arguments = parser().parse_args(words)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    results = {name: [] for name in PARTS}
    results["machine"] = machine.describe()
    python = environment(arguments.python)
    try:
        measure(arguments, python, results)
    except KeyboardInterrupt:
        note("interrupted: what was measured so far is reported")
    out = arguments.out or target_folder().resolve() / "compare" / "results" / f"torch-{date}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=0), encoding="utf-8")
    text = report(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    note(f"results are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
