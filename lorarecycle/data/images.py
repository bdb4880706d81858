"""Images of any kind in, one uint8 batch out; and the normalisation that a backbone wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

ImageInput = Any
"""A PIL image, a path, a numpy array, a tensor, or a sequence of those; see `to_uint8`."""

_CHANNELS = (1, 3, 4)
_KINDS = "a PIL image, a path, a numpy array, a tensor, or a list of those"


def to_uint8(images: ImageInput, size: int, *, name: str = "images") -> Tensor:
    """Bring images of any kind to one uint8 RGB batch.

    The shorter side is resized to `size` (bicubic, antialiased) and the centre is cropped. Files are turned
    upright by their EXIF tag; grey becomes RGB; an alpha channel is dropped.

    Args:
        images: one image or many: PIL images, paths of image files, numpy arrays ([H, W], [H, W, C] or a
            batch [B, H, W, C]; channels first is understood where last cannot be), tensors ([H, W], [C, H, W]
            or [B, C, H, W]; channels last is understood where first cannot be), or lists of those, nested or
            mixed. C is 1, 3 or 4. Arrays hold integers 0 to 255 or floats in [0, 1].
        size: side of the result in pixels.
        name: what error messages call `images`.

    Returns:
        uint8 [B, 3, size, size], on the device of the (first) tensor given.

    Raises:
        FileNotFoundError: no such image file.
        TypeError: something that is no image.
        ValueError: no image at all, an unreadable file, another number of channels, values out of range, NaN.
    """
    parts = list(to_batches(images, size, 256, name=name))
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


def to_batches(images: ImageInput, size: int, batch_size: int, *, name: str = "images") -> Iterator[Tensor]:
    """`to_uint8` in parts of at most `batch_size` images; files are read when their part is due.

    Yields:
        uint8 [B, 3, size, size] with B at most `batch_size`.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    pending: list[Tensor] = []
    count, seen = 0, False
    for decoded in _decode(images, name):
        seen = True
        for part in decoded.split(batch_size):
            if pending and count + len(part) > batch_size:
                yield torch.cat(pending)
                pending, count = [], 0
            fitted = _fit(part, size)
            pending.append(fitted.to(pending[0].device) if pending else fitted)
            count += len(part)
    if not seen:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    yield torch.cat(pending)


def count_images(images: ImageInput) -> int:
    """Number of images in what `to_uint8` takes, without reading any file."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        images = images.tolist()
    if isinstance(images, (np.ndarray, Tensor)):
        return len(images) if images.ndim == 4 else 1
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return sum(map(count_images, images))
    return 1


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scale uint8 pixels to [0, 1], subtract `mean` and divide by `std`, in float32.

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: per RGB channel, for pixels in [0, 1].
        dtype: of the result.

    Returns:
        float [B, 3, H, W].

    Raises:
        ValueError: not uint8, or not [B, 3, H, W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}; use `to_uint8`."
        )
    scaled = tvf.to_dtype(images, torch.float32, scale=True)
    return tvf.normalize(scaled, mean=list(mean), std=list(std)).to(dtype)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images at `size` pixels, bicubic and differentiable; the same tensor where the size is that already."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def _fit(images: Tensor, size: int) -> Tensor:
    images = tvf.resize(images, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(images, [size, size])


def _decode(images: ImageInput, name: str) -> Iterator[Tensor]:
    """uint8 batches [b, 3, H, W], lazily, each of one size."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        images = images.tolist()  # an array of paths or PIL images
    if isinstance(images, Image.Image):
        yield _from_pil(images, f"`{name}`")
    elif isinstance(images, (str, PathLike)):
        yield _from_file(Path(fspath(images)))
    elif isinstance(images, np.ndarray):
        native = np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("="))
        yield _from_array(torch.tensor(native), name, channels_last=True)
    elif isinstance(images, Tensor):
        yield _from_array(images.detach(), name, channels_last=False)
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, Mapping)):
        for i, image in enumerate(images):
            yield from _decode(image, f"{name}[{i}]")
    else:
        raise TypeError(f"`{name}` must be {_KINDS}, got {type(images).__name__}.")


def _from_file(path: Path) -> Tensor:
    if not path.exists():
        raise FileNotFoundError(f"no image file {path}.")
    try:
        with Image.open(path) as image:
            return _from_pil(image, f"image file {path}")
    except Exception as error:  # Pillow's readers raise many kinds
        if str(error).startswith(f"image file {path} "):
            raise
        raise ValueError(
            f"image file {path} must be readable, got {type(error).__name__}: {error}; replace or remove it."
        ) from error


def _from_pil(image: Image.Image, label: str) -> Tensor:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode[0] not in "IF":
            return tvf.pil_to_tensor(image.convert("RGB")).unsqueeze(0)
        pixels = torch.tensor(np.asarray(image, dtype=np.float32))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{label} must be readable, got {type(error).__name__}: {error}; replace it.") from error
    # 16 bits per pixel, or floats; Pillow's own conversion would clip them
    scaled = pixels if image.mode == "F" else pixels / 65535
    return _from_array(scaled, label.strip("`"), channels_last=False)


def _from_array(x: Tensor, name: str, *, channels_last: bool) -> Tensor:
    shape = list(x.shape)
    if x.ndim not in (2, 3, 4) or 0 in shape:
        raise ValueError(
            f"`{name}` must be an image [H, W], [H, W, C], [C, H, W] or a batch of images, got shape {shape}."
        )
    if x.ndim == 2:
        x = x[None, None]
    else:
        x = x if x.ndim == 4 else x[None]
        first, last = x.shape[1] in _CHANNELS, x.shape[3] in _CHANNELS
        if last and (channels_last or not first):
            x = x.permute(0, 3, 1, 2)
        elif not first:
            raise ValueError(
                f"`{name}` must have 1, 3 or 4 channels, first or last, got shape {shape}; "
                "a batch of grey images needs an axis of length 1 for them."
            )
    x = _bytes(x, name)
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]


def _bytes(x: Tensor, name: str) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"`{name}` must hold integers 0 to 255 or floats in [0, 1], got {x.dtype}.")
    if not x.is_floating_point():
        x = x.long()
    elif not torch.isfinite(x).all():
        raise ValueError(f"`{name}` must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite pixels.")
    low, high = (value.item() for value in x.aminmax())
    if not x.is_floating_point():
        if low < 0 or high > 255:
            raise ValueError(f"`{name}` must hold integers 0 to 255, got {low} to {high}; scale them.")
        return x.to(torch.uint8)
    slack = 1e-3  # interpolation may leave values a little outside
    if low < -slack or high > 1 + slack:
        raise ValueError(
            f"`{name}` must hold floats in [0, 1], got {low:.4g} to {high:.4g}; scale them, undo the "
            "normalisation, or pass uint8."
        )
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8)
