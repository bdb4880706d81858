"""Which adapters matter: what leaving one out does to the mean of all, found in their weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..adapters.adapter import Adapter, LoRAFactors


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

    Inner products come from the factors, without the products B A, so the cost is linear in the number of adapters.

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
    meta_length = 0.0
    for site, meta in meta_lora.factors.items():
        meta_length += _inner([meta], [meta])
        parts = {i: a.factors[site] for i, a in enumerate(adapters) if site in a.factors}
        everything = list(parts.values())
        for i, part in parts.items():
            own[i] += _inner([part], [part])
            with_sum[i] += _inner([part], everything)
            with_meta[i] += _inner([part], [meta])
    mean_length = float(with_sum.sum()) / n**2
    found = []
    for i in range(n):
        apart = max(float(own[i] - 2 * with_sum[i] / n) + mean_length, 0.0)
        moves = math.sqrt(apart / mean_length) / (n - 1) if n > 1 and mean_length > 0 else None
        lengths = math.sqrt(float(own[i]) * meta_length)
        found.append(Influence(moves, float(with_meta[i]) / lengths if lengths else 0.0))
    return found


def _inner(left: Sequence[LoRAFactors], right: Sequence[LoRAFactors]) -> float:
    """<sum of the left updates, sum of the right ones>."""
    A1, A2 = (torch.cat([p.lora_A.double() for p in side]) for side in (left, right))
    B1, B2 = (torch.cat([p.lora_B.double() * p.scaling for p in side], dim=1) for side in (left, right))
    return float(((B1.T @ B2) * (A1 @ A2.T)).sum())
