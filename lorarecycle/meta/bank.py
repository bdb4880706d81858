"""All surrogates side by side, where meta-training gathers its images from."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.resolution import resampling
from ..inversion.stored import StoredImages, StoredSurrogate, Tables
from ..inversion.surrogate import Surrogate
from ..runtime.digests import digest_tensor
from ..vit.backbone import Backbone

AnySurrogate = Surrogate | StoredSurrogate


class Bank(NamedTuple):
    """All surrogates side by side, on the backbone's device but for images that stay in files."""

    images: Tensor | None
    """uint8 [n, 3, H, W]; None where they stay in files"""
    teacher_logits: Tensor | None
    """float32 [n, C], padded with zeros to the largest number of classes; None where a surrogate has none"""
    kept: Tensor | None
    """int64 [n, k]"""
    columns: int
    """patches in a row of the grid"""
    targets: Tensor | None = None
    """float32 [n, D], features to follow"""
    resampling: Tensor | None = None
    """float32 [resolutions, H, H], see `data.resolution.resampling`"""
    stored: StoredImages | None = None
    """the images where they stay in files"""
    window: Tensor | None = None
    """uint8 [k, 3, H, W], those of one step, where they stay in files"""

    @property
    def all_images(self) -> Tensor | StoredImages:
        """The images, wherever they are."""
        found = self.stored if self.images is None else self.images
        assert found is not None
        return found

    def step_images(self, rows: Tensor) -> Tensor:
        """uint8 [k, 3, H, W] of the images at `rows`, which are those of the step that is taken."""
        if self.window is not None:
            return self.window
        assert self.images is not None
        return self.images[rows]


def content_digest(surrogate: AnySurrogate) -> str:
    """SHA-256 (hex) of all that training reads of a surrogate, in a file or in memory."""
    images = surrogate.images_digest if isinstance(surrogate, StoredSurrogate) else digest_tensor(surrogate.images)
    tables = _tables(surrogate)
    sha = hashlib.sha256(repr((images, surrogate.adapter_digest, surrogate.class_names)).encode())
    for table in (surrogate.labels, tables.kept, tables.teacher_logits, tables.scores):
        if table is not None:
            plain = table.to(torch.float32 if table.is_floating_point() else torch.int64)
            sha.update(digest_tensor(plain).encode())
        sha.update(b"|")
    return sha.hexdigest()


def fill_bank(
    backbone: Backbone,
    surrogates: Sequence[AnySurrogate],
    sparsity: float | None = None,
    *,
    budget: int | None = None,
    resolutions: Sequence[int] = (),
) -> Bank:
    """Put surrogates side by side.

    Args:
        backbone: model that will see them.
        surrogates: of one image size, in memory or in files.
        sparsity: mask every surrogate to this share from its scores; None takes their kept tokens as they are.
        budget: bytes of images that may be held; those of surrogates in files stay there above it. No limit when None.
        resolutions: sides in pixels that training brings images down to.

    Raises:
        ValueError: sizes, patch size or numbers of kept tokens that differ.
    """
    tables = [_tables(s).masked(sparsity, s.adapter) for s in surrogates]
    shapes = [tuple(s.shape if isinstance(s, StoredSurrogate) else s.images.shape) for s in surrogates]
    for what, values in (
        ("image size", [shape[-2:] for shape in shapes]),
        ("patch size", [s.patch_size for s in surrogates] + [backbone.patch_size]),
        ("number of kept tokens", [None if t.kept is None else t.kept.shape[1] for t in tables]),
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"`surrogates` must share one {what}, got {sorted(set(values), key=str)}; invert them anew."
            )
    answers = [t.teacher_logits for t in tables if t.teacher_logits is not None]
    width = max((each.shape[1] for each in answers), default=0)
    logits = [F.pad(each, (0, width - each.shape[1])) for each in answers]
    kept = [t.kept for t in tables if t.kept is not None]
    device = backbone.device
    stored = [s for s in surrogates if isinstance(s, StoredSurrogate)]
    streamed = budget is not None and len(stored) == len(surrogates) and sum(map(math.prod, shapes)) > budget
    seen = [resampling(shapes[0][-1], side, device) for side in resolutions]
    return Bank(
        None if streamed else _side_by_side(surrogates, shapes, device),
        torch.cat(logits).to(device) if len(logits) == len(surrogates) else None,
        torch.cat(kept).to(device) if kept else None,
        shapes[0][-1] // surrogates[0].patch_size,
        resampling=torch.stack(seen) if seen else None,
        stored=StoredImages(stored) if streamed else None,
    )


def _tables(surrogate: AnySurrogate) -> Tables:
    if isinstance(surrogate, StoredSurrogate):
        return surrogate.tables
    return Tables(surrogate.teacher_logits, surrogate.kept, surrogate.scores)


def _side_by_side(
    surrogates: Sequence[AnySurrogate], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor:
    """All images in one tensor: the one that they are parts of already, or a new one."""
    held = [s.images for s in surrogates if isinstance(s, Surrogate)]
    if len(held) == len(surrogates):
        start, places = held[0].data_ptr(), []
        for images in held:
            places.append(images.data_ptr() - start)
        sizes = list(itertools.accumulate(map(math.prod, shapes), initial=0))
        whole = held[0].untyped_storage()
        if all(i.is_contiguous() and i.untyped_storage().data_ptr() == whole.data_ptr() for i in held) and (
            places == sizes[:-1]
        ):
            count = sum(shape[0] for shape in shapes)
            return held[0].as_strided((count, *shapes[0][1:]), held[0].stride(), held[0].storage_offset()).to(device)
    images = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=torch.uint8, device=device)
    start = 0
    for surrogate, shape in zip(surrogates, shapes, strict=True):
        own = surrogate.images
        images[start : start + shape[0]] = own if isinstance(own, Tensor) else own(torch.arange(shape[0]))
        start += shape[0]
    return images
