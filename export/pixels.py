"""Images of any kind in, uint8 batches out, with numpy and Pillow: `lorarecycle.data.images` without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from .optional import explain_missing

_CHANNELS = (1, 3, 4)


def to_batches(images: Any, size: int, batch_size: int, *, name: str = "images") -> Iterator[np.ndarray]:
    """Bring images of any kind to uint8 RGB batches; the rules and errors of `lorarecycle.data.images.to_batches`.

    Resizing is Pillow's, which agrees with torchvision's to one grey level (of 255) but at the hardest edges. Pillow
    is imported only for files and for images of another size.

    Args:
        images: one image or many: PIL images, paths, numpy arrays, tensors, or lists of those.
        size: side of the result in pixels.
        batch_size: images in a part.
        name: what error messages call `images`.

    Yields:
        uint8 [B, 3, size, size] with B at most `batch_size`; only the last part is smaller.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    pending: list[np.ndarray] = []
    seen = False
    for decoded in _decode(images, name):
        for image in decoded:
            seen = True
            pending.append(_fit(image, size))
            if len(pending) == batch_size:
                yield np.stack(pending)
                pending = []
    if not seen:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    if pending:
        yield np.stack(pending)


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Scale uint8 [B, 3, H, W] to [0, 1], subtract `mean`, divide by `std`; float32."""
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    shape = (1, 3, 1, 1)
    return (scaled - np.array(mean, np.float32).reshape(shape)) / np.array(std, np.float32).reshape(shape)


def count_images(images: Any) -> int:
    """Number of images in what `to_batches` takes, without reading any file."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        images = images.tolist()
    if hasattr(images, "ndim"):
        return len(images) if images.ndim == 4 else 1
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return sum(map(count_images, images))
    return 1


def list_images(images: Any) -> Any:
    """Iterators become lists, so that they can be counted."""
    single = isinstance(images, (str, bytes, PathLike, Sequence)) or hasattr(images, "ndim") or _is_pil(images)
    return images if single or not isinstance(images, Iterable) else list(images)


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side of [3, H, W] resized to `size` (bicubic, antialiased), the centre cropped."""
    height, width = image.shape[1:]
    short, long = min(height, width), max(height, width)
    if short != size:
        Image = _import_pillow()
        longer = int(size * long / short)
        height, width = (size, longer) if height <= width else (longer, size)
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        image = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


def _decode(images: Any, name: str) -> Iterator[np.ndarray]:
    """uint8 batches [b, 3, H, W], lazily, each of one size."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        images = images.tolist()
    if _is_pil(images):
        yield _from_pil(images, f"`{name}`")
    elif isinstance(images, (str, PathLike)):
        yield _from_file(Path(fspath(images)))
    elif isinstance(images, np.ndarray):
        yield _from_array(images, name, channels_last=True)
    elif hasattr(images, "detach"):  # a tensor, known without importing torch
        images = images.detach().cpu()
        if images.is_floating_point():
            images = images.float()  # numpy has no bfloat16
        yield _from_array(images.numpy(), name, channels_last=False)
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, Mapping)):
        for i, image in enumerate(images):
            yield from _decode(image, f"{name}[{i}]")
    else:
        raise TypeError(
            f"`{name}` must be a PIL image, a path, a numpy array, a tensor, or a list of those, got "
            f"{type(images).__name__}."
        )


def _import_pillow() -> Any:
    fix = "install `pillow`, or pass arrays of the model's size."
    with explain_missing("image files and images of another size need Pillow", fix):
        from PIL import Image
    return Image


def _is_pil(image: Any) -> bool:
    return any(cls.__module__ == "PIL.Image" for cls in type(image).__mro__)


def _from_file(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"no image file {path}.")
    Image = _import_pillow()
    try:
        with Image.open(path) as image:
            return _from_pil(image, f"image file {path}")
    except Exception as error:  # Pillow's readers raise many kinds
        if str(error).startswith(f"image file {path} "):
            raise
        raise ValueError(
            f"image file {path} must be readable, got {type(error).__name__}: {error}; replace or remove it."
        ) from error


def _from_pil(image: Any, label: str) -> np.ndarray:
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode[0] not in "IF":
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]
        pixels = np.asarray(image, dtype=np.float32)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{label} must be readable, got {type(error).__name__}: {error}; replace it.") from error
    scaled = pixels if image.mode == "F" else pixels / np.float32(65535)
    return _from_array(scaled, label.strip("`"), channels_last=False)


def _from_array(x: np.ndarray, name: str, *, channels_last: bool) -> np.ndarray:
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
            x = x.transpose(0, 3, 1, 2)
        elif not first:
            raise ValueError(
                f"`{name}` must have 1, 3 or 4 channels, first or last, got shape {shape}; "
                "a batch of grey images needs an axis of length 1 for them."
            )
    x = _bytes(x, name)
    return x.repeat(3, axis=1) if x.shape[1] == 1 else x[:, :3]


def _bytes(x: np.ndarray, name: str) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind not in "iuf":
        raise TypeError(f"`{name}` must hold integers 0 to 255 or floats in [0, 1], got {x.dtype}.")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ValueError(f"`{name}` must be finite, got {int((~np.isfinite(x)).sum())} NaN or infinite pixels.")
    low, high = x.min(), x.max()
    if x.dtype.kind != "f":
        if low < 0 or high > 255:
            raise ValueError(f"`{name}` must hold integers 0 to 255, got {low} to {high}; scale them.")
        return x.astype(np.uint8)
    slack = 1e-3  # interpolation may leave values a little outside
    if low < -slack or high > 1 + slack:
        raise ValueError(
            f"`{name}` must hold floats in [0, 1], got {low:.4g} to {high:.4g}; scale them, undo the "
            "normalisation, or pass uint8."
        )
    return np.clip(np.round(x.astype(np.float32) * np.float32(255)), 0, 255).astype(np.uint8)
