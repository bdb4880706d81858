"""Warm start of the meta-LoRA: what the adapters have in common, found in their weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Adapter, LoRAFactors
from .lora import LoRA

SHARED = 0.5
"""Length that what the adapters share is given, relative to one adapter's update."""


def warm_start(adapters: Sequence[Adapter], like: LoRA, *, gain: float | None = None) -> LoRA:
    """Factors that start where many adapters point: `gain` times the mean of their updates `scaling * B A`.

    What adapters of different tasks share is small in each one, as each update is confined to a random subspace of
    its rank, and it is spread over all of them; averaging uncovers it, but small as it is. How small tells the
    adapters' likeness: the inner product of two updates, on average over pairs and relative to an update's squared
    length, is the squared length of the shared part. So the mean is amplified by `0.5 / sqrt(likeness)`, which makes
    the shared part half as long as an update, but by no more than n (the sum of all) and no less than 1 (the mean).

    At each site the mean is cut to the rank of `like` by a singular value decomposition of the stacked factors, one
    site after the other: never more than a matrix of one site's size. The cost grows with the square of the ranks' sum
    up to the width, linearly from there.

    Args:
        adapters: for one base model; ranks, scalings and sites may differ, heads are not used. An adapter without a
            site counts as zero there.
        like: gives sites, ranks and scalings; what the adapters leave open stays as it is there: sites that none of
            them has, ranks beyond the sum of theirs. It is not changed.
        gain: factor on the mean; found from the adapters' likeness when None.

    Returns:
        new factors, on the device of `like`; singular values are shared evenly between `lora_A` and `lora_B`.

    Raises:
        ValueError: no adapters, `gain` not positive, shapes that differ at a site.
    """
    if not adapters:
        raise ValueError("`adapters` must hold at least one adapter, got none; use init='random'.")
    if gain is not None and not gain > 0:
        raise ValueError(f"`gain` must be positive, got {gain}.")
    n, factors = len(adapters), like.factors()
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    together = apart = 0.0  # squared length of the sum of all updates; sum of the updates' squared lengths
    for site, start in factors.items():
        parts = [adapter.factors[site] for adapter in adapters if site in adapter.factors]
        shapes = {(p.lora_B.shape[0], p.lora_A.shape[1]) for p in parts}
        if shapes - {(start.lora_B.shape[0], start.lora_A.shape[1])}:
            raise ValueError(
                f"`adapters` must fit the model that the meta-LoRA is for, got updates {sorted(shapes)} at {site} "
                f"where it has {[start.lora_B.shape[0], start.lora_A.shape[1]]}."
            )
        if parts:
            U, S, Vh = _sum(parts, start.r)
            sums[site] = U, S[: start.r], Vh
            together += S.square().sum().item()
            apart += sum(_squared_length(p) for p in parts)
    if gain is None:
        gain = _gain(n, (together - apart) / ((n - 1) * apart) if n > 1 and apart > 0 else 1.0)
    for site, (U, S, Vh) in sums.items():
        start = factors[site]
        root = (S * gain / (n * start.scaling)).sqrt()
        new_A, new_B = start.lora_A.clone(), start.lora_B.clone()
        new_A[: len(root)] = (root[:, None] * Vh).to(new_A)
        new_B[:, : len(root)] = (U * root).to(new_B)
        factors[site] = LoRAFactors(new_A, new_B, start.scaling)
    return LoRA(factors).to(next(like.parameters()).device)


def _gain(n: int, likeness: float) -> float:
    """Factor on the mean of n updates whose mean cosine is `likeness`; the sum where they have nothing in common."""
    return min(float(n), max(1.0, SHARED / math.sqrt(likeness))) if likeness > 0 else float(n)


def _squared_length(part: LoRAFactors) -> float:
    gram = (part.lora_B.T @ part.lora_B) * (part.lora_A @ part.lora_A.T)
    return part.scaling**2 * gram.sum().item()


def _sum(parts: Sequence[LoRAFactors], r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r singular vectors of the sum of updates, and all its singular values."""
    lora_A = torch.cat([p.lora_A for p in parts])  # [R, in], R the sum of the ranks
    lora_B = torch.cat([p.lora_B * p.scaling for p in parts], dim=1)  # [out, R]
    basis_in, small_A = torch.linalg.qr(lora_A.T)
    basis_out, small_B = torch.linalg.qr(lora_B)
    U, S, Vh = torch.linalg.svd(small_B @ small_A.T, full_matrices=False)
    return basis_out @ U[:, :r], S, Vh[:r] @ basis_in.T
