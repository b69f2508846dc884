"""PyTorch's own tests of `torch.distributed` backends, as they lie in its wheel."""

import functools
import os
import sys
import traceback
import unittest

import torch
import torch.distributed as dist

torch.set_num_threads(1)


def prepare(backend: str) -> None:
    """Sets what PyTorch's test modules read when they are imported. `backend` is "unisum", "gloo",
    "unisum-as-gloo": unisum under gloo's name, so that tests for gloo alone run too, or
    "unisum-ddp-as-gloo": that with unisum's DistributedDataParallel in the place of PyTorch's."""
    name = "gloo" if backend.endswith("gloo") else backend
    os.environ["BACKEND"] = name
    from torch.testing._internal.common_distributed import DistTestCases

    if backend != "gloo":
        import unisum.torch

        if backend.startswith("unisum-ddp"):
            # Its own in the place of PyTorch's.
            torch.nn.parallel.DistributedDataParallel = unisum.torch.DistributedDataParallel
        if name == "gloo":
            create = functools.partial(unisum.torch._group.create, name="gloo")
            dist.Backend.register_backend("gloo", create, extended_api=True, devices=["cpu"])
        else:
            for feature in ("ddp", "subgroup"):
                DistTestCases.backend_feature[feature].add(name)


def case_class() -> type:
    """The class that has all the cases, without its starting of processes."""
    from torch.testing._internal.distributed.distributed_test import (
        DistributedTest,
        TestDistBackend,
    )

    class Cases(TestDistBackend, DistributedTest._DistTestBase):
        pass

    # Decorators look for its helpers in the module that a case's class is of.
    setattr(sys.modules[__name__], "Cases", Cases)
    return Cases


def names(cases: type) -> list:
    """The cases to run: decorators mark those that unittest would skip."""
    found = [name for name in dir(cases) if name.startswith("test_")]
    return [it for it in found if not getattr(getattr(cases, it), "__unittest_skip__", False)]


def run(cases: type, name: str, rank: int, file_name: str) -> tuple:
    """Runs one case in this process: how it ended, and why."""
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_distributed import TEST_SKIPS

    skips = {skip.exit_code: key for key, skip in TEST_SKIPS.items()}
    case = cases(name)
    case.rank, case.file_name, case.id = rank, file_name, lambda: name
    common_utils.set_rng_seed(1234)
    try:
        getattr(case, name)()
    except unittest.SkipTest as skipped:
        return "skipped", str(skipped)
    except SystemExit as exit:
        return "skipped", skips.get(exit.code, str(exit.code))
    except Exception as error:
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {str(error).strip()[:400]}"
    return "passed", ""
