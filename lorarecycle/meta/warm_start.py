"""Warm start of the meta-LoRA: what the adapters have in common, found in their weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, LoRAFactors
from ..vit.backbone import Backbone
from ..vit.lora import LoRA

GAIN, SHARED, LENGTH = 4.5, 0.5, 0.04
"""Of `common_gain`; chosen on validation classes (benchmarks/results/warm_start_gain.md)."""


def warm_start(adapters: Sequence[Adapter], like: LoRA, *, gain: float) -> LoRA:
    """Factors that start where many adapters point: `gain` times the mean of their updates `scaling * B A`.

    What adapters of different tasks share is small in each one, as each update is confined to a random subspace of
    its rank, and it is spread over all of them; averaging uncovers it, and the gain brings it to size. At each site the
    mean is cut to the rank of `like` by a singular value decomposition of the stacked factors, one site after the
    other: never more than a matrix of one site's size. The cost grows with the square of the ranks' sum up to the
    width, linearly from there.

    Args:
        adapters: for one base model; ranks, scalings and sites may differ, heads are not used. An adapter without a
            site counts as zero there.
        like: gives sites, ranks and scalings; what the adapters leave open stays as it is there: sites that none of
            them has, ranks beyond the sum of theirs. It is not changed.
        gain: factor on the mean, such as `common_gain`; as many as there are adapters make their sum.

    Returns:
        new factors, on the device of `like`; singular values are shared evenly between `lora_A` and `lora_B`.

    Raises:
        ValueError: no adapters, `gain` not positive, shapes that differ at a site.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"`gain` must be positive and finite, got {gain}.")
    factors = like.factors()
    for site, parts in _by_site(adapters, factors).items():
        factors[site] = _sum(parts, factors[site], gain / len(adapters))
    return LoRA(factors).to(next(like.parameters()).device)


def common_gain(adapters: Sequence[Adapter], like: LoRA, backbone: Backbone) -> float:
    """How far to amplify the mean of many updates.

    4.5, or more where they have little in common: the inner product of two updates, on average over pairs and relative
    to an update's squared length, is the squared length of what they share, their likeness; `0.5 / sqrt(likeness)`
    makes the shared part half as long as an update. But no more than changes the weights by 4 % of their length, which
    holds back adapters that were tuned far, and no more than the number of adapters (their sum). At least 1 (their
    mean).

    Args:
        adapters, like: as in `warm_start`; only the sites of `like` count.
        backbone: that the adapters are for.

    Raises:
        ValueError: no adapters, or shapes that differ at a site.
    """
    n, pools = len(adapters), _by_site(adapters, like.factors())
    together = sum((lora_B @ lora_A).square().sum().item() for lora_A, lora_B in map(_stacked, pools.values()))
    apart = sum(a.delta(site).square().sum().item() for a in adapters for site in pools if site in a.factors)
    if n == 1 or together == 0:
        return 1.0
    weights = sum(backbone.site_weight(site).float().square().sum().item() for site in pools)
    likeness = (together - apart) / ((n - 1) * apart)
    wanted = max(GAIN, SHARED / math.sqrt(likeness)) if likeness > 0 else n
    return max(1.0, min(wanted, LENGTH * n * math.sqrt(weights / together), n))


def _by_site(adapters: Sequence[Adapter], factors: Mapping[str, LoRAFactors]) -> dict[str, list[LoRAFactors]]:
    """The adapters' factors at each site that any of them has."""
    if not adapters:
        raise ValueError("`adapters` must hold at least one adapter, got none; use init='random'.")
    pools = {}
    for site, start in factors.items():
        parts = [adapter.factors[site] for adapter in adapters if site in adapter.factors]
        shapes = {(p.lora_B.shape[0], p.lora_A.shape[1]) for p in parts}
        if shapes - {(start.lora_B.shape[0], start.lora_A.shape[1])}:
            raise ValueError(
                f"`adapters` must fit the model that the meta-LoRA is for, got updates {sorted(shapes)} at {site} "
                f"where it has {[start.lora_B.shape[0], start.lora_A.shape[1]]}."
            )
        if parts:
            pools[site] = parts
    return pools


def _stacked(parts: Sequence[LoRAFactors]) -> tuple[Tensor, Tensor]:
    """[R, in] and [out, R], R the sum of the ranks; their product is the sum of the updates."""
    return torch.cat([p.lora_A for p in parts]), torch.cat([p.lora_B * p.scaling for p in parts], dim=1)


def _sum(parts: Sequence[LoRAFactors], start: LoRAFactors, factor: float) -> LoRAFactors:
    """`factor` times the sum of updates, in the rank and scaling of `start`."""
    lora_A, lora_B = _stacked(parts)
    basis_in, small_A = torch.linalg.qr(lora_A.T)
    basis_out, small_B = torch.linalg.qr(lora_B)
    U, S, Vh = torch.linalg.svd(small_B @ small_A.T, full_matrices=False)
    r = min(start.r, len(S))
    root = (S[:r] * (factor / start.scaling)).sqrt()
    new_A, new_B = start.lora_A.clone(), start.lora_B.clone()
    new_A[:r] = (root[:, None] * (Vh[:r] @ basis_in.T)).to(new_A)
    new_B[:, :r] = (basis_out @ U[:, :r] * root).to(new_B)
    return LoRAFactors(new_A, new_B, start.scaling)
