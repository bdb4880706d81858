"""What a preprocessor_config.json says of the images of a model: the one reader, for bases and adapters alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.files import read_object

FILE = "preprocessor_config.json"

Triple = tuple[float, ...]


class Preparation(NamedTuple):
    """How images are prepared; None where that is unknown."""

    mean: Triple | None = None
    """per RGB channel, for pixels in [0, 1]"""
    std: Triple | None = None
    resize: str | None = None
    """"crop": the shorter side is resized, the centre cropped; "squash": both sides are resized"""
    crop_pct: float | None = None
    """share of the resized side that the crop keeps"""


def read_processor(folder: Path) -> Preparation:
    """What preprocessor_config.json, or the image processor in processor_config.json, says; all None without a file.

    `do_normalize: false` is mean 0 and std 1; `rescale_factor` and `do_rescale` are worked into mean and std, so that
    these are always for pixels in [0, 1]. One number stands for all three channels.

    Raises:
        ValueError: no JSON object, or numbers that cannot be; the message names file and key.
    """
    path = folder / FILE
    content: Any = read_object(path) if path.is_file() else {}
    if not content and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        content = read_object(path).get("image_processor") or {}
        if not isinstance(content, dict):
            raise ValueError(f"`image_processor` in {path} must be a JSON object, got {type(content).__name__}.")
    if not content:
        return Preparation()
    mean, std = _normalisation(content, path)
    return Preparation(mean, std, *_resizing(content, path))


def read_channels(values: Any, key: str, path: Path) -> Triple:
    """Three numbers; one number, alone or in a list, stands for all channels.

    Raises:
        ValueError: something else; `key` and `path` name it.
    """
    numbers = values if isinstance(values, (list, tuple)) else [values]
    if len(numbers) not in (1, 3) or not all(map(_is_number, numbers)):
        raise ValueError(f"`{key}` in {path} must be one number or three, got {str(values)[:80]}.")
    if key.endswith("std") and min(numbers) <= 0:
        raise ValueError(f"`{key}` in {path} must be above 0, got {values}.")
    return tuple(float(value) for value in (numbers * 3)[:3])


def _normalisation(content: Mapping[str, Any], path: Path) -> tuple[Triple | None, Triple | None]:
    scale = 1.0
    if content.get("do_rescale", True) is False:
        scale = 255.0
    elif content.get("rescale_factor") is not None:
        factor = content["rescale_factor"]
        if not _is_number(factor) or factor <= 0:
            raise ValueError(f"`rescale_factor` in {path} must be a number above 0, got {str(factor)[:40]}.")
        scale = 255.0 * factor
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        scale = 1.0
    mean: Triple
    std: Triple
    if content.get("do_normalize", True) is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    elif content.get("image_mean") is None or content.get("image_std") is None:
        return None, None
    else:
        mean = read_channels(content["image_mean"], "image_mean", path)
        std = read_channels(content["image_std"], "image_std", path)
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _resizing(content: Mapping[str, Any], path: Path) -> tuple[str | None, float | None]:
    if content.get("do_resize", True) is False:
        return None, None
    kind = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    squashes = kind.startswith(("ViT", "DeiT", "Beit"))
    size = content.get("size")
    if isinstance(size, dict) and _is_number(size.get("height")):
        resize, side = "squash", size["height"]
    elif isinstance(size, dict) and _is_number(size.get("shortest_edge")):
        resize, side = "crop", size["shortest_edge"]
    elif kind and (size is None or _is_number(size)):
        resize, side = "squash" if squashes else "crop", size
    elif size is None or _is_number(size):
        return None, None
    else:
        raise ValueError(
            f"`size` in {path} must be a number, or hold `height` and `width` or `shortest_edge`, got {str(size)[:80]}."
        )
    crop = content.get("crop_size")
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if not content.get("do_center_crop", not squashes) or crop is None or side is None:
        return resize, 1.0
    if not (_is_number(crop) and _is_number(side)):
        raise ValueError(f"`size` and `crop_size` in {path} must be numbers, got {side!r} and {str(crop)[:40]}.")
    if crop <= 0 or side <= 0:
        raise ValueError(f"`size` and `crop_size` in {path} must be above 0, got {side} and {crop}.")
    return resize, min(1.0, crop / side)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
