"""`torch.compile` for the steps of inversion and meta-training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

Compile = bool | str | None
"""Whether steps are compiled: None for on CUDA only; or a mode of `torch.compile` such as "reduce-overhead"."""

LIMIT = 256
"""Forms of one step (classes, batch sizes, pruning, settings) that may be compiled; more fail."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compiled(function: Callable[P, R], compile: Compile, device: torch.device) -> Callable[P, R]:
    """The function itself, or its compiled form: one graph without breaks, for static shapes.

    A compiled function is made once for each mode, so that later calls find the graphs of earlier ones.

    Args:
        function: defined at module level.
        compile: True, False, or a mode of `torch.compile`; None compiles where `device` is a GPU.
        device: where it will run.

    Raises:
        ValueError: unknown mode.
    """
    if isinstance(compile, str) and compile not in MODES:
        raise ValueError(f"`compile` must be True, False, None or one of {MODES}, got {compile!r}.")
    if compile is False or (compile is None and device.type != "cuda"):
        return function
    return _compile(function, compile if isinstance(compile, str) else "default")


@cache
def _compile(function: Callable[P, R], mode: str) -> Callable[P, R]:
    compiled_function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._dynamo.config.patch(recompile_limit=LIMIT):
            return compiled_function(*args, **kwargs)

    return run
