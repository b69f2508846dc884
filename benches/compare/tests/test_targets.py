import unittest

from compare.bounds import exchange_us, hosts_bound_us, shm_us, tcp_us
from compare.libraries import BY_NAME
from compare.report import write
from compare.targets import Judge, Verdict, load, rivals, startup_ms, worst

EMPTY = {name: [] for name in ("rows", "floors", "doublings", "algorithms", "late", "startup",
                               "resident", "hosts", "skipped")}


def row(line, size, time, ranks=2):
    return {"line": line, "ranks": ranks, "bytes": size, "p50_us": time, "p99_us": time,
            "iterations": 1, "voluntary_switches": 0, "cpu_seconds_per_GB": time}


def judged(results, name, ranks):
    verdicts = Judge({**EMPTY, **results}).verdicts(load())
    return next(it for it in verdicts if it.name == name and it.ranks == ranks)


class Targets(unittest.TestCase):
    def test_nothing_measured_is_neither_met_nor_missed(self):
        for verdict in Judge(EMPTY).verdicts(load()):
            self.assertEqual(verdict.word, "not measured")

    def test_the_worst_size_of_a_range_decides(self):
        rows = [row("unisum-shm", 8, 1.0), row("mpich-shm", 8, 4.0),
                row("unisum-shm", 1024, 3.0), row("mpich-shm", 1024, 4.0),
                row("unisum-shm", 4096, 9.0), row("mpich-shm", 4096, 4.0)]
        verdict = judged({"rows": rows}, "shm, 8 B – 1 KiB / best peer", 2)
        self.assertEqual((verdict.measured, verdict.where), (0.75, "1 KiB, MPICH shm"))
        self.assertEqual(verdict.word, "NOT met")

    def test_peers_of_the_other_transport_and_references_do_not_count(self):
        self.assertNotIn("one-pass", rivals("unisum-shm"))
        self.assertEqual({BY_NAME[name].transport for name in rivals("unisum-tcp")}, {"tcp"})

    def test_a_limit_that_is_reached_exactly_is_met(self):
        self.assertTrue(Verdict("", 2, 0.5, 0.5).met)
        self.assertFalse(Verdict("", 2, 0.5, 0.51).met)

    def test_hosts_are_held_against_the_stream_of_the_same_run(self):
        stream = {"floor": "stream_between_hosts", "value": 0.12, "unit": "GB/s"}
        size = 16 << 20
        time = hosts_bound_us(0.12, 4, size)
        mine = {**row("unisum-auto", size, time, 4), "local": 1}
        name = "4 hosts at 1 Gbit/s, 16 MiB and more, 1 rank each / bound"
        verdict = judged({"hosts": [stream, mine]}, name, "")
        self.assertAlmostEqual(verdict.measured, 1.0)

    def test_every_target_names_lines_that_exist(self):
        for target in load():
            for name in (target.get("ours"), target.get("against")):
                self.assertTrue(name in (None, "peers") or name in BY_NAME, name)

    def test_start_up_adds_both_parts_and_takes_the_median(self):
        entries = [{"line": "a", "connect_ms": time, "first_all_reduce_ms": 1.0}
                   for time in (1.0, 5.0, 2.0)]
        self.assertEqual(startup_ms(entries), {"a": 3.0})

    def test_worst_of_nothing_is_nothing(self):
        self.assertEqual(worst(iter(())), (None, ""))
        self.assertEqual(worst([(1, "a"), (3, "b")]), (3, "b"))


class Bounds(unittest.TestCase):
    FLOORS = {"nt_copy_1_core": 10.0, "nt_copy_all_cores": 20.0, "cached_copy_all_cores": 80.0,
              "spin_one_way": 0.05, "tcp_8B_spinning": 4.0, "tcp_exchange_64M_default": 2.0,
              "tcp_exchange_64M_cubic": 4.0}

    def test_an_exchange_takes_the_better_congestion_control(self):
        self.assertAlmostEqual(exchange_us(self.FLOORS, 64 << 20), (64 << 20) / 4.0 * 1e-3)
        self.assertIsNone(exchange_us(self.FLOORS, 8))

    def test_small_buffers_are_bound_by_latency_and_large_ones_by_memory(self):
        self.assertAlmostEqual(shm_us(self.FLOORS, 2, 8), 0.1)
        self.assertAlmostEqual(shm_us(self.FLOORS, 2, 64 << 20), 2 * (64 << 20) / 20.0 * 1e-3)
        self.assertAlmostEqual(tcp_us(self.FLOORS, 2, 8), 4.0)

    def test_two_ranks_over_tcp_are_one_exchange(self):
        size = 64 << 20
        self.assertAlmostEqual(tcp_us(self.FLOORS, 2, size), exchange_us(self.FLOORS, size))

    def test_a_host_sends_three_halves_of_its_buffer_among_four(self):
        self.assertAlmostEqual(hosts_bound_us(1.0, 4, 1000), 1.5)


class Report(unittest.TestCase):
    def test_it_is_written_whatever_is_missing(self):
        head = {"date": "today", "machine": dict.fromkeys(
            ("processor", "cores", "memory_GiB", "kernel", "congestion_control"), "x"),
            "versions": {}, "missing": {"gloo": "no network"}}
        head["machine"]["load_before"] = 0.5
        self.assertIn("| gloo |  | no network |", write({**EMPTY, **head}))
        rows = [row("unisum-shm", 8, 1.0), row("mpich-shm", 8, 2.0)]
        self.assertIn("| 8 B | 1.00 | 2.00 |", write({**EMPTY, **head, "rows": rows}))


if __name__ == "__main__":
    unittest.main()
