"""Part of benchmarks/icm_lora.py: seconds of a step, peak memory and seconds of a sample, by number of parameters."""

from __future__ import annotations

import statistics
import time

import torch
from memory import peak_memory, reset_peak_memory

from lorarecycle import Adapter
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.generate import LoRAGenerator
from lorarecycle.generate.training import TIMED

SIZES = (9_216, 18_432, 36_864, 100_000, 250_000, 500_000, 1_000_000, 2_000_000)
STEPS = 3


def measure_scaling() -> list[dict[str, float]]:
    """Random adapters of one site each, batch 2, float32, with as many threads as torch has."""
    rows = []
    for size in SIZES:
        width = size // 2
        pool = [Adapter({"blocks.0.attn.q": LoRAFactors(*random_pair(width, seed), 1.0)}) for seed in range(2)]
        vectors = torch.eye(2, 192)
        reset_peak_memory()
        before = peak_memory()
        start = time.perf_counter()
        generator = LoRAGenerator.fit(
            pool, vectors, config={"epochs": STEPS, "batch_size": 2}, device="cpu", quiet=True
        )
        seconds = (time.perf_counter() - start) / (STEPS + 1 + TIMED)  # those that say how long it takes count
        peak = peak_memory()
        generator.sample(vectors[0])
        samples = []
        for seed in range(5):
            start = time.perf_counter()
            generator.sample(vectors[0], seed=seed)
            samples.append(time.perf_counter() - start)
        rows.append(
            {
                "parameters": generator.layout.size,
                "seconds_per_step": seconds,
                "peak_gb": peak,
                "peak_gb_above_start": peak - before,
                "sample_ms": 1000 * statistics.median(samples),
                "generator_mb": sum(t.numel() * t.element_size() for t in generator.model.state_dict().values()) / 1e6,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def random_pair(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, width, generator=generator) * 0.04, torch.randn(width, 1, generator=generator) * 0.04
