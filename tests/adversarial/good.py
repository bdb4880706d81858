"""What all campaigns build on: a tiny base, adapters that fit it, and what a kind of file is to the fuzzer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.vit.backbone import Backbone

D, CLASSES = 32, ("a", "b", "c")


@dataclass(frozen=True)
class Target:
    """One kind of file."""

    make: Callable[[Path], object]
    """Writes good files into a folder."""
    read: Callable[[Path], Any]
    """Reads them."""
    facts: Callable[[Any], Any]
    """What counts of a result, comparable."""
    legal: Callable[[Path, Any], None]
    """Raises AssertionError where a result that is not the original one is not what the files say."""
    files: str = "*"
    """Which files are mutated, a glob."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(depth: int = 2, cls: Any = VisionTransformer, **options: Any) -> Any:
    """A random ViT of timm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": depth, "num_heads": 2, "num_classes": 0}
        return cls(**{**sizes, **options}).eval()


def adapter(parts: tuple[str, ...] = ("q", "v"), head: bool = True, seed: int = 0, pool: str = "token+mean") -> Adapter:
    """A small adapter."""
    factors = {
        f"blocks.{b}.attn.{p}": LoRAFactors(
            numbers(2, D, seed=seed + i), numbers(D, 2, seed=seed + i + 9), 0.5 * (b + 1)
        )
        for b in range(2)
        for i, p in enumerate(parts)
    }
    wide = D * (1 + (pool == "token+mean"))
    own = Head(numbers(3, wide), numbers(3), CLASSES, pool) if head else None
    return Adapter(factors, own, "base", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "a")


def digest(*values: Any) -> str:
    """SHA-256 of tensors, arrays and plain values."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().numpy()
        if isinstance(value, np.ndarray) and value.dtype.kind != "O":
            sha.update(f"{value.dtype} {value.shape}".encode())
            value = value.tobytes()
        sha.update(value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def normalisation(mean: Any, std: Any) -> None:
    """Three finite numbers each, deviations above zero."""
    for values in (mean, std):
        assert values is None or (len(values) == 3 and all(map(math.isfinite, values))), f"mean {mean}, std {std}"
    assert std is None or min(std) > 0, f"std {std}"


def never(_: Path, __: Any) -> None:
    """For files that say whether they are whole: nothing but the original may be read."""
    raise AssertionError("read, though it is not what was written")


def anything(_: Path, __: Any) -> None:
    """Free text and settings: another legal value."""


_base: list[Backbone] = []


def BASE() -> Backbone:
    """The base that fits all adapters here."""
    if not _base:
        _base.append(Backbone(tiny(), name="base"))
    return _base[0]
