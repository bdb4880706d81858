"""Several low-rank updates as one block-structured pair over a qkv layer, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .value import LoRAFactors

Columns = tuple[int, int] | None
"""The columns [start, stop) of the whole B that a part owns; None when the part carries no update."""


def split_factors(
    whole: LoRAFactors, num_parts: int, columns: Sequence[Columns] | None = None
) -> list[LoRAFactors | None]:
    """Cut an update of a layer of several parts (q, k and v in one) into the updates of its parts; exact.

    The rows of B fall into `num_parts` equal segments that share A. With `columns` (as `stack_factors` gave
    them) each part keeps its own columns only and the parts that were absent stay so; that is done only where
    what is left out is zero in every entry, so the update is the same either way.

    Args:
        whole: lora_A [r, in], lora_B [num_parts * out, r].
        num_parts: segments.
        columns: per part.

    Raises:
        ValueError: the rows of B do not divide by `num_parts`.
    """
    lora_A, lora_B, scaling = whole
    if lora_B.shape[0] % num_parts:
        raise ValueError(
            f"`lora_B` of a layer of {num_parts} parts must have rows divisible by {num_parts}, got "
            f"{list(lora_B.shape)}."
        )
    segments = lora_B.chunk(num_parts)
    if columns is None or not _structured(segments, columns):
        return [LoRAFactors(lora_A, segment, scaling) for segment in segments]
    return [
        None if own is None else LoRAFactors(lora_A[slice(*own)], segment[:, slice(*own)], scaling)
        for segment, own in zip(segments, columns, strict=True)
    ]


def stack_factors(parts: Sequence[LoRAFactors | None]) -> tuple[LoRAFactors, list[Columns]]:
    """Put updates of equal size into one pair whose B is block-structured; the update is the same.

    Parts with the same A and scaling share one block of columns, so factors that came from one qkv layer go
    back at their old rank. Where scalings differ, the ratio to the largest is folded into B.

    Args:
        parts: in row order; None for a part without an update. At least one is not None.

    Returns:
        lora_A [sum of distinct r, in], lora_B [len(parts) * out, the same], and the columns of each part.

    Raises:
        ValueError: parts of different sizes.
    """
    present = [part for part in parts if part is not None]
    out, width = present[0].lora_B.shape[0], present[0].lora_A.shape[1]
    for pair in present:
        if (pair.lora_B.shape[0], pair.lora_A.shape[1]) != (out, width):
            raise ValueError(
                f"`parts` of one layer must all be [{out}, {width}], got "
                f"[{pair.lora_B.shape[0]}, {pair.lora_A.shape[1]}]."
            )
    scaling = max((part.scaling for part in present), key=abs)
    blocks: list[tuple[LoRAFactors, tuple[int, int]]] = []
    columns: list[Columns] = []
    for part in parts:
        own = None
        if part is not None:
            own = next((own for other, own in blocks if _share(part, other)), None)
            if own is None:
                start = blocks[-1][1][1] if blocks else 0
                own = (start, start + part.r)
                blocks.append((part, own))
        columns.append(own)
    lora_A = torch.cat([pair.lora_A for pair, _ in blocks])
    lora_B = present[0].lora_B.new_zeros(len(parts) * out, len(lora_A))
    for index, (part, own) in enumerate(zip(parts, columns, strict=True)):
        if part is not None and own is not None:
            folded = part.lora_B if part.scaling == scaling else part.lora_B * (part.scaling / scaling)
            lora_B[index * out : (index + 1) * out, slice(*own)] = folded
    return LoRAFactors(lora_A, lora_B, scaling), columns


def _share(part: LoRAFactors, other: LoRAFactors) -> bool:
    return part.scaling == other.scaling and torch.equal(part.lora_A, other.lora_A)


def _structured(segments: Sequence[torch.Tensor], columns: Sequence[Columns]) -> bool:
    rank = segments[0].shape[1]
    if len(columns) != len(segments) or all(own is None for own in columns):
        return False
    for segment, own in zip(segments, columns, strict=True):
        start, stop = own or (0, 0)
        if not (0 <= start <= stop <= rank) or (own is not None and start == stop):
            return False
        if segment[:, :start].any() or segment[:, stop:].any():
            return False
    return True
