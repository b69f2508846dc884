"""Keeps `torch.compile` out of what a process group does."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType
from typing import Any, Callable, Iterator, Optional

import torch


def skip(*modules: ModuleType) -> None:
    """Has functions of these modules run as they are where a compiled program calls them. PyTorch
    would compile each, and fails at the attributes of process groups."""
    skip_code = _skip_code()
    if skip_code is None:
        return
    for module in modules:
        for function in _functions(module, module.__name__):
            skip_code(function.__code__)
            function._torchdynamo_disable = True


def _skip_code() -> Optional[Callable[[Any], None]]:
    """What marks code to be left as it is. Not `torch._dynamo`'s own, whose import takes long."""
    native = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(native, "skip_code"):
        return native.skip_code  # type: ignore[no-any-return, union-attr]
    try:
        actions = native._FrameAction  # type: ignore[union-attr]
        strategy = native._FrameExecStrategy(actions.SKIP, actions.DEFAULT)  # type: ignore
        return lambda code: native.set_code_exec_strategy(code, strategy)  # type: ignore
    except AttributeError:
        return None


def _functions(owner: Any, module: str) -> Iterator[Any]:
    """The functions and methods that the module itself defines."""
    for it in list(vars(owner).values()):
        if isinstance(it, property):
            it = it.fget
        if isinstance(it, (staticmethod, classmethod)):
            it = it.__func__
        if getattr(it, "__module__", None) != module:
            continue
        if isinstance(it, FunctionType):
            yield it
        elif inspect.isclass(it) and not isinstance(owner, type):
            yield from _functions(it, module)
