"""Hugging Face data sets as people have them: a folder of parquet files, or an id; images stay where they are."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .lazy import Dataset, LazyImages

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label", "class")
KEPT_BYTES = 64 << 20
"""Of decoded row groups that are kept in memory, beside the one in use."""
EXTRA = "install `lorarecycle[data]`"


def holds_parquet(folder: Path) -> bool:
    """Whether a folder holds parquet files, at any depth; folders of such a name are classes."""
    return any(file.is_file() for file in folder.rglob("*.parquet"))


def open_parquet(folder: Path, split: str | None = None) -> Dataset:
    """A folder of parquet files with an image column (`image` {bytes, path}, or bytes) and a label column.

    A column `group` says which images belong together. Files are those of Hugging Face: `train.parquet`,
    `train-00000-of-00002.parquet`, `train/0000.parquet`. Labels keep their ClassLabel names; other labels, such as
    strings, are sorted. Classes without images are left out.

    Args:
        folder: that holds the files, at any depth, or one such file.
        split: files whose name or folder starts with it; may be left out where all files are of one.

    Raises:
        FileNotFoundError: no such split.
        ValueError: files without such columns, several splits and none chosen.
        ImportError: pyarrow is missing.
    """
    parquet = _pyarrow()
    files = [folder] if folder.is_file() else sorted(f for f in folder.rglob("*.parquet") if f.is_file())
    parts = {file: _split_of(file, folder) for file in files}
    known = sorted(set(parts.values()))
    if split is None and len(known) > 1:
        raise ValueError(f"`split` must be one of {known}, the parts of {folder}, got None.")
    if split is not None and not folder.is_file():
        files = [file for file in files if parts[file] == split]
    if not files:
        raise FileNotFoundError(f"`split` must be one of {known}, the parquet files of {folder}, got {split!r}.")
    opened = [_reading(file, partial(parquet.ParquetFile, file)) for file in files]
    schema = _reading(files[0], lambda: opened[0].schema_arrow)
    image, label = _column(schema.names, IMAGE_COLUMNS, folder), _column(schema.names, LABEL_COLUMNS, folder)
    columns = [label, *(["group"] if "group" in schema.names else [])]
    tables = [_reading(path, partial(file.read, columns=columns)) for path, file in zip(files, opened, strict=True)]
    labels = np.concatenate([table[label].to_numpy() for table in tables])
    if labels.ndim != 1 or labels.dtype.kind not in "iubUSO":
        raise ValueError(f"column {label} of {folder} must hold whole numbers or text, got {labels.dtype}; mend it.")
    groups = np.concatenate([t["group"].to_numpy() for t in tables]) if len(columns) > 1 else None
    rows = _Rows(files, opened, image)
    return _dataset(rows, labels, _class_names(schema.metadata, label), groups, str(folder))


def open_hub_dataset(name: str, split: str | None = None, *, download: bool = False) -> Dataset:
    """A data set of the Hugging Face Hub, through `datasets`, which keeps it in its cache and maps it into memory.

    Args:
        name: "owner/name".
        split: part of it.
        download: fetch it when it is not in the cache.

    Raises:
        FileNotFoundError: it is not to be had; the message says where it is.
        ValueError: no image or label column, several splits and none chosen.
        ImportError: `datasets` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"a Hugging Face data set needs `datasets` ({error}); {EXTRA}.") from None
    config = datasets.DownloadConfig(local_files_only=not download)
    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not download
    try:
        found = datasets.load_dataset(name, split=split, download_config=config)
    except Exception as error:  # of many kinds, its own among them
        raise FileNotFoundError(
            f"data set {name!r} must be in the cache of `datasets`, or fetched with `download=True` from "
            f"https://huggingface.co/datasets/{name}, got {type(error).__name__}: {str(error)[:300]}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if not isinstance(found, datasets.Dataset):
        raise ValueError(f"`split` must be one of {sorted(found)}, the parts of {name}, got {split!r}.")
    return from_hugging_face(found, name=name)


def from_hugging_face(data: Any, *, name: str = "data") -> Dataset:
    """A `datasets.Dataset` with an image and a label column; images are decoded when they are wanted.

    Raises:
        ValueError: no such columns.
    """
    import datasets

    image, label = _column(data.column_names, IMAGE_COLUMNS, name), _column(data.column_names, LABEL_COLUMNS, name)
    raw = data.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    labels = np.asarray(data.select_columns([label]).with_format("numpy")[label][:])
    groups = None
    if "group" in data.column_names:
        groups = np.asarray(data.select_columns(["group"]).with_format("numpy")["group"][:])
    names = getattr(data.features[label], "names", None)
    return _dataset(lambda i: _content(raw[i][image]), labels, names, groups, name)


class _Rows:
    """Image i of several parquet files: the row group that holds it is read, and kept for those that come next."""

    def __init__(self, paths: Sequence[Path], files: Sequence[Any], column: str) -> None:
        self.column = column
        groups = [(path, file, g) for path, file in zip(paths, files, strict=True) for g in range(file.num_row_groups)]
        self.groups = groups
        self.starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for _, file, g in groups)]).tolist()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, i: int) -> Any:
        group = bisect_right(self.starts, i) - 1
        with self._lock:
            column = self._kept.pop(group, None)
            if column is None:
                path, file, g = self.groups[group]
                column = _reading(path, lambda: file.read_row_group(g, columns=[self.column])[self.column])
            while self._kept and sum(c.nbytes for c in self._kept.values()) + column.nbytes > KEPT_BYTES:
                self._kept.popitem(last=False)
            self._kept[group] = column
        return _content(column[i - self.starts[group]].as_py())


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, whose errors do not say which file is damaged."""
    try:
        return read()
    except Exception as error:  # pyarrow's are OSError, ValueError, KeyError, NotImplementedError and more
        raise ValueError(
            f"{path} must be a whole parquet file, got one that does not read ({type(error).__name__}: "
            f"{str(error)[:200]}); fetch it again."
        ) from error


def _content(value: Any) -> Any:
    """What `decode` takes of Hugging Face's {bytes, path}."""
    return (value["bytes"] or value["path"]) if isinstance(value, dict) else value


