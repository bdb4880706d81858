"""What a teacher answers to finished images: logits, scores of its patches, the tokens that pruning keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Head
from ..vit.backbone import Backbone
from ..vit.features import normalized_batches


class Answers(NamedTuple):
    """Each of them on the CPU; None where it was not asked for."""

    teacher_logits: Tensor | None
    """float32 [n, C]"""
    scores: Tensor | None
    """float32 [n, N], attention of the class token in the last block (Eq. 5)"""
    kept: Tensor | None
    """int64 [n, k], ascending"""


@torch.no_grad()
def teacher_answers(
    teacher: Backbone,
    images: Tensor,
    *,
    head: Head | None = None,
    scores: bool = False,
    prune: Mapping[int, float] | None = None,
    size: int | None = None,
    batch_size: int = 64,
) -> Answers:
    """Ask a teacher about images, in no more passes than the questions need.

    Args:
        teacher: with the adapter merged.
        images: uint8 [n, 3, H, W].
        head: classifier whose logits are wanted; none when None.
        scores: whether the patches' scores are wanted.
        prune: `{layer: ratio}` of the pruning whose kept tokens are wanted; none when None or empty.
        size: side in pixels of the images; `teacher.image_size` when None.
        batch_size: images per forward pass.
    """
    found: dict[str, list[Tensor]] = {"teacher_logits": [], "scores": [], "kept": []}
    wanted = head is not None or scores or prune
    for x in (
        normalized_batches(teacher, images, size=size or teacher.image_size, batch_size=batch_size) if wanted else ()
    ):
        if head is not None or scores:
            narrow = head is None or teacher.reads_class_token(head.pool)
            encoding = teacher.encode(x, scores=scores, class_token_only=narrow)
            if head is not None:
                found["teacher_logits"].append(head(teacher.pool(encoding.tokens, head.pool)).cpu())
            if encoding.scores is not None:
                found["scores"].append(encoding.scores.float().cpu())
        if prune:
            index = teacher.encode(x, prune=prune, class_token_only=True).kept
            assert index is not None
            found["kept"].append(index.cpu())
    return Answers(**{name: torch.cat(parts) if parts else None for name, parts in found.items()})
