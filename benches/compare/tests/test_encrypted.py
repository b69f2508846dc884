import unittest

from compare.encrypted import most, ratios, report, summary


def turn(number, tls, time, case=("loopback", 2, 1 << 20), cost=1.0):
    return {"case": case, "round": number, "tls": tls, "us": time, "cpu_s_per_GB": cost}


class Encrypted(unittest.TestCase):
    # A round that is slow as a whole, as on a busy machine, is no worse than others.
    ROWS = [turn(0, "off", 100), turn(0, "token", 150), turn(1, "token", 1800),
            turn(1, "off", 1000), turn(2, "off", 100), turn(2, "token", 160, cost=2.0)]

    def test_a_ratio_is_of_one_round(self):
        told = summary(ratios(self.ROWS)["loopback", 2, 1 << 20])
        self.assertEqual(told["ratio"], 1.6)
        self.assertEqual(told["range"], (1.5, 1.8))
        self.assertEqual(told["us"], [100, 160])

    def test_a_round_that_lacks_one_of_the_two_does_not_count(self):
        rows = [*self.ROWS, turn(3, "off", 1)]
        self.assertEqual(len(ratios(rows)["loopback", 2, 1 << 20]), 3)

    def test_results_that_were_saved_give_the_same(self):
        saved = [{**row, "case": list(row["case"])} for row in self.ROWS]
        self.assertEqual(report(saved), report(self.ROWS))

    def test_what_is_asked_depends_on_where_and_how_much(self):
        self.assertEqual(most(("loopback", 4, 8)), 1.3)
        self.assertEqual(most(("loopback", 4, 64 << 20)), 2)
        self.assertLess(most(("hosts", 2, 64 << 20)), 1.03)

    def test_the_report_says_what_is_missed_and_has_no_cost_of_a_start(self):
        start = ("start", 16, None)
        rows = [turn(0, tls, time, start, None) for tls, time in (("off", 9e3), ("token", 18e3))]
        text = report([*self.ROWS, *rows])
        self.assertIn("| **1.60** (1.50–1.80) | 2.00: yes | 1.00 → 1.00 |", text)
        self.assertIn("| 9.00 ms | 18.0 ms | **2.00** (2.00–2.00) | 1.50: no | – |", text)


if __name__ == "__main__":
    unittest.main()
