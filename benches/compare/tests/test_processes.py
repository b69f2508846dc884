import sys
import time
import unittest

from compare.processes import Launch, has_mark, objects, run

# A rank that leaves its launcher's session, as MPI launchers make them do.
RUNAWAY = """
import os, sys, time
child = os.fork()
if child == 0:
    os.setsid()
    time.sleep(600)
print('{"pid": %d}' % child, flush=True)
time.sleep(600)
"""


class Processes(unittest.TestCase):
    def test_objects_are_picked_from_other_output(self):
        self.assertEqual(objects('warning\n{"a": 1}\n{"a": 2'), [{"a": 1}])

    def test_success_gives_the_first_ones_records(self):
        say = [sys.executable, "-c", "print('{\"a\": 1}')"]
        outcome = run(Launch([say, say]), 30)
        self.assertEqual((outcome.records, outcome.failure), ([{"a": 1}], ""))

    def test_failure_says_why(self):
        outcome = run(Launch([[sys.executable, "-c", "import sys; sys.exit('no way')"]]), 30)
        self.assertIn("exit status 1: no way", outcome.failure)

    def test_the_failure_of_one_ends_the_others(self):
        start = time.monotonic()
        commands = [[sys.executable, "-c", "import time; time.sleep(600)"],
                    [sys.executable, "-c", "raise SystemExit(3)"]]
        self.assertIn("exit status 3", run(Launch(commands), 300).failure)
        self.assertLess(time.monotonic() - start, 60)

    def test_the_time_limit_ends_ranks_in_sessions_of_their_own(self):
        outcome = run(Launch([[sys.executable, "-c", RUNAWAY]]), 2)
        self.assertTrue(outcome.timed_out)
        self.assertFalse(has_mark(outcome.records[0]["pid"], b"COMPARE_LAUNCH="))


if __name__ == "__main__":
    unittest.main()
