"""Images to features: the one loop that decodes, resizes, normalises and runs a backbone over many images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.images import Fit, ImageInput, count_images, normalize, to_batches
from ..runtime.progress import track
from .backbone import Backbone
from .lora import LoRA
from .replay import ReplayedForward


def normalized_batches(
    backbone: Backbone,
    images: ImageInput,
    *,
    size: int | Fit | None = None,
    batch_size: int = 64,
    name: str = "images",
    workers: int | None = None,
    title: str = "features",
    quiet: bool = True,
) -> Iterator[Tensor]:
    """Images of any kind, batch after batch as a backbone reads them.

    Args:
        backbone: gives device, dtype, normalisation and size.
        images: whatever `to_batches` takes; files are read when their batch is due.
        size: side in pixels that they are resized to, or a `Fit`; `backbone.fit` when None.
        batch_size: images of a batch.
        name: what error messages call `images`.
        workers: threads that read files, see `to_batches`.
        title: of the progress bar.
        quiet: no progress bar.

    Yields:
        [B, 3, size, size] on the backbone's device and in its dtype; B is `batch_size` but in the last one, and where
        `images` mixes batches of its own.

    Raises:
        TypeError, ValueError, FileNotFoundError: see `to_batches`.
    """
    batches = to_batches(images, size or backbone.fit, batch_size, name=name, workers=workers)
    with track(range(count_images(images)), title, unit="images", quiet=quiet) as bar:
        for pixels in batches:
            yield normalize(pixels.to(backbone.device), backbone.mean, backbone.std, backbone.dtype)
            bar.update(len(pixels))


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    images: ImageInput,
    *,
    size: int | Fit | None = None,
    lora: LoRA | None = None,
    pool: str = "pooled",
    batch_size: int = 64,
    name: str = "images",
    workers: int | None = None,
    forward: ReplayedForward | None = None,
    quiet: bool = True,
) -> Tensor:
    """Features of many images.

    Args:
        backbone: the frozen model; its device and dtype are used.
        images: whatever `to_batches` takes, such as uint8 [n, 3, H, W].
        size: side in pixels that they are resized to, or a `Fit`; `backbone.fit` when None.
        lora: trainable factors, applied beside the weights.
        pool: which feature, see `Head.pool`.
        batch_size: images per forward pass.
        name: what error messages call `images`.
        workers: threads that read files, see `to_batches`.
        forward: that of the backbone, for callers who ask again and again; one of this call's own on a GPU when None.
            Without `lora` only.
        quiet: no progress bar.

    Returns:
        float32 [n, D] on the CPU ([n, 2 D] with `pool="token+mean"`); [0, D] for a tensor without images.
    """
    if isinstance(images, Tensor) and images.ndim == 4 and not len(images):
        return torch.empty(0, backbone.feature_width(pool))
    batches = normalized_batches(
        backbone, images, size=size, batch_size=batch_size, name=name, workers=workers, quiet=quiet
    )
    if lora is not None:
        return torch.cat([backbone(batch, lora=lora, pool=pool).float() for batch in batches]).cpu()
    forward = forward or ReplayedForward(backbone, compile=False, after=16)
    return torch.cat([forward(batch, pool).float() for batch in batches]).cpu()
