"""Part of benchmarks/icm_lora.py: the tasks and their adapters, tuned at several ranks; accuracies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

from lorarecycle import Adapter, Backbone, LabelledImages, TuneConfig, tune
from lorarecycle.data.images import normalize
from lorarecycle.reproduce.stages import draw_class_lists
from lorarecycle.runtime.files import read_json, write_json
from lorarecycle.runtime.seeds import stream
from lorarecycle.vit.features import extract_features

EPOCHS, SAVE_LAST, BATCH = 40, 20, 20
LEARNT = 10
"""The last checkpoints of each task that a generator learns from, unless said otherwise."""
TUNE_PER_CLASS, TEST_PER_CLASS = 20, 100


class Task(NamedTuple):
    """Five classes, with images to tune on, others of the same classes to test on, and the rest to choose settings."""

    name: str
    images: LabelledImages
    test: LabelledImages
    rest: LabelledImages


def make_tasks(data: LabelledImages, count: int, seed: int) -> list[Task]:
    """Tasks whose classes do not overlap."""
    tasks = []
    for i, names in enumerate(draw_class_lists(data.class_names, count, 5, seed=seed)):
        images, rest = data.select_classes(names).split(TUNE_PER_CLASS, stream(seed, "tune", i))
        tasks.append(Task(f"task-{i}", images, *rest.split(TEST_PER_CLASS, stream(seed, "test", i))))
    return tasks


def tune_task(backbone: Backbone, task: Task, r: int, folder: Path, *, seed: int = 0) -> list[Adapter]:
    """The last checkpoints of one run, from `folder` where it is there; its seconds are kept beside them."""
    record = folder / "seconds.json"
    if not record.exists():
        config = TuneConfig(epochs=EPOCHS, batch_size=BATCH, r=r, lora_alpha=r, save_last=SAVE_LAST, seed=seed)
        start = time.perf_counter()
        tune(backbone, task.images, config=config, name=task.name, checkpoints=folder / "checkpoints")
        write_json(record, time.perf_counter() - start)
    return [Adapter.load(path) for path in sorted((folder / "checkpoints").iterdir())]


def seconds_spent(folder: Path) -> float:
    """All tuning under a folder."""
    return sum(read_json(path) for path in folder.rglob("seconds.json"))


@torch.no_grad()
def head_accuracy(backbone: Backbone, adapter: Adapter, data: LabelledImages) -> float:
    """Accuracy in percent of an adapter under its own head."""
    assert adapter.head is not None
    model, hits = backbone.merge(adapter), 0
    for images, labels in zip(data.images.split(125), data.labels.split(125), strict=True):
        features = model(normalize(images, model.mean, model.std, model.dtype))
        hits += int((adapter.head(features).argmax(dim=1) == labels).sum())
    return 100 * hits / len(data)


def mean_accuracy(backbone: Backbone, adapter: Adapter | None, support: LabelledImages, data: LabelledImages) -> float:
    """Accuracy in percent of nearest class means of the support images, under an adapter or the plain model."""
    model = backbone if adapter is None else backbone.merge(adapter.with_head(None))
    features, queries = extract_features(model, support.images), extract_features(model, data.images)
    classes = range(len(data.class_names))
    means = torch.stack([features[support.labels == c].mean(dim=0) for c in classes])
    return 100 * (torch.cdist(queries, means).argmin(dim=1) == data.labels).float().mean().item()
