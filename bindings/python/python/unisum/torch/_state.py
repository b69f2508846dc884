"""A program's state as bytes: the same ones on all ranks that have the same state."""

from __future__ import annotations

import io
import pickle
from typing import Any, List

import torch

#: What tensors are aligned to, and how long the length of the pickle in front of them is.
_ALIGNMENT = 16


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and says where they will lie."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=4)
        # Without this, what is equal would be written in another way where it is the same object,
        # as strings are on some ranks and not on others.
        self.fast = True
        self.tensors: List[Any] = []
        self._end = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"a state with a tensor of {value.layout} can't be given to others")
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy()
        place = (self._end, value.numel(), str(value.dtype).removeprefix("torch."), *value.shape)
        padding = -len(content) % _ALIGNMENT
        self.tensors += [content, bytes(padding)]
        self._end += len(content) + padding
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, content: bytearray, start: int) -> None:
        super().__init__(file)
        self._content, self._start = content, start

    def persistent_load(self, place: Any) -> torch.Tensor:
        start, count, name, *shape = place
        dtype = getattr(torch, name)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        start += self._start
        flat = torch.frombuffer(self._content, dtype=dtype, count=count, offset=start)
        # Memory of its own: optimizers keep what they are given.
        return flat.reshape(shape).clone()


def to_bytes(state: Any) -> bytes:
    """Tensors and what holds them, as bytes that depend on nothing but their values."""
    head = io.BytesIO()
    pickler = _Pickler(head)
    pickler.dump(state)
    told = head.getvalue()
    told += bytes(-len(told) % _ALIGNMENT)
    return b"".join([len(told).to_bytes(_ALIGNMENT, "little"), told, *pickler.tensors])


def from_bytes(content: bytes) -> Any:
    """What ``to_bytes`` was given, with all tensors on the CPU. Only for bytes of the job's ranks:
    they may run any code, as those of ``torch.distributed.broadcast_object_list`` may."""
    whole = bytearray(content)
    end = _ALIGNMENT + int.from_bytes(whole[:_ALIGNMENT], "little")
    return _Unpickler(io.BytesIO(whole[_ALIGNMENT:end]), whole, end).load()
