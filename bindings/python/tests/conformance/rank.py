"""One rank of a conformance run: all cases in one process group. `run` starts it."""

import datetime
import json
import os
import signal
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import cases  # noqa: E402

CASE_S = 40


class Hang(BaseException):
    """A case that took too long."""


def main(backend: str, rank: int, world: int, folder: str) -> int:
    cases.prepare(backend)
    import torch.distributed as dist
    from torch.testing._internal.distributed import distributed_test

    case_class = cases.case_class()
    with open(f"{folder}/todo") as file:
        todo = json.load(file)
    if rank == 0:
        distributed_test.Barrier.init()
    open(f"{folder}/up{rank}", "w").close()
    while not all(os.path.exists(f"{folder}/up{other}") for other in range(world)):
        time.sleep(0.02)
    dist.init_process_group(
        os.environ["BACKEND"],
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )

    def too_long(*_):
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    with open(f"{folder}/out{rank}", "w", buffering=1) as out:
        for name in todo:
            out.write(json.dumps([name, "begun", ""]) + "\n")
            signal.alarm(CASE_S)
            try:
                outcome, why = cases.run(case_class, name, rank, f"{folder}/{name}")
            except Hang:
                outcome, why = "failed", f"it did not end in {CASE_S} s"
            signal.alarm(0)
            out.write(json.dumps([name, outcome, why]) + "\n")
            if outcome == "failed":
                return 3
            if not dist.is_initialized():
                return 4
            distributed_test.Barrier.sync()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.stdout.flush()
    # The group may be in any state: nothing of it is needed any more.
    os._exit(code)
