"""`open_dataset`: any labelled set that people have, with its images left on disk."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .folder import ClassFolders
from .lazy import Dataset, LazyImages
from .parquet import holds_parquet, open_hub_dataset, open_parquet
from .sources import NAMED_SOURCES, Source, read_npz

PLACES = {
    "cub": "https://huggingface.co/datasets/dpdl-benchmark/caltech_birds2011",
    "miniimagenet": "https://huggingface.co/datasets/timm/mini-imagenet",
    "isic": "https://challenge.isic-archive.com/data/#2018 (task 3, training)",
    "chestx": "https://nihcc.app.box.com/v/ChestXray-NIHCC",
    "cropdiseases": "https://github.com/spMohanty/PlantVillage-Dataset",
}
"""Where sets are to be had that nothing here fetches."""


def open_dataset(
    source: str | PathLike[str],
    split: str | None = None,
    *,
    download: bool = False,
    root: str | PathLike[str] | None = None,
    strict: bool | None = None,
) -> Dataset:
    """Open labelled images without reading them; `Dataset.load` brings all of them into memory.

    Args:
        source: one of
            - a folder with a sub-folder of image files per class, see `ClassFolders`;
            - a folder of parquet files, or one such file, see `open_parquet`;
            - a npz file as in `load_dataset`, which is read into memory, as are "cifar-fs" and "digits";
            - "cifar-fs", "flowers102", "eurosat", "digits", as in `load_dataset`;
            - "torchvision/NAME", a class of `torchvision.datasets`, such as "torchvision/DTD";
            - "owner/name", a data set of the Hugging Face Hub.
        split: which part.
        download: fetch a named set when it is absent.
        root: folder of downloads; `~/.cache/lorarecycle/datasets` when None. `datasets` has its own.
        strict: what becomes of files that are left out, see `load_dataset`.

    Raises:
        FileNotFoundError: no such file, folder or split, or the set is not to be had; the message says where it is.
        ValueError: content that is not as described.
        ImportError: a package is missing.
    """
    require_named(source)
    name, path = fspath(source), Path(source).expanduser()
    cache = Path(root).expanduser() if root is not None else Path.home() / ".cache/lorarecycle/datasets"
    if name in NAMED_SOURCES:
        return _of_source(NAMED_SOURCES[name](split, cache, download), name)
    if path.is_dir():
        if holds_parquet(path):
            return open_parquet(path, split)
        folder = ClassFolders(path, split, strict=strict)
        return _of_source(Source([Path(file) for file, _ in folder.samples], folder.targets, folder.classes), name)
    if path.is_file():
        return open_parquet(path, split) if path.suffix == ".parquet" else _of_source(read_npz(path, split), name)
    if name.startswith("torchvision/"):
        return _of_torchvision(name.partition("/")[2], split, cache, download)
    plain = name.lower().replace("-", "").replace("_", "")
    if plain in PLACES:
        raise FileNotFoundError(
            f"`source` {name!r} is not fetched here; it is at {PLACES[plain]}: pass your folder of it."
        )
    if name.count("/") == 1 and path.suffix == "" and not name.startswith((".", "/", "~")):
        try:
            return open_hub_dataset(name, split, download=download)
        except (FileNotFoundError, ImportError) as error:
            raise type(error)(f"there is no folder or file {name!r} here; as a name of the Hub: {error}") from error
    raise FileNotFoundError(
        "`source` must be a folder, a npz or parquet file, 'owner/name' of the Hugging Face Hub, 'torchvision/NAME', "
        f"or one of {tuple(NAMED_SOURCES)}, got {name!r}."
    )


def require_named(source: str | PathLike[str]) -> None:
    """Raises ValueError for a source without a name, which a path would take for the current folder."""
    if not fspath(source):
        raise ValueError("`source` must name a data set, got an empty name; '.' is the current folder.")


def _of_source(found: Source, name: str) -> Dataset:
    images = found.images
    labels = torch.as_tensor(np.asarray(found.labels, dtype=np.int64))
    return Dataset(
        LazyImages(images.__getitem__, torch.arange(len(labels))), labels, tuple(found.class_names), name=name
    )


def _of_torchvision(kind: str, split: str | None, root: Path, download: bool) -> Dataset:
    """Any set of torchvision that takes `root` and knows its labels; images are read when they are wanted."""
    import torchvision

    make: Any = getattr(torchvision.datasets, kind, None)
    if not isinstance(make, type) or not issubclass(make, torchvision.datasets.VisionDataset):
        known = sorted(n for n in torchvision.datasets.__all__ if n[:1].isupper())
        raise ValueError(f"`source` must name a class of torchvision.datasets ({', '.join(known)}), got {kind!r}.")
    from inspect import signature

    parameters = signature(make).parameters
    options: dict[str, Any] = {"download": download} if "download" in parameters else {}
    if split is not None and "split" in parameters:
        options["split"] = split
    elif split is not None and "train" in parameters:
        if split not in ("train", "test"):
            raise ValueError(f"`split` of torchvision/{kind} must be 'train' or 'test', got {split!r}.")
        options["train"] = split == "train"
    elif split is not None:
        raise ValueError(f"`split` of torchvision/{kind} must be None (it has no parts), got {split!r}.")
    try:
        data = make(str(root), **options)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"data set torchvision/{kind} must be under `root` ({root}), or fetched with `download=True`, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return from_torchvision(data, name=f"torchvision/{kind}")


def from_torchvision(data: Any, *, name: str = "data") -> Dataset:
    """A map-style data set whose items are (image, label), as torchvision's are; images are read when they are wanted.

    The labels come from its `targets`, `labels`, `_labels` or `samples`; where it has none of them, every item is read
    once for its label.
    """
    labels = next(
        (
            found
            for key in ("targets", "_labels", "labels", "_targets")
            if (found := getattr(data, key, None)) is not None
        ),
        None,
    )
    if labels is None and (samples := getattr(data, "samples", None) or getattr(data, "_samples", None)):
        labels = [sample[1] for sample in samples]
    labels = np.asarray([data[i][1] for i in range(len(data))] if labels is None else labels)
    used, renumbered = np.unique(labels, return_inverse=True)
    classes = getattr(data, "classes", None)
    named = classes is not None and used.dtype.kind in "iu" and used.max() < len(classes)
    names = tuple(str(classes[c]) if named else str(c) for c in used.tolist())  # type: ignore[index]
    return Dataset(
        LazyImages(lambda i: data[i][0], torch.arange(len(labels))), torch.from_numpy(renumbered), names, name=name
    )
