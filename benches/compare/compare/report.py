"""The report in Markdown."""

from .libraries import BY_NAME
from .bounds import hosts_bound_us
from .medians import Table, floors_of, switches_per_operation, tail
from .targets import Judge, load, rivals, startup_ms
from .text import markdown, significant, size_text

REFERENCE = {"shm": "one-pass", "tcp": "tcp-tree"}
OURS = {"shm": ("unisum-shm", "unisum-shm-private"), "tcp": ("unisum-tcp",)}


def title(line):
    return BY_NAME[line].title


def write(results):
    """The whole report as text."""
    table = Table(results["rows"])
    judge = Judge(results)
    parts = [heading(results, table), verdict_section(judge)]
    for transport in ("shm", "tcp"):
        parts.append(speed_section(table, transport))
    parts += [
        ratio_section(table),
        cost_section(table, "Processor time of all ranks, seconds per GB of buffer",
                     lambda row: row["cpu_seconds_per_GB"]),
        cost_section(table, "Voluntary context switches per rank and operation",
                     switches_per_operation),
        cost_section(table, "p99 / median", tail),
        late_section(results), startup_section(results), resident_section(results),
        hosts_section(results, judge), floor_section(results), skipped_section(results),
    ]
    return "\n".join(part for part in parts if part)


def heading(results, table):
    machine = results["machine"]
    lines = [f"# All-reduce side by side, {results['date']}", ""]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, "
                 f"Linux {machine['kernel']}, TCP {machine['congestion_control']}; "
                 f"load {machine['load_before']:.1f} before the run.")
    lines.append("")
    lines += [f"- {name}: {version}" for name, version in results["versions"].items()]
    lines += ["", f"Sum of float32, in place; an operation counts as its slowest rank; medians "
              f"over {table.round_count()} rounds, in which all libraries took turns.", ""]
    return "\n".join(lines)


def verdict_section(judge):
    verdicts = judge.verdicts(load())
    measured = [it for it in verdicts if it.measured is not None]
    rows = [[it.name, str(it.ranks), significant(it.limit), significant(it.measured), it.word,
             it.where] for it in measured]
    met = sum(it.met for it in measured)
    head = ["target", "ranks", "at most", "measured", "", "where it is worst"]
    absent = len(verdicts) - len(measured)
    return (f"## Targets: {met} of {len(measured)} met, {absent} not measured\n\n"
            + markdown(head, rows))


def speed_section(table, transport):
    parts = []
    lines = [line for line in BY_NAME if BY_NAME[line].transport == transport
             and line in table.lines()]
    for ranks in table.ranks():
        rows = []
        for size in table.sizes(ranks):
            cells = [significant(table.value(line, ranks, size)) for line in lines]
            rows.append([size_text(size), *cells])
        parts.append(f"### {transport}, {ranks} ranks, median in µs\n\n"
                     + markdown(["size", *map(title, lines)], rows))
    return f"## Speed over {transport}\n\n" + "\n".join(parts) if lines else ""


def ratio_cell(found):
    return f"{found[0]:.2f}" if found else "–"


def ratio_section(table):
    """Ours to the best peer, with its name, and to the reference."""
    parts = ["## Ratios: below 1 unisum is faster\n"]
    for transport, ours in OURS.items():
        for line in ours:
            if line not in table.lines():
                continue
            head = ["size"]
            for ranks in table.ranks():
                head += [f"{ranks} ranks / best peer", "which", "/ reference"]
            rows = []
            for size in table.sizes():
                cells = [size_text(size)]
                for ranks in table.ranks():
                    peer = table.ratio(line, rivals(line), ranks, size)
                    reference = table.ratio(line, [REFERENCE[transport]], ranks, size)
                    cells += [ratio_cell(peer), title(peer[1]) if peer else "–",
                              ratio_cell(reference)]
                rows.append(cells)
            parts.append(f"### {title(line)}\n\n{markdown(head, rows)}")
    return "\n".join(parts)


