"""The accuracy benchmark's experiments on CIFAR-FS and EuroSAT, made of the stages in `lorarecycle.reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorarecycle import (
    Adapter,
    Backbone,
    BatchNormPrior,
    LabelledImages,
    MetaConfig,
    RecycleConfig,
    Surrogate,
    TuneConfig,
    load_dataset,
    recycle,
    warm_start,
)
from lorarecycle.fewshot.methods.average import average
from lorarecycle.reproduce.stages import Row, draw_class_lists, inverted, label_by_teacher, measured, trained, tuned

POOL = 20
"""Adapters in the pool; the first n of them make an experiment with n."""
N_WAY = 5
WARM, OURS, BOUND = (
    "warm start alone",
    "meta-LoRA from surrogates",
    "meta-LoRA from real images, the paper's loss (bound)",
)
OURS_REAL, PAPER = "meta-LoRA from real images, our loss", "meta-LoRA from surrogates, the paper's loss"


@dataclass(frozen=True)
class Experiment:
    """What differs between the tables."""

    name: str
    adapters: int = 8
    image_size: int = 112
    ranks: tuple[int, ...] = (4,)
    """Ranks of the adapters, in turn."""
    sparsity: float | None = None
    """Share of the tokens that meta-training leaves out."""
    ablations: bool = False
    """Train on real images with our loss and on surrogates with the paper's instead."""


@dataclass(frozen=True)
class Bench:
    """Where things are and what all experiments share."""

    data: Path
    work_dir: Path
    device: torch.device
    dtype: torch.dtype
    config: RecycleConfig
    prior: BatchNormPrior | None
    split: str
    n_shots: tuple[int, ...]
    n_tasks: int
    tune_epochs: int

    def backbone(self, image_size: int) -> Backbone:
        """ViT-Tiny in float32."""
        weights = self.data / "vit_tiny_patch16_224.safetensors"
        return Backbone.load("vit_tiny_patch16_224", weights=weights, image_size=image_size, device=self.device)

    def unseen(self) -> dict[str, LabelledImages]:
        """The data sets of an evaluation, none of whose classes an adapter has seen."""
        cifar = load_dataset(self.data / "cifar_fs.npz", self.split)
        return {"CIFAR-FS": cifar, "EuroSAT": load_dataset(self.data / "eurosat.npz")}


def run_experiment(bench: Bench, experiment: Experiment, seeds: Sequence[int]) -> dict[str, list[Row]]:
    """Method -> accuracies, one row for each seed of `recycle` and of the bound's training."""
    backbone = bench.backbone(experiment.image_size)
    adapters, tasks = tuned_adapters(bench, experiment)
    meta = replace(bench.config.meta, sparsity=experiment.sparsity)
    size = {"steps": meta.steps, "r": meta.r, "lora_alpha": meta.lora_alpha}
    paper = replace(RecycleConfig.paper().meta, **size, sparsity=experiment.sparsity)

    @cache
    def real() -> list[Surrogate]:
        return [label_by_teacher(backbone, a, t, dtype=bench.dtype) for a, t in zip(adapters, tasks, strict=True)]

    def recycled(settings: MetaConfig, seed: int) -> Adapter:
        config = replace(bench.config, meta=settings, seed=seed)
        where = {"base": backbone, "device": bench.device, "dtype": bench.dtype}
        prior = bench.prior if config.inversion.steps else None
        return recycle(adapters, config=config, prior=prior, **where)

    def from_real_images(settings: MetaConfig, seed: int) -> Adapter:
        return trained(backbone, real(), config=settings, adapters=adapters, seed=seed, dtype=bench.dtype)

    runs: dict[str, Callable[[int], Adapter]] = {OURS: partial(recycled, meta), BOUND: partial(from_real_images, paper)}
    if experiment.ablations:
        runs = {OURS_REAL: partial(from_real_images, meta), PAPER: partial(recycled, paper)}
    fixed: dict[str, Callable[[], Adapter | None]] = {
        "plain ViT, nearest class mean": lambda: None,
        "average of the adapters": lambda: average(adapters),
        WARM: lambda: warm_start(adapters, base=backbone, r=meta.r, lora_alpha=meta.lora_alpha),
    }
    folder = bench.work_dir / "accuracy" / f"{experiment.name}-{bench.split}"
    unseen = bench.unseen()
    shared: dict[str, Any] = {"n_shots": bench.n_shots, "n_tasks": bench.n_tasks, "dtype": bench.dtype}
    rows = {name: [measured(backbone, make, unseen, folder / f"{name}.json", **shared)] for name, make in fixed.items()}
    for seed in seeds:
        for name, run in runs.items():
            path = folder / f"{name}-seed{seed}.json"
            rows.setdefault(name, []).append(measured(backbone, partial(run, seed), unseen, path, **shared))
    return rows


def tuned_adapters(bench: Bench, experiment: Experiment) -> tuple[list[Adapter], list[LabelledImages]]:
    """Adapters, and the images that each was tuned on. They are tuned at 112 pixels, whatever the experiment."""
    data = load_dataset(bench.data / "cifar_fs.npz", "train")
    backbone = bench.backbone(112).to(bench.dtype)
    adapters, tasks = [], []
    for i, names in enumerate(draw_class_lists(data.class_names, POOL, N_WAY)[: experiment.adapters]):
        rank = experiment.ranks[i % len(experiment.ranks)]
        folder = bench.work_dir / "adapters" / (f"task-{i}" if rank == 4 else f"task-{i}-rank{rank}")
        images = data.select_classes(names)
        config = TuneConfig(epochs=bench.tune_epochs, seed=i, r=rank, lora_alpha=float(rank))
        adapters.append(tuned(backbone, images, folder, config=config))
        tasks.append(images.resize(experiment.image_size))
    return adapters, tasks


def surrogate_of(bench: Bench, backbone: Backbone, adapter: Adapter) -> Surrogate:
    """The surrogate of an adapter, from the work folder where it is there."""
    path = bench.work_dir / "surrogates" / f"{adapter.name}-{backbone.image_size}px.safetensors"
    return inverted(backbone, adapter, path, config=bench.config.inversion, prior=bench.prior, dtype=bench.dtype)
