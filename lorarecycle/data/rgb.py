"""Arrays and tensors to uint8 RGB: which axis holds the channels, and what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from logging import getLogger
from typing import Any

import numpy as np

MAX_RATIO = 100
"""Images longer than this many times their width are refused: resizing them can take seconds and gigabytes."""

_CHANNELS = (1, 3, 4)
_SLACK = 1e-3  # interpolation may leave floats a little outside [0, 1]


def to_rgb(x: Any, label: str, *, channels_last: bool) -> Any:
    """An image or a batch as uint8 RGB; only what numpy and torch can both do is used, so that the rules are one.

    Args:
        x: [H, W], [H, W, C], [C, H, W] or a batch of the latter two, C being 1, 3 or 4; a numpy array or a tensor.
        label: what error messages call it.
        channels_last: where both axes could hold the channels, they are last.

    Returns:
        uint8 [B, 3, H, W]: an array, or a tensor on the same device.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, values out of range, NaN, or a side more than `MAX_RATIO` times the other.
    """
    shape = list(x.shape)
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(
            f"{label} must be an image [H, W], [H, W, C], [C, H, W] or a batch of images, got shape {shape}."
        )
    x = x[None, None] if len(shape) == 2 else x[None] if len(shape) == 3 else x
    first, last = x.shape[1] in _CHANNELS, x.shape[3] in _CHANNELS
    if last and len(shape) > 2 and (channels_last or not first):
        x = x.swapaxes(1, 3).swapaxes(2, 3)
    elif not first:
        raise ValueError(
            f"{label} must have 1, 3 or 4 channels, first or last, got shape {shape}; "
            "a batch of grey images needs an axis of length 1 for them."
        )
    refuse_strips(x.shape[2], x.shape[3], label)
    x = _bytes(x, label)
    return x[:, [0, 0, 0]] if x.shape[1] == 1 else x[:, :3]


def refuse_strips(height: int, width: int, label: str) -> None:
    """Raises ValueError where a side is more than `MAX_RATIO` times the other."""
    if max(height, width) > MAX_RATIO * max(1, min(height, width)):
        raise ValueError(
            f"{label} must be at most {MAX_RATIO} times as long as wide, got {height} x {width} pixels; cut it."
        )


def _bytes(x: Any, label: str) -> Any:
    tensor = hasattr(x, "detach")
    dtype = str(x.dtype).removeprefix("torch.") if tensor else x.dtype.name
    to_bytes: Callable[[Any], Any] = (lambda y: y.byte()) if tensor else (lambda y: y.astype(np.uint8))
    if dtype == "uint8":
        return x
    if dtype.startswith(("int", "uint")):
        x = x.long() if tensor else x
        low, high = int(x.min()), int(x.max())
        if dtype == "uint16":
            if 0 < high < 256:
                getLogger(__name__).warning(
                    "%s: 16-bit pixels of at most %d make a black image; pass uint8 if 255 is white.", label, high
                )
            return to_bytes(((x if tensor else x.astype(np.int32)) + 128) // 257)  # 65535 / 255 is 257
        if low < 0 or high > 255:
            raise ValueError(
                f"{label} must hold integers 0 to 255 (or uint16, 0 to 65535), got {dtype} {low} to {high}; scale them."
            )
        return to_bytes(x)
    if not dtype.startswith(("float", "bfloat", "longdouble")):
        raise TypeError(f"{label} must hold integers 0 to 255 or floats in [0, 1], got {dtype}.")
    x = x.float() if tensor and dtype != "float64" else x
    least, most = float(x.min()), float(x.max())  # NaN where there is one
    if not (math.isfinite(least) and math.isfinite(most)):
        bad = int((~(abs(x) < math.inf)).sum())
        raise ValueError(f"{label} must be finite, got {bad} NaN or infinite pixels.")
    if least < -_SLACK or most > 1 + _SLACK:
        raise ValueError(
            f"{label} must hold floats in [0, 1], got {least:.4g} to {most:.4g}; scale them, undo the "
            "normalisation, or pass uint8."
        )
    return to_bytes(((x.float() if tensor else x.astype(np.float32)) * 255).round().clip(0, 255))
