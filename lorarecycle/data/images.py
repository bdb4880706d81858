"""Images of any kind in, one uint8 batch out; resizing, and the normalisation that a backbone wants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from .decode import ImageInput, count_images, decode, list_images

__all__ = ["Fit", "ImageInput", "count_images", "enlarge", "list_images", "normalize", "to_batches", "to_uint8"]


class Fit(NamedTuple):
    """How images of any size become squares. Those of `size` x `size` pixels are taken as they are."""

    size: int
    """side in pixels"""
    resize: str = "crop"
    """"crop": the shorter side is resized, then the centre is cropped; "squash": both sides are resized"""
    crop_pct: float = 1.0
    """share of the resized side that is kept, as timm's: sides are resized to `size / crop_pct`, rounded down, and the
    centre is cropped"""

    @property
    def side(self) -> int:
        """What a side is resized to, before the crop."""
        return int(self.size / self.crop_pct)

    @classmethod
    def of(cls, size: int | Fit) -> Fit:
        """Checked; a number means the shorter side resized and the centre cropped.

        Raises:
            ValueError: a size below 1, an unknown `resize`, a `crop_pct` outside (0, 1].
        """
        fit = size if isinstance(size, Fit) else cls(size)
        if fit.size < 1:
            raise ValueError(f"`size` must be at least 1, got {fit.size}.")
        if fit.resize not in ("crop", "squash"):
            raise ValueError(f"`resize` must be 'crop' or 'squash', got {fit.resize!r}.")
        if not 0.1 <= fit.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must be from 0.1 to 1, got {fit.crop_pct}.")
        return fit


def to_uint8(images: ImageInput, size: int | Fit, *, name: str = "images", workers: int | None = None) -> Tensor:
    """Bring images of any kind to one uint8 RGB batch.

    The shorter side is resized to `size` (bicubic, antialiased) and the centre is cropped; a `Fit` says it otherwise.

    Args:
        images: one image or many: PIL images, image files (paths, bytes, file objects), numpy arrays, tensors, or
            sequences of those, nested or mixed; `decode` says how each is read.
        size: side of the result in pixels, or a `Fit`.
        name: what error messages call `images`.
        workers: threads that read files, counted as scikit-learn's `n_jobs`; one when None. The result is the same.

    Returns:
        uint8 [B, 3, size, size], on the device of the first image (the CPU, unless it is a tensor).

    Raises:
        FileNotFoundError, TypeError, ValueError: see `decode`; ValueError also where there is no image at all.
    """
    parts = list(to_batches(images, size, 256, name=name, workers=workers))
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


def to_batches(
    images: ImageInput, size: int | Fit, batch_size: int, *, name: str = "images", workers: int | None = None
) -> Iterator[Tensor]:
    """`to_uint8` in parts of at most `batch_size` images; files are read when their part is due, or, by `workers`,
    a little before.

    Yields:
        uint8 [B, 3, size, size] with B at most `batch_size`.
    """
    fit = Fit.of(size)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    pending: list[Tensor] = []
    count = 0
    for decoded in decode(images, name, fit=lambda pixels: _fit(_tensor(pixels), fit), workers=workers):
        for part in _tensor(decoded).split(batch_size):
            if pending and count + len(part) > batch_size:
                yield torch.cat(pending)
                pending, count = [], 0
            fitted = _fit(part, fit)
            pending.append(fitted.to(pending[0].device) if pending else fitted)
            count += len(part)
    if not pending:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    yield torch.cat(pending)


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
    return scaled.sub_(of_channels(mean, images.device)).div_(of_channels(std, images.device)).to(dtype)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images at `size` pixels, bicubic and differentiable; the same tensor where the size is that already.

    Args:
        images: float [B, C, H, W].
        size: side of the result in pixels.

    Returns:
        float [B, C, size, size].
    """
    if tuple(images.shape[-2:]) == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def of_channels(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [3, 1, 1], made on the device: copying it there would wait for the host."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


def _tensor(pixels: np.ndarray | Tensor) -> Tensor:
    if isinstance(pixels, Tensor):
        return pixels
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # torch takes neither
        pixels = pixels.copy("K")
    return torch.from_numpy(pixels)


def _fit(images: Tensor, fit: Fit) -> Tensor:
    size, side = fit.size, fit.side
    if tuple(images.shape[-2:]) == (size, size):
        return images
    if fit.resize == "crop":
        images = _trim(images, side)
    target = [side] if fit.resize == "crop" else [side, side]
    images = tvf.resize(images, target, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tvf.center_crop(images, [size, size])


def _trim(images: Tensor, size: int) -> Tensor:
    """Without ends of the longer side that the crop would drop: where a whole number of pixels becomes a whole number,
    resizing the rest gives the very same pixels."""
    short, long = sorted(images.shape[-2:])
    if size * long % short:
        return images
    step = 2 * short // math.gcd(short, size)  # twice: the crop rounds a half to an even number
    reach = 2 * math.ceil(max(1, short / size)) + 1  # of the bicubic kernel
    ends = ((long - short) // 2 - reach) // step * step
    axis = -1 if images.shape[-1] == long else -2
    return images.narrow(axis, ends, long - 2 * ends) if ends > 0 else images