def _dataset(
    fetch: Callable[[int], Any], labels: np.ndarray, names: Sequence[str] | None, groups: Any, source: str
) -> Dataset:
    if names is None or labels.dtype.kind not in "iu":
        values, labels = np.unique(labels.astype(str) if labels.dtype.kind == "O" else labels, return_inverse=True)
        names = [str(value) for value in values]
    known = (labels >= 0).nonzero()[0]  # -1: without a label
    used, renumbered = np.unique(labels[known], return_inverse=True)
    group = None if groups is None else torch.from_numpy(np.unique(groups[known], return_inverse=True)[1])
    index: Tensor = torch.from_numpy(known)
    images = LazyImages(fetch, index)
    return Dataset(images, torch.from_numpy(renumbered), tuple(names[int(c)] for c in used), group, source)


def _class_names(metadata: Any, label: str) -> list[str] | None:
    """Of a ClassLabel in the metadata that `datasets` writes."""
    try:
        facts = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return None
    for key in ("info", "features", label, "names"):
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts if isinstance(facts, list) else None


def _column(names: Sequence[str], wanted: Sequence[str], source: object) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise ValueError(f"{source} must have a column {' or '.join(wanted)}, got {', '.join(names)}; rename yours.")
    return found


def _split_of(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts if file != folder else (file.name,)
    return (parts[-2] if len(parts) > 1 and parts[-2] != "data" else parts[-1]).split("-")[0].split(".")[0]


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"parquet files need pyarrow ({error}); {EXTRA}.") from None
    return pyarrow.parquet
