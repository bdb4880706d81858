"""Nearest class centres: the classifier of LoRA Recycle (Eq. 3), in training and in use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DISTANCES, MIDDLE, SHARPNESS, Distance

DENSE = 1 << 22
"""Features times classes up to which class means are one matrix product."""
FEW, CANDIDATES = 1024, 16
"""Of `nearest_centres`."""


def class_centres(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Mean feature of each class (Eq. 3a).

    Args:
        features: [..., S, D].
        labels: int [..., S], values 0 to `n_classes - 1`.
        n_classes: C.

    Returns:
        [..., C, D], in float32 (float64 stays).

    Raises:
        ValueError: shapes that do not fit, a label out of range, a class without features.
    """
    if features.ndim < 2 or labels.shape != features.shape[:-1]:
        raise ValueError(
            f"`labels` must have one value per feature, got features {list(features.shape)} and labels "
            f"{list(labels.shape)}."
        )
    features = _at_least_float32(features)
    if features.ndim == 2 and len(labels) * n_classes > DENSE:
        return _many_centres(features, labels.to(features.device), n_classes)
    member = labels.to(features.device).unsqueeze(-1) == torch.arange(n_classes, device=features.device)
    counts = member.sum(dim=-2)
    if not bool((counts > 0).all() & member.any(dim=-1).all()):
        raise ValueError(
            f"`labels` must hold every class 0 to {n_classes - 1} and no other, got {labels.unique().tolist()}."
        )
    return member.to(features.dtype).transpose(-2, -1) @ features / counts.unsqueeze(-1)


def _many_centres(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """The same in memory and time linear in the number of features, whatever that of classes."""
    inside = bool(((labels >= 0) & (labels < n_classes)).all())
    counts = torch.bincount(labels, minlength=n_classes) if inside else labels.new_zeros(n_classes)
    if not inside or not bool((counts > 0).all()):
        wrong = f"{int((counts == 0).sum())} without features" if inside else "labels out of range"
        raise ValueError(f"`labels` must hold every class 0 to {n_classes - 1} and no other, got {wrong}.")
    sums = features.new_zeros(n_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.unsqueeze(-1)


def distance_logits(features: Tensor, prototypes: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Logits of a nearest-centre classifier: minus the distance to each class centre (Eq. 3b is "euclidean").

    With "centred_cosine" both lose most of the centres' mean m first, then only directions count, as features that are
    centred and brought to one length do better with few shots (SimpleShot's CL2N, Wang et al. 2019; theirs takes the
    mean of the training classes, which is not to be had here)::

        logits = 12 (cos(f - 0.8 m, c - 0.8 m) - 1)

    Args:
        features: [..., Q, D].
        prototypes: [..., C, D], all classes of the task.
        distance: "euclidean" as published (its gradient at distance zero is zero), "sqeuclidean" (the square, as the
            authors' code has it), "cosine" (1 - cosine similarity) or "centred_cosine".

    Returns:
        [..., Q, C], in float32 (float64 stays).

    Raises:
        ValueError: unknown distance, or widths that differ.
    """
    if features.ndim < 2 or prototypes.ndim < 2 or features.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"`features` [Q, D] and `prototypes` [C, D] must have the same width, got {list(features.shape)} "
            f"and {list(prototypes.shape)}."
        )
    features, prototypes = _at_least_float32(features), _at_least_float32(prototypes)
    check_distance(distance)
    if distance == "centred_cosine":
        middle = MIDDLE * prototypes.mean(dim=-2, keepdim=True)
        return SHARPNESS * distance_logits(features - middle, prototypes - middle, "cosine")
    if distance == "cosine":
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(-2, -1) - 1
    # the shortcut through a matrix product loses the digits of small distances
    d = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return -d if distance == "euclidean" else -d.square()


def nearest_centres(features: Tensor, prototypes: Tensor, distance: Distance = "euclidean") -> Tensor:
    """Which class centre is nearest, int64 [Q]: `distance_logits(...).argmax(-1)`, fast for thousands of classes.

    Among more than `FEW` classes a matrix product chooses `CANDIDATES`, between which the distances decide.

    Args:
        features: [Q, D].
        prototypes: [C, D].
        distance: see `distance_logits`.
    """
    if len(prototypes) <= FEW or "cosine" in distance:  # that is one matrix product already
        return distance_logits(features, prototypes, distance).argmax(dim=-1)
    features, prototypes = _at_least_float32(features), _at_least_float32(prototypes)
    middle = prototypes.mean(dim=0)  # taken off, it costs no digits
    x, c = features - middle, prototypes - middle
    likely = (x @ c.T - c.square().sum(dim=1) / 2).topk(CANDIDATES, dim=1).indices.sort(dim=1).values
    exact = (features.unsqueeze(1) - prototypes[likely]).square().sum(dim=-1)
    return likely.gather(1, exact.argmin(dim=1, keepdim=True))[:, 0]


def check_distance(distance: str) -> None:
    """Raise ValueError unless it is one of `DISTANCES`."""
    if distance not in DISTANCES:
        known = ", ".join(map(repr, DISTANCES[:-1]))
        raise ValueError(f"`distance` must be {known} or {DISTANCES[-1]!r}, got {distance!r}.")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
