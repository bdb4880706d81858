"""The images that tasks are made of: read when a task wants them, their features computed once for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..data.images import Fit, to_batches
from ..vit.backbone import Backbone
from ..vit.features import extract_features


class TaskImages:
    """Numbered images, in memory or on disk, that tasks point into.

    Args:
        images: uint8 [n, 3, H, W], or a sequence of n things that `to_batches` takes, such as files.
        fit: how they come to size.
        wanted: int64, the images that tasks use; the features of all of them are computed with the first that are asked
            for. All images when None.
        batch_size: images per forward pass.
        workers: threads that read files, see `to_batches`.
        quiet: no progress bar.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Any],
        fit: int | Fit,
        *,
        wanted: Tensor | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        quiet: bool = True,
    ) -> None:
        self.images = images
        self.fit: Fit = Fit.of(fit)
        self.batch_size = batch_size
        self.workers = workers
        self.quiet = quiet
        self.wanted: Tensor = torch.arange(len(images)) if wanted is None else wanted.unique()
        self._features: WeakKeyDictionary[Backbone, dict[str, Tensor]] = WeakKeyDictionary()
        self._row = torch.full((len(images),), -1)
        self._row[self.wanted] = torch.arange(len(self.wanted))

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 [k, 3, size, size] of the images at `index` [k], on the CPU."""
        batches = to_batches(self._at(index), self.fit, self.batch_size, workers=self.workers)
        return torch.cat([batch.cpu() for batch in batches])

    def features(self, backbone: Backbone, index: Tensor, pool: str = "pooled") -> Tensor:
        """Features float32 [k, D] of the images at `index` [k], on the backbone's device; see `Head.pool` for `pool`.

        The first call for a backbone computes those of all wanted images; they are kept as long as it lives.
        """
        known = self._features.setdefault(backbone, {})
        if pool not in known:
            known[pool] = extract_features(
                backbone,
                self._at(self.wanted),
                size=self.fit,
                pool=pool,
                batch_size=self.batch_size,
                workers=self.workers,
                quiet=self.quiet,
            ).to(backbone.device)
        return known[pool][self._row[index].to(backbone.device)]

    def _at(self, index: Tensor) -> Any:
        if isinstance(self.images, Tensor):
            return self.images[index.to(self.images.device)]
        select = getattr(self.images, "select", None)
        return select(index) if select is not None else [self.images[i] for i in index.tolist()]
