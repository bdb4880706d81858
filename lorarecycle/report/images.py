"""Surrogate images for a page: small WebP data and masks as SVG paths over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..inversion.surrogate import Surrogate

SIDE = 160
"""Pixels at most of an image on the page."""
QUALITY = 72


def data_address(image: Tensor, side: int = SIDE) -> str:
    """An image as a `data:` address of WebP.

    Args:
        image: uint8 [3, H, W].
        side: larger ones are brought down to it.
    """
    from PIL import Image

    return data_of_picture(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), side)


def data_of_picture(picture: Any, side: int, *, square: bool = False) -> str:
    """A PIL image in RGB as a `data:` address of WebP, its longer side at most `side`; `square` stretches it."""
    if square:
        picture = picture.resize((side, side))
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def mask_overlay(surrogate: Surrogate, image: int) -> str:
    """The patches that were dropped from an image, as an SVG that covers it; "" where none was."""
    if surrogate.kept is None:
        return ""
    rows, columns = surrogate.grid
    dropped = torch.ones(rows * columns, dtype=torch.bool)
    dropped[surrogate.kept[image]] = False
    path = []
    for row, line in enumerate(dropped.view(rows, columns).tolist()):
        column = 0
        while column < columns:  # one path for each run of neighbours
            end = column
            while end < columns and line[end]:
                end += 1
            if end > column:
                path.append(f"M{column} {row}h{end - column}v1h-{end - column}z")
            column = max(end, column + 1)
    return f'<svg class="mask" viewBox="0 0 {columns} {rows}" aria-hidden="true"><path d="{"".join(path)}"/></svg>'


def chosen(surrogate: Surrogate, most: int) -> list[int]:
    """Images to show, at most `most`: class after class the same number, or painted pictures, evenly spread."""
    if surrogate.labels is None:
        return list(every(len(surrogate.images), most))
    by_class = [(surrogate.labels == c).nonzero()[:, 0].tolist() for c in range(len(surrogate.class_names))]
    each = max(1, most // max(len(by_class), 1))
    return [image for images in by_class for image in images[:each]][:most]


def mean_colours(images: Tensor) -> list[str]:
    """The mean colour of each image of uint8 [n, 3, H, W], as "#rrggbb"."""
    means = images.float().mean(dim=(2, 3)).round().int().tolist()
    return ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in means]


def every(count: int, most: int) -> Sequence[int]:
    """At most `most` of `count` places, evenly spread."""
    return range(count) if count <= most else [i * count // most for i in range(most)]
