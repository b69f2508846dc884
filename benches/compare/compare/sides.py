"""What is measured beside speed: waiting, starting, and resident memory."""

import os
from pathlib import Path

from .libraries import note
from .rounds import do

LATE_MS = 2000
LATE_RANKS = 4
MANY_RANKS = 16
RESIDENT_SIZES = [8, 64 << 10, 4 << 20]
TIMEOUT_S = 60


def measured(lines):
    """One line for each library and transport."""
    return [line for line in lines
            if not line.is_reference and not line.name.endswith(("private", "yield"))]


def late(launcher, lines, results, skips):
    """Processor time that each rank burns while one is two seconds late."""
    for line in measured(lines):
        job = {"sizes": [64], "late-ms": LATE_MS}
        for record in do(launcher, line, LATE_RANKS, job, skips, TIMEOUT_S):
            if "waiting_cpu_ms_max" in record:
                results["late"].append({"line": line.name, **record})
        note(f"  late rank: {line.title}")


def startup(launcher, lines, results, skips, number):
    """From the library's init to the end of the first all-reduce."""
    for line in measured(lines):
        for record in do(launcher, line, MANY_RANKS, {"startup": True}, skips, TIMEOUT_S):
            if "connect_ms" in record:
                results["startup"].append({"line": line.name, "round": number, **record})
        note(f"  start-up: {line.title}")


def arguments_of(pid):
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.split("\0")[:-1]


def resident_kib(pid):
    """Anonymous and shared memory, shared pages in proportion (proc_pid_smaps(5)); None if gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    return sum(float(line.split()[1]) for line in text.splitlines()
               if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


class Observer:
    """The largest sum over all ranks that it saw."""

    def __init__(self, ranks):
        self.ranks, self.most_kib = ranks, 0.0

    def __call__(self, launch, pids):
        ranks = []
        for pid in pids:
            arguments = arguments_of(pid)
            if arguments and launch.is_rank(arguments, leads(pid)):
                ranks.append(pid)
        parts = [resident_kib(pid) for pid in ranks]
        # A sum over fewer would credit the others with pages that they share with the missing.
        if len(parts) == self.ranks and None not in parts:
            self.most_kib = max(self.most_kib, sum(parts))


def leads(pid):
    """Whether a process leads its session."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def resident(launcher, lines, results, skips):
    """Memory per rank beside the user's buffer, and beside what was there before the init."""
    for line in measured(lines):
        observer = Observer(MANY_RANKS)
        job = {"sizes": RESIDENT_SIZES, "seconds": 0.2, "limit": 20, "resident": True}
        if line.is_ours:
            # One launch, so that one process sees all sizes; its own state before is not known.
            job = {"sizes": [4 << 10, 128 << 10, 4 << 20], "seconds": 0.4}
        records = do(launcher, line, MANY_RANKS, job, skips, TIMEOUT_S, observer)
        before = next((it["resident_before_KiB"] for it in records
                       if "resident_before_KiB" in it), 0.0)
        if observer.most_kib == 0:
            skips.add(line.name, MANY_RANKS, "resident memory: not all ranks were seen at once")
            continue
        largest = max((it["bytes"] for it in records if "bytes" in it), default=0)
        each_kib = observer.most_kib / MANY_RANKS - largest / 1024 - before
        results["resident"].append({
            "line": line.name, "ranks": MANY_RANKS, "buffer_bytes": largest,
            "before_init_MiB": before / 1024, "beside_buffers_MiB": each_kib / 1024,
        })
        note(f"  resident: {line.title}: {each_kib / 1024:.1f} MiB")
