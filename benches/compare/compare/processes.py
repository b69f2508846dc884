"""Runs worlds of processes, bounded in time, and leaves none of them behind."""

import json
import os
import secrets
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 2.0
POLL_S = 0.01
WATCH_S = 0.1
MARK = "COMPARE_LAUNCH"


@dataclass
class Launch:
    """Processes that are started together; only the first one's output is read."""

    commands: list
    environment: dict = field(default_factory=dict)
    # Whether a process of the launch is a rank, by its arguments and whether it leads a session.
    is_rank: object = None


@dataclass
class Outcome:
    """What came of a launch: the objects it printed, and why it failed, if it did."""

    records: list
    failure: str = ""
    timed_out: bool = False


def has_mark(pid, mark):
    """Whether a process was started, directly or not, with this mark in its environment."""
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        # It has ended, or is somebody else's.
        return False


def members(mark):
    """Living processes of a launch: some launchers give their ranks groups and sessions of their
    own, but all of them hand their environment on."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if has_mark(pid, mark)]


def send(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def end(processes, mark):
    """Ends what is left of a launch, by its processes' ids."""
    send(members(mark), signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while members(mark) and time.monotonic() < deadline:
        for process in processes:
            process.poll()
        time.sleep(POLL_S)
    send(members(mark), signal.SIGKILL)
    for process in processes:
        process.wait()


def objects(text):
    """The JSON objects among lines."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                # A line that a process was killed in the middle of.
                pass
    return found


def last_words(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[:300]


def run(launch, timeout_s, observe=None):
    """Runs a launch to its end or the time limit. `observe` is called with its processes' ids."""
    token = secrets.token_hex(16)
    environment = {**os.environ, **launch.environment, MARK: token}
    mark = f"{MARK}={token}".encode()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        processes = []
        watch = (lambda: observe(members(mark))) if observe else None
        try:
            for at, command in enumerate(launch.commands):
                processes.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out if at == 0 else errors,
                        stderr=errors,
                        start_new_session=True,
                    )
                )
            failure = await_all(processes, time.monotonic() + timeout_s, watch)
        finally:
            end(processes, mark)
        out.seek(0)
        errors.seek(0)
        records = objects(out.read())
        timed_out = failure == "time"
        if timed_out:
            failure = f"ended after {timeout_s:.0f} s"
        elif failure:
            failure = f"{failure}: {last_words(errors.read())}"
        return Outcome(records, failure, timed_out)


def await_all(processes, deadline, watch):
    """Empty if all succeeded; "time" or how one failed otherwise."""
    while True:
        statuses = [process.poll() for process in processes]
        bad = [status for status in statuses if status]
        if bad:
            return f"exit status {bad[0]}"
        if all(status == 0 for status in statuses):
            return ""
        if time.monotonic() > deadline:
            return "time"
        if watch:
            watch()
        time.sleep(WATCH_S if watch else POLL_S)
