"""The scenarios of torch_parallelisms over unisum, in worlds of SIZES ranks."""

import datetime
import json
import os
import traceback

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
import torch_parallelisms  # noqa: E402
from worlds import SIZES  # noqa: E402


def run_scenarios(rank, world, backend, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=300),
    )
    results = {}
    for scenario in torch_parallelisms.SCENARIOS:
        try:
            scenario(rank, world)
            results[scenario.__name__] = ["passed", ""]
        except Exception:
            results[scenario.__name__] = ["failed", traceback.format_exc()]
            break  # what the others do meanwhile is not known
    with open(f"{folder}/{rank}", "w") as file:
        json.dump(results, file)
    if results[scenario.__name__][0] == "passed":
        dist.destroy_process_group()
    # Threads of the compiler's and of gloo's may be left.
    os._exit(0)


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    """By rank. `UNISUM_TEST_BACKEND=gloo` shows that the scenarios are right."""
    folder, world = tmp_path_factory.mktemp("scenarios"), request.param
    backend = os.environ.get("UNISUM_TEST_BACKEND", "unisum")
    mp.spawn(run_scenarios, (world, backend, str(folder)), nprocs=world)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world)]


@pytest.mark.parametrize("scenario", [it.__name__ for it in torch_parallelisms.SCENARIOS])
def test_scenario(results, scenario):
    for rank, told in enumerate(results):
        outcome, why = told.get(scenario, ["was not reached", ""])
        assert outcome == "passed", f"rank {rank}: {why}"
