"""Scenarios of PyTorch programs that an older PyTorch runs too, on 2 ranks; `torch_2_13` calls it."""

import json
import sys
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
import unisum.torch  # noqa: F401  before 2.14 nothing else finds the backend

SCENARIOS = {
    "test_torch": ("reductions", "gatherings", "objects", "messages", "functional", "ddp",
                   "ddp_static_graph", "ddp_unused_parameters", "ddp_no_sync", "fsdp2"),
    "test_ddp": ("gradients_are_those_of_pytorch", "accumulation", "unused_parameters",
                 "static_graph", "buffers", "uneven_inputs", "a_rank_that_raises"),
}


def worker(rank, world, folder):
    import test_ddp
    import test_torch

    own = Path(folder)
    test_torch.run_scenarios(rank, world, "unisum", str(own / "torch"), SCENARIOS["test_torch"])
    test_ddp.run_scenarios(rank, world, str(own / "ddp"), SCENARIOS["test_ddp"])


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("torch", "ddp"):
            (Path(folder) / name).mkdir()
        mp.spawn(worker, (2, folder), nprocs=2)
        failed = []
        for name, wanted in (("torch", SCENARIOS["test_torch"]), ("ddp", SCENARIOS["test_ddp"])):
            told = json.loads((Path(folder) / name / "0").read_text())
            for scenario in wanted:
                outcome, why = told.get(scenario, ["was not reached", ""])
                print(f"{outcome:8} {scenario}")
                if outcome != "passed":
                    failed.append(f"{scenario}: {why}")
    print(f"PyTorch {torch.__version__}:", "\n".join(failed) or "all passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
