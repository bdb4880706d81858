"""A labelled set whose images stay where they are until somebody wants them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import hash_file, naming
from ..runtime.progress import track
from .dataset import LabelledImages
from .images import Fit, to_batches


class LazyImages(Sequence[Any]):
    """Images that are fetched one by one, each time they are asked for.

    Args:
        fetch: gives image i as anything that `to_uint8` takes as one image: a path, a file's content, a PIL image ...
        index: int64 [n], the images of this sequence.
    """

    one_each = True
    """Each item is one image: they can be counted without being fetched."""

    def __init__(self, fetch: Callable[[int], Any], index: Tensor) -> None:
        self.fetch = fetch
        self.rows = index

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.select(torch.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"`i` must be below {len(self)}, got {i}.")
        return self.fetch(int(self.rows[i]))

    def __iter__(self) -> Iterator[Any]:
        return (self.fetch(i) for i in self.rows.tolist())

    def select(self, index: Tensor) -> LazyImages:
        """Some of them, int64 or bool, without fetching any."""
        return LazyImages(self.fetch, self.rows[index.cpu()])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images on disk; `LabelledImages` is the same in memory.

    Attributes:
        images: n of them, in their own sizes.
        labels: int64 [n], indices into `class_names`.
        class_names: C names, all different.
        groups: int64 [n], images that belong together, such as those of one patient or one track; None where each
            stands alone.
        name: for messages.

    Raises:
        ValueError: lengths or labels that do not fit together.
    """

    images: LazyImages
    labels: Tensor
    class_names: tuple[str, ...]
    groups: Tensor | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        labels, names = torch.as_tensor(self.labels).long(), tuple(map(str, self.class_names))
        if labels.shape != (len(self.images),):
            raise ValueError(f"`labels` must be one per image ({len(self.images)}), got {list(labels.shape)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"`class_names` must all be different, got {names}.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
            raise ValueError(
                f"`labels` must be indices of the {len(names)} class names, got {int(labels.min())} to "
                f"{int(labels.max())}."
            )
        if self.groups is not None and len(self.groups) != len(labels):
            raise ValueError(f"`groups` must be one per image ({len(labels)}), got {len(self.groups)}.")
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} images on disk, {len(self.class_names)} classes)"

    @property
    def counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(torch.bincount(self.labels, minlength=len(self.class_names)).tolist())

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """SHA-256 (hex) of each image: of its file, or of its pixels where there is none. All are read once."""
        return tuple(_digest(image) for image in self.images)

    def digest(self) -> str:
        """SHA-256 (hex) of images, labels, class names and groups: equal content in equal order, equal digest."""
        return self._content

    @cached_property
    def _content(self) -> str:
        groups = None if self.groups is None else self.groups.tolist()
        facts = (self.image_digests, self.labels.tolist(), self.class_names, groups)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def subset(self, index: Tensor) -> Dataset:
        """The images at `index` (int64 or bool), under the same class names."""
        groups = None if self.groups is None else self.groups[index]
        return Dataset(self.images.select(index), self.labels[index], self.class_names, groups, self.name)

    def select_classes(self, classes: Sequence[str | int]) -> Dataset:
        """Only some classes, named or by index; labels are numbered anew, in the order given.

        Raises:
            ValueError: no such class, none, or one twice.
        """
        names = self.class_names
        wanted = [names.index(c) if isinstance(c, str) and c in names else c for c in classes]
        wrong = [c for c in wanted if isinstance(c, str) or not 0 <= c < len(names)]
        if wrong:
            raise ValueError(
                f"`classes` must be names or indices of the {len(names)} classes, got {wrong[0]!r}; the names are "
                f"{', '.join(names)}."
            )
        if not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(f"`classes` must name some classes, each once, got {list(classes)}.")
        renumbered = torch.full((len(names),), -1)
        renumbered[[int(c) for c in wanted]] = torch.arange(len(wanted))
        labels = renumbered[self.labels]
        chosen = (labels >= 0).nonzero()[:, 0]
        groups = None if self.groups is None else self.groups[chosen]
        own = tuple(names[int(c)] for c in wanted)
        return Dataset(self.images.select(chosen), labels[chosen], own, groups, self.name)

    def load(self, size: int | Fit, *, workers: int | None = None, quiet: bool = True) -> LabelledImages:
        """All of it in memory.

        Args:
            size: side in pixels that images are brought to, or a `Fit`.
            workers: threads that read.
            quiet: no progress bar.
        """
        if not len(self):
            return LabelledImages(torch.empty(0, 3, 1, 1, dtype=torch.uint8), self.labels, self.class_names)
        parts = []
        with naming(self.name), track(range(len(self)), f"read {self.name}", unit="images", quiet=quiet) as bar:
            for batch in to_batches(self.images, size, 64, workers=workers):
                parts.append(batch)
                bar.update(len(batch))
        return LabelledImages(torch.cat(parts), self.labels, self.class_names, self.groups)


def require_labelled(data: Any, name: str) -> None:
    """Raises TypeError for what is neither `LabelledImages` nor a `Dataset`."""
    if not isinstance(data, (LabelledImages, Dataset)):
        raise TypeError(
            f"`{name}` must be LabelledImages or a Dataset, got {type(data).__name__}; `load_dataset` and "
            "`open_dataset` read folders, files and named sets."
        )


def _digest(image: Any) -> str:
    """SHA-256 (hex) of one image: a file, a file's content, or pixels of whatever kind."""
    if isinstance(image, (str, PathLike)):
        return hash_file(Path(image))
    if isinstance(image, (bytes, bytearray)):
        return hashlib.sha256(image).hexdigest()
    pixels = np.ascontiguousarray(image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image))
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()
