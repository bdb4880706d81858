"""Images, labels and weights as scikit-learn hands them on, checked and in a form that can be counted."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ..data import images
from ..data.images import ImageInput
from .labels import label_list


def list_images(X: Any) -> ImageInput:
    """Images that can be counted: what `to_uint8` takes, or a data frame whose one column holds such things.

    Args:
        X: what `lorarecycle.data.images.to_uint8` takes, such as a pandas Series of paths; or a data frame.

    Raises:
        ValueError: a data frame of several columns.
    """
    if hasattr(X, "to_numpy") and hasattr(X, "columns"):
        if len(X.columns) != 1:
            raise ValueError(
                f"`X` must be one column of paths or images, got a data frame with the columns {list(X.columns)}; "
                "choose one of them."
            )
        X = X.to_numpy()[:, 0]
    return images.list_images(X)


def read_labels(y: Any) -> tuple[list[Hashable], np.dtype | None]:
    """`label_list` of what scikit-learn's other classifiers take: also a Series, or a column [n, 1] with a warning.

    Raises:
        ValueError: None, NaN, more than one axis.
        TypeError: not a sequence of hashable labels.
    """
    if y is None:  # scikit-learn's words, which its checks look for
        raise ValueError("`y` must hold one label per image: requires y to be passed, but the target y is None.")
    if hasattr(y, "__array__") and not isinstance(y, Tensor):
        y = np.asarray(y)
    if isinstance(y, (np.ndarray, Tensor)) and y.ndim == 2 and y.shape[1] == 1:
        from sklearn.exceptions import DataConversionWarning

        text = f"A column-vector y was passed when a 1d array was expected: `y` {list(y.shape)} is read as [{len(y)}]."
        warnings.warn(text, DataConversionWarning, stacklevel=5)
        y = y.reshape(-1)
    return label_list(y, "y")


def require_classes(labels: Iterable[Hashable]) -> None:
    """Refuse labels that are continuous numbers, as all classifiers of scikit-learn do.

    Raises:
        ValueError: a float that is no integer.
    """
    for i, label in enumerate(labels):
        if isinstance(label, float) and not label.is_integer():
            raise ValueError(
                f"`y` must hold classes, got {label!r} at {i}. Unknown label type: continuous; round the numbers or "
                "write them as strings."
            )


def read_weights(sample_weight: Any, n: int) -> np.ndarray:
    """Weights of n images, float64 [n].

    Raises:
        ValueError: another shape, values that are negative, infinite, NaN or all 0.
    """
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        values = f" from {weights.min()} to {weights.max()}" if weights.size else ""
        raise ValueError(
            f"`sample_weight` must be {n} finite numbers, at least 0 and not all 0, got shape {list(weights.shape)}"
            f"{values}."
        )
    return weights
