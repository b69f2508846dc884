"""Collectives as PyTorch's profiler shows them."""

from __future__ import annotations

import threading
from typing import Any, Callable, List

import torch

is_on = torch.autograd._profiler_enabled


def record(name: str, tensors: List[torch.Tensor]) -> Callable[[], None]:
    """Begins an event; call the result when it has ended.

    It ends on another thread: so the profiler knows that it went on beside the program.
    """
    handle: Any = torch.autograd._record_function_with_args_enter(name, *tensors)

    def end() -> None:
        exit_args = (torch.autograd._record_function_with_args_exit, (handle,))
        thread = threading.Thread(target=exit_args[0], args=exit_args[1])
        thread.start()
        thread.join()

    return end
