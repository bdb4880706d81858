"""Which adapters matter: what leaving one out does to the mean of all, found in their weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, LoRAFactors
from .sums import in_parts, sum_updates


class Influence(NamedTuple):
    """What one adapter counts among others."""

    moves_mean: float | None
    """How far the mean of all updates moves without it, as a share of the mean's length; None for one alone."""
    likeness: float
    """Cosine between its update and the meta-LoRA's, at the meta-LoRA's sites; 0 where one is zero."""


def leave_one_out(adapters: Sequence[Adapter], meta_lora: Adapter) -> list[Influence]:
    """Leave one adapter out after another, in weight space: nothing is trained again.

    With D_i the updates `scaling * B A` at the meta-LoRA's sites and M their mean over n adapters, the mean without
    adapter i is M_i = (n M - D_i) / (n - 1), and::

        moves_mean = |M_i - M| / |M| = |D_i - M| / ((n - 1) |M|)
        likeness   = <D_i, D_meta> / (|D_i| |D_meta|)

    Adapters are gone through twice, for the sum and for inner products with it, so the cost is linear in their number
    and memory does not grow with it.

    Args:
        adapters: for one base model; an adapter without a site counts as zero there.
        meta_lora: what was made of them.

    Returns:
        one `Influence` for each adapter.

    Raises:
        ValueError: no adapters.
    """
    n = len(adapters)
    if n == 0:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    own, with_sum, with_meta = torch.zeros(3, n, dtype=torch.float64)
    meta_length = sum(_inner(f, f) for f in meta_lora.factors.values())
    shapes = {site: (f.lora_B.shape[0], f.lora_A.shape[1]) for site, f in meta_lora.factors.items()}
    for part in in_parts(shapes):
        sums = sum_updates(adapters, part).sites
        for i, adapter in enumerate(adapters):
            for site, update in adapter.factors.items():
                if site in sums:
                    own[i] += _inner(update, update)
                    with_sum[i] += _inner_with(update, sums[site].times(update.lora_A.T))
                    with_meta[i] += _inner(update, meta_lora.factors[site])
    mean_length = float(with_sum.sum()) / n**2
    found = []
    for i in range(n):
        apart = max(float(own[i] - 2 * with_sum[i] / n) + mean_length, 0.0)
        moves = math.sqrt(apart / mean_length) / (n - 1) if n > 1 and mean_length > 0 else None
        lengths = math.sqrt(float(own[i]) * meta_length)
        found.append(Influence(moves, float(with_meta[i]) / lengths if lengths else 0.0))
    return found


def _inner(left: LoRAFactors, right: LoRAFactors) -> float:
    """<left update, right update>."""
    A1, A2, B1, B2 = (t.double() for t in (left.lora_A, right.lora_A, left.lora_B, right.lora_B))
    return left.scaling * right.scaling * float(((B1.T @ B2) * (A1 @ A2.T)).sum())


def _inner_with(update: LoRAFactors, product: Tensor) -> float:
    """<update, S> of `S A^T`, float64 [out, r]."""
    return update.scaling * float((update.lora_B.double() * product).sum())
