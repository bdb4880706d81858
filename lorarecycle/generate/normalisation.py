"""Zero mean and unit variance, for each adapter or each of its tensors; the statistics stay beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segments(slices: Sequence[slice], kind: str) -> list[int]:
    """Lengths of the parts of a vector that are normalised apart.

    Args:
        slices: where each tensor lies in the vector.
        kind: "adapter" (one part) or "tensor" (each tensor by itself).
    """
    sizes = [place.stop - place.start for place in slices]
    return [sum(sizes)] if kind == "adapter" else sizes


def normalise(vector: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A vector [size] with each part at mean 0 and deviation 1, and the statistics [parts, 2]: mean, deviation."""
    parts = vector.split(list(sizes))
    statistics = torch.stack([torch.stack([part.mean(), part.std(correction=0)]) for part in parts])
    statistics[:, 1].clamp_(min=1e-8)  # a constant part
    return (vector - _spread(statistics[:, 0], sizes)) / _spread(statistics[:, 1], sizes), statistics


def denormalise(vectors: Tensor, statistics: Tensor, sizes: Sequence[int]) -> Tensor:
    """What `normalise` undid, for vectors [n, size]."""
    return vectors * _spread(statistics[:, 1], sizes) + _spread(statistics[:, 0], sizes)


def _spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    return values.repeat_interleave(torch.tensor(list(sizes)))
