"""Surrogate data: synthesised images with what is known of them (labels, teacher logits, kept tokens); and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..runtime.files import load_tensors, save_tensors

FORMAT = 2
READABLE = (1, 2)
PER_IMAGE = ("labels", "teacher_logits", "kept", "scores", "curves", "rows")
"""Tensors with a row for each image, beside the images."""
_FACTS = {"class_names": list, "patch_size": int, "adapter": str, "adapter_digest": str, "config": dict}


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Images to meta-train on: synthesised from one adapter, or painted.

    Attributes:
        images: uint8 [n, 3, H, W].
        labels: int64 [n], indices into `class_names`; None for painted pictures, which show no class.
        teacher_logits: float32 [n, C], the adapter's own answer to the images; None where nothing asked for it.
        class_names: C names; none for painted pictures.
        patch_size: side of the patches that `kept` and `scores` count.
        kept: int64 [n, k], patch tokens left after pruned inversion, ascending; None where nothing was pruned.
        scores: float32 [n, N], attention of the class token in the last block (Eq. 5); masks to any sparsity.
        adapter: name of the adapter; "" for painted pictures.
        adapter_digest: its `Adapter.weights_digest()`.
        config: settings it was made with.
        curves: float32 [n, 2, T], cross-entropy of each image and the prior of its batch on the way, at every
            `ceil(steps / 100)`-th step of the optimisation, NaN after an early end; None where nothing was optimised.
        rows: int64 [n], ascending, which of all images these are where only those were kept that training draws; None
            where all are here.

    Raises:
        ValueError: lengths that do not fit together.
    """

    images: Tensor
    labels: Tensor | None
    teacher_logits: Tensor | None
    class_names: tuple[str, ...]
    patch_size: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    adapter: str = ""
    adapter_digest: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    curves: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"`images` must be uint8 [n, 3, H, W], got {self.images.dtype} {list(self.images.shape)}.")
        for name in PER_IMAGE:
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ValueError(f"`{name}` must have one row per image ({n}), got {len(values)}.")
        if self.teacher_logits is not None and self.teacher_logits.shape[1] != len(self.class_names):
            raise ValueError(
                f"`teacher_logits` must have a column per class ({len(self.class_names)}), "
                f"got {list(self.teacher_logits.shape)}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.images.shape[-2] // self.patch_size, self.images.shape[-1] // self.patch_size

    def masked(self, sparsity: float) -> Surrogate:
        """The same images with the `sparsity` share of patches left out that the class token attended to least.

        Raises:
            ValueError: no scores are stored, or `sparsity` is outside [0, 1).
        """
        return replace(self, kept=mask_scores(self.scores, sparsity, self.adapter))

    def select(self, index: Tensor) -> Surrogate:
        """Some of the images, those at `index` [k], ascending, with what is known of them."""
        rows = index if self.rows is None else self.rows[index]
        own = {name: getattr(self, name) for name in PER_IMAGE[:-1]}
        parts: dict[str, Any] = {name: None if values is None else values[index] for name, values in own.items()}
        return replace(self, images=self.images[index], rows=rows, **parts)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write one safetensors file atomically."""
        dtypes = {
            "teacher_logits": torch.float32,
            "kept": torch.int32,
            "scores": torch.float32,
            "curves": torch.float32,
            "rows": torch.int32,
        }
        tensors = {}
        for name in ("images", *PER_IMAGE):
            tensor = getattr(self, name)
            if tensor is not None:
                tensors[name] = tensor.to(dtypes.get(name, tensor.dtype))
        meta = {
            "surrogate_format": FORMAT,
            "class_names": list(self.class_names),
            "patch_size": self.patch_size,
            "adapter": self.adapter,
            "adapter_digest": self.adapter_digest,
            "config": dict(self.config),
        }
        return save_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Surrogate:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, corrupt, or no surrogate of this version.
        """
        tensors, strings = load_tensors(path)
        meta = read_facts(path, strings)
        images = tensors.get("images")
        if images is None or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = "none" if images is None else f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{path} must hold `images`, uint8 [n, 3, H, W], got {found}; make it again.")
        check_tables(path, tuple(images.shape), len(meta["class_names"]), meta["patch_size"], tensors)
        return cls(
            images=tensors["images"],
            labels=tensors.get("labels"),
            teacher_logits=tensors.get("teacher_logits"),
            class_names=tuple(meta["class_names"]),
            patch_size=meta["patch_size"],
            kept=tensors["kept"].long() if "kept" in tensors else None,
            scores=tensors.get("scores"),
            adapter=meta["adapter"],
            adapter_digest=meta["adapter_digest"],
            config=meta["config"],
            curves=tensors.get("curves"),
            rows=tensors["rows"].long() if "rows" in tensors else None,
        )


def read_facts(path: str | PathLike[str], strings: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a surrogate's file, checked.

    Raises:
        ValueError: no JSON, another format, or values of other kinds; the message names the file and the field.
    """
    try:
        meta = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must have metadata in JSON, got {str(error)[:80]}; make it again.") from error
    if meta.get("surrogate_format") not in READABLE:
        raise ValueError(
            f"{path} must be a surrogate of a format in {READABLE}, got {meta.get('surrogate_format')!r:.40}; make it "
            "again."
        )
    for key, kind in _FACTS.items():
        if not isinstance(meta.get(key), kind) or isinstance(meta[key], bool):
            raise ValueError(
                f"`{key}` of {path} must be {kind.__name__}, got {str(meta.get(key))[:80]!r}; make it again."
            )
    if meta["patch_size"] < 1 or not all(isinstance(name, str) for name in meta["class_names"]):
        raise ValueError(f"{path} must have a `patch_size` above 0 and `class_names` of text; make it again.")
    return meta


def check_tables(
    path: str | PathLike[str],
    shape: tuple[int, ...],
    classes: int,
    patch_size: int,
    tensors: Mapping[str, Tensor],
) -> None:
    """Make sure that what stands beside the images of a file fits them.

    Args:
        path: of the file.
        shape: of the images.
        classes, patch_size: as the metadata say.
        tensors: what is there of `PER_IMAGE`, as stored.

    Raises:
        ValueError: no images, other shapes or types, NaN, labels or patches that are not there.
    """
    n, _, height, width = shape
    patches = (height // patch_size) * (width // patch_size)
    if not n or not patches:
        raise ValueError(f"{path} must hold images of patches of {patch_size}, got {list(shape)}; make it again.")
    rules: dict[str, tuple[list[int | None], int | None]] = {
        "labels": ([n], classes),
        "teacher_logits": ([n, classes], None),
        "kept": ([n, None], patches),
        "scores": ([n, patches], None),
        "curves": ([n, 2, None], None),
        "rows": ([n], 2**31),
    }
    for name, (sizes, below) in rules.items():
        if name not in tensors:
            continue
        found = tensors[name]
        fits = found.ndim == len(sizes) and all(a in (None, b) for a, b in zip(sizes, found.shape, strict=True))
        if below is None:
            fits = fits and found.dtype == torch.float32 and (name == "curves" or bool(torch.isfinite(found).all()))
        else:
            fits = fits and found.dtype in (torch.int32, torch.int64) and found.numel() > 0
            fits = fits and 0 <= int(found.min()) <= int(found.max()) < below
        if not fits:
            rule = f"whole numbers below {below}" if below is not None else "float32"
            raise ValueError(
                f"`{name}` of {path} must be {rule}, {['any' if size is None else size for size in sizes]}, got "
                f"{found.dtype} {list(found.shape)} or values that cannot be; make it again."
            )


def mask_scores(scores: Tensor | None, sparsity: float, adapter: str) -> Tensor:
    """The patches that are left, int64 [n, k]; see `Surrogate.masked`."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must be in [0, 1), got {sparsity}; no token would be left.")
    if scores is None:
        raise ValueError(f"surrogate of {adapter!r} must hold scores to be masked, got none; invert it anew.")
    N = scores.shape[1]
    return reference.top_patches(scores, N - math.floor(N * sparsity))
