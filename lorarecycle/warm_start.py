"""Warm start of the meta-LoRA: what the adapters have in common, found in their weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapter import Adapter, LoRAFactors
from .lora import LoRA

GAIN = 4.5


def warm_start(adapters: Sequence[Adapter], like: LoRA, *, gain: float = GAIN) -> LoRA:
    """Factors that start where many adapters point: `min(n, gain)` times the mean of their updates `scaling * B A`.

    What adapters of different tasks share is small in each one, as each update is confined to a random subspace of
    its rank, and it is spread over all of them. So few adapters are summed as they are; from `gain` adapters on, their
    mean is amplified by a constant, for it has settled on what is shared and grows no more. At each site the mean is
    cut to the rank of `like` by a singular value decomposition of the stacked factors, one site after the other: never
    more than a matrix of one site's size. The cost grows with the square of the ranks' sum up to the width, linearly
    from there.

    Args:
        adapters: for one base model; ranks, scalings and sites may differ, heads are not used. An adapter without a
            site counts as zero there.
        like: gives sites, ranks and scalings; what the adapters leave open stays as it is there: sites that none of
            them has, ranks beyond the sum of theirs. It is not changed.
        gain: largest factor on the mean.

    Returns:
        new factors, on the device of `like`; singular values are shared evenly between `lora_A` and `lora_B`.

    Raises:
        ValueError: no adapters, `gain` not positive, shapes that differ at a site.
    """
    if not adapters:
        raise ValueError("`adapters` must hold at least one adapter, got none; use init='random'.")
    if not gain > 0:
        raise ValueError(f"`gain` must be positive, got {gain}.")
    factors = like.factors()
    for site, start in factors.items():
        parts = [adapter.factors[site] for adapter in adapters if site in adapter.factors]
        shapes = {(p.lora_B.shape[0], p.lora_A.shape[1]) for p in parts}
        if shapes - {(start.lora_B.shape[0], start.lora_A.shape[1])}:
            raise ValueError(
                f"`adapters` must fit the model that the meta-LoRA is for, got updates {sorted(shapes)} at {site} "
                f"where it has {[start.lora_B.shape[0], start.lora_A.shape[1]]}."
            )
        if parts:
            factors[site] = _mean(parts, start, min(len(adapters), gain) / len(adapters))
    return LoRA(factors).to(next(like.parameters()).device)


def _mean(parts: Sequence[LoRAFactors], start: LoRAFactors, factor: float) -> LoRAFactors:
    """`factor` times the sum of updates, in the rank and scaling of `start`."""
    lora_A = torch.cat([p.lora_A for p in parts])  # [R, in], R the sum of the ranks
    lora_B = torch.cat([p.lora_B * (p.scaling * factor / start.scaling) for p in parts], dim=1)  # [out, R]
    basis_in, small_A = torch.linalg.qr(lora_A.T)
    basis_out, small_B = torch.linalg.qr(lora_B)
    U, S, Vh = torch.linalg.svd(small_B @ small_A.T, full_matrices=False)
    r = min(start.r, len(S))
    root = S[:r].sqrt()
    new_A, new_B = start.lora_A.clone(), start.lora_B.clone()
    new_A[:r] = (root[:, None] * (Vh[:r] @ basis_in.T)).to(new_A)
    new_B[:, :r] = (basis_out @ U[:, :r] * root).to(new_B)
    return LoRAFactors(new_A, new_B, start.scaling)
