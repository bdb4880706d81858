"""`load_dataset`: any labelled set that people have, in memory."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch

from ..runtime.progress import track
from .dataset import LabelledImages
from .folder import ClassFolders
from .images import Fit, to_batches
from .parquet import holds_parquet
from .sets import open_dataset, require_named
from .sources import NAMED_SOURCES, Source, common_size, read_npz


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
            - "digits": the 1797 grey 8 x 8 images that scikit-learn carries;
            - a folder of parquet files, "owner/name" of the Hugging Face Hub, "torchvision/NAME", as in `open_dataset`.
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
    require_named(source)
    path = Path(source).expanduser()
    cache = Path(root).expanduser() if root is not None else Path.home() / ".cache/lorarecycle/datasets"
    if fspath(source) in NAMED_SOURCES:
        found = NAMED_SOURCES[fspath(source)](split, cache, download)
    elif path.is_dir() and not holds_parquet(path):
        folder = ClassFolders(path, split, strict=strict)
        found = Source([Path(file) for file, _ in folder.samples], folder.targets, folder.classes)
    elif path.is_file() and path.suffix != ".parquet":
        found = read_npz(path, split)
    else:
        opened = open_dataset(source, split, download=download, root=root, strict=strict)
        return opened.load(size or common_size(opened.images) or mixed, quiet=quiet)
    images = found.images
    if isinstance(images, list):
        files = track(images, f"read {path.name}", unit="images", quiet=quiet)
        images = torch.cat(list(to_batches(files, size or common_size(images) or mixed, 64)))
    labels = torch.as_tensor(np.asarray(found.labels, dtype=np.int64))
    data = LabelledImages(images, labels, tuple(found.class_names))
    return data.resize(size) if size else data
