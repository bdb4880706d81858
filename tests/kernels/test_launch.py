"""Launches: what Triton compiled is found again only where every property that it looks at agrees."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lorarecycle.kernels import launch as launch_module
from lorarecycle.kernels.launch import launch


class _OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


class _Kernel:
    """Stands for a function under `triton.jit`: notes what it is called with, and what it compiled is called with."""

    arg_names = ("x_ptr", "y_ptr", "n", "eps", "BLOCK")

    def __init__(self) -> None:
        self.whole: list[tuple] = []
        self.compiled: list[tuple] = []

    def __getitem__(self, grid):
        def start(*args, **named):
            self.whole.append((grid, args, named))
            return _Compiled(self)

        return start


class _Compiled:
    def __init__(self, kernel: _Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.compiled.append((grid, args))


def _tensor(dtype: torch.dtype = torch.float32, first: int = 0) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[first : first + 16].as_subclass(_OnGPU)


@pytest.fixture
def kernel(monkeypatch) -> _Kernel:
    monkeypatch.setattr(launch_module, "_compiled", {})
    return _Kernel()


def test_the_second_of_two_alike_starts_what_the_first_compiled(kernel):
    x, y, other = _tensor(), _tensor(), _tensor()
    launch(kernel, (3, 1, 1), x, y, 5, eps=0.5, BLOCK=16, num_warps=4)
    launch(kernel, (7, 2, 1), other, y, 5, eps=0.5, BLOCK=16, num_warps=4)
    assert [call[0] for call in kernel.whole] == [(3, 1, 1)]
    assert kernel.whole[0][2] == {"eps": 0.5, "BLOCK": 16, "num_warps": 4}
    ((grid, args),) = kernel.compiled
    assert grid == (7, 2, 1)
    assert args[0] is other
    assert args[1] is y
    assert args[2:] == (5, 0.5, 16)  # all parameters in order, no option


@pytest.mark.parametrize(
    "change",
    [
        {"x": _tensor(torch.float16)},
        {"x": _tensor(first=1)},  # 4 bytes off an address that 16 divides
        {"y": _tensor(first=1)},
        {"n": 6},
        {"eps": 0.25},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_launches_that_differ_are_compiled_each(change, kernel):
    for call in ({}, change, {}, change):
        given = {"x": _tensor(), "y": _tensor(), "n": 5, "eps": 0.5, "BLOCK": 16, "num_warps": 4} | call
        launch(kernel, (1, 1, 1), given.pop("x"), given.pop("y"), given.pop("n"), **given)
    assert len(kernel.whole) == len(kernel.compiled) == 2


def test_the_store_of_launches_stays_small(kernel, monkeypatch):
    monkeypatch.setattr(launch_module, "_MOST", 3)
    for n in range(10):
        launch(kernel, (1, 1, 1), _tensor(), _tensor(), n, eps=0.5, BLOCK=16)
    assert len(launch_module._compiled) <= 3


def test_without_a_gpu_the_kernel_is_called_as_it_is(kernel):
    for _ in range(2):
        launch(kernel, (1, 1, 1), torch.zeros(4), torch.zeros(4), 5, eps=0.5, BLOCK=16)
    assert len(kernel.whole) == 2
    assert not kernel.compiled
