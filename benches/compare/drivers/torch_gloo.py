"""All-reduce of torch.distributed with Gloo, by the rule of rule.h.

One process imports torch and forks the ranks of this host, so that sixteen ranks do not import it
sixteen times.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as distributed

MOST_OPERATIONS = 20_000
MOST_WARMUPS = 50
LEAST_OPERATIONS = 3
SLOW_S = 0.1
WARMUP_S = 0.1
PATTERN_PERIOD = 1021


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="lowest rank of this host")
    parser.add_argument("--local", type=int, help="ranks of this host")
    parser.add_argument("--meet", required=True, help="init_method: file:///... or tcp://...")
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--sizes", default="8")
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--late-ms", type=float)
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--resident", action="store_true")
    return parser.parse_args()


def resident_kib():
    """Anonymous and shared memory of this process, shared pages in proportion."""
    parts = ("Pss_Anon:", "Pss_Shmem:")
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return sum(float(line.split()[1]) for line in lines if line.startswith(parts))


class Rank:
    """One rank's side of the job."""

    def __init__(self, options, rank):
        self.options, self.rank, self.ranks = options, rank, options.ranks
        self.sizes = [int(size) // 4 * 4 for size in options.sizes.split(",")]
        self.seed = 0
        self.resident_before_kib = resident_kib() if options.resident else 0.0
        self.begin_s = time.monotonic()
        distributed.init_process_group(
            "gloo",
            init_method=options.meet,
            rank=rank,
            world_size=options.ranks,
            timeout=timedelta(seconds=600),
        )

    def combine(self, values, op=distributed.ReduceOp.MAX):
        together = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(together, op)
        return together.tolist()

    def total(self, values):
        return self.combine(values, distributed.ReduceOp.SUM)

    def say(self, fields):
        if self.rank == 0:
            print(json.dumps(fields), flush=True)

    def contribution(self, rank, positions):
        return ((positions * 7 + rank * 13 + self.seed) % 101).float()

    def checked(self, data):
        """One operation on known data: its time on the slowest rank, and wrong elements."""
        self.seed += 1
        positions = torch.arange(min(PATTERN_PERIOD, len(data)))
        repeats = math.ceil(len(data) / len(positions))
        data.copy_(self.contribution(self.rank, positions).repeat(repeats)[: len(data)])
        self.combine([0.0])
        start = time.perf_counter()
        distributed.all_reduce(data)
        elapsed = time.perf_counter() - start
        expected = sum(self.contribution(rank, positions) for rank in range(self.ranks))
        wrong = (data != expected.repeat(repeats)[: len(data)]).sum().item()
        return self.combine([elapsed])[0], self.total([wrong])[0]

    def timed(self, data, operations):
        """Operations back to back: slowest rank's times, processor time and switches of all."""
        times = [0.0] * operations
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        cpu = time.process_time()
        self.combine([0.0])
        for at in range(operations):
            start = time.perf_counter()
            distributed.all_reduce(data)
            times[at] = time.perf_counter() - start
        cpu = time.process_time() - cpu
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - switches
        return self.combine(times), self.total([cpu, switches])

    def measure(self, data):
        estimate, wrong = self.checked(data)
        data.zero_()
        slow = estimate >= SLOW_S
        if not slow:
            (cold,), _ = self.timed(data, 1)
            warm, _ = self.timed(data, fitting(WARMUP_S, cold, 1, MOST_WARMUPS))
            estimate = sum(warm) / len(warm)
        operations = fitting(self.options.seconds, estimate, LEAST_OPERATIONS, MOST_OPERATIONS)
        times, (cpu, switches) = self.timed(data, operations)
        if not slow:
            wrong += self.checked(data)[1]
        self.say(self.row(data, sorted(times), wrong, cpu, switches))

    def row(self, data, times, wrong, cpu, switches):
        size = len(data) * 4
        median_us = quantile_us(times, 0.5)
        algbw = size / median_us * 1e-3
        return {
            "collective": "all_reduce",
            "transport": self.options.transport,
            "algorithm": "library's choice",
            "automatic": True,
            "ranks": self.ranks,
            "bytes": size,
            "count": len(data),
            "dtype": "f32",
            "op": "sum",
            "memory": "private",
            "iterations": len(times),
            "min_us": times[0] * 1e6,
            "p50_us": median_us,
            "p99_us": quantile_us(times, 0.99),
            "max_us": times[-1] * 1e6,
            "algbw_GBps": algbw,
            "busbw_GBps": algbw * 2 * (self.ranks - 1) / self.ranks,
            "wrong": int(wrong),
            "cpu_seconds": cpu,
            "cpu_seconds_per_GB": cpu / (size * len(times) * 1e-9),
            "voluntary_switches": int(switches),
        }

    def sweep(self):
        buffer = torch.empty(max(self.sizes) // 4)
        start = time.monotonic()
        for size in self.sizes:
            (elapsed,) = self.combine([time.monotonic() - start])
            if elapsed > self.options.limit:
                reason = f"{elapsed:.0f} s spent on smaller sizes"
                return self.say({"skipped_from": size, "reason": reason})
            self.measure(buffer[: size // 4])

    def operation_cpu_s(self, data, late_s):
        self.combine([0.0])
        before = time.process_time()
        time.sleep(late_s)
        distributed.all_reduce(data)
        return time.process_time() - before

    def come_late(self):
        data = torch.zeros(max(self.sizes) // 4)
        late_s = self.options.late_ms * 1e-3 if self.rank == self.ranks - 1 else 0.0
        self.operation_cpu_s(data, 0.0)
        in_time = self.operation_cpu_s(data, 0.0)
        burnt = self.operation_cpu_s(data, late_s) - in_time
        burnt = max(burnt, 0.0) if late_s == 0 else 0.0
        most, total = self.combine([burnt])[0], self.total([burnt])[0]
        fields = {"ranks": self.ranks, "late_ms": self.options.late_ms}
        fields["waiting_cpu_ms_mean"] = total / (self.ranks - 1) * 1e3
        fields["waiting_cpu_ms_max"] = most * 1e3
        self.say(fields)

    def start_up(self):
        connected = time.monotonic()
        distributed.all_reduce(torch.ones(2))
        end = time.monotonic()
        slowest = self.combine([connected - self.begin_s, end - connected])
        begin, end = self.combine([self.begin_s, end])
        self.say(
            {
                "ranks": self.ranks,
                "connect_ms": slowest[0] * 1e3,
                "first_all_reduce_ms": slowest[1] * 1e3,
                "last_start_to_first_all_reduce_ms": (end - begin) * 1e3,
            }
        )

    def reside(self):
        (before,) = self.total([self.resident_before_kib])
        self.say({"resident_before_KiB": before / self.ranks})
        self.sweep()
        self.combine([0.0])
        time.sleep(0.5)
        self.combine([0.0])

    def run(self):
        if self.options.late_ms is not None:
            self.come_late()
        elif self.options.startup:
            self.start_up()
        elif self.options.resident:
            self.reside()
        else:
            self.sweep()
        distributed.barrier()
        distributed.destroy_process_group()


def fitting(time_s, one_s, least, most):
    return max(least, min(most, int(time_s / max(one_s, 1e-9))))


def quantile_us(times, share):
    """Nearest rank; the times are ascending."""
    return times[max(1, math.ceil(share * len(times))) - 1] * 1e6


def main():
    options = arguments()
    local = options.ranks if options.local is None else options.local
    torch.set_num_threads(1)
    children = []
    # All ranks begin together, once all of them exist.
    gate, opener = os.pipe()
    for rank in range(options.first, options.first + local):
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)
            Rank(options, rank).run()
            sys.stdout.flush()
            # Not through the parent's exit handlers, which belong to it.
            os._exit(0)
        children.append(child)
    os.close(opener)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return 0 if not any(statuses) else 1


if __name__ == "__main__":
    sys.exit(main())
