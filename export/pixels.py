"""Images of any kind in, uint8 batches out, with numpy and Pillow: `lorarecycle.data.images` without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..data.decode import ImageInput, decode, import_pillow


def to_batches(
    images: ImageInput,
    size: int,
    batch_size: int,
    *,
    name: str = "images",
    resize: str = "crop",
    crop_pct: float = 1.0,
) -> Iterator[np.ndarray]:
    """Bring images of any kind to uint8 RGB batches, as `lorarecycle.data.images.to_batches` does.

    Resizing is Pillow's, which agrees with torchvision's to two grey levels (of 255). Pillow is imported only for files
    and for images of another size.

    Args:
        images: one image or many, see `lorarecycle.data.decode.decode`.
        size: side of the result in pixels.
        batch_size: images in a part.
        name: what error messages call `images`.
        resize, crop_pct: how other sizes become that one, see `lorarecycle.data.images.Fit`.

    Yields:
        uint8 [B, 3, size, size] with B at most `batch_size`; only the last part is smaller.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: see `decode`; ValueError also where there is no image.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    pending: list[np.ndarray] = []
    seen = False
    for decoded in decode(images, name):
        for image in decoded.cpu().numpy() if hasattr(decoded, "cpu") else decoded:
            seen = True
            pending.append(_fit(image, size, resize, crop_pct))
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


def _fit(image: np.ndarray, size: int, resize: str, crop_pct: float) -> np.ndarray:
    """[3, H, W] as [3, size, size], bicubic and antialiased: only what the crop keeps is computed."""
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    side = int(size / crop_pct)
    short, long = min(height, width), max(height, width)
    longer = side if resize == "squash" else int(side * long / short)
    tall, wide = (longer if length == long and height != width else side for length in (height, width))
    (top, bottom), (left, right) = _kept(height, tall, size), _kept(width, wide, size)
    if (tall, wide) == (height, width):
        return image[:, int(top) : int(top) + size, int(left) : int(left) + size]
    Image = import_pillow()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    # across, then down, as torchvision does: values are cut to 0..255 between, and Pillow alone picks either order
    picture = picture.resize((size, height), Image.Resampling.BICUBIC, box=(left, 0, right, height))
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
    return np.asarray(picture).transpose(2, 0, 1)


def _kept(length: int, resized: int, size: int) -> tuple[float, float]:
    """Where on a side the part starts and ends that is `size` long in the centre once the side is resized."""
    start = round((resized - size) / 2)
    return start * length / resized, min((start + size) * length / resized, float(length))
