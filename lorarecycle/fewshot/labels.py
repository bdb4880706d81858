"""Labels of any hashable kind, in plain Python and numpy: shared by the classifier and its exported twin."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np


class NotFittedError(ValueError, AttributeError):
    """The classifier was asked before `fit`."""


def label_list(labels: Any, name: str) -> tuple[list[Hashable], np.dtype | None]:
    """Labels as plain Python values, and the dtype of the array they came in."""
    if hasattr(labels, "detach"):  # a tensor, known without importing torch
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise TypeError(f"`{name}` must be a sequence of labels, got {labels!r}.")
    if isinstance(labels, (Mapping, set, frozenset)):
        raise TypeError(
            f"`{name}` must be labels in the order of the images, got a {type(labels).__name__}; pass a list."
        )
    if isinstance(labels, np.ndarray) and labels.ndim != 1:
        raise ValueError(f"`{name}` must have one axis, got shape {list(labels.shape)}.")
    dtype = labels.dtype if isinstance(labels, np.ndarray) else None
    plain = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    for i, label in enumerate(plain):
        if hasattr(label, "detach") and label.ndim == 0:
            plain[i] = label = label.item()  # tensors hash by identity
        if not isinstance(label, Hashable):
            raise TypeError(f"`{name}[{i}]` must be hashable, got {type(label).__name__}.")
        if type(label).__name__ in ("NAType", "NaTType"):
            raise ValueError(f"`{name}[{i}]` must be a label, got {label}; leave the image out, or name its class.")
        if label != label:
            raise ValueError(f"`{name}[{i}]` must be a label, got NaN.")
    return plain, dtype


def sort_classes(labels: Iterable[Hashable]) -> list[Hashable]:
    """The distinct labels: sorted where they can be, else in order of first appearance."""
    classes: list[Hashable] = list(dict.fromkeys(labels))
    with suppress(TypeError):  # mixed types keep their order
        classes = sorted(classes)  # type: ignore[type-var]
    return classes


def match_labels(labels: Sequence[Hashable], classes: Sequence[Hashable]) -> np.ndarray:
    """Position of each label among the classes, int64; -1 for one that is not among them."""
    index = {label: i for i, label in enumerate(classes)}
    return np.array([index.get(label, -1) for label in labels], dtype=np.int64)


def class_array(classes: list[Hashable], dtype: np.dtype | None) -> np.ndarray:
    """The classes as an array of their own kind, of `dtype` where the labels came in an array."""
    kinds = {type(c) for c in classes}
    if dtype is not None:
        return np.array(classes, dtype=dtype) if dtype.kind != "O" else _objects(classes)
    if len(kinds) == 1 and issubclass(kinds.pop(), (str, int, float, np.generic)):
        return np.array(classes)
    return _objects(classes)


def _objects(classes: list[Hashable]) -> np.ndarray:
    array = np.empty(len(classes), dtype=object)  # filled one by one: tuples stay tuples
    for i, label in enumerate(classes):
        array[i] = label
    return array


def require_same_length(n_images: int, labels: list[Hashable], name: str) -> None:
    """Raise ValueError unless there is one label for each image; `name` is what the caller calls the labels."""
    if n_images != len(labels):
        raise ValueError(f"`{name}` must have one label per image, got {len(labels)} labels for {n_images} images.")
