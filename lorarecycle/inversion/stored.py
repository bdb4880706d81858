"""Surrogates that stay on disk: their images are mapped into memory row by row, the small tensors are read whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.digests import KEY, hash_tensor, read_digests, refusal
from ..runtime.files import load_tensors
from .surrogate import check_tables, mask_scores, read_facts


class Tables(NamedTuple):
    """What is known of a surrogate's images, without the images."""

    teacher_logits: Tensor | None
    kept: Tensor | None
    scores: Tensor | None

    def masked(self, sparsity: float | None, adapter: str) -> Tables:
        """With the kept tokens of a mask from the scores, see `Surrogate.masked`; as it is for None."""
        return self if sparsity is None else self._replace(kept=mask_scores(self.scores, sparsity, adapter))


class StoredSurrogate:
    """A file of a `Surrogate`, whose images stay there.

    Args:
        path: that `Surrogate.save` wrote.

    Attributes:
        shape: of the images, (n, 3, H, W).
        labels: int64 [n]; None for painted pictures.
        images_digest: SHA-256 (hex) of the images.
        patch_size, adapter, adapter_digest, class_names, config: as in `Surrogate`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no surrogate of this version.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path: Path = Path(path)
        tensors, strings = load_tensors(self.path, skip=("images",))
        self.tables: Tables = Tables(
            tensors.get("teacher_logits"), tensors["kept"].long() if "kept" in tensors else None, tensors.get("scores")
        )
        self.labels: Tensor | None = tensors["labels"].long() if "labels" in tensors else None
        self.shape, self._offset, digest = _place(self.path)
        facts = read_facts(self.path, strings)
        self.patch_size: int = facts["patch_size"]
        self.adapter: str = facts["adapter"]
        self.adapter_digest: str = facts["adapter_digest"]
        self.class_names: tuple[str, ...] = tuple(facts["class_names"])
        self.config: dict[str, Any] = facts["config"]
        check_tables(self.path, self.shape, len(self.class_names), self.patch_size, tensors)
        self.images_digest: str = hash_tensor("torch.uint8", self.shape, self._mapped().reshape(-1))
        if digest is not None and digest != self.images_digest:
            raise ValueError(refusal(self.path, "other images"))

    def __len__(self) -> int:
        return self.shape[0]

    def images(self, rows: Tensor) -> Tensor:
        """uint8 [k, 3, H, W], the images at `rows` [k]: a copy, after which nothing stays mapped."""
        return torch.from_numpy(self._mapped()[rows.numpy()])

    def _mapped(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r", self._offset, self.shape)


class StoredImages:
    """The images of several surrogates side by side, read when they are asked for.

    Args:
        surrogates: of one image size.
    """

    def __init__(self, surrogates: Sequence[StoredSurrogate]) -> None:
        self._surrogates = surrogates
        self._ends = torch.tensor([len(s) for s in surrogates]).cumsum(0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, 3, H, W)"""
        return (int(self._ends[-1]), *self._surrogates[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor) -> Tensor:
        """uint8 [k, 3, H, W], the images at `rows`, int64 [k] on the CPU."""
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        owners = torch.bucketize(rows, self._ends, right=True)
        for owner in owners.unique().tolist():
            mine = owners == owner
            start = 0 if owner == 0 else int(self._ends[owner - 1])
            found[mine] = self._surrogates[owner].images(rows[mine] - start)
        return found


def _place(path: Path) -> tuple[tuple[int, int, int, int], int, str | None]:
    """Shape of the images in a safetensors file that loads, where they start, and their digest if any."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    images = header.get("images")
    if images is None or images["dtype"] != "U8" or len(images["shape"]) != 4 or images["shape"][1] != 3:
        found = "none" if images is None else f"{images['dtype']} {images['shape']}"
        raise ValueError(f"{path} must hold `images`, uint8 [n, 3, H, W], got {found}; make it again.")
    strings = header.get("__metadata__", {})
    digest = (read_digests(strings) or {}).get("images", "") if KEY in strings else None
    return tuple(images["shape"]), 8 + size + images["data_offsets"][0], digest
