"""Installs, builds, measures, reports."""

import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone

from . import build, hosts, install, machine, report, rounds, sides
from .arguments import FOLDER, ROOT, options_from, parser
from .libraries import Launcher, chosen, note

LISTS = ("rows", "floors", "doublings", "algorithms", "late", "startup", "resident", "hosts",
         "skipped")
PLOTS_TIMEOUT_S = 120


def main(words):
    arguments = parser().parse_args(words)
    # Ends as on Ctrl-C, so that what was started is ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    options = options_from(arguments, date)
    if arguments.report:
        results = json.loads((arguments.report / "results.json").read_text(encoding="utf-8"))
        options.out = arguments.report
        return finish(options, results)
    start = time.monotonic()
    places = install.install(options.peers, options.cache.resolve(), options.install)
    bench = build.bench(options.bench)
    build.build(places, options.peers)
    note(f"installed and built in {time.monotonic() - start:.0f} s")
    results = {name: [] for name in LISTS}
    results["date"] = date
    results["machine"] = machine.describe()
    results["versions"] = {"unisum": machine.unisum_version(bench), **places.versions}
    results["missing"] = places.missing
    results["command"] = words
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        measure(options, places, bench, results)
    except KeyboardInterrupt:
        note("interrupted: what was measured so far is reported")
    results["seconds"] = round(time.monotonic() - start)
    note(f"measured in {results['seconds']} s")
    return finish(options, results)


def measure(options, places, bench, results):
    lines = [line for line in chosen(options.peers) if line.family not in places.missing]
    launcher = Launcher(bench, places)
    skips = rounds.Skips(results)
    for number in range(options.rounds):
        if "floors" in options.parts:
            rounds.floors(places, results, number)
        if "speed" in options.parts:
            rounds.speed(options, launcher, lines, results, skips, number)
        if "choice" in options.parts:
            rounds.choice(options, launcher, lines, results, skips, number)
        if "startup" in options.parts:
            sides.startup(launcher, lines, results, skips, number)
        save(options, results)
    if "late" in options.parts:
        sides.late(launcher, lines, results, skips)
    if "resident" in options.parts:
        sides.resident(launcher, lines, results, skips)
    if "hosts" in options.parts:
        hosts.measure(options, launcher, places, results, skips)


def save(options, results):
    text = json.dumps(results, indent=0)
    (options.out / "results.json").write_text(text, encoding="utf-8")


def finish(options, results):
    save(options, results)
    text = report.write(results)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    note(f"results are in {options.out}")
    plot(options)
    return 0


def plot(options):
    """In the Python that has matplotlib."""
    try:
        python = install.plotting_python(install.Places(options.cache.resolve()), options.install)
        figures = [ROOT / "docs" / "figures"] if options.publish else []
        subprocess.run(
            [str(python), "-m", "compare.plots", str(options.out.resolve()), *map(str, figures)],
            cwd=FOLDER, check=True, timeout=PLOTS_TIMEOUT_S,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        note(f"no plots: {install.reason_of(error)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
