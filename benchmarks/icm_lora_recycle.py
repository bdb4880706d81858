"""Part of benchmarks/icm_lora.py: recycle() on real adapters, and on those with generated ones beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorarecycle import Adapter, Backbone, EvaluateConfig, InversionConfig, evaluate, load_dataset, recycle

INVERSION = InversionConfig(latent_size=32)


def recycle_all(
    once: Callable[[str, Callable[[], Any]], Any],
    backbone: Backbone,
    data: Path,
    real: list[Adapter],
    generated: list[Adapter],
    folder: Path,
) -> None:
    """1-shot accuracy on the test classes of the plain model and of each meta-LoRA; `once` keeps the results."""
    unseen = load_dataset(data / "cifar_fs.npz", "test").resize(112)

    def measure(pool: list[Adapter], name: str) -> dict[str, float]:
        meta_lora = None
        if pool:
            meta_lora = recycle(
                pool,
                base=backbone,
                inversion=INVERSION,
                device="cpu",
                dtype="bfloat16",
                work_dir=folder / "recycle" / name,
            )
        found = evaluate(backbone, unseen, meta_lora, config=EvaluateConfig(distance="euclidean"))
        return {"mean": found.accuracy, "interval": found.interval}

    once("recycle plain", lambda: measure([], ""))
    once("recycle real", lambda: measure(real, "real"))
    once("recycle real and generated", lambda: measure([*real, *generated], "both"))
