"""The JSON of `POST /predict`: what may be asked, within limits, and what is said."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .answers import Answer


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    images: int = 100
    """Support images and queries together."""
    classes: int = 50
    """Classes."""
    bytes: int = 20_000_000
    """Of the request."""
    pixels: int = 40_000_000
    """Of one image, before it is decoded."""


class TooLarge(ValueError):
    """More than the limits allow."""


def read_request(body: bytes, limits: Limits) -> tuple[dict[str, list[Any]], list[Any]]:
    """Support images by class, and queries, as PIL images.

    Args:
        body: JSON, `{"support": {"cat": ["<base64 of an image file>", ...], ...}, "queries": ["<base64>", ...]}`.
        limits: checked before anything is decoded.

    Raises:
        TooLarge: more than the limits allow.
        ValueError: not such JSON, or an image that cannot be read.
    """
    if len(body) > limits.bytes:
        raise TooLarge(f"a request must be at most {limits.bytes} bytes, got {len(body)}.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request must be JSON, got text that does not parse ({error}).") from None
    rule = 'the request must be {"support": {class: [images]}, "queries": [images]}, images in base64'
    support = content.get("support") if isinstance(content, dict) else None
    queries = content.get("queries") if isinstance(content, dict) else None
    if not isinstance(support, dict) or not isinstance(queries, list):
        raise ValueError(f"{rule}, got {type(content).__name__} without these.")
    if not all(isinstance(images, list) for images in support.values()):
        raise ValueError(f"{rule}, got a class whose images are no list.")
    count = len(queries) + sum(map(len, support.values()))
    if count > limits.images or len(support) > limits.classes:
        raise TooLarge(
            f"a request must hold at most {limits.images} images of {limits.classes} classes, got {count} images of "
            f"{len(support)}."
        )
    decoded = {
        name: [decode(one, f"{name}, image {i}", limits) for i, one in enumerate(images)]
        for name, images in support.items()
    }
    return decoded, [decode(one, f"query {i}", limits) for i, one in enumerate(queries)]


def decode(text: Any, label: str, limits: Limits) -> Any:
    """A PIL image of a file in base64.

    Raises:
        TooLarge: more pixels than the limits allow.
        ValueError: not base64 of an image.
    """
    from PIL import Image, ImageOps

    try:
        content = base64.b64decode(text, validate=True)
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > limits.pixels:
            raise TooLarge(f"{label} must have at most {limits.pixels} pixels, got {image.width} x {image.height}.")
        image.load()
    except TooLarge:
        raise
    except (TypeError, binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{label} must be an image file in base64, got one that cannot be read ({error}).") from None
    return ImageOps.exif_transpose(image)


def as_json(answers: Sequence[Answer], owners: Sequence[str], milliseconds: dict[str, float]) -> dict[str, Any]:
    """The response.

    Args:
        answers: of all queries.
        owners: class of each support image.
        milliseconds: see `answer`.
    """
    rows = [
        {
            "class": one.label,
            "probabilities": one.probabilities,
            "nearest": {"class": owners[one.nearest], "image": one.nearest},
            "attention": one.attention,
        }
        for one in answers
    ]
    return {"answers": rows, "milliseconds": {name: round(value, 2) for name, value in milliseconds.items()}}
