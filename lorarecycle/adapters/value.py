"""What an adapter of a Vision Transformer is: low-rank factors at sites, and the head tuned with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

AnyValue = TypeVar("AnyValue", bound="AdapterValue")

SITE_PATTERN = re.compile(r"blocks\.(\d+)\.(attn\.(?:q|k|v|proj)|mlp\.(?:fc1|fc2))")
POOLS = ("token", "token+mean", "mean", "avg", "map", "pooled")
MAX_ENTRY = 1e6
"""Largest absolute value of a factor or a head that is taken: more than that is a damaged file."""


class LoRAFactors(NamedTuple):
    """The low-rank update of one site: `delta W = scaling * lora_B @ lora_A` (LoRA Recycle, Sec. 3)."""

    lora_A: Tensor
    """[r, in]"""
    lora_B: Tensor
    """[out, r]"""
    scaling: float
    """lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA."""

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, eq=False)
class Head:
    """The linear classifier tuned together with an adapter.

    Attributes:
        weight: [C, D], or [C, 2 D] with `pool="token+mean"`.
        bias: [C]; zeros when left out.
        class_names: C names; "0" to "C-1" when left out.
        pool: the feature that the head reads: "token" (class token after the final norm: ViT, DeiT, timm),
            "token+mean" (class token beside the mean patch token: transformers' DINOv2 classifier),
            "mean" (mean patch token before the final norm: transformers' CLIP classifier),
            "avg" (mean patch token after the final norm: timm with `global_pool="avg"`),
            "map" (what a learnt query attends to: SigLIP, timm with `global_pool="map"`) or
            "pooled" (what the backbone itself pools: heads of timm models, whose files do not say).

    Raises:
        ValueError: shapes that do not fit together, NaN or infinite values, an unknown pool.
    """

    weight: Tensor
    bias: Tensor | None = None
    class_names: tuple[str, ...] = ()
    pool: str = "token"

    def __post_init__(self) -> None:
        weight = self.weight.detach()
        if weight.ndim != 2 or weight.shape[0] < 1:
            raise ValueError(f"`weight` of a head must be [classes, features], got {list(weight.shape)}.")
        bias = torch.zeros(len(weight)) if self.bias is None else self.bias.detach()
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"`bias` of a head must have one value per class ({len(weight)}), got {list(bias.shape)}.")
        names = tuple(str(name) for name in self.class_names) or tuple(map(str, range(len(weight))))
        if len(names) != len(weight):
            raise ValueError(f"`class_names` must name the head's {len(weight)} classes, got {len(names)} names.")
        if self.pool not in POOLS:
            raise ValueError(f"`pool` must be one of {POOLS}, got {self.pool!r}.")
        for label, tensor in (("weight", weight), ("bias", bias)):
            object.__setattr__(self, label, _plain_floats(tensor, f"the head's `{label}`"))
        object.__setattr__(self, "class_names", names)

    def to(self, device: torch.device) -> Head:
        """The head with its tensors on a device."""
        assert self.bias is not None
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [B, C] in float32 of features [B, D]."""
        assert self.bias is not None
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return torch.nn.functional.linear(features.float(), weight, bias)


@dataclass(frozen=True, eq=False)
class AdapterValue:
    """The fields, checks and arithmetic of `Adapter`, which documents them; nothing here knows of files."""

    factors: Mapping[str, LoRAFactors]
    head: Head | None = None
    base_model: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    name: str = "adapter"
    base_class: str = ""
    resize: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError(f"`factors` of {self.name!r} must hold at least one site, got none.")
        clean = {}
        for site in sorted(self.factors, key=_model_order):
            lora_A, lora_B, scaling = self.factors[site]
            if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1] or lora_A.shape[0] < 1:
                raise ValueError(
                    f"`factors[{site!r}]` of {self.name!r} must be lora_A [r, in] and lora_B [out, r] of the same "
                    f"rank, got {list(lora_A.shape)} and {list(lora_B.shape)}."
                )
            lora_A, lora_B = (
                _plain_floats(tensor.detach(), f"{side} at {site} of {self.name!r}")
                for side, tensor in (("lora_A", lora_A), ("lora_B", lora_B))
            )
            if not abs(scaling) <= MAX_ENTRY:
                raise ValueError(
                    f"scaling at {site} of {self.name!r} must be finite and at most {MAX_ENTRY:g}, got {scaling}."
                )
            clean[site] = LoRAFactors(lora_A, lora_B, float(scaling))
        object.__setattr__(self, "factors", clean)
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that carry factors, in model order."""
        return tuple(self.factors)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank at each site."""
        return {site: factors.r for site, factors in self.factors.items()}

    def delta(self, site: str) -> Tensor:
        """The full update of one site, float32 [out, in]; zero-rank sites raise KeyError."""
        lora_A, lora_B, scaling = self.factors[site]
        return scaling * (lora_B @ lora_A)

    def digest(self) -> str:
        """SHA-256 (hex) over sites, factors, scalings and head, class names included: equal content, equal digest.

        Computed once; anew only after a tensor was written to in place.
        """
        return self._sha256(names=True)

    def weights_digest(self) -> str:
        """SHA-256 (hex) over sites, factors, scalings and the head's weight, bias and pool, without any name.

        What orders adapters and seeds their random streams, so that renaming classes or files changes no result.
        Computed once, as `digest` is.
        """
        return self._sha256(names=False)

    def with_head(self: AnyValue, head: Head | None) -> AnyValue:
        """The same factors under another head, or under none."""
        return replace(self, head=head)

    @cached_property
    def _digests(self) -> dict[bool, tuple[tuple[int, ...], str]]:
        """With names or without -> the tensors' version counters, and the digest that they had then."""
        return {}

    def _tensors(self) -> Iterator[Tensor]:
        for lora_A, lora_B, _ in self.factors.values():
            yield from (lora_A, lora_B)
        if self.head is not None:
            assert self.head.bias is not None
            yield from (self.head.weight, self.head.bias)

    def _sha256(self, *, names: bool) -> str:
        if any(tensor.is_inference() for tensor in self._tensors()):  # those keep no version counter
            return self._hash(names)
        versions = tuple(tensor._version for tensor in self._tensors())
        known = self._digests.get(names)
        if known is None or known[0] != versions:
            known = self._digests[names] = (versions, self._hash(names))
        return known[1]

    def _hash(self, names: bool) -> str:
        if names:  # the tensors are hashed once
            classes = None if self.head is None else self.head.class_names
            return hashlib.sha256(f"{self._sha256(names=False)} {classes}".encode()).hexdigest()
        sha = hashlib.sha256()
        for site, (lora_A, lora_B, scaling) in self.factors.items():
            sha.update(f"{site} {tuple(lora_A.shape)} {tuple(lora_B.shape)} {scaling!r}".encode())
            sha.update(_bytes(lora_A))
            sha.update(_bytes(lora_B))
        if self.head is not None:
            assert self.head.bias is not None
            sha.update(f"{tuple(self.head.weight.shape)} {self.head.pool}".encode())
            sha.update(_bytes(self.head.weight))
            sha.update(_bytes(self.head.bias))
        return sha.hexdigest()

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        classes = f", {len(self.head.class_names)} classes" if self.head else ""
        return f"Adapter({self.name!r}, {len(self.factors)} sites, r={ranks}{classes}, base={self.base_model!r})"


def _model_order(site: str) -> tuple[int, int]:
    match = SITE_PATTERN.fullmatch(site)
    if match is None:
        raise ValueError(
            f"`factors` must be keyed by sites such as 'blocks.3.attn.q' (q, k, v, proj) or 'blocks.3.mlp.fc1' "
            f"(fc1, fc2), got {site!r}."
        )
    order = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    return int(match[1]), order.index(match[2])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


def _plain_floats(tensor: Tensor, what: str) -> Tensor:
    """The tensor in float32, of whatever floating-point type it came (8 bits too).

    Raises:
        ValueError: integers, booleans, complex numbers; NaN, infinite or absurdly large values.
    """
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{what} must hold floating-point numbers, got {kind}; save the adapter again in float32.")
    plain = tensor.float()
    if not torch.isfinite(plain).all():
        bad = int((~torch.isfinite(plain)).sum())
        raise ValueError(f"{what} must be finite, got {bad} NaN or infinite values; the file is damaged.")
    if plain.numel() and plain.abs().max() > MAX_ENTRY:
        raise ValueError(
            f"{what} must hold numbers of at most {MAX_ENTRY:g}, got {plain.abs().max():.3g}; the file is damaged, or "
            "the tuning diverged."
        )
    return plain
