"""Part of benchmarks/icm_lora.py: recycle() on real adapters, and on those with generated ones beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet20 import resnet20_prior

from lorarecycle import Adapter, Backbone, EvaluateConfig, InversionConfig, MetaConfig, evaluate, load_dataset, recycle

INVERSION = InversionConfig(images_per_class=8, batch_size=40, steps=20, prior=None, init="shapes", schedule="cosine")
META = MetaConfig(steps=40, n_query=7, init="adapters")
EVALUATION = EvaluateConfig(n_tasks=200)


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
    prior = resnet20_prior(data / "resnet20_cifar10.safetensors")

    def measure(pool: list[Adapter], name: str) -> dict[str, float]:
        meta_lora = None
        if pool:
            meta_lora = recycle(
                pool,
                base=backbone,
                inversion=INVERSION,
                meta=META,
                prior=prior,
                device="cpu",
                dtype="bfloat16",
                work_dir=folder / "recycle" / name,
            )
        found = evaluate(backbone, unseen, meta_lora, config=EVALUATION)
        return {"mean": found.accuracy, "interval": found.interval}

    once("recycle plain", lambda: measure([], ""))
    once("recycle real", lambda: measure(real, "real"))
    once("recycle real and generated", lambda: measure([*real, *generated], "both"))
