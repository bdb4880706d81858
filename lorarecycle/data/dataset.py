"""Labelled images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .images import Fit, to_uint8


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size with their classes.

    Attributes:
        images: uint8 [n, 3, H, W].
        labels: int64 [n], indices into `class_names`.
        class_names: C names, all different.
        groups: int64 [n], images that belong together, such as those of one patient: no task has one in its support and
            another among its queries. None where each stands alone.

    Raises:
        ValueError: shapes, types or labels that do not fit together.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        images, names = self.images, tuple(map(str, self.class_names))
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` must be uint8 [n, 3, H, W], got {images.dtype} {list(images.shape)}; "
                "use `lorarecycle.data.images.to_uint8`."
            )
        labels = torch.as_tensor(self.labels, device=images.device)
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise ValueError(
                f"`labels` must be one integer per image ({len(images)}), got {labels.dtype} {list(labels.shape)}."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"`class_names` must all be different, got {names}.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
            raise ValueError(
                f"`labels` must be indices of the {len(names)} class names, got {int(labels.min())} to "
                f"{int(labels.max())}."
            )
        if self.groups is not None:
            groups = torch.as_tensor(self.groups, device=images.device).long()
            if groups.shape != labels.shape:
                raise ValueError(f"`groups` must be one per image ({len(images)}), got {list(groups.shape)}.")
            object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "labels", labels.long())
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        height, width = self.images.shape[-2:]
        return f"LabelledImages({len(self)} images {height} x {width}, {len(self.class_names)} classes)"

    @property
    def counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(torch.bincount(self.labels, minlength=len(self.class_names)).tolist())

    def subset(self, index: Tensor) -> LabelledImages:
        """The images at `index` (int64 or bool), under the same class names."""
        groups = None if self.groups is None else self.groups[index]
        return LabelledImages(self.images[index], self.labels[index], self.class_names, groups)

    def select_classes(self, classes: Sequence[str | int]) -> LabelledImages:
        """Only some classes, named or by index; labels are numbered anew, in the order given.

        Raises:
            ValueError: no such class, none, or one twice.
        """
        indices = [self._class_index(c) for c in classes]
        if not indices or len(set(indices)) != len(indices):
            raise ValueError(f"`classes` must name some classes, each once, got {list(classes)}.")
        renumbered = torch.full((len(self.class_names),), -1, device=self.labels.device)
        renumbered[indices] = torch.arange(len(indices), device=self.labels.device)
        labels = renumbered[self.labels]
        chosen = labels >= 0
        names = tuple(self.class_names[i] for i in indices)
        return replace(self.subset(chosen), labels=labels[chosen], class_names=names)

    def sample(self, per_class: int, generator: torch.Generator) -> LabelledImages:
        """`per_class` images of each class, drawn without replacement by a CPU generator, class after class.

        Raises:
            ValueError: a class has fewer images.
        """
        return self.subset(self._draw(per_class, generator))

    def split(self, per_class: int, generator: torch.Generator) -> tuple[LabelledImages, LabelledImages]:
        """`sample`, and the images that are left over."""
        drawn = self._draw(per_class, generator)
        rest = torch.ones(len(self), dtype=torch.bool, device=self.labels.device)
        rest[drawn] = False
        return self.subset(drawn), self.subset(rest)

    def resize(self, size: int | Fit) -> LabelledImages:
        """Shorter side resized to `size` (bicubic, antialiased), centre cropped; a `Fit` says it otherwise."""
        side = Fit.of(size).size
        if tuple(self.images.shape[-2:]) == (side, side) or not len(self):
            return self
        return replace(self, images=to_uint8(self.images, size))

    def _draw(self, per_class: int, generator: torch.Generator) -> Tensor:
        if per_class < 1 or per_class > min(self.counts):
            few = self.class_names[int(np.argmin(self.counts))]
            raise ValueError(
                f"`per_class` must be 1 to {min(self.counts)}, the images of class {few!r}, got {per_class}."
            )
        drawn = []
        for c in range(len(self.class_names)):
            members = (self.labels == c).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator)[:per_class]
            drawn.append(members[order.to(members.device)])
        return torch.cat(drawn)

    def _class_index(self, name: str | int) -> int:
        if isinstance(name, str):
            if name in self.class_names:
                return self.class_names.index(name)
        elif 0 <= int(name) < len(self.class_names):
            return int(name)
        raise ValueError(
            f"`classes` must be names or indices of the {len(self.class_names)} classes, got {name!r}; "
            f"the names are {', '.join(self.class_names)}."
        )
