"""Pictures for people: surrogate images with their masks, and the training curve (needs matplotlib)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..inversion.surrogate import Surrogate
from ..runtime.files import write_atomic
from .images import chosen


def draw_surrogates(surrogates: Sequence[Surrogate], path: str | PathLike[str], *, per_class: int = 2) -> Path:
    """A sheet with one row of images per adapter, and below it the same images with the dropped patches in grey.

    Args:
        surrogates: one or more.
        path: PNG file to write.
        per_class: images shown of each class; six times as many of pictures without classes.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = _pyplot()
    rows = [chosen(s, per_class * (len(s.class_names) or 6)) for s in surrogates]
    columns = max(len(index) for index in rows)
    figure, axes = plt.subplots(
        2 * len(rows),
        columns,
        figsize=(1.1 * columns + 1, 2.3 * len(rows) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (surrogate, index) in enumerate(zip(surrogates, rows, strict=True)):
        masked = masked_images(surrogate)
        for j, image in enumerate(index):
            top, bottom = axes[2 * i, j], axes[2 * i + 1, j]
            top.imshow(surrogate.images[image].permute(1, 2, 0).numpy())
            bottom.imshow(masked[image].permute(1, 2, 0).numpy())
            if surrogate.labels is not None:
                top.set_title(surrogate.class_names[surrogate.labels[image]], fontsize=8)
        axes[2 * i, 0].text(
            -0.15,
            0.5,
            surrogate.adapter or "painted",
            fontsize=8,
            rotation=90,
            va="center",
            ha="right",
            transform=axes[2 * i, 0].transAxes,
        )
    return _save(figure, path)


def masked_images(surrogate: Surrogate, fill: int = 128) -> Tensor:
    """The images with their dropped patches painted grey (LoRA Recycle, Fig. 4), uint8 [n, 3, H, W]."""
    if surrogate.kept is None:
        return surrogate.images
    n, (rows, columns), p = len(surrogate.images), surrogate.grid, surrogate.patch_size
    mask = torch.zeros(n, rows * columns, dtype=torch.bool).scatter(1, surrogate.kept, True)
    pixels = mask.view(n, 1, rows, columns).repeat_interleave(p, -2).repeat_interleave(p, -1)
    return torch.where(pixels, surrogate.images, torch.tensor(fill, dtype=torch.uint8))


def draw_losses(losses: str | PathLike[str], path: str | PathLike[str]) -> Path:
    """The loss of every episode and its running mean, from the losses.csv that `recycle` writes.

    Raises:
        ImportError: matplotlib is missing.
    """
    plt = _pyplot()
    with open(losses, newline="") as file:
        values = torch.tensor([float(row["loss"]) for row in csv.DictReader(file)])
    window = min(20, len(values))
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(values.numpy(), color="0.75", linewidth=0.8, label="episode")
    if window:
        smooth = values.unfold(0, window, 1).mean(-1).numpy()
        axis.plot(range(window - 1, len(values)), smooth, label=f"mean of {window}")
    axis.set(xlabel="meta-training step", ylabel="loss", ylim=(0, None))
    axis.legend(frameon=False)
    return _save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install `lorarecycle[demo]`.") from error
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: str | PathLike[str]) -> Path:
    saved = write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    _pyplot().close(figure)
    return saved
