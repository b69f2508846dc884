"""The all-reduce of sparse tensors: all ranks' entries, gathered and added."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce_sparse(group: Any, tensor: torch.Tensor, op: Any) -> None:
    """Adds sparse tensors of one shape in place. Blocks. Collective."""
    if getattr(op, "op", op) != dist.ReduceOp.SUM:
        raise ValueError("sparse tensors can only be summed")
    own = tensor.coalesce()
    shape = torch.tensor([own._nnz(), own.sparse_dim(), *own.shape], dtype=torch.int64)
    shapes = [torch.empty_like(shape) for _ in range(group.size())]
    group.allgather([shapes], [shape]).wait()
    for rank, other in enumerate(shapes):
        if not torch.equal(other[1:], shape[1:]):
            raise ValueError(f"rank {rank} has a sparse tensor of another shape")
    entries = [int(other[0]) for other in shapes]
    indices = _gathered(group, own.indices().t().contiguous(), entries)
    values = _gathered(group, own.values().contiguous(), entries)
    total = torch.sparse_coo_tensor(indices.t(), values, own.shape).coalesce()
    tensor.copy_(total)


def _gathered(group: Any, own: torch.Tensor, entries: Any) -> torch.Tensor:
    out = [own.new_empty((count, *own.shape[1:])) for count in entries]
    group.allgather([out], [own]).wait()
    return torch.cat(out)
