"""unisum as a backend of ``torch.distributed``.

From PyTorch 2.14 on nothing needs to be imported: the entry point finds it. Before, import this
module first::

    torch.distributed.init_process_group("unisum")
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .. import _completion
from . import _backend, _barrier, _compiling, _elastic, _group, _options, _profiling, _sparse, _work
from . import hooks
from ._ddp import DistributedDataParallel
from ._elastic import rank, rebuild, view, world
from ._group import UnisumProcessGroup, create
from ._joining import admit, align, join
from ._observing import describe, stats

__all__ = [
    "DistributedDataParallel",
    "UnisumProcessGroup",
    "admit",
    "align",
    "describe",
    "hooks",
    "join",
    "rank",
    "rebuild",
    "register",
    "stats",
    "view",
    "world",
]


def register(name: str = "unisum", **options: Any) -> None:
    """Registers the backend. PyTorch calls it by the entry point, and importing this module does."""
    if name.upper() not in dist.Backend._plugins or options:
        dist.Backend.register_backend(
            name, create, extended_api=True, devices=["cpu", "cuda"], **options
        )


_compiling.skip(
    _completion, _backend, _barrier, _elastic, _group, _options, _profiling, _sparse, _work
)
if dist.is_available():
    register()