def cost_section(table, name, function):
    """A value of all lines, at a few sizes."""
    parts = [f"## {name}\n"]
    some = [size for size in table.sizes() if size in (8, 1 << 10, 16 << 10, 1 << 20, 64 << 20)]
    if not some:
        return ""
    for size in some:
        rows = []
        for line in BY_NAME:
            cells = [significant(table.of_rows(line, ranks, size, function))
                     for ranks in table.ranks()]
            if any(cell != "–" for cell in cells):
                rows.append([title(line), *cells])
        head = [size_text(size), *(f"{ranks} ranks" for ranks in table.ranks())]
        parts.append(markdown(head, rows))
    return "\n".join(parts)


def late_section(results):
    if not results["late"]:
        return ""
    rows = [[title(it["line"]), str(it["ranks"]), significant(it["waiting_cpu_ms_mean"]),
             significant(it["waiting_cpu_ms_max"])] for it in results["late"]]
    return ("## Processor time while one rank is 2 s late, ms\n\n"
            + markdown(["", "ranks", "mean of the waiting ranks", "most"], rows))


def startup_section(results):
    if not results["startup"]:
        return ""
    times = startup_ms(results["startup"])
    ranks = results["startup"][0]["ranks"]
    rows = [[title(line), significant(time)] for line, time in times.items()]
    return ("## From the library's init to the end of the first all-reduce, ms\n\n"
            "The slowest rank of each part; starting processes is not counted, waiting for the "
            "others' start is.\n\n" + markdown(["", f"{ranks} ranks"], rows))


def resident_section(results):
    if not results["resident"]:
        return ""
    rows = [[title(it["line"]), str(it["ranks"]), size_text(it["buffer_bytes"]),
             significant(it["before_init_MiB"]), significant(it["beside_buffers_MiB"])]
            for it in results["resident"]]
    head = ["", "ranks", "buffer", "before init", "memory per rank beside both"]
    return ("## Resident memory, MiB\n\nAnonymous and shared pages, shared ones in proportion, "
            "without the user's buffer and what was there before the init (0 where it is not "
            "known); file pages and the kernel's socket buffers are not counted.\n\n"
            + markdown(head, rows))


def hosts_section(results, judge):
    if not judge.hosts.rounds:
        return ""
    rows = []
    for local in sorted({row["local"] for row in results["hosts"] if "local" in row}):
        for size in judge.hosts.sizes(4 * local):
            mine = judge.hosts.value(f"unisum-auto-{local}", 4 * local, size)
            gloo = judge.hosts.value(f"gloo-tcp-{local}", 4 * local, size)
            bound = hosts_bound_us(judge.goodput, 4, size) if judge.goodput else None
            rows.append([str(local), size_text(size), *(
                significant(value / 1e3) if value else "–" for value in (mine, gloo, bound)
            ), ratio_of(mine, bound), ratio_of(mine, gloo)])
    head = ["ranks a host", "size", "unisum, ms", "Gloo, ms", "bound, ms", "/ bound", "/ Gloo"]
    goodput = f"{judge.goodput * 8:.3f}" if judge.goodput else "?"
    return (f"## Four hosts on 1 Gbit/s links\n\nA plain stream there: {goodput} Gbit/s.\n\n"
            + markdown(head, rows))


def ratio_of(ours, other):
    return f"{ours / other:.3f}" if ours and other else "–"


def floor_section(results):
    units = {entry["floor"]: entry["unit"] for entry in results["floors"]}
    if not units:
        return ""
    rows = [[name, significant(value), units[name]]
            for name, value in floors_of(results["floors"]).items()]
    return "## The machine's limits\n\n" + markdown(["", "median", ""], rows)


def skipped_section(results):
    rows = [[it["line"], str(it["ranks"] or ""), it["reason"].replace("|", "/")]
            for it in results["skipped"]]
    rows += [[peer, "", reason] for peer, reason in results["missing"].items()]
    return "## Left out\n\n" + markdown(["", "ranks", "why"], rows) if rows else ""
