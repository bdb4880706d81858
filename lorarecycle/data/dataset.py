"""Labelled images: folders, npz files, and the sets that torchvision and scikit-learn carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.progress import track
from .folder import ClassFolders
from .images import Fit, to_batches, to_uint8
from .sources import Source, common_size, read_cifar_fs, read_digits, read_eurosat, read_flowers102, read_npz

NAMED_SOURCES = {
    "cifar-fs": read_cifar_fs,
    "flowers102": read_flowers102,
    "eurosat": read_eurosat,
    "digits": read_digits,
}


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size with their classes.

    Attributes:
        images: uint8 [n, 3, H, W].
        labels: int64 [n], indices into `class_names`.
        class_names: C names, all different.

    Raises:
        ValueError: shapes, types or labels that do not fit together.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

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
        return LabelledImages(self.images[index], self.labels[index], self.class_names)

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
        return LabelledImages(self.images[chosen], labels[chosen], names)

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
        return LabelledImages(to_uint8(self.images, size), self.labels, self.class_names)

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


def load_dataset(
    source: str | PathLike[str],
    split: str | None = None,
    *,
    download: bool = False,
    root: str | PathLike[str] | None = None,
    size: int | Fit | None = None,
    mixed: int | Fit = 224,
    strict: bool | None = None,
    quiet: bool = False,
) -> LabelledImages:
    """Load labelled images.

    Args:
        source: one of
            - a folder with a sub-folder of image files per class (`folder/split/class` with `split`); see
              `ClassFolders` for what it reads;
            - a npz file with `<split>_images` (uint8 [n, H, W, 3]), `<split>_labels` and, optional,
              `<split>_classes` (names);
            - "cifar-fs": CIFAR-100 in the class split of Bertinetto et al., "train", "val" or "test";
            - "flowers102": "train", "val" or "test", or all images without split;
            - "eurosat": ten kinds of land;
            - "digits": the 1797 grey 8 x 8 images that scikit-learn carries.
            A folder under one of these names is read as "./digits".
        split: which part; may be left out where there is only one.
        download: fetch a named set when it is absent.
        root: folder of downloads; `~/.cache/lorarecycle/datasets` when None.
        size: side in pixels that images are brought to, or a `Fit`. When None they keep their own; image files of
            different sizes, or not square, come as `mixed` says.
        mixed: side or `Fit` for those; a model's own is `Backbone.fit`.
        strict: what becomes of files that are left out or cannot be read. None: the former are counted in a line of the
            log, the latter are an error; True: both are; False: both are left out and counted.
        quiet: no progress bar.

    Raises:
        FileNotFoundError: no such file, folder or split, or the set cannot be had; the message says how.
        ValueError: content that is not as described; an unreadable image file, named.
    """
    path = Path(source).expanduser()
    cache = Path(root).expanduser() if root is not None else Path.home() / ".cache/lorarecycle/datasets"
    if fspath(source) in NAMED_SOURCES:
        found = NAMED_SOURCES[fspath(source)](split, cache, download)
    elif path.is_dir():
        folder = ClassFolders(path, split, strict=strict)
        found = Source([Path(file) for file, _ in folder.samples], folder.targets, folder.classes)
    elif path.is_file():
        found = read_npz(path, split)
    else:
        raise FileNotFoundError(
            f"`source` must be a folder, a npz file, or one of {tuple(NAMED_SOURCES)}, got {fspath(source)!r}."
        )
    images = found.images
    if isinstance(images, list):
        files = track(images, f"read {path.name}", unit="images", quiet=quiet)
        images = torch.cat(list(to_batches(files, size or common_size(images) or mixed, 64)))
    labels = torch.as_tensor(np.asarray(found.labels, dtype=np.int64))
    data = LabelledImages(images, labels, tuple(found.class_names))
    return data.resize(size) if size else data
