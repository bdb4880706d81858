"""The data folder and the ViT of all benchmarks; sets and work folders of those at 224 pixels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorarecycle import Backbone, LabelledImages, load_dataset
from lorarecycle.data.images import Fit
from lorarecycle.data.lazy import Dataset
from lorarecycle.data.sets import open_dataset
from lorarecycle.runtime.files import read_json, write_json
from lorarecycle.runtime.seeds import stream

Images = LabelledImages | Dataset
DATA = Path(os.environ.get("LORARECYCLE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
"""What the benchmarks read."""


def vit_tiny(**options: Any) -> Backbone:
    """ViT-Tiny of `DATA`; options as in `Backbone.load`."""
    return Backbone.load("vit_tiny_patch16_224", weights=DATA / "vit_tiny_patch16_224.safetensors", **options)


class Sets(NamedTuple):
    """A data set by part; None where it has no classes for that part."""

    train: Callable[[], Images] | None
    val: Callable[[], Images] | None
    test: Callable[[], Images]


def data_sets(data: Path) -> dict[str, Sets]:
    """Every set; the first four have classes to tune adapters on, the others only test them (Tab. 3).

    Args:
        data: folder with cifar_fs.npz, eurosat.npz and datasets/{cub,vgg_flower,crop_diseases,isic,chestx}.
    """

    def cifar(split: str) -> Images:
        return load_dataset(data / "cifar_fs.npz", split)

    def parquet(name: str, split: str) -> Images:
        return open_dataset(data / "datasets" / name, split)

    def in_domain(name: str) -> Sets:
        return Sets(*(partial(parquet, name, split) for split in ("train", "validation", "test")))

    return {
        "cifar_fs": Sets(*(partial(cifar, split) for split in ("train", "val", "test"))),
        "vgg_flower": in_domain("vgg_flower"),
        "cub": in_domain("cub"),
        "crop_diseases": Sets(*(partial(_crops, data, part) for part in ("train", "val", "test"))),
        "eurosat": Sets(None, None, lambda: load_dataset(data / "eurosat.npz")),
        "isic": Sets(None, None, partial(parquet, "isic", "test")),
        "chestx": Sets(None, None, partial(parquet, "chestx", "test")),
    }


def _crops(data: Path, part: str) -> Images:
    """CropDiseases has one part: tomatoes and potatoes test, of the other 15 classes ten tune and five choose."""
    whole = open_dataset(data / "datasets" / "crop_diseases", "test")
    tested = [name for name in whole.class_names if name.startswith(("Tomato", "Potato"))]
    others = [name for name in whole.class_names if name not in tested]
    order = [others[i] for i in torch.randperm(len(others), generator=stream(0, "crop diseases")).tolist()]
    return whole.select_classes({"train": order[:10], "val": order[10:], "test": tested}[part])


def loaded(images: Images, fit: Fit, per_class: int | None = None) -> LabelledImages:
    """In memory and of the backbone's size, at most `per_class` images of each class (evenly spaced)."""
    if per_class is not None:
        rows = [(images.labels == c).nonzero()[:, 0] for c in range(len(images.class_names))]
        images = images.subset(torch.cat([evenly(r, per_class) for r in rows]))
    return images.load(fit) if isinstance(images, Dataset) else images.resize(fit)


def evenly(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of them, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write down with which settings (JSON values) a folder is filled; the program ends where it was with others."""
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
    there = read_json(path)
    for name, value in settings.items():
        if there.get(name) != value:
            sys.exit(f"--work-dir: {name} of {folder.name} is {there.get(name)}, not {value}; name another folder.")
