"""Cells of the figures: images of adapters, and where their features lie; drawn once all cells are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..report.pictures import _pyplot, _save
from ..runtime.files import load_tensors, save_tensors
from ..vit.features import extract_features
from .facts import Facts
from .settings import key_of
from .world import World


def facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves such a cell."""
    count, per_class = drawn(settings)
    return {**world.surrogate_facts(settings), "count": min(count, world.count(settings)), "per_class": per_class}


def drawn(settings: Mapping[str, Any]) -> tuple[int, int]:
    """How many adapters are shown, and images of each class."""
    chosen = settings.get("pictures") or {}
    return chosen.get("adapters", 2), chosen.get("per_class", 1)


def pictures(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A few images of each class of the first adapters, with the teacher's features, in a file; "images" is how many,
    and "loss" the teachers' mean cross-entropy of them. No other adapters are tuned or inverted."""
    count, per_class = drawn(settings)
    images, features, labels, losses = [], [], [], []
    surrogates, adapters = world.surrogates(settings, count), world.adapters(settings, count)
    for i, (surrogate, adapter) in enumerate(zip(surrogates, adapters, strict=True)):
        assert surrogate.labels is not None
        assert surrogate.teacher_logits is not None
        rows = [(surrogate.labels == c).nonzero()[:per_class, 0] for c in range(len(surrogate.class_names))]
        index = torch.cat(rows)
        teacher = world.backbone(settings).merge(adapter).to(dtype=world.dtype)
        images.append(surrogate.images[index])
        features.append(extract_features(teacher, surrogate.images[index], size=surrogate.images.shape[-1]))
        labels.append(torch.stack([torch.full_like(index, i), surrogate.labels[index]], dim=1))
        shown = surrogate.teacher_logits[index], surrogate.labels[index]
        losses.append(torch.nn.functional.cross_entropy(*shown).item())
    tensors = {"images": torch.cat(images), "features": torch.cat(features), "labels": torch.cat(labels)}
    path = Path("pictures") / f"{key_of(facts(world, settings))}.safetensors"
    (world.work / path.parent).mkdir(parents=True, exist_ok=True)
    save_tensors(world.work / path, tensors, {})
    return {"images": float(len(tensors["images"])), "loss": sum(losses) / len(losses), "file": str(path)}


def draw_grid(rows: Sequence[tuple[str, Path]], path: Path) -> Path:
    """A sheet of images, a row for each cell (Fig. 5 and 8).

    Args:
        rows: titles and the files that `pictures` wrote.
        path: PNG file to write.
    """
    plt = _pyplot()
    sheets = [(title, load_tensors(file)[0]["images"]) for title, file in rows]
    columns = max(len(images) for _, images in sheets)
    figure, axes = plt.subplots(
        len(sheets), columns, figsize=(1.2 * columns + 1.5, 1.4 * len(sheets)), squeeze=False, layout="constrained"
    )
    for line, (title, images) in zip(axes, sheets, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy())
        line[0].set_title(title, fontsize=8, loc="left")
    return _save(figure, path)


def draw_map(rows: Sequence[tuple[str, Path]], path: Path) -> Path:
    """The features of each cell's images in two dimensions by t-SNE, a colour for each class (Fig. 9)."""
    from sklearn.manifold import TSNE

    plt = _pyplot()
    figure, axes = plt.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.2), squeeze=False, layout="constrained")
    for axis, (title, file) in zip(axes[0], rows, strict=True):
        tensors = load_tensors(file)[0]
        _, colour = tensors["labels"].unique(dim=0, return_inverse=True)
        n = len(tensors["features"])
        where = TSNE(perplexity=min(30, max(2, n // 4)), random_state=0, init="pca").fit_transform(
            tensors["features"].numpy()
        )
        axis.scatter(where[:, 0], where[:, 1], c=colour.numpy(), cmap="tab20", s=8)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    return _save(figure, path)


def draw_shots(lines: Mapping[str, Sequence[tuple[int, float, float]]], path: Path) -> Path:
    """Accuracy against support images per class, a line for each row of a table.

    Args:
        lines: row -> (shots, accuracy, interval) in the order of the columns.
        path: PNG file to write.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, points in lines.items():
        shots, accuracy, interval = zip(*points, strict=True)
        axis.errorbar(shots, accuracy, yerr=interval, label=name, marker="o", markersize=4, capsize=2)
    axis.set(xlabel="images per class", ylabel="accuracy, %")
    axis.set_xticks(sorted({shot for points in lines.values() for shot, _, _ in points}))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    return _save(figure, path)
