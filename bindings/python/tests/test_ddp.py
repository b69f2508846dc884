"""unisum's DistributedDataParallel against PyTorch's: the scenarios of ddp_scenarios,
ddp_options and ddp_failures at two worlds."""

import datetime
import json
import traceback

import pytest

torch = pytest.importorskip("torch")
import ddp_failures  # noqa: E402
import ddp_options  # noqa: E402
import ddp_scenarios  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from worlds import SIZES  # noqa: E402

SCENARIOS = ddp_scenarios.SCENARIOS + ddp_options.SCENARIOS + ddp_failures.SCENARIOS


def run_scenarios(rank, world, folder, only):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "unisum", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=limit
    )
    gloo = dist.new_group(backend="gloo", timeout=limit)
    results = {}
    for scenario in SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        try:
            scenario(rank, world, gloo)
            results[scenario.__name__] = ["passed", ""]
        except Exception:
            results[scenario.__name__] = ["failed", traceback.format_exc()]
            break  # what the others do meanwhile is not known
    with open(f"{folder}/{rank}", "w") as file:
        json.dump(results, file)
    if all(outcome == "passed" for outcome, _ in results.values()):
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenarios")
    world = request.param
    mp.spawn(run_scenarios, (world, str(folder), ()), nprocs=world)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world)]


@pytest.mark.parametrize("scenario", [it.__name__ for it in SCENARIOS])
def test_scenario(results, scenario):
    for rank, told in enumerate(results):
        outcome, value = told.get(scenario, ["was not reached", ""])
        assert outcome == "passed", f"rank {rank}: {value}"
