"""The adapters that benchmarks/icm_lora.py learns from: 5-way tasks of CIFAR-FS train classes, tuned at several ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from accuracy import class_lists

from lorarecycle import Adapter, Backbone, LabelledImages, TuneConfig, tune
from lorarecycle.files import read_json, write_json
from lorarecycle.images import normalize
from lorarecycle.seeds import stream

EPOCHS, SAVE_LAST, BATCH = 40, 20, 20
TUNE_PER_CLASS, TEST_PER_CLASS = 20, 100


class Task(NamedTuple):
    """Five classes, with the images to tune on and others of the same classes to test on."""

    name: str
    images: LabelledImages
    test: LabelledImages


def make_tasks(data: LabelledImages, count: int, seed: int) -> list[Task]:
    """Tasks whose classes do not overlap."""
    tasks = []
    for i, names in enumerate(class_lists(data, count, 5, seed)):
        images, rest = data.select_classes(names).split(TUNE_PER_CLASS, stream(seed, "tune", i))
        test = rest.sample(TEST_PER_CLASS, stream(seed, "test", i))
        tasks.append(Task(f"task-{i}", images, test))
    return tasks


def tune_task(backbone: Backbone, task: Task, r: int, folder: Path, *, seed: int = 0) -> list[Adapter]:
    """The last checkpoints of one run, from `folder` where it is there; its seconds are kept beside them."""
    record = folder / "seconds.json"
    if not record.exists():
        config = TuneConfig(epochs=EPOCHS, batch_size=BATCH, r=r, lora_alpha=r, save_last=SAVE_LAST, seed=seed)
        start = time.perf_counter()
        tune(backbone, task.images, config, name=task.name, checkpoints=folder / "checkpoints")
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
