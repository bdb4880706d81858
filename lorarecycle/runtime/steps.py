"""`torch.compile` for what a step repeats: a block is compiled once and serves every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from .deprecation import warn_renamed

P = ParamSpec("P")
R = TypeVar("R")

Compile = bool | None
"""Whether repeated parts of steps are compiled: None for where they run on a GPU."""

LIMIT = 256
"""Forms of one part (shapes, dtypes, sites) that may be compiled; more fail."""

_compiling: ContextVar[bool] = ContextVar("lorarecycle_compiling", default=False)


def check_compile(compile: Any, device: torch.device) -> bool:
    """Whether to compile on a device.

    Args:
        compile: True, False, or None for on a GPU only.
        device: where the steps will run.

    Raises:
        ValueError: anything else.
    """
    if isinstance(compile, str):  # modes of torch.compile
        warn_renamed(f"compile={compile!r}", "compile=True")
        return True
    if compile not in (True, False, None):
        raise ValueError(f"`compile` must be True, False or None, got {compile!r}.")
    return device.type == "cuda" if compile is None else compile


@contextmanager
def compiling(compile: Compile, device: torch.device) -> Iterator[None]:
    """Compile the `repeated` functions that are called inside the `with` block, or not; see `check_compile`."""
    token = _compiling.set(check_compile(compile, device))
    try:
        yield
    finally:
        _compiling.reset(token)


def repeated(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator of what every layer of a model does with its own weights; inside `compiling` it runs compiled.

    The layer is an argument. `torch.compile` takes its weights as inputs, so that one graph, for static shapes and
    without breaks, serves all layers; it is kept for later calls, and by PyTorch on disk for later processes.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not _compiling.get():
            return function(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=LIMIT):
            return _compiled(function)(*args, **kwargs)

    return call


@cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, fullgraph=True, dynamic=False)
