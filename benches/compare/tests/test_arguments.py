import unittest

from compare.arguments import bytes_of, geometric_runs, options_from, parser, size_list


class Sizes(unittest.TestCase):
    def test_units_are_powers_of_1024(self):
        self.assertEqual(size_list("64K,8,1M"), [8, 65536, 1 << 20])

    def test_less_than_a_float_is_refused(self):
        with self.assertRaises(ValueError):
            bytes_of("3")

    def test_runs_cover_all_sizes_once_and_in_order(self):
        for sizes in ([8], [8, 64, 256, 1024], [8, 1024, 16384, 65536, 1 << 20], [8, 12, 20]):
            covered = []
            for first, last, factor in geometric_runs(sizes):
                size = first
                while size <= last:
                    covered.append(size)
                    size *= factor
            self.assertEqual(covered, sizes)

    def test_a_run_goes_on_while_the_factor_holds(self):
        self.assertEqual(geometric_runs([8, 64, 256, 1024]), [(8, 64, 8), (256, 1024, 4)])


class Defaults(unittest.TestCase):
    def options(self, line):
        return options_from(parser().parse_args(line.split()), "today")

    def test_quick_is_less_of_everything(self):
        full, quick = self.options(""), self.options("--quick")
        self.assertLess(len(quick.sizes), len(full.sizes))
        self.assertLess(quick.rounds, full.rounds)
        self.assertLess(quick.limit, full.limit)

    def test_what_is_said_wins_over_quick(self):
        options = self.options("--quick --rounds 5 --ranks 3 --peers mpich")
        self.assertEqual((options.rounds, options.ranks, options.peers), (5, [3], ("mpich",)))

    def test_huge_buffers_are_for_few_ranks(self):
        options = self.options("")
        self.assertIn(256 << 20, options.sizes_for(4))
        self.assertNotIn(256 << 20, options.sizes_for(8))

    def test_parts_can_be_left_out(self):
        self.assertNotIn("hosts", self.options("--without hosts").parts)
        self.assertEqual(self.options("--only late").parts, ("late",))


if __name__ == "__main__":
    unittest.main()
