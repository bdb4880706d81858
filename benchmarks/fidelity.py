"""Stages of the accuracy benchmark: adapters, surrogates, real images in their place, accuracies; each is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from lorarecycle import (
    Adapter,
    Backbone,
    LabelledImages,
    MetaConfig,
    RecycleConfig,
    Surrogate,
    TuneConfig,
    invert,
    load_dataset,
    meta_train,
    tune,
)
from lorarecycle.data.images import normalize
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.methods.average import average
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.inversion.prior import BatchNormPrior
from lorarecycle.runtime.files import read_json, write_json
from lorarecycle.runtime.seeds import stream
from lorarecycle.vit.features import extract_features

POOL = 20
"""Adapters in the pool; the first n of them make an experiment with n."""
N_WAY = 5
WARM, OURS, BOUND = (
    "warm start alone",
    "meta-LoRA from surrogates",
    "meta-LoRA from real images, the paper's loss (bound)",
)
OURS_REAL, PAPER = "meta-LoRA from real images, our loss", "meta-LoRA from surrogates, the paper's loss"

Row = dict[str, dict[str, float]]


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
    """Method -> accuracies, one row for each seed of meta-training; surrogates are made once, with seed 0."""
    backbone = bench.backbone(experiment.image_size)
    adapters, tasks = tuned_adapters(bench, experiment)
    meta = replace(bench.config.meta, sparsity=experiment.sparsity)
    size = {"steps": meta.steps, "r": meta.r, "lora_alpha": meta.lora_alpha}
    paper = replace(RecycleConfig.paper().meta, **size, sparsity=experiment.sparsity)
    surrogates = [inverted(bench, backbone, adapter) for adapter in adapters]

    @cache
    def real() -> list[Surrogate]:
        return [label_by_teacher(backbone, a, t, bench.dtype) for a, t in zip(adapters, tasks, strict=True)]

    untrained = replace(meta, steps=0, init="adapters", guide_weight=0.0)
    runs: dict[str, tuple[Callable[[], list[Surrogate]], MetaConfig]] = {
        OURS: (lambda: surrogates, meta),
        BOUND: (real, paper),
    }
    if experiment.ablations:
        runs = {OURS_REAL: (real, meta), PAPER: (lambda: surrogates, paper)}
    fixed: dict[str, Callable[[], Adapter | None]] = {
        "plain ViT, nearest class mean": lambda: None,
        "average of the adapters": lambda: average(adapters),
        WARM: lambda: train(bench, backbone, surrogates, untrained, adapters, 0),
    }
    folder = bench.work_dir / "accuracy" / f"{experiment.name}-{bench.split}"
    rows: dict[str, list[Row]] = {}
    for name, make in fixed.items():
        rows[name] = [accuracy(bench, backbone, make, folder / f"{name}.json")]
    for seed in seeds:
        for name, (pools, settings) in runs.items():

            def trained(pools=pools, settings=settings, seed=seed):  # type: ignore[no-untyped-def]
                return train(bench, backbone, pools(), settings, adapters, seed)

            rows.setdefault(name, []).append(accuracy(bench, backbone, trained, folder / f"{name}-seed{seed}.json"))
    return rows


def train(
    bench: Bench,
    backbone: Backbone,
    pools: list[Surrogate],
    settings: MetaConfig,
    adapters: Sequence[Adapter],
    seed: int,
) -> Adapter:
    """A meta-LoRA, in the precision of the benchmark."""
    student = backbone.clone().to(bench.dtype)
    return meta_train(student, pools, settings, adapters=adapters, seed=seed).meta_lora


def tuned_adapters(bench: Bench, experiment: Experiment) -> tuple[list[Adapter], list[LabelledImages]]:
    """Adapters, and the images that each was tuned on. They are tuned at 112 pixels, whatever the experiment."""
    data = load_dataset(bench.data / "cifar_fs.npz", "train")
    backbone = bench.backbone(112).to(bench.dtype)
    adapters, tasks = [], []
    for i, names in enumerate(class_lists(data, POOL, N_WAY)[: experiment.adapters]):
        rank = experiment.ranks[i % len(experiment.ranks)]
        folder = bench.work_dir / "adapters" / (f"task-{i}" if rank == 4 else f"task-{i}-rank{rank}")
        images = data.select_classes(names)
        config = TuneConfig(epochs=bench.tune_epochs, seed=i, r=rank, lora_alpha=float(rank))
        adapters.append(tuned(backbone, images, config, folder))
        tasks.append(images.resize(experiment.image_size))
    return adapters, tasks


def tuned(backbone: Backbone, images: LabelledImages, config: TuneConfig, folder: Path) -> Adapter:
    """An adapter, from its folder where it is there."""
    if not folder.exists():
        tune(backbone, images, config, name=folder.name).save(folder)
    return Adapter.load(folder)


def class_lists(train: LabelledImages, n_tasks: int, n_way: int, seed: int = 0) -> list[list[str]]:
    """The classes of each adapter's task, drawn without repetition as long as there are enough."""
    names: list[str] = []
    while len(names) < n_tasks * n_way:
        order = torch.randperm(len(train.class_names), generator=stream(seed, "tasks", len(names)))
        names += [train.class_names[i] for i in order[: len(order) // n_way * n_way]]
    return [names[i * n_way : (i + 1) * n_way] for i in range(n_tasks)]


def inverted(bench: Bench, backbone: Backbone, adapter: Adapter) -> Surrogate:
    """The surrogate of an adapter, from the work folder where it is there."""
    path = bench.work_dir / "surrogates" / f"{adapter.name}-{backbone.image_size}px.safetensors"
    if path.exists():
        return Surrogate.load(path)
    surrogate = invert(backbone, adapter, bench.config.inversion, prior=bench.prior, dtype=bench.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    surrogate.save(path)
    return surrogate


@torch.no_grad()
def label_by_teacher(backbone: Backbone, adapter: Adapter, task: LabelledImages, dtype: torch.dtype) -> Surrogate:
    """Real images in a surrogate's place, with the teacher's logits and scores."""
    assert adapter.head is not None
    teacher, head = backbone.merge(adapter).to(dtype), adapter.head
    logits, scores = [], []
    for batch in task.images.split(100):
        encoding = teacher.encode(normalize(batch.to(teacher.device), teacher.mean, teacher.std), scores=True)
        assert encoding.scores is not None
        logits.append(head(teacher.pool(encoding.tokens)).cpu())
        scores.append(encoding.scores.float().cpu())
    return Surrogate(
        task.images,
        task.labels,
        torch.cat(logits),
        head.class_names,
        backbone.patch_size,
        scores=torch.cat(scores),
        adapter=adapter.name,
        adapter_digest=adapter.digest(),
    )


def accuracy(bench: Bench, backbone: Backbone, make: Callable[[], Adapter | None], path: Path) -> Row:
    """Accuracy of a meta-LoRA on the same tasks for all, in percent, and the seconds that making it took."""
    if path.exists():
        return read_json(path)
    start = time.perf_counter()
    adapter = make()
    row: Row = {"seconds": {"mean": time.perf_counter() - start}}
    model = backbone.clone().to(bench.dtype) if adapter is None else backbone.merge(adapter).to(bench.dtype)
    for dataset, images in bench.unseen().items():
        features = extract_features(model, images.images)
        for n_shot in bench.n_shots:
            tasks = sample_tasks(images.labels, n_way=N_WAY, n_shot=n_shot, n_query=15, n_tasks=bench.n_tasks, seed=0)
            result = Evaluation(task_accuracies(features, tasks), tasks)
            row[f"{dataset}, {n_shot}-shot"] = {"mean": result.accuracy, "interval": result.interval}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    logging.info("%s: %s", path.stem, {k: round(v["mean"], 2) for k, v in row.items()})
    return row
