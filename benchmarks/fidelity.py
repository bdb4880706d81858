"""Stages of the accuracy benchmark: adapters, real images in a surrogate's place, one experiment; all resumable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from lorarecycle import (
    Adapter,
    Backbone,
    LabelledImages,
    RecycleConfig,
    load_dataset,
    meta_train,
)
from lorarecycle.baselines.average import average
from lorarecycle.lora import LoRA
from lorarecycle.seeds import stream
from lorarecycle.warm_start import warm_start

T = TypeVar("T")
POOL = 20
"""Adapters in the pool; the first n of them make an experiment with n."""


@dataclass(frozen=True)
class Experiment:
    """What differs between the rows of the tables."""

    name: str
    adapters: int = 8
    image_size: int = 112
    ranks: tuple[int, ...] = (4,)
    """Ranks of the adapters, in turn."""
    sparsity: float | None = None
    """Share of the tokens that meta-training leaves out."""
    datasets: tuple[str, ...] = ("cifar-fs",)
    """Where it is evaluated."""


@dataclass(frozen=True)
class Bench:
    """Where things are and what all experiments share."""

    data: Path
    work_dir: Path
    device: torch.device
    dtype: torch.dtype
    config: RecycleConfig
    split: str
    n_shots: tuple[int, ...]
    n_tasks: int
    tune_epochs: int

    def backbone(self, image_size: int) -> Backbone:
        weights = self.data / "vit_tiny_patch16_224.safetensors"
        return Backbone.load("vit_tiny_patch16_224", weights=weights, image_size=image_size, device=self.device)

    def unseen(self, dataset: str) -> LabelledImages:
        if dataset == "eurosat":
            return load_dataset(self.data / "eurosat.npz")
        return load_dataset(self.data / "cifar_fs.npz", self.split)


def run_experiment(bench: Bench, experiment: Experiment, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of every method: method -> "data set, n-shot" -> mean and interval, in percent.

    The seed is that of meta-training; the surrogates are made once for each set of adapters, with seed 0.
    """
    backbone = bench.backbone(experiment.image_size)
    adapters, tasks = tuned_adapters(bench, experiment)
    meta = replace(bench.config.meta, sparsity=experiment.sparsity)
    surrogates = inverted(bench, experiment, backbone, adapters)
    student = backbone.clone().to(bench.dtype)
    folder = bench.work_dir / "meta" / f"{experiment.name}-seed{seed}"
    methods: dict[str, Adapter | None] = {
        "plain ViT, nearest class mean": None,
        "average of the adapters": average(adapters),
    }
    start = LoRA.random(backbone, r=meta.r, lora_alpha=meta.lora_alpha, sites=meta.sites, generator=stream(0, "warm"))
    methods["warm start alone"] = warm_start(adapters, start, gain=meta.gain).to_adapter(name="warm", like=backbone)
    real = [label_by_teacher(backbone, a, t, bench.dtype) for a, t in zip(adapters, tasks, strict=True)]
    paper = replace(RecycleConfig.paper().meta, steps=meta.steps, r=meta.r, lora_alpha=meta.lora_alpha)
    for name, pools, settings in (
        ("meta-LoRA from surrogates", surrogates, meta),
        ("bound: real images, the paper's loss", real, replace(paper, sparsity=experiment.sparsity)),
        ("real images, our recipe", real, meta),
        ("surrogates, the paper's loss", surrogates, replace(paper, sparsity=experiment.sparsity)),
    ):
        path = folder / name.replace(" ", "-").replace(":", "").replace(",", "").replace("'", "")
        methods[name] = kept(
            path,
            lambda: meta_train(student, pools, settings, adapters=adapters, seed=seed).meta_lora,  # noqa: B023
        )
    return {name: accuracy(bench, experiment, backbone, adapter, seed) for name, adapter in methods.items()}
