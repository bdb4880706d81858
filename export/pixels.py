"""Images of any kind in, uint8 batches out, with numpy and Pillow: `lorarecycle.data.images` without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..data.decode import ImageInput, decode, import_pillow


def to_batches(images: ImageInput, size: int, batch_size: int, *, name: str = "images") -> Iterator[np.ndarray]:
    """Bring images of any kind to uint8 RGB batches, as `lorarecycle.data.images.to_batches` does.

    Resizing is Pillow's, which agrees with torchvision's to two grey levels (of 255). Pillow is imported only for files
    and for images of another size.

    Args:
        images: one image or many, see `lorarecycle.data.decode.decode`.
        size: side of the result in pixels.
        batch_size: images in a part.
        name: what error messages call `images`.

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


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """The shorter side of [3, H, W] resized to `size` (bicubic, antialiased), the centre cropped."""
    height, width = image.shape[1:]
    short, long = min(height, width), max(height, width)
    if short == size:
        top, left = round((height - size) / 2), round((width - size) / 2)
        return image[:, top : top + size, left : left + size]
    longer = int(size * long / short)
    start = round((longer - size) / 2) * long / longer
    kept = (start, min(start + size * long / longer, long))  # the part of the longer side that the crop keeps
    left, right = (0, width) if height > width else kept
    top, bottom = kept if height > width else (0, height)
    Image = import_pillow()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    # across, then down, as torchvision does: values are cut to 0..255 between, and Pillow alone picks either order
    picture = picture.resize((size, height), Image.Resampling.BICUBIC, box=(left, 0, right, height))
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))
    return np.asarray(picture).transpose(2, 0, 1)
