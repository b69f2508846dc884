import unittest

from compare.medians import (Table, best_floors, choices, floors_of, steepest,
                             switches_per_operation, tail)


def row(line, size, time, number=0, ranks=2, **more):
    fields = {"line": line, "ranks": ranks, "bytes": size, "p50_us": time, "round": number}
    return {**fields, "p99_us": 2 * time, "iterations": 10, "voluntary_switches": 0, **more}


class Medians(unittest.TestCase):
    def test_values_are_medians_over_rounds(self):
        table = Table([row("a", 8, time) for time in (1.0, 9.0, 2.0)])
        self.assertEqual(table.value("a", 2, 8), 2.0)
        self.assertIsNone(table.value("a", 4, 8))
        self.assertEqual(table.round_count(), 3)

    def test_the_best_is_the_smallest_of_those_that_were_measured(self):
        table = Table([row("a", 8, 3.0), row("b", 8, 2.0)])
        self.assertEqual(table.best(["a", "b", "absent"], 2, 8), ("b", 2.0))
        self.assertIsNone(table.best(["absent"], 2, 8))

    def test_ratios_name_the_other_line(self):
        table = Table([row("ours", 8, 1.0), row("a", 8, 4.0), row("b", 8, 2.0)])
        self.assertEqual(table.ratio("ours", ["a", "b"], 2, 8), (0.5, "b"))
        self.assertIsNone(table.ratio("absent", ["a"], 2, 8))

    def test_only_whole_doublings_are_neighbours(self):
        table = Table([row("a", 8, 1.0), row("a", 16, 2.0), row("a", 64, 100.0)])
        self.assertEqual(steepest(table, "a", 2), (2.0, 8, 16))
        self.assertIsNone(steepest(table, "absent", 2))

    def test_switches_are_per_rank_and_operation(self):
        self.assertEqual(switches_per_operation(row("a", 8, 1.0, voluntary_switches=40)), 2.0)

    def test_the_tail_is_relative(self):
        self.assertEqual(tail(row("a", 8, 3.0)), 2.0)


class Floors(unittest.TestCase):
    ENTRIES = [{"floor": name, "value": value, "unit": unit} for name, value, unit in (
        ("copy", 1.0, "GB/s"), ("copy", 2.0, "GB/s"), ("copy", 9.0, "GB/s"),
        ("wake", 5.0, "us"), ("wake", 3.0, "us"), ("wake", 4.0, "us"))]

    def test_the_table_has_medians_and_the_plots_the_best(self):
        self.assertEqual(floors_of(self.ENTRIES), {"copy": 2.0, "wake": 4.0})
        self.assertEqual(best_floors(self.ENTRIES), {"copy": 9.0, "wake": 3.0})


class Choices(unittest.TestCase):
    def test_the_slowest_choice_of_the_rounds_counts(self):
        rows = []
        for number, taken in enumerate(("ring", "tree", "ring")):
            for name, time in (("ring", 10.0), ("tree", 15.0)):
                rows.append(row("a", 8, time, number, algorithm=name, automatic=name == taken))
        self.assertEqual(choices(rows), {("a", 2, 8): (1.5, "tree", "ring")})


if __name__ == "__main__":
    unittest.main()
