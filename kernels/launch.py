"""Starts Triton kernels at little cost to the host: what was launched once is found by its arguments' properties."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}
_MOST = 4096  # kinds of launches kept; a job has some hundreds


def launch(kernel: Any, grid: tuple[int, int, int], *args: Any, **named: Any) -> None:
    """`kernel[grid](*args, **named)`, without Triton's look at every argument when all were alike before.

    Triton compiles for dtypes, for addresses that 16 divides and for some properties of integers. Launches that agree
    in dtypes, such addresses, all numbers, options and the device start the kernel that the first of them compiled.

    Args:
        kernel: a function under `triton.jit`.
        grid: blocks along three dimensions.
        args: its first parameters, in order; the first is a tensor on the current device.
        named: all others, and options such as `num_warps`, in the same order at each place that launches.
    """
    if not args[0].is_cuda:  # interpreted, or compiled without being started
        kernel[grid](*args, **named)
        return
    alike = [(arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg for arg in args]
    key = (kernel, args[0].device.index, *alike, *named.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, rest = found
        try:
            compiled[grid](*args, *rest)
        except TypeError:  # a release of Triton whose compiled kernels take other arguments; nothing was started
            kernel[grid](*args, **named)
        return
    compiled = kernel[grid](*args, **named)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = compiled, tuple(named[name] for name in kernel.arg_names[len(args) :])
