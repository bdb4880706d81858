"""Benchmarks of the ops: `pytest benchmarks --benchmark-only --benchmark-json=out.json`, on either machine.

On CUDA every op runs in bfloat16 at batch 100 and is timed with device events; on the CPU in float32 at a
small batch. `extra_info` holds the device, the achieved bandwidth and rate of arithmetic, and on CUDA the
measured ceilings of the card. `--models vit_tiny` (or vit_base, vit_large) picks sizes.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# `python -m pytest` puts the checkout first: transformers, under PEFT, would take kernels/ for its own package.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Model:
    """Sizes of a Vision Transformer at 224 x 224."""

    name: str
    width: int
    heads: int
    patch: int
    batch: int

    @property
    def patches(self) -> int:
        return (224 // self.patch) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + 1


MODELS = {
    "vit_tiny": Model("ViT-Tiny/16", 192, 3, 16, 100 if CUDA else 8),
    "vit_base": Model("ViT-B/16", 768, 12, 16, 100 if CUDA else 4),
    "vit_large": Model("ViT-L/14", 1024, 16, 14, 100 if CUDA else 2),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", default=",".join(MODELS), help="sizes to measure, of " + ", ".join(MODELS))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        names = metafunc.config.getoption("--models").split(",")
        metafunc.parametrize("model", [MODELS[name] for name in names], ids=names)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if CUDA else "cpu"


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    return torch.bfloat16 if CUDA else torch.float32


def _event_seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _queued_seconds(run: Callable[[], Any], calls: int = 20) -> float:
    seconds = sorted(_event_seconds(lambda: [run() for _ in range(calls)]) / calls for _ in range(15))
    return seconds[len(seconds) // 2]


def _replayed_seconds(run: Callable[[], Any]) -> float | None:
    """Seconds of a call inside a CUDA graph, where the host plays no part; None for what cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(run, rep=20, return_mode="median")) / 1000
    except RuntimeError:
        return None


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """What this card reaches: a copy of 1 GiB and a square bfloat16 product, best of 20; empty on the CPU."""
    if not CUDA:
        return {}
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy = min(_event_seconds(lambda: target.copy_(source)) for _ in range(20))
    product = min(_event_seconds(lambda: square @ square) for _ in range(20))
    return {"ceiling_GB_per_s": 2 * 2**30 / copy / 1e9, "ceiling_TFLOP_per_s": 2 * 8192**3 / product / 1e12}


@pytest.fixture
def measure(benchmark, ceilings) -> Callable[..., None]:
    """`measure(run, bytes=..., flops=...)`: time `run` after warming it up, and note what it achieved.

    On CUDA twice: replayed from a CUDA graph, where the host plays no part (the median of the tables, where that can be
    captured), and as called, device events around calls queued together.
    """

    def run_benchmark(run: Callable[[], Any], *, bytes: float, flops: float = 0.0) -> None:
        for _ in range(10 if CUDA else 2):
            run()
        if CUDA:
            called, replayed = _queued_seconds(run), _replayed_seconds(run)
            median = replayed or called
            benchmark.extra_info |= {"device_median_s": median, "as_called_s": called, "replayed_s": replayed}
            benchmark.pedantic(run, rounds=3, iterations=1)  # the table of pytest-benchmark; host time
            benchmark.extra_info["device"] = torch.cuda.get_device_name()
        else:
            benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=1)
            median = benchmark.stats.stats.median if benchmark.stats else float("nan")
            benchmark.extra_info |= {"device": platform.processor() or platform.machine()}
            benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info |= {"GB_per_s": bytes / median / 1e9, "TFLOP_per_s": flops / median / 1e12}
        benchmark.extra_info |= {"torch": torch.__version__, **ceilings}

    return run_benchmark


@pytest.fixture(scope="session")
def compile_plain() -> Callable[..., Any]:
    """`torch.compile` at its best: for these shapes alone, without the dynamic ones that it infers from other sizes."""

    def compile_alone(function: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return compile_alone


def with_backward(run: Callable[[], Any], inputs: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """`run`, which returns a tensor or several, and the gradients of `inputs` for fixed output gradients."""
    y = run()
    dy = torch.randn_like(y) if isinstance(y, torch.Tensor) else [torch.randn_like(part) for part in y]
    return lambda: torch.autograd.grad(run(), inputs, dy)


@pytest.fixture(scope="session")
def grad() -> Callable[..., Any]:
    return with_backward
