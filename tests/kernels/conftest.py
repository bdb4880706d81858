"""Kernel tests: on a GPU where there is one, else in Triton's interpreter; unwritten memory holds NaN."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

_CUDA = torch.cuda.is_available()
_TOO_LATE = "triton" in sys.modules and not _CUDA and os.environ.get("TRITON_INTERPRET") != "1"
if not _CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _teach_interpreter_bfloat16() -> None:
    """The interpreter keeps bfloat16 as bit patterns and multiplies these in `tl.dot`; give it the values."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_widened(self, a, b, *args):
        return create_dot(self, widen(a), widen(b), *args)

    InterpreterBuilder.create_dot = create_dot_widened


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels are tested."""
    pytest.importorskip("triton")
    if _CUDA:
        return "cuda"
    if _TOO_LATE:
        pytest.skip("triton was imported before its interpreter could be asked for; run tests/kernels alone")
    _teach_interpreter_bfloat16()
    return "cpu"


_HALF = [pytest.param(dtype, marks=pytest.mark.medium) for dtype in (torch.float16, torch.bfloat16)]
"""Triton's interpreter is slow: 16-bit tensors, which differ in loads and stores alone, wait for `make test`."""


@pytest.fixture(params=[torch.float32, *_HALF], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each in turn, where a test does not choose its own."""
    return request.param


@pytest.fixture(scope="session")
def cpp_backend() -> None:
    """Skips where the C++ twins cannot be built."""
    from lorarecycle.kernels import cpp

    if not cpp.available():
        pytest.skip("no C++ compiler")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` returns NaN (the largest integer): an output that a kernel leaves unwritten is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch) -> None:
    """References on a GPU multiply and convolve in float32, not in TF32."""
    if _CUDA:
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
        # for convolutions alone, or by the new names, torch.export refuses it: "a mix of the legacy and new APIs"
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def assert_close() -> Callable[[torch.Tensor, torch.Tensor, float, str], None]:
    """`assert_close(actual, expected, tolerance, what)`: error relative to the largest expected value."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
        assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)} != {list(expected.shape)}"
        if not actual.numel():
            return
        got, wanted = actual.detach().double().cpu(), expected.detach().double().cpu()
        error = (got - wanted).abs() / wanted.abs().max().clamp_min(1e-30)
        error = torch.where(error.isnan(), torch.inf, error)
        worst = int(error.argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
        assert error.flatten()[worst] <= tolerance, (
            f"{what}: worst element {place}: got {got.flatten()[worst]:.6g}, expected "
            f"{wanted.flatten()[worst]:.6g}, relative error {error.flatten()[worst]:.2e} > {tolerance:.1e}"
        )

    return check
