"""Readers of the sources that `load_dataset` knows: images or image files, labels and class names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.npz import names_in_npz, read_npz_arrays
from .splits import class_split

MOST_CLASSES = 10**6
"""Of a npz file that names none: a label beyond is damage, and names would be made for all below it."""


class Source(NamedTuple):
    """What a reader finds."""

    images: Tensor | list[Path]
    """uint8 [n, 3, H, W], or n image files."""
    labels: Any
    """n integers."""
    class_names: Sequence[str]


def common_size(images: Iterable[Any]) -> int | None:
    """The side that all images share, which are files, contents of files, or PIL's; None where there is none."""
    from PIL import Image

    shared: tuple[int, int] | None = None
    for one in images:
        try:
            source = BytesIO(one) if isinstance(one, (bytes, bytearray)) else one
            with nullcontext(one) if isinstance(one, Image.Image) else Image.open(source) as image:
                if image.width != image.height or (shared or image.size) != image.size:
                    return None
                shared = image.size
        except Exception:
            return None  # the reader names the file
    return shared[0] if shared else None


def read_npz(path: Path, split: str | None) -> Source:
    """A npz file with `<split>_images`, `<split>_labels` and, if named, `<split>_classes`; no other part is read."""
    names_there = names_in_npz(path)
    splits = sorted(key[: -len("images")].rstrip("_") for key in names_there if key.endswith("images"))
    if not splits:
        raise ValueError(
            f"{path} must hold `images` and `labels`, or `<split>_images` and `<split>_labels`, got "
            f"{sorted(names_there)[:9]}; save it again under those names."
        )
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise ValueError(f"`split` must be one of {splits}, the image arrays of {path}, got {split!r}.")
    prefix = f"{split}_" if split else ""
    arrays = read_npz_arrays(path, [f"{prefix}{what}" for what in ("images", "labels", "classes")])
    images, labels = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{prefix}images of {path} must be uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}."
        )
    if labels is None or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        found = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{prefix}labels of {path} must be {len(images)} integers, got {found}.")
    highest = int(labels.max(initial=-1))
    if labels.min(initial=0) < 0:
        raise ValueError(
            f"{prefix}labels of {path} must be 0 or more, got {int(labels.min())}; leave those images out."
        )
    if f"{prefix}classes" not in arrays and highest >= MOST_CLASSES:
        raise ValueError(
            f"{prefix}labels of {path} must be below {MOST_CLASSES} where no `{prefix}classes` names them, got "
            f"{highest}."
        )
    names = arrays.get(f"{prefix}classes")
    if names is None:
        names = np.arange(highest + 1)
    if names.ndim != 1 or names.dtype.kind not in "USiu" or not highest < len(names) <= MOST_CLASSES:
        raise ValueError(
            f"{prefix}classes of {path} must be a name for each label up to {highest}, at most {MOST_CLASSES}, got "
            f"{names.dtype} {list(names.shape)}."
        )
    if len(set(names.tolist())) != len(names):
        raise ValueError(f"{prefix}classes of {path} must all be different, got {str(names.tolist())[:100]}.")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Source(pixels, labels, names.astype(str).tolist())


def read_cifar_fs(split: str | None, root: Path, download: bool) -> Source:
    """CIFAR-FS from CIFAR-100: all 600 images of each class of the split."""
    from torchvision.datasets import CIFAR100

    parts_of = class_split("cifar_fs")
    if split not in parts_of:
        raise ValueError(f"`split` of cifar-fs must be one of {tuple(parts_of)}, got {split!r}.")
    parts = [_fetch("cifar-fs", partial(CIFAR100, str(root), train=t, download=download)) for t in (True, False)]
    labels = np.concatenate([part.targets for part in parts])
    names = parts_of[split]
    wanted = [parts[0].class_to_idx[name] for name in names]
    chosen = np.isin(labels, wanted)
    images = np.concatenate([part.data for part in parts])[chosen]
    renumbered = np.argsort(wanted)[np.searchsorted(np.sort(wanted), labels[chosen])]
    return Source(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), renumbered, names)


def read_flowers102(split: str | None, root: Path, download: bool) -> Source:
    """The 102 flowers of the Visual Geometry Group."""
    from torchvision.datasets import Flowers102

    splits = ("train", "val", "test")
    if split is not None and split not in splits:
        raise ValueError(f"`split` of flowers102 must be one of {splits} or None, got {split!r}.")
    files: list[Path] = []
    labels: list[int] = []
    for part in splits if split is None else (split,):
        data = _fetch("flowers102", partial(Flowers102, str(root), split=part, download=download))
        files += data._image_files
        labels += data._labels
    return Source(files, labels, getattr(data, "classes", None) or [str(c) for c in range(102)])


def read_eurosat(split: str | None, root: Path, download: bool) -> Source:
    """Ten kinds of land seen by Sentinel-2, RGB, 64 x 64."""
    from torchvision.datasets import EuroSAT

    if split is not None:
        raise ValueError(f"`split` of eurosat must be None (it has no parts), got {split!r}.")
    data = _fetch("eurosat", partial(EuroSAT, str(root), download=download))
    return Source([Path(file) for file, _ in data.samples], data.targets, data.classes)


def read_digits(split: str | None, root: Path, download: bool) -> Source:
    """Handwritten digits, grey, 8 x 8, carried by scikit-learn."""
    from sklearn.datasets import load_digits

    if split is not None:
        raise ValueError(f"`split` of digits must be None (it has no parts), got {split!r}.")
    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))  # values are 0 to 16
    return Source(grey.unsqueeze(1).repeat(1, 3, 1, 1), digits.target, [str(d) for d in digits.target_names])


NAMED_SOURCES = {
    "cifar-fs": read_cifar_fs,
    "flowers102": read_flowers102,
    "eurosat": read_eurosat,
    "digits": read_digits,
}
"""Sets by name, and what reads them."""


def _fetch(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RuntimeError, OSError) as error:  # RuntimeError: absent or corrupt; OSError: no network
        raise FileNotFoundError(
            f"data set {name!r} must be under `root`, or fetched over a network with `download=True`, got "
            f"{type(error).__name__}: {error}"
        ) from error
