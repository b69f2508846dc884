"""PyTorch's options and tensors, as unisum's."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.distributed import ReduceOp

_OPS = {
    ReduceOp.SUM: 1,
    ReduceOp.PRODUCT: 2,
    ReduceOp.MIN: 3,
    ReduceOp.MAX: 4,
    ReduceOp.AVG: 5,
    ReduceOp.BAND: 6,
    ReduceOp.BOR: 7,
    ReduceOp.BXOR: 8,
}


def reduction(op: Any, dtype: torch.dtype) -> Tuple[int, Optional[float]]:
    """The number of an operation, and a factor for inputs."""
    kind = getattr(op, "op", op)
    number = _OPS.get(kind)
    if number is not None:
        if dtype == torch.bool and kind in (ReduceOp.SUM, ReduceOp.AVG):
            # As in arithmetic of booleans: true if one is.
            return 7, None
        return number, None
    if kind == ReduceOp.PREMUL_SUM:
        factor = op.factor
        return 1, float(factor.item() if isinstance(factor, torch.Tensor) else factor)
    raise ValueError(f"unisum has no reduction {kind}")


def single(tensors: Any) -> torch.Tensor:
    """The one tensor of a list, or the tensor."""
    if isinstance(tensors, torch.Tensor):
        return tensors
    if len(tensors) != 1:
        raise ValueError(f"unisum takes one tensor a call, not {len(tensors)}")
    tensor = tensors[0]
    return tensor  # type: ignore[no-any-return]


def nested(lists: Any) -> List[torch.Tensor]:
    """The one list of a list of lists, or the list, or nothing."""
    if not lists:
        return []
    if isinstance(lists[0], torch.Tensor):
        return list(lists)
    if len(lists) != 1:
        raise ValueError(f"unisum takes one list of tensors a call, not {len(lists)}")
    return list(lists[0])


def flat(tensors: List[torch.Tensor]) -> List[torch.Tensor]:
    """The same as contiguous memory; others are refused."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
    return tensors


def refuse_unsendable(tensors: List[torch.Tensor]) -> None:
    """Tensors without memory can't be sent: other backends do nothing, and tell nobody. Of sparse
    layouts, one can be added."""
    for tensor in (it for it in tensors if isinstance(it, torch.Tensor)):
        if tensor.is_meta:
            raise ValueError('tensors on the device "meta" have no memory to communicate')
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(f"tensors of the layout {tensor.layout} are not taken: use sparse_coo")


def counts(tensors: List[torch.Tensor]) -> Optional[List[int]]:
    """How many elements each has, unless all have as many."""
    numbers = [tensor.numel() for tensor in tensors]
    return numbers if any(number != numbers[0] for number in numbers) else None


def split_counts(splits: List[int], tensor: torch.Tensor, world: int) -> List[int]:
    """How many elements go to (or come from) each rank: ``splits`` are rows."""
    rows = tensor.size(0) if tensor.dim() else tensor.numel()
    width = tensor.numel() // rows if rows else 0
    if not splits:
        if rows % world:
            raise RuntimeError("Tensor's dim 0 does not divide equally across group size")
        return [rows // world * width] * world
    if len(splits) != world:
        raise RuntimeError("Number of tensor splits not equal to group size")
    if sum(splits) != rows:
        raise RuntimeError("Split sizes doesn't match total dim 0 size")
    return [split * width for split in splits]


def settings(timeout: float, is_default: bool, is_elastic: bool = False) -> Dict[str, Any]:
    """What PyTorch says, where the environment does not say otherwise."""
    said = {"timeout": timeout, "connect_timeout": timeout}
    known = {name: value for name, value in said.items() if not _is_set(name)}
    options: Dict[str, Any] = dict(known)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface and not _is_set("interface"):
        options["interface"] = ",".join(f"={name}" for name in interface.split(",")[:1])
    if is_default and _is_set("rendezvous"):
        options["rendezvous"] = os.environ["UNISUM_RENDEZVOUS"]
    if not is_default:
        # The ranks of other groups are some of the job's: they are made again in its next view.
        options["elastic"] = False
    elif is_elastic and not _is_set("elastic"):
        options["elastic"] = True
    return options


def _is_set(name: str) -> bool:
    return bool(os.environ.get(f"UNISUM_{name.upper()}"))
